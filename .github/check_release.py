"""Refuses a tag that is not the version everywhere, and prints the changelog's section of it.

    python .github/check_release.py v0.1.0

`version` in pyproject.toml is the version's home; CITATION.cff repeats it, since readers of citations read nothing
else, and CHANGELOG.md has a section `## 0.1.0 (2026-12-01)`.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def section_of(changelog: str, version: str) -> str | None:
    """The text below the heading of a version; None without one that has a date."""
    found = re.search(
        rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)\n(.*?)(?=^## |\Z)",
        changelog,
        re.MULTILINE | re.DOTALL,
    )
    return found[1].strip() if found else None


def main(tag: str, root: Path = ROOT) -> str:
    """The section, or an exit with what is wrong."""
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"the tag must be v{version}, the version in pyproject.toml, got {tag}")
    if not re.search(rf"^version: {re.escape(version)}$", (root / "CITATION.cff").read_text(), re.MULTILINE):
        sys.exit(f"CITATION.cff must say version: {version}, and says another")
    section = section_of((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if not section:
        sys.exit(f"CHANGELOG.md must have a section '## {version} (YEAR-MONTH-DAY)' with text, got none")
    return section


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check_release.py TAG")
    print(main(sys.argv[1]))
