"""inspect: the numbers against dense computations, the text, the JSON, the picture."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_teachers import capture, log_softmax, write_cache

from formats import CacheWriter, CodecConfig, TeacherCache, TokenRow, TopKLogprobs
from formats.disk.sealed_json import seal, unseal
from formats.errors import ConfigError, FormatError
from formats.inspect.inspect_cache import inspect_cache
from formats.inspect.summary import distribution, head_size_histogram
from formats.logprobs.entropy import entropy

LENGTHS = [9, 0, 1, 30, 14, 5, 22]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect") / "cache"
    write_cache(directory, lengths=LENGTHS, vocab_size=60, rows_per_shard=3)
    return directory


def test_entropy_against_the_full_vocabulary():
    logits = np.random.default_rng(0).normal(size=(20, 400)) * np.linspace(0.1, 6, 20)[:, None]
    dense = log_softmax(logits)
    truth = -(np.exp(dense) * dense).sum(1)
    assert entropy(capture(logits, 0.0, 400)) == pytest.approx(truth, abs=1e-5)
    assert entropy(capture(logits, 1e-3, 64)) == pytest.approx(truth, abs=0.05)
    assert entropy(capture(np.zeros((1, 400)), 1e-2, 5)) == pytest.approx(np.log([400]), abs=1e-3)
    certain = np.full((1, 10), -1e4)
    certain[0, 3] = 0
    assert entropy(capture(certain)) == pytest.approx([0.0], abs=1e-9)


def test_the_entropy_shown_is_the_one_that_a_gate_goes_by(tmp_path: Path):
    """Flat tails, which hold most of the mass and most of the entropy: three nodes alone miss 0.08 nats."""
    ranks = np.log(np.arange(1.0, 50_001))
    logits = -np.linspace(0.9, 1.3, 5)[:, None] * ranks
    dense = log_softmax(logits)
    truth = -(np.exp(dense) * dense).sum(1)
    row = TokenRow(np.arange(6), np.array([False] + [True] * 5))
    identity = {name: {} for name in ("teacher", "tokenizer", "corpus", "preprocessing")}
    exact = {"codec": CodecConfig.lossless(), "vocab_size": 50_000, "min_prob": 5e-3, "max_k": 64}
    with CacheWriter(tmp_path / "cache", identity=identity, positions="loss", **exact) as writer:
        writer.append(row, capture(logits, 5e-3, 64, label_ids=row.label_ids()))
    shown = TeacherCache(tmp_path / "cache").summary()
    assert shown["entropy"]["min"] == pytest.approx(truth.min(), abs=0.035)
    assert shown["entropy"]["mean"] == pytest.approx(truth.mean(), abs=0.025)


def test_distribution_and_histogram_by_hand():
    assert distribution(np.zeros(0)) == {}
    found = distribution(np.arange(101.0))
    assert found == {"mean": 50, "min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "max": 100}
    assert head_size_histogram(np.array([1, 1, 2, 3, 4, 5, 9])) == [
        {"from": 1, "to": 1, "positions": 2},
        {"from": 2, "to": 2, "positions": 1},
        {"from": 3, "to": 4, "positions": 2},
        {"from": 5, "to": 8, "positions": 1},
        {"from": 9, "to": 16, "positions": 1},
    ]


def test_summary_adds_up(cache_dir: Path):
    cache = TeacherCache(cache_dir)
    summary = cache.summary()
    rows = list(cache)
    assert summary["num_rows"] == len(LENGTHS) and summary["num_tokens"] == sum(LENGTHS)
    assert summary["num_positions"] == sum(len(row.teacher) for row in rows) == summary["sample"]["positions"]
    assert summary["sample"]["complete"]
    assert sum(c["bytes"] for c in summary["columns"].values()) == summary["num_bytes"]
    assert summary["num_bytes"] == sum(f.stat().st_size for f in cache_dir.glob("*.arrow"))
    parts = sum(part["bytes_per_position"] for part in summary["payload_parts"].values())
    assert parts == pytest.approx(summary["payload_bytes_per_position"], rel=0.1)
    counts = np.concatenate([row.teacher.counts for row in rows])
    assert summary["head_size"]["mean"] == pytest.approx(counts.mean())
    nats = np.concatenate([entropy(row.teacher) for row in rows])
    worst = summary["most_uncertain"][0]
    assert worst["entropy"] == pytest.approx(nats.max())
    row = rows[worst["row"]]
    at = row.positions.tolist().index(worst["position"])
    assert entropy(row.teacher)[at] == pytest.approx(nats.max())


def test_draws_are_parts_and_a_distribution_of_their_own(cache_dir: Path, tmp_path: Path):
    assert TeacherCache(cache_dir).summary()["num_draws"] == {}
    assert "draw" not in inspect_cache(cache_dir)
    write_cache(tmp_path / "draws", lengths=LENGTHS, vocab_size=60, min_prob=0.1, draw_rate=7)
    cache = TeacherCache(tmp_path / "draws")
    summary = json.loads(inspect_cache(tmp_path / "draws", as_json=True))
    assert summary["format_version"] == 1 and summary["settings"]["codec"]["draw_rate"] == 7
    counts = np.concatenate([row.teacher.draws.counts for row in cache])
    assert summary["num_draws"] == distribution(counts) and counts.max() > counts.min()
    parts = ("counts", "ids", "probabilities", "tails", "labels")
    assert tuple(summary["payload_parts"]) == (*parts, "draw_counts", "draw_ids", "draw_logprobs")
    sizes = [part["bytes_per_position"] for part in summary["payload_parts"].values()]
    assert min(sizes) > 0.1
    assert sum(sizes) == pytest.approx(summary["payload_bytes_per_position"], rel=0.1)
    text = inspect_cache(tmp_path / "draws")
    for words in ("tail draws at rate 7", "numbers of draws", "drawn token ids", "drawn logprobs"):
        assert words in text
    assert f"{counts.mean():.1f}" in next(line for line in text.splitlines() if "tail draws  " in line)
    page = (Path(__file__).parents[3] / "docs" / "inspect.md").read_text()
    assert all(f"`{part}`" in page for part in summary["payload_parts"])
    with CacheWriter(tmp_path / "none", identity={}, vocab_size=5, codec=CodecConfig(draw_rate=3)) as writer:
        writer.append(TokenRow(np.zeros(0), np.zeros(0, bool)), TopKLogprobs.empty(5, 3))
    assert TeacherCache(tmp_path / "none").summary()["num_draws"] == {}
    assert "no position carries" in inspect_cache(tmp_path / "none")


def test_a_large_cache_is_sampled_and_says_so(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("formats.inspect.summary.SAMPLE_POSITIONS", 10)
    sample = TeacherCache(cache_dir).summary()["sample"]
    assert not sample["complete"] and sample["rows"] < len(LENGTHS)
    assert "--full" in inspect_cache(cache_dir)
    assert TeacherCache(cache_dir).summary(full=True)["sample"]["complete"]


DOCUMENTED = {
    "path", "format_version", "identity", "settings", "num_shards", "num_rows", "num_tokens", "num_positions",
    "num_entries", "num_bytes", "num_payload_bytes", "bytes_per_token", "payload_bytes_per_position",
    "columns", "payload_parts", "sample", "head_size", "num_draws", "head_mass", "entropy", "label_nll",
    "most_uncertain",
}  # fmt: skip


def test_json_has_the_documented_keys(cache_dir: Path):
    summary = json.loads(inspect_cache(cache_dir, as_json=True))
    assert set(summary) == DOCUMENTED
    page = (Path(__file__).parents[3] / "docs" / "inspect.md").read_text()
    assert all(f"`{key}`" in page for key in DOCUMENTED)
    assert json.loads(inspect_cache(cache_dir, row=3, as_json=True))["num_tokens"] == 30


def test_text_report(cache_dir: Path, tmp_path: Path):
    text = inspect_cache(cache_dir)
    for words in ("7 rows, 81 tokens", "identity", "token ids", "covered mass", "most uncertain", "all rows"):
        assert words in text
    with CacheWriter(tmp_path / "none", identity={}, vocab_size=5) as writer:
        writer.append(TokenRow(np.zeros(0), np.zeros(0, bool)), capture(np.zeros((0, 5))))
    assert "no position carries" in inspect_cache(tmp_path / "none")


def test_row_view_shows_the_prediction_of_the_next_token(tmp_path: Path):
    from tokenizers import Tokenizer, models

    words = ["a", "b", "c", "d"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="a"))
    row = TokenRow(np.array([0, 1, 2]), np.array([False, True, True]))
    logits = np.log([[0.1, 0.1, 0.2, 0.6], [0.1, 0.2, 0.6, 0.1]])
    with CacheWriter(tmp_path / "c", identity={}, vocab_size=4, max_k=2) as writer:
        writer.append(row, capture(logits, 0.15, 2, label_ids=row.label_ids()))
        writer.add_file("tokenizer.json", tokenizer.to_str().encode())
    view = json.loads(inspect_cache(tmp_path / "c", row=0, as_json=True))
    first, position = view["positions"]
    assert (position["position"], position["token"], position["label"]) == (1, "b", "c")
    assert (first["label"], first["label_kept"], position["label_kept"]) == ("b", False, True)
    assert position["label_logprob"] == pytest.approx(np.log(0.6), abs=1e-3)
    assert first["label_logprob"] == round(16 * np.log(0.1)) / 16, "to a step of 1/16 nat"
    assert [(t["token"], round(t["prob"], 2)) for t in position["top"]] == [("c", 0.6), ("b", 0.2)]
    text = inspect_cache(tmp_path / "c", row=0)
    assert "a[b][c]" in text and "log p(next)" in text and "-2.31" in text and "-0.51" in text
    for outside in (1, -2):
        with pytest.raises(ConfigError, match="--row"):
            inspect_cache(tmp_path / "c", row=outside)
    with pytest.raises(ConfigError, match="--full is for the distributions over all rows, got it with --row"):
        inspect_cache(tmp_path / "c", row=0, full=True)


def test_perplexity_of_the_tokens_that_carry_loss(tmp_path: Path):
    """In a cache of all positions too, and exactly where the cache is exact."""
    written = write_cache(
        tmp_path / "all", lengths=[30, 14], vocab_size=60, positions="all", codec=CodecConfig.lossless()
    )
    found = TeacherCache(tmp_path / "all").summary()["label_nll"]
    nats = []
    for row, teacher in written:
        nats += [-teacher.label_logprobs[t - 1] for t in range(1, len(row)) if row.loss_mask[t]]
    assert found["positions"] == len(nats) < 42
    assert found["mean"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    text = inspect_cache(tmp_path / "all")
    assert f"mean NLL of the teacher {found['mean']:.4f} nats" in text
    assert f"perplexity {found['perplexity']:.2f}" in text
    # Stored in bytes, one after the other is off by at most 1/32 nat, and what a byte cannot tell is cut.
    write_cache(tmp_path / "bytes", lengths=[30, 14], vocab_size=60, positions="all")
    cut = np.minimum(nats, 255 / 16).mean()
    assert TeacherCache(tmp_path / "bytes").summary()["label_nll"]["mean"] == pytest.approx(cut, abs=1 / 32)
    assert TeacherCache(tmp_path / "bytes").summary()["label_nll"]["positions"] == len(nats)


def test_what_a_byte_cannot_tell_is_shown_as_a_bound(tmp_path: Path):
    row = TokenRow(np.array([0, 1]), np.array([False, True]))
    for name, logprob, codec, shown, stored in (
        ("bytes", -40.0, CodecConfig(), "<= -15.94", -255 / 16),
        ("exact", -40.0, CodecConfig.lossless(), "-40.00", -40.0),
        ("impossible", -np.inf, CodecConfig.lossless(), "-inf", None),
    ):
        teacher = capture(np.array([[0.0, logprob, -30.0]]), label_ids=row.label_ids())
        with CacheWriter(tmp_path / name, identity={}, vocab_size=3, codec=codec) as writer:
            writer.append(row, teacher)
        assert f" {shown} " in inspect_cache(tmp_path / name, row=0)
        view = json.loads(inspect_cache(tmp_path / name, row=0, as_json=True))
        assert view["positions"][0]["label_logprob"] == (None if stored is None else pytest.approx(stored))
    summary = json.loads(inspect_cache(tmp_path / "impossible", as_json=True))
    assert summary["label_nll"] == {"positions": 1, "mean": None, "perplexity": None}
    assert "infinite" in inspect_cache(tmp_path / "impossible")


def test_picture(cache_dir: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    text = inspect_cache(cache_dir, plot=tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "p.png" in text
    with pytest.raises(ConfigError, match=r"\.png"):
        inspect_cache(cache_dir, plot=tmp_path / "p.nonsense")


def test_inspect_loads_nothing_heavy(cache_dir: Path):
    code = f"""
