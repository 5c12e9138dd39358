"""An unfinished build whose own files were damaged: refused in one line, or ended as if nothing had happened."""

import re
import shutil
from pathlib import Path

import pytest
from deterministic_build import SeededTeacher, Stop, contents, make_config, make_source, stop_at

from cache_builder.build import build_cache
from formats.errors import FormatError


def build(out: Path, **options) -> None:
    source = make_source(12, rows_per_shard=4)
    assert build_cache(
        make_config(out), source=source, make_teacher=lambda config, source: SeededTeacher(), **options
    ).complete


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("undisturbed") / "cache"
    build(directory)
    return contents(directory)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stopped") / "cache"
    with pytest.raises(Stop):
        build(directory, step=stop_at("committed 1"))
    return directory


def damages(data: bytes) -> list[bytes]:
    """What a disk, an editor or a copy makes of a file: empty, cut, a letter and a count changed."""
    letter, digit = data.index(b"num_") if b"num_" in data else len(data) // 2, re.compile(rb": (\d)|:(\d)")
    found = [b"", data[: len(data) // 2], data[:letter] + b"x" + data[letter + 1 :]]
    for match in [*digit.finditer(data)][:12]:
        at = match.end() - 1
        found.append(data[:at] + b"%d" % ((data[at] - 47) % 10) + data[at + 1 :])
    return found


@pytest.mark.parametrize("name", ["settings.json", "plan.json", "engine.json"])
def test_a_damaged_record_is_refused(stopped: Path, tmp_path: Path, name: str):
    data = (stopped / "_build" / name).read_bytes()
    shutil.copytree(stopped, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    for damaged in damages(data):
        (tmp_path / "cache" / "_build" / name).write_bytes(damaged)
        with pytest.raises(FormatError, match=rf"_build/{name} must be .* --overwrite") as refused:
            build(tmp_path / "cache")
        assert "\n" not in str(refused.value)
    (tmp_path / "cache" / "_build" / name).write_bytes(data)
    assert contents(tmp_path / "cache") == before


def test_a_shard_whose_note_is_damaged_is_captured_again(
    stopped: Path, tmp_path: Path, undisturbed: dict[str, str]
):
    """The manifest takes its counts from there: a changed digit was another manifest, without a word."""
    note = next((stopped / "_build" / "notes").glob("00000-*"))
    for number, damaged in enumerate(damages(note.read_bytes())):
        copy = Path(shutil.copytree(stopped, tmp_path / str(number)))
        (copy / note.relative_to(stopped)).write_bytes(damaged)
        build(copy)
        assert contents(copy) == undisturbed
