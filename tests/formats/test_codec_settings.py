"""Codecs, drafts and rates that this version does not read are refused."""

from dataclasses import replace
from pathlib import Path

import independent_reader
import numpy as np
import pytest
from damaged_caches import edited, reader_of, refused_manifest, table_of, write_arrow
from make_teachers import capture

from formats import (
    CacheWriter,
    CodecConfig,
    Manifest,
    TailDraws,
    TeacherCache,
    TokenRow,
    TopKLogprobs,
)
from formats.disk.sealed_json import seal, unseal
from formats.errors import CorruptShardError, FormatError, UnsupportedVersionError

DRAW_KEYS = ("draw_rate", "draw_steps")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m["codec"].pop("draw_rate"), "must have the keys"),
        (lambda m: m["codec"].pop("draw_steps"), "must have the keys"),
        (lambda m: m["codec"].pop("tail_steps"), "must have the keys"),
        (lambda m: m["codec"].update(new=1), "must have the keys"),
        (lambda m: m["codec"].update(draw_rate=65), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=-1), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=6.0), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_rate=True), "draw_rate must be"),
        (lambda m: m["codec"].update(draw_steps=0), "draw_steps must be"),
        (lambda m: m["codec"].update(draw_steps=1025), "draw_steps must be"),
        (lambda m: m["codec"].update(draw_steps="32"), "draw_steps must be"),
    ],
)
def test_codecs_that_this_version_does_not_have(cache_dir: Path, change, match: str):
    refused_manifest(cache_dir, change, match)


MOMENTS = {"num_features": 16, "moment_steps": 128}
DEVELOPMENT = (
    r"development version before the first release; build it again \(anneal cache build .*--overwrite"
)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: [m["codec"].pop(key) for key in DRAW_KEYS],  # version 1 of the drafts
        lambda m: (m.update(version=2), m["codec"].update(MOMENTS), [m["codec"].pop(k) for k in DRAW_KEYS]),
        lambda m: (m.update(version=3), m["codec"].update(MOMENTS)),
        lambda m: m.update(version=3),
        lambda m: m.update(version=2),
    ],
)
def test_caches_of_the_drafts_are_to_be_built_again(cache_dir: Path, tmp_path: Path, change):
    """In one line, by manifest and by shard."""
    refused_manifest(cache_dir, change, DEVELOPMENT)
    with pytest.raises(UnsupportedVersionError, match=DEVELOPMENT) as refused:
        TeacherCache(cache_dir)
    assert "\n" not in str(refused.value)
    table = table_of(cache_dir).slice(0, 2)
    settings = unseal(table.schema.metadata[b"anneal"], "metadata")
    change(settings)
    write_arrow(tmp_path / "x.arrow", table.replace_schema_metadata({"anneal": seal(settings)}))
    with pytest.raises(UnsupportedVersionError, match=DEVELOPMENT):
        reader_of(tmp_path / "x.arrow")


@pytest.mark.parametrize("rate", [0, 1])
def test_a_shard_with_another_rate_than_its_payloads(cache_dir: Path, tmp_path: Path, rate: int):
    """A possible setting, but not that of the payloads."""
    table = table_of(cache_dir).slice(0, 2)
    path = tmp_path / "x.arrow"
    settings = unseal(table.schema.metadata[b"anneal"], "metadata")
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    assert max(teacher.draws.counts.max(initial=0) for _, teacher in reader_of(path)) > 4
    settings["codec"].update(draw_rate=rate)
    write_arrow(path, table.replace_schema_metadata({"anneal": seal(settings)}))
    with pytest.raises(CorruptShardError):
        reader_of(path)


def test_a_shard_of_another_rate_belongs_to_another_cache(cache_dir: Path):
    manifest = edited(cache_dir, lambda m: m["codec"].update(draw_rate=7))
    (cache_dir / "manifest.json").write_bytes(manifest)
    with pytest.raises(FormatError, match="belongs to another cache"):
        TeacherCache(cache_dir)[0]


def test_full_validation_refuses_draws_inside_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading does not look for them: it would take longer than everything else."""
    head, tail = capture(np.zeros((1, 8)), 1.0, label_ids=np.array([1])), CodecConfig(draw_rate=4)
    row = TokenRow(np.arange(2), np.array([False, True]))
    for name, token, good in (("good", 5, True), ("bad", int(head.token_ids[0]), False)):
        drawn = TailDraws([0, 1], [token], head.logprobs, 4)
        with monkeypatch.context() as patch:
            patch.setattr(TopKLogprobs, "validate_draws", lambda self: None)
            with CacheWriter(tmp_path / name, identity={}, vocab_size=8, codec=tail) as writer:
                writer.append(row, replace(head, draws=drawn))
        cache = TeacherCache(tmp_path / name)
        assert cache[0].teacher.draws.token_ids.tolist() == [token]
        cache.validate()
        if good:
            cache.validate(full=True)
            continue
        with pytest.raises(
            CorruptShardError, match=r"shard-00000\.arrow, row 0: draws must be tokens of the"
        ):
            cache.validate(full=True)


def test_the_unchanged_manifest_is_accepted(cache_dir: Path):
    """So that the refusals above are due to their changes, and not to the editing."""
    assert Manifest.from_bytes(edited(cache_dir, lambda m: None)).codec.draw_rate == 6
    assert independent_reader.read_manifest(cache_dir)["version"] == 1