import sys
from formats.inspect.inspect_cache import inspect_cache
inspect_cache({str(cache_dir)!r})
assert not {{"torch", "transformers", "vllm", "matplotlib", "pyarrow"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "corpus",
    [
        "mine",
        {"counts": {"num_ended": 1}},
        {"counts": {"num_records": "many"}},
        {"counts": {"num_records": 3}, "notes": 5},
        {"counts": {"num_ended": 1, "num_rows": 3}, "generate_temperature": "warm"},
    ],
)
def test_words_of_another_writer_in_the_identity(cache_dir: Path, tmp_path: Path, corpus: object):
    """They are shown as they are; what has a line of its own in our caches is no traceback in others'."""
    content = unseal((cache_dir / "manifest.json").read_bytes(), "manifest")
    content["identity"]["corpus"] = corpus
    directory = Path(shutil.copytree(cache_dir, tmp_path / "c"))
    (directory / "manifest.json").write_bytes(seal(content, indent=1))
    assert "7 rows, 81 tokens" in inspect_cache(directory)


def test_a_tokenizer_that_cannot_be_read_is_one_line(tmp_path: Path):
    with CacheWriter(tmp_path / "c", identity={}, vocab_size=5, positions="all") as writer:
        writer.add_file("tokenizer.json", b'{"version": "9.0"}')
        row = TokenRow(np.arange(2), np.arange(2) > 0)
        writer.append(row, capture(np.zeros((1, 5)), label_ids=row.label_ids("all")))
    assert "1 row, 2 tokens" in inspect_cache(tmp_path / "c")
    with pytest.raises(
        FormatError, match=r"tokenizer\.json of .* must be one that .* got: Unknown tokenizer"
    ):
        inspect_cache(tmp_path / "c", row=0)


def test_no_rows_and_a_certain_teacher(tmp_path: Path):
    with CacheWriter(tmp_path / "empty", identity={}, vocab_size=5):
        pass
    with pytest.raises(ConfigError, match="--row needs a cache with rows, got none"):
        inspect_cache(tmp_path / "empty", row=0)
    with CacheWriter(tmp_path / "one", identity={}, vocab_size=1, positions="all") as writer:
        row = TokenRow(np.zeros(3), np.arange(3) > 0)
        writer.append(row, capture(np.zeros((2, 1)), label_ids=row.label_ids("all")))
    assert "mean NLL of the teacher 0.0000 nats, perplexity 1.00" in inspect_cache(tmp_path / "one")
