"""Verification finds damaged bytes, wrong numbers and wrong models, and passes what is right."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deterministic_build import VOCAB_SIZE, logits_of, make_rows, reduce_exactly

from cache_builder import build_cache, verify_cache
from cache_builder.config import BuildConfig
from cache_builder.teachers import transformers_teacher
from cache_builder.tools.deviation import compare
from formats.cache import TeacherCache
from formats.errors import ConfigError, FormatError, IdentityMismatchError
from formats.logprobs.tail_draws import TailDraws, starts
from formats.logprobs.topk import TopKLogprobs
from formats.writer import CacheWriter


def corpus(path: Path, num_records: int) -> Path:
    from tiny_models import stdlib_sources

    text = next(iter(stdlib_sources(1)))
    with open(path, "w") as file:
        for number in range(num_records):
            file.write(json.dumps({"text": text[number * 200 : number * 200 + 200]}) + "\n")
    return path


def build_in(directory: Path, model: Path, num_records: int = 12, **settings) -> None:
    """A cache of real numbers, built by transformers, in `directory / "cache"`."""
    build_cache(
        BuildConfig(
            corpus=str(corpus(directory / "corpus.jsonl", num_records)),
            model=str(model),
            out=str(directory / "cache"),
            engine="transformers",
            max_length=128,
            **settings,
        )
    )


@pytest.fixture(scope="module")
def cache(tiny_llama_dir: Path, tmp_path_factory) -> Path:
    """A cache of real numbers, built by transformers; with tail draws, as every cache by default."""
    directory = tmp_path_factory.mktemp("verify")
    build_in(directory, tiny_llama_dir, rows_per_shard=5)
    return directory / "cache"


def rewrite(source: Path, out: Path, change) -> Path:
    """The same cache with changed distributions and honest checksums; labels that are kept are as the kept
    tokens."""
    opened = TeacherCache(source)
    manifest = opened.manifest
    with CacheWriter(
        out,
        identity=opened.identity,
        vocab_size=manifest.vocab_size,
        positions=manifest.positions,
        min_prob=manifest.min_prob,
        max_k=manifest.max_k,
        codec=manifest.codec,
    ) as writer:
        for index, row in enumerate(opened.rows()):
            teacher = change(index, row.teacher)
            positions, entries = teacher.kept_labels(row.label_ids)
            labels = teacher.label_logprobs.copy()
            labels[positions] = teacher.logprobs[entries]
            writer.append(row.tokens, replace(teacher, label_logprobs=labels))
    return out


def test_a_sound_cache_passes_without_a_model(cache: Path) -> None:
    report = verify_cache(cache)
    assert report.ok and report.num_rows == len(TeacherCache(cache)) and "sound" in report.text()
    assert report.num_recomputed == 0
    json.dumps(report.to_dict())


def test_a_sound_cache_passes_with_its_model(cache: Path, tiny_llama_dir: Path) -> None:
    report = verify_cache(cache, tiny_llama_dir, rows=4, engine="transformers")
    assert report.ok, report.text()
    assert report.num_recomputed == 4 and "model weights" in report.compared
    assert report.figures["draw_share"] == 1.0 and "100% drawn again" in report.text()
    assert 0 < report.figures["draw_mean"] <= 1.01 / 64, "a quarter of a step on average"
    # The same engine computed it again: nothing is left but the codec.
    assert report.figures["logprob_mean"] <= report.figures["quantisation_mean"] * 1.01 + 1e-6


@pytest.mark.vllm
@pytest.mark.slow
def test_the_other_engine_agrees(cache: Path, tiny_llama_dir: Path) -> None:
    report = verify_cache(cache, tiny_llama_dir, rows=4, engine_args={"enforce_eager": True})
    assert report.ok, report.text()
    assert report.built_by.startswith("transformers") and report.checked_by.startswith("vllm")


@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_a_damaged_byte_is_found(cache: Path, tmp_path: Path, place: float) -> None:
    shutil.copytree(cache, tmp_path / "c")
    victim = tmp_path / "c" / "shard-00001.arrow"
    data = bytearray(victim.read_bytes())
    data[int(len(data) * place)] ^= 4
    victim.write_bytes(data)
    report = verify_cache(tmp_path / "c")
    assert not report.ok and "shard-00001.arrow" in report.text() and "must not be used" in report.text()


def test_every_damaged_file_is_named(cache: Path, tmp_path: Path, anneal) -> None:
    """Not the first alone: what is to be copied again is known after one pass."""
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c" / "shard-00000.arrow").unlink()
    for name in ("shard-00002.arrow", "tokenizer.json"):
        (tmp_path / "c" / name).write_bytes((tmp_path / "c" / name).read_bytes().replace(b"a", b"b"))
    report = verify_cache(tmp_path / "c")
    assert len(report.problems) == 3
    for name in ("shard-00000.arrow", "shard-00002.arrow", "tokenizer.json"):
        assert sum(name in problem for problem in report.problems) == 1
    code, out, _ = anneal("cache", "verify", tmp_path / "c")
    assert code == 1 and out.count("WRONG: ") == 3 and "shard-00001" not in out
    many = replace(report, problems=("bad",) * 25)
    assert many.text().count("WRONG: bad") == 20 and "5 more like these" in many.text()


def test_a_cache_without_draws_passes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    build_in(tmp_path, tiny_llama_dir, num_records=3, draw_rate=0)
    assert verify_cache(tmp_path / "cache", tiny_llama_dir, rows=2, engine="transformers").ok


def test_a_missing_shard_and_a_missing_cache(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c" / "shard-00000.arrow").unlink()
    assert not verify_cache(tmp_path / "c").ok
    with pytest.raises(FormatError):
        verify_cache(tmp_path)


def test_shifted_rows_are_found(cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    def shift(index: int, teacher: TopKLogprobs) -> TopKLogprobs:
        return teacher.take(np.roll(np.arange(len(teacher)), 1))

    rewrite(cache, tmp_path / "c", shift)
    assert verify_cache(tmp_path / "c").ok  # every byte is as written
    report = verify_cache(tmp_path / "c", tiny_llama_dir, rows=4, engine="transformers")
    assert not report.ok and "shifted" in report.text()


def test_labels_with_wrong_logprobs_are_found(cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Every label that is not kept half a nat too low: nothing else is wrong."""

    def lower(index: int, teacher: TopKLogprobs) -> TopKLogprobs:
        return replace(teacher, label_logprobs=teacher.label_logprobs - np.float32(0.5))

    rewrite(cache, tmp_path / "c", lower)
    assert verify_cache(tmp_path / "c").ok
    report = verify_cache(tmp_path / "c", tiny_llama_dir, rows=4, engine="transformers")
    assert len(report.problems) == 1 and "labels and rows do not belong together" in report.problems[0]
    sound = verify_cache(cache, tiny_llama_dir, rows=4, engine="transformers")
    assert sound.ok and sound.figures["label_mean"] > 0 and "next tokens" in sound.text()
    codec_alone = sound.figures["label_allowed"] - sound.figures["engine_noise"]
    assert sound.figures["label_mean"] == pytest.approx(codec_alone, abs=1e-6), "the same engine"


