"""The pages themselves: lines fit a screen, links lead somewhere, the site shows all of them, facts have one home."""

import json
import math
import re
import struct
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
LONGEST_LINE = 120

LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^(#{1,6}) +(.*?) *#*$")


def prose(page: Path) -> list[str]:
    """The lines outside code blocks, code in the line taken out."""
    lines, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append(re.sub(r"`[^`]*`", "", line))
    return lines


def anchors(page: Path) -> set[str]:
    """What `#...` may name in a page; a heading that comes again gets a number."""
    found: dict[str, int] = {}
    result = set()
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (heading := HEADING.match(line)):
            slug = re.sub(r"[^\w\- ]", "", heading[2].strip().lower()).replace(" ", "-")
            number = found.get(slug, 0)
            found[slug] = number + 1
            result.add(f"{slug}-{number}" if number else slug)
    return result


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "design.md", "settings.md"} <= {page.name for page in PAGES}


def test_lines_fit() -> None:
    long = {
        page.name
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if len(line) > LONGEST_LINE and not line.startswith("|")
    }
    assert sorted(long) == [], "break lines: python docs/wrap_pages.py README.md docs/*.md"


def test_the_columns_of_an_estimate_are_explained() -> None:
    from cache_builder.tools.expected_angle import UNCERTAINTY

    text = " ".join((ROOT / "docs" / "settings.md").read_text(encoding="utf-8").split())
    for column in ("draws at", "entries", "missed mass", "codec KL", "angle"):
        assert f"`{column}`" in text
    assert f"foretold within a factor of {UNCERTAINTY:g}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall("\n".join(prose(page))):
        if re.match(r"[a-z]+:", target):
            continue  # another site; no test needs a network
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        if not place.exists() or not place.is_relative_to(ROOT):
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(place):
            broken.append(f"{target}: no such heading; there are {sorted(anchors(place))}")
    assert not broken


def test_links_are_found(tmp_path: Path) -> None:
    """The check itself, on a page with one good link of each kind and one bad one."""
    (tmp_path / "other.md").write_text("# A `b` of C: why?\n\n## Twice\n\n## Twice\n")
    assert anchors(tmp_path / "other.md") == {"a-b-of-c-why", "twice", "twice-1"}
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#twice-1) ![b](c.png) `[no](link.md)`\n```\n[no](either.md)\n```\n[[x] y](#z)\n"
    )
    assert LINK.findall("\n".join(prose(page))) == ["other.md#twice-1", "c.png", "#z"]


def test_every_page_of_docs_is_on_the_site() -> None:
    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        nested = entry.values() if isinstance(entry, dict) else entry
        return [leaf for child in nested for leaf in leaves(child)]  # type: ignore[union-attr]

    named = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(named) == len(set(named))
    ours = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    made = {"index.md", "contributing.md", "changelog.md", "security.md"}
    made |= {f"api/{package}.md" for package in ("formats", "cache_builder", "trainer")}
    assert set(named) == ours | made


def test_the_log_is_no_documentation() -> None:
    linking = {
        page.name for page in PAGES if re.search(r"\]\((docs/)?log\.md", page.read_text(encoding="utf-8"))
    }
    assert linking == {"CONTRIBUTING.md"}


def test_what_was_taken_out_is_not_described() -> None:
    gone = re.compile(
        r"tail moment|tail_moments|tail-features|token features|token_features|16 features", re.IGNORECASE
    )
    speaking = {page.name for page in PAGES if gone.search(page.read_text(encoding="utf-8"))} - {
        "log.md",
        "CHANGELOG.md",
    }
    assert sorted(speaking) == []


def test_the_base_model_has_one_size() -> None:
    """3,410,176 parameters, read from the weights; every page that gives the number gives this one."""
    folder = ROOT / "examples" / "tiny-base"
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    counted = sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    assert f"| parameters | {counted:,}," in (folder / "README.md").read_text(encoding="utf-8")
    said = re.compile(
        r"(?:tiny.base|demo(?:'s)? model|demo's|base model)[^.\n|]{0,30}?\b(\d+(?:\.\d+)?) ?-?(?:M\b|million)",
        re.I,
    )
    numbers = {}
    for page in PAGES:
        for number in said.findall(page.read_text(encoding="utf-8")):
            numbers[page.name] = float(number)
    assert numbers, "no page gives the size: the pattern is out of date"
    assert set(numbers.values()) == {round(counted / 1e6, 1)}, numbers


def test_versions_agree() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    prefix = "Programming Language :: Python :: "
    named = [line.removeprefix(prefix) for line in project["classifiers"] if line.startswith(prefix)]
    assert steps["tests"]["strategy"]["matrix"]["python"] == named
    assert project["requires-python"] == f">={named[0]}"


def test_ci_types_what_a_newcomer_types() -> None:
    """Lint before the tests, both through make, and nothing else."""
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make lint", "make test"]
