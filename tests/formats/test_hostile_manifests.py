"""Manifests with a correct digest and hostile contents are refused."""

import hashlib
import os
from pathlib import Path

import pytest
from damaged_caches import edited, shard_path

from formats import (
    Manifest,
    TeacherCache,
)
from formats.disk.sealed_json import unseal
from formats.errors import CorruptShardError, FormatError, IncompleteCacheError, UnsupportedVersionError


@pytest.mark.parametrize(
    "name",
    [
        "../x.arrow",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "",
        ".",
        "..",
        ".hidden",
        "a\0b",
        "a..b",
        "manifest.json",
        "x" * 129,
        7,
        None,
    ],
)
def test_names_cannot_leave_the_directory(cache_dir: Path, name: object):
    for change in (
        lambda m: m["shards"][0].update(name=name),
        lambda m: (
            m["files"].update({str(name): "0" * 64})
            if isinstance(name, str)
            else m["shards"][0].update(name=name)
        ),
    ):
        with pytest.raises(FormatError, match="plain name"):
            Manifest.from_bytes(edited(cache_dir, change))


def test_symbolic_links_pipes_and_directories_are_refused(cache_dir: Path, tmp_path: Path):
    path = shard_path(cache_dir)
    secret = tmp_path / "elsewhere.arrow"
    path.rename(secret)
    path.symlink_to(secret)
    with pytest.raises(FormatError, match="symbolic link"):
        TeacherCache(cache_dir)[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FormatError, match="regular"):
        TeacherCache(cache_dir)[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(FormatError, match="regular"):
        TeacherCache(cache_dir)[0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.update(version=4), UnsupportedVersionError),
        (lambda m: m.update(version=0), UnsupportedVersionError),
        (lambda m: m.update(version=1.0), UnsupportedVersionError),
        (lambda m: m.update(version=True), UnsupportedVersionError),
        (lambda m: m.update(format="other"), FormatError),
        (lambda m: m.update(tail_betas=[1.0]), UnsupportedVersionError),
        (lambda m: m["codec"].update(sqrt_steps=10**9), UnsupportedVersionError),
        (lambda m: m["codec"].update(entropy_coder="new"), UnsupportedVersionError),
        (lambda m: m.pop("positions"), FormatError),
        (lambda m: m.update(extra=1), FormatError),
        (lambda m: m.update(positions="some"), FormatError),
        (lambda m: m.update(min_prob=2), FormatError),
        (lambda m: m.update(min_prob="1"), FormatError),
        (lambda m: m.update(max_k=0), FormatError),
        (lambda m: m.update(max_k=10**9), FormatError),
        (lambda m: m.update(vocab_size=1 << 21), FormatError),
        (lambda m: m.update(vocab_size=2.0), FormatError),
        (lambda m: m.update(shards={}), FormatError),
        (lambda m: m.update(shards=[1]), FormatError),
        (lambda m: m["shards"].append(m["shards"][0]), FormatError),
        (lambda m: m["shards"][0].update(num_rows=-1), FormatError),
        (lambda m: m["shards"][0].update(num_rows=2**63), FormatError),
        (lambda m: m["shards"][0].update(num_rows=True), FormatError),
        (lambda m: m["shards"][0].update(sha256="0" * 63), FormatError),
        (lambda m: m["shards"][0].pop("num_tokens"), FormatError),
        (lambda m: m.update(files=[]), FormatError),
        (lambda m: m.update(identity=[]), FormatError),
    ],
)
def test_manifest_rules(cache_dir: Path, change, error: type[FormatError]):
    with pytest.raises(error):
        Manifest.from_bytes(edited(cache_dir, change))


def test_row_counts_must_agree(cache_dir: Path):
    (cache_dir / "manifest.json").write_bytes(edited(cache_dir, lambda m: m["shards"][0].update(num_rows=5)))
    with pytest.raises(CorruptShardError, match="must have 5 rows"):
        TeacherCache(cache_dir)[0]
    (cache_dir / "manifest.json").write_bytes(
        edited(cache_dir, lambda m: m["shards"][1].update(num_entries=1))
    )
    with pytest.raises(CorruptShardError, match=r"rows|num_entries"):
        TeacherCache(cache_dir).validate(full=True)


def test_row_counts_are_not_allocated(cache_dir: Path):
    (cache_dir / "manifest.json").write_bytes(
        edited(cache_dir, lambda m: m["shards"][0].update(num_rows=2**53 - 1))
    )
    with pytest.raises(CorruptShardError, match="must have 9007199254740991 rows"):
        TeacherCache(cache_dir).summary(full=True)


def test_a_lost_manifest_is_no_unfinished_build(cache_dir: Path):
    """To run the build again, as was advised, is refused: it finds files that are not of a build."""
    (cache_dir / "manifest.json").unlink()
    with pytest.raises(IncompleteCacheError, match=r"got shards without one in .*: an unfinished copy"):
        TeacherCache(cache_dir)
    (cache_dir / "_build").mkdir()
    with pytest.raises(IncompleteCacheError, match="run the same build command again"):
        TeacherCache(cache_dir)


def test_json_traps():
    def sealed(rest: bytes) -> bytes:
        return b'{"digest": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest

    assert unseal(sealed(b'"a": 1}'), "it") == {"a": 1}
    for rest in (
        b'"a": 1, "a": 2}',
        b'"a": NaN}',
        b'"a": Infinity}',
        b'"a": [-1e999]}',
        b'"a": ' + b"[" * 10**5 + b"}",
        b"",
        b"}}",
        b"\xff",
    ):
        with pytest.raises(FormatError):
            unseal(sealed(rest), "it")
    for data in (b"", b"{}", b"[]", b'{"digest": "00",\n}', sealed(b'"a": 1}')[:-1]):
        with pytest.raises(FormatError):
            unseal(data, "it")