def test_draws_with_wrong_logprobs_are_found(cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    def halve(index: int, teacher: TopKLogprobs) -> TopKLogprobs:
        drawn = replace(teacher.draws, logprobs=teacher.draws.logprobs - np.float32(np.log(2)))
        return replace(teacher, draws=drawn)

    rewrite(cache, tmp_path / "c", halve)
    assert verify_cache(tmp_path / "c").ok
    report = verify_cache(tmp_path / "c", tiny_llama_dir, rows=4, engine="transformers")
    assert len(report.problems) == 1 and "logprobs of tail draws must deviate" in report.problems[0]
    assert report.figures["draw_mean"] == pytest.approx(np.log(2), abs=0.02)


def test_too_few_draws_are_found(cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Every fourth draw dropped: what is left is right, and every estimate a quarter too small."""

    def thin(index: int, teacher: TopKLogprobs) -> TopKLogprobs:
        drawn = teacher.draws
        keep = np.arange(len(drawn.token_ids)) % 4 > 0
        offsets = np.concatenate([[0], np.cumsum(keep)])[drawn.offsets]
        thinned = TailDraws(offsets, drawn.token_ids[keep], drawn.logprobs[keep], drawn.rate)
        return replace(teacher, draws=thinned)

    rewrite(cache, tmp_path / "c", thin)
    assert verify_cache(tmp_path / "c").ok
    report = verify_cache(tmp_path / "c", tiny_llama_dir, engine="transformers")
    assert len(report.problems) == 1, report.text()
    assert "tail draws must be about as many as their rate says" in report.problems[0]


def test_other_draws_of_the_right_number_are_sound(tiny_llama_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """Points half way between those of our builder: other tokens, and as good as its own."""

    def shifted(key: bytes, positions: np.ndarray) -> np.ndarray:
        return (starts(key, positions) + 0.5) % 1.0

    monkeypatch.setattr(transformers_teacher, "starts", shifted)
    build_in(tmp_path, tiny_llama_dir, num_records=3)
    monkeypatch.undo()
    report = verify_cache(tmp_path / "cache", tiny_llama_dir, engine="transformers")
    assert report.ok, report.text()
    assert report.figures["draw_share"] < 0.1
    assert report.figures["draw_number"] == pytest.approx(report.figures["draw_expected"], rel=0.02)


def test_one_wrong_row_among_right_ones_is_named(cache: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    victim = TeacherCache(cache)[2]

    def change(index: int, teacher: TopKLogprobs) -> TopKLogprobs:
        return teacher.take(np.arange(len(teacher))[::-1]) if index == 2 else teacher

    rewrite(cache, tmp_path / "c", change)
    report = verify_cache(tmp_path / "c", tiny_llama_dir, rows=1000, engine="transformers")
    assert not report.ok and victim.key.hex() in report.text()


def test_another_model_is_refused(cache: Path, tiny_qwen3_dir: Path) -> None:
    with pytest.raises(IdentityMismatchError, match="model weights"):
        verify_cache(cache, tiny_qwen3_dir)
    with pytest.raises(ConfigError, match="rows must be at least 1"):
        verify_cache(cache, rows=0)


def test_compare_against_the_obvious_loop() -> None:
    rows = list(make_rows(6))
    exact = TopKLogprobs.concatenate([reduce_exactly(logits_of(r.input_ids), 1e-2, 8) for r in rows])
    other = TopKLogprobs.concatenate([reduce_exactly(logits_of(r.input_ids) * 1.05, 2e-2, 8) for r in rows])
    found = compare(exact, other)
    differences, kl, alone, largest = [], [], 0, 0.0
    for p in range(len(exact)):
        mine, theirs = (
            dict(zip(t.token_ids[a:b].tolist(), t.logprobs[a:b].astype(float), strict=True))
            for t, a, b in ((t, t.offsets[p], t.offsets[p + 1]) for t in (exact, other))
        )
        shared = mine.keys() & theirs.keys()
        differences += [abs(mine[j] - theirs[j]) for j in shared]
        lonely = [v for side in (mine, theirs) for j, v in side.items() if j not in shared]
        alone += len(lonely)
        largest = max([largest, *np.exp(lonely)])
        rest_p = 1 - sum(np.exp(mine[j]) for j in shared)
        rest_q = 1 - sum(np.exp(theirs[j]) for j in shared)
        kl.append(
            sum(np.exp(mine[j]) * (mine[j] - theirs[j]) for j in shared) + rest_p * np.log(rest_p / rest_q)
        )
    assert sorted(found.logprobs) == pytest.approx(sorted(differences))
    np.testing.assert_allclose(found.kl, kl, atol=1e-5)
    assert found.num_only_one == alone > 0 and found.largest_only_one == pytest.approx(largest, rel=1e-5)
    assert len(found.labels) == 0, "of logits without rows no label is known"
    known = [reduce_exactly(logits_of(r.input_ids), 1e-2, 8, np.zeros(len(r), int)) for r in rows]
    lower = [replace(one, label_logprobs=one.label_logprobs - np.float32(0.25)) for one in known]
    impossible = [replace(one, label_logprobs=np.full(len(one), -np.inf)) for one in known]
    sides = [TopKLogprobs.concatenate(side) for side in (known, lower, impossible)]
    np.testing.assert_allclose(compare(sides[0], sides[1]).labels, 0.25, atol=1e-6)
    assert (compare(sides[2], sides[2]).labels == 0).all()
    assert np.isinf(compare(sides[0], sides[2]).labels).all()
    same = compare(exact, exact)
    assert same.kl.max() < 1e-6 and same.num_only_one == 0 and same.tails.max() == 0
    with pytest.raises(ValueError, match="same positions"):
        compare(exact, exact.slice(0, 3))


def test_compare_matches_draws_by_position_token_and_number() -> None:
    def side(counts: list[int], ids: list[int], logprobs: list[float]) -> TopKLogprobs:
        head = reduce_exactly(logits_of(np.arange(3)), 0.5, 1)
        return replace(head, draws=TailDraws(np.cumsum([0, *counts]), ids, logprobs, 8))

    one = side([4, 0, 2], [9, 7, 9, 8, 7, 9], [-1.0, -2.0, -1.0, -3.0, -4.0, -5.0])
    other = side([3, 1, 2], [9, 8, 9, 7, 9, 9], [-1.5, -3.25, -1.5, -2.0, -5.125, -5.125])
    # Position 0: twice token 9, once 8; 7 is on one side only. Position 1: nothing. Position 2: 9 once.
    found = compare(one, other)
    assert sorted(found.draws.tolist()) == [0.125, 0.25, 0.5, 0.5]
    assert (found.num_draws, compare(other, one).draws.tolist()) == (6, found.draws.tolist())
    none = compare(side([0, 0, 0], [], []), one)
    assert (len(none.draws), none.num_draws) == (0, 6)
    with pytest.raises(ValueError, match="equal rates of draws, got 8 and 0"):
        compare(one, replace(one, draws=TailDraws.none(len(one))))


def test_compare_where_the_head_is_everything() -> None:
    logits = logits_of(np.arange(5))
    full = reduce_exactly(logits, 0.0, VOCAB_SIZE)
    found = compare(full, full)
    assert np.isfinite(found.kl).all() and np.isfinite(found.tails).all()
