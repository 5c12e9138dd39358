"""The rectangles say what the cache says, position by position, read back by Parquet alone."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from deterministic_build import VOCAB_SIZE, SeededTeacher, logits_of, make_config, make_source

from cache_builder.build import build_cache
from cache_builder.tools import export_topk as export_module
from cache_builder.tools import topk_table
from cache_builder.tools.export_topk import export_topk
from cache_builder.tools.topk_table import PADDING_LOGPROB
from formats.cache import TeacherCache
from formats.errors import ConfigError

COLUMNS = ["input_ids", "labels", "teacher_ids", "teacher_logprobs", "teacher_tail", "teacher_mask"]


def build(out: Path, positions: str = "loss", **capture) -> Path:
    build_cache(
        make_config(out, positions=positions),
        source=make_source(30, positions=positions, **capture),
        make_teacher=lambda config, source: SeededTeacher(positions=positions, **capture),
    )
    return out


@pytest.fixture(scope="module", params=[("loss", 8), ("all", 0)], ids=["loss with draws", "all"])
def cache(request, tmp_path_factory) -> Path:
    positions, draw_rate = request.param
    return build(tmp_path_factory.mktemp("export") / "c", positions, draw_rate=draw_rate)


def lines_of(path: Path) -> list[dict[str, np.ndarray]]:
    return [
        {name: np.asarray(values) for name, values in line.items()}
        for line in pq.read_table(path).to_pylist()
    ]


@pytest.mark.parametrize("k", [None, 1, 3, VOCAB_SIZE])
def test_every_value_of_every_position(cache: Path, tmp_path: Path, monkeypatch, k: int | None) -> None:
    """Entries and tail are those of `prune`, made whole; what pads them changes no sum."""
    monkeypatch.setattr(topk_table, "CELLS_PER_GROUP", 30 * (k or 8))  # several row groups
    report = export_topk(cache, tmp_path / "x.parquet", k=k)
    lines = lines_of(tmp_path / "x.parquet")
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups > 5
    opened = TeacherCache(cache)
    width = k or max(int(row.teacher.counts.max(initial=1)) for row in opened)
    assert report.k == width and report.num_rows == len(lines) == len(opened)
    num_entries = 0
    for row, line in zip(opened, lines, strict=True):
        assert list(line) == COLUMNS
        np.testing.assert_array_equal(line["input_ids"], row.input_ids)
        np.testing.assert_array_equal(line["labels"], np.where(row.loss_mask, row.input_ids, -100))
        np.testing.assert_array_equal(np.flatnonzero(line["teacher_mask"]), row.positions)
        head = row.teacher.prune(max_k=width).sorted()
        for p, t in enumerate(row.positions):
            own = slice(*head.offsets[p : p + 2])
            size = own.stop - own.start
            num_entries += size
            raw = np.append(head.logprobs[own], head.log_tail(1.0)[p]).astype(np.float64)
            raw -= np.logaddexp.reduce(raw)
            np.testing.assert_array_equal(line["teacher_ids"][t, :size], head.token_ids[own])
            np.testing.assert_allclose(line["teacher_logprobs"][t, :size], raw[:-1], atol=2e-6)
            np.testing.assert_allclose(line["teacher_tail"][t], max(raw[-1], PADDING_LOGPROB), atol=2e-6)
            assert set(line["teacher_ids"][t, size:]) <= {head.token_ids[own][0]}
            assert set(line["teacher_logprobs"][t, size:]) <= {PADDING_LOGPROB}
            total = np.exp(np.append(line["teacher_logprobs"][t], line["teacher_tail"][t])).sum()
            assert total == pytest.approx(1.0, abs=1e-6)
        without = ~line["teacher_mask"]
        assert without[-1] and not line["teacher_ids"][without].any()
        assert set(line["teacher_logprobs"][without].ravel()) <= {PADDING_LOGPROB}
        assert set(line["teacher_tail"][without]) <= {PADDING_LOGPROB}
    positions = sum(len(row.positions) for row in opened)
    assert report.num_positions == positions
    assert report.padding == pytest.approx(1 - num_entries / (positions * width))
    masses = [np.exp(line["teacher_logprobs"][line["teacher_mask"]]).sum() for line in lines]
    assert report.mean_mass == pytest.approx(sum(masses) / positions)


def test_the_teacher_of_a_position_predicts_the_next_token(cache: Path, tmp_path: Path) -> None:
    """Against the exact logits at t; those one position earlier or later disagree."""
    export_topk(cache, tmp_path / "x.parquet")
    errors = {-1: [], 0: [], 1: []}
    for line in lines_of(tmp_path / "x.parquet"):
        logits = logits_of(line["input_ids"])
        exact = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        for t in np.flatnonzero(line["teacher_mask"]):
            if "loss" in cache.parent.name:
                assert line["labels"][t + 1] == line["input_ids"][t + 1]
            there = line["teacher_logprobs"][t] > PADDING_LOGPROB
            for shift in errors:
                if 0 <= t + shift < len(logits):
                    of_ids = np.exp(exact[t + shift, line["teacher_ids"][t, there]])
                    errors[shift].append(np.abs(of_ids - np.exp(line["teacher_logprobs"][t, there])).max())
                    if shift == 0:
                        others = 1 - of_ids.sum()
                        assert np.exp(line["teacher_tail"][t]) == pytest.approx(others, abs=5e-3)
    assert max(errors[0]) < 5e-3
    assert min(np.median(errors[-1]), np.median(errors[1])) > 0.1


def test_labels_of_a_loss_cache_are_where_its_teacher_is(tmp_path: Path) -> None:
    export_topk(build(tmp_path / "c"), tmp_path / "x.parquet")
    for line in lines_of(tmp_path / "x.parquet"):
        np.testing.assert_array_equal(line["teacher_mask"][:-1], line["labels"][1:] != -100)


def test_a_head_of_the_whole_vocabulary_has_no_tail(tmp_path: Path) -> None:
    cache = build(tmp_path / "c", min_prob=0.0, max_k=VOCAB_SIZE)
    assert export_topk(cache, tmp_path / "x.parquet").k == VOCAB_SIZE
    for line in lines_of(tmp_path / "x.parquet"):
        assert (line["teacher_tail"] == PADDING_LOGPROB).all()
        assert np.isfinite(line["teacher_logprobs"]).all()
    export_topk(cache, tmp_path / "y.parquet", k=VOCAB_SIZE - 1)
    for line in lines_of(tmp_path / "y.parquet"):
        assert (line["teacher_tail"][line["teacher_mask"]] > PADDING_LOGPROB).all()


def test_the_file_describes_itself(cache: Path, tmp_path: Path) -> None:
    export_topk(cache, tmp_path / "x.parquet", k=3)
    metadata = pq.read_schema(tmp_path / "x.parquet").metadata
    assert metadata[b"k"] == b"3" and float(metadata[b"padding_logprob"]) == PADDING_LOGPROB
    assert int(metadata[b"vocab_size"]) == VOCAB_SIZE
    assert json.loads(metadata[b"anneal_identity"]) == TeacherCache(cache).identity.to_dict()


def test_a_limit_takes_the_first_rows(cache: Path, tmp_path: Path) -> None:
    assert export_topk(cache, tmp_path / "x.parquet", limit=3).num_rows == 3
    first = [row.input_ids.tolist() for row in TeacherCache(cache).rows(0, 3)]
    assert [line["input_ids"].tolist() for line in lines_of(tmp_path / "x.parquet")] == first


def test_bad_input_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "there.parquet").write_text("mine")
    for out in (tmp_path / "there.parquet", tmp_path / "x.csv", Path("/proc/nothing/x.parquet")):
        with pytest.raises(ConfigError, match="--parquet must name"):
            export_topk(cache, out)
    for k in (0, VOCAB_SIZE + 1):
        with pytest.raises(ConfigError, match=f"k must be from 1 to {VOCAB_SIZE}.*got {k}"):
            export_topk(cache, tmp_path / "x.parquet", k=k)
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        export_topk(cache, tmp_path / "x.parquet", limit=0)
    monkeypatch.setattr(topk_table, "MOST_CELLS", 100)
    with pytest.raises(ConfigError, match=r"k must be at most \d+ for row \d+ of \d+ tokens, got 30"):
        export_topk(cache, tmp_path / "x.parquet", k=30)
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"]
    assert (tmp_path / "there.parquet").read_text() == "mine"


def test_an_interrupted_export_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(topk_table, "CELLS_PER_GROUP", 30)
    seen = []

    def stop(row):
        seen.append(row)
        if len(seen) > 8:  # some row groups are written
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(topk_table.TopKRow, "mass", stop)
    with pytest.raises(KeyboardInterrupt):
        export_topk(cache, tmp_path / "x.parquet")
    assert len(seen) > 8 and list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_kept(cache: Path, tmp_path: Path, monkeypatch) -> None:
    def other(cache, k):
        (tmp_path / "x.parquet").write_text("mine")
        return {}

    monkeypatch.setattr(export_module, "_metadata", other)
    with pytest.raises(ConfigError, match="which exists"):
        export_topk(cache, tmp_path / "x.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    assert (tmp_path / "x.parquet").read_text() == "mine"


def test_the_command(cache: Path, tmp_path: Path, anneal) -> None:
    export = partial(anneal, "cache", "export", cache)
    code, out, _ = export("--layout", "topk", "--k", "4", "--limit", "5", "--parquet", tmp_path / "x.parquet")
    assert code == 0 and "5 rows" in out and "4 entries" in out and "load_dataset" in out
    assert lines_of(tmp_path / "x.parquet")[0]["teacher_ids"].shape[1] == 4
    for words, message in (
        (("--layout", "topk", "--parquet", tmp_path / "x.parquet"), "which exists"),
        (("--layout", "wide", "--parquet", tmp_path / "y.parquet"), "positions or topk, got 'wide'"),
        (("--k", "4", "--parquet", tmp_path / "y.parquet"), "--k belongs to --layout topk"),
    ):
        code, out, err = export(*words)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
