"""The exported table says what the cache says, position by position, read back by Parquet alone."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from deterministic_build import SeededTeacher, logits_of, make_config, make_source

from cache_builder.build import build_cache
from cache_builder.tools import export_parquet as export_module
from cache_builder.tools.export_parquet import export_parquet
from formats.cache import TeacherCache
from formats.errors import ConfigError
from formats.logprobs.tail_function import TAIL_BETAS


@pytest.fixture(scope="module", params=[("loss", 8), ("all", 0)], ids=["loss with draws", "all"])
def cache(request, tmp_path_factory) -> Path:
    positions, draw_rate = request.param
    out = tmp_path_factory.mktemp("export") / "c"
    build_cache(
        make_config(out, positions=positions),
        source=make_source(30, positions=positions, draw_rate=draw_rate),
        make_teacher=lambda config, source: SeededTeacher(positions=positions, draw_rate=draw_rate),
    )
    return out


def test_every_value_of_every_position(cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export_module, "POSITIONS_PER_GROUP", 50)  # several row groups
    report = export_parquet(cache, tmp_path / "x.parquet")
    lines = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups > 2
    opened = TeacherCache(cache)
    assert len(lines) == report.num_positions == sum(len(row.positions) for row in opened.rows())
    at = num_kept = 0
    for index, row in enumerate(opened.rows()):
        head = row.teacher.sorted()
        for p, position in enumerate(row.positions):
            line = lines[at]
            at += 1
            a, b = head.offsets[p], head.offsets[p + 1]
            assert (line["key"], line["row"], line["position"]) == (row.key, index, position)
            assert (line["token_id"], line["label_id"]) == tuple(row.input_ids[position : position + 2])
            assert line["loss"] == row.loss_mask[position + 1]
            assert line["token_ids"] == head.token_ids[a:b].tolist()
            np.testing.assert_array_equal(np.float32(line["logprobs"]), head.logprobs[a:b])
            np.testing.assert_array_equal(np.float32(line["log_tail"]), head.log_tail_nodes[p])
            drawn = head.draws.slice(p, p + 1)
            assert line["draw_ids"] == drawn.token_ids.tolist()
            np.testing.assert_array_equal(np.float32(line["draw_logprobs"]), drawn.logprobs)
            kept = dict(zip(line["token_ids"], line["logprobs"], strict=True)).get(line["label_id"])
            assert line["label_logprob"] == head.label_logprobs[p] and kept in (None, line["label_logprob"])
            dense = logits_of(row.input_ids)[position]
            exact = dense[line["label_id"]] - np.logaddexp.reduce(dense)
            assert line["label_logprob"] == pytest.approx(max(exact, -255 / 16), abs=1 / 32)
            num_kept += kept is not None
    assert any(line["draw_ids"] for line in lines) == (opened.manifest.codec.draw_rate > 0)
    assert 0 < num_kept < len(lines)


def test_the_file_describes_itself(cache: Path, tmp_path: Path) -> None:
    export_parquet(cache, tmp_path / "x.parquet")
    metadata = pq.read_schema(tmp_path / "x.parquet").metadata
    assert json.loads(metadata[b"tail_betas"]) == list(TAIL_BETAS)
    assert json.loads(metadata[b"draw_rate"]) == TeacherCache(cache).manifest.codec.draw_rate
    assert json.loads(metadata[b"anneal_identity"]) == TeacherCache(cache).identity.to_dict()


def test_a_limit_takes_the_first_rows(cache: Path, tmp_path: Path) -> None:
    report = export_parquet(cache, tmp_path / "x.parquet", limit=3)
    assert set(pq.read_table(tmp_path / "x.parquet")["row"].to_pylist()) == {0, 1, 2} and report.num_rows == 3


def test_bad_outputs_leave_nothing(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "there.parquet").write_text("mine")
    for out in (tmp_path / "there.parquet", tmp_path / "x.csv", Path("/proc/nothing/x.parquet")):
        with pytest.raises(ConfigError, match="--parquet must name"):
            export_parquet(cache, out)
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"]


def test_a_file_has_a_folder_that_is_no_cache(cache: Path, tmp_path: Path) -> None:
    """A folder that is missing is a slip of the pen; a cache holds its own files alone."""
    before = sorted(path.name for path in cache.iterdir())
    for out, reason in (
        (tmp_path / "gone" / "x.parquet", "no directory"),
        (cache / "x.parquet", "is a cache"),
    ):
        with pytest.raises(ConfigError, match=f"--parquet must name.*{reason}"):
            export_parquet(cache, out)
    assert list(tmp_path.iterdir()) == [] and sorted(path.name for path in cache.iterdir()) == before


def test_an_interrupted_export_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch) -> None:
    def stop(group):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_table", stop)
    with pytest.raises(KeyboardInterrupt):
        export_parquet(cache, tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_row_group_holds_so_many_entries(cache: Path, tmp_path: Path, monkeypatch) -> None:
    """Its size is bounded where positions keep thousands of tokens, too."""
    export_parquet(cache, tmp_path / "one.parquet")
    monkeypatch.setattr(export_module, "ENTRIES_PER_GROUP", 60)
    export_parquet(cache, tmp_path / "x.parquet")
    file = pq.ParquetFile(tmp_path / "x.parquet")
    rows = [file.read_row_group(number) for number in range(file.num_row_groups)]
    longest = max(row.teacher.num_entries for row in TeacherCache(cache).rows())
    sizes = [sum(map(len, group.column("token_ids").to_pylist())) for group in rows]
    assert len(sizes) > 5 and max(sizes) < 60 + longest
    assert file.read().equals(pq.read_table(tmp_path / "one.parquet"))


@pytest.mark.parametrize("name", ["run:1/x.parquet", "a b%20?.parquet", os.fsdecode(b"caf\xe9.parquet")])
def test_names_that_could_be_addresses(cache: Path, tmp_path: Path, monkeypatch, name: str) -> None:
    """pyarrow takes `run:1/x` for an address of the scheme `run`, and no name that is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    assert export_parquet(cache, name, limit=1).num_rows == 1
    assert os.listdir(Path(name).parent) == [Path(name).name]
    with open(name, "rb") as file:
        assert pq.read_table(file).num_rows > 0


def test_an_address_is_refused(cache: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="which is an address"):
        export_parquet(cache, "s3://bucket/x.parquet")
    assert os.listdir(tmp_path) == []
