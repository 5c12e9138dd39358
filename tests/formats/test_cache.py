"""Writing and opening caches: rows, order, keys, other readers, other processes, other places."""

import concurrent.futures
import functools
import hashlib
import http.server
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from make_teachers import by_id, keys_in_worker, random_row, random_teacher, write_cache

from formats import (
    CacheWriter,
    CodecConfig,
    Manifest,
    ShardInfo,
    ShardWriter,
    TailDraws,
    TeacherCache,
    TokenRow,
    TopKLogprobs,
)
from formats.errors import CorruptShardError, FormatError, IncompleteCacheError

LENGTHS = [7, 0, 1, 2, 30, 12, 5, 9, 16, 3, 4, 40, 1, 1, 22, 8, 11, 6, 2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("caches") / "cache"
    return directory, write_cache(directory, lengths=LENGTHS, codec=CodecConfig.lossless())


@pytest.fixture(scope="module")
def with_draws(tmp_path_factory: pytest.TempPathFactory):
    """A lossless cache with tail draws, and what was written."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    return directory, write_cache(
        directory, lengths=LENGTHS, codec=CodecConfig.lossless(), min_prob=0.02, draw_rate=9
    )


def assert_same_row(got, row: TokenRow, teacher: TopKLogprobs) -> None:
    assert (got.input_ids == row.input_ids).all() and (got.loss_mask == row.loss_mask).all()
    assert got.key == row.key and len(got) == len(row)
    assert len(got.positions) == len(got.teacher) == len(teacher)
    for a, b in zip(by_id(got.teacher), by_id(teacher), strict=True):
        assert (a == b).all()
    assert (got.teacher.log_tail_nodes == teacher.log_tail_nodes).all()
    assert got.teacher.draws.rate == teacher.draws.rate
    assert (got.teacher.label_logprobs == teacher.label_logprobs).all()
    assert got.label_ids.tolist() == [row.input_ids[p + 1] for p in got.positions]
    for a, b in zip(by_id(got.teacher.draws), by_id(teacher.draws), strict=True):
        assert (a == b).all()


def test_rows_come_back_in_any_order(written):
    directory, rows = written
    cache = TeacherCache(directory)
    assert len(cache) == len(rows) and len(cache.manifest.shards) == 3
    for index in np.random.default_rng(0).permutation(len(rows)).tolist():
        assert_same_row(cache[index], *rows[index])
        assert_same_row(cache[index - len(rows)], *rows[index])
    for got, (row, teacher) in zip(cache, rows, strict=True):
        assert_same_row(got, row, teacher)
    assert [row.key for row in cache.rows(7, 10)] == [row.key for row, _ in rows[7:10]]
    assert cache.tokens(4).key == rows[4][0].key
    assert cache.lengths().tolist() == [len(row) for row, _ in rows] and cache.lengths().dtype == np.int32
    for outside in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            cache[outside]
    cache.validate(full=True)
    assert cache.file("notes.txt") == b"auxiliary"


def test_rows_are_found_by_content(written):
    directory, rows = written
    cache = TeacherCache(directory)
    for row, _ in rows:
        found = cache.index_of(row.key)
        assert rows[found][0].key == row.key
    with pytest.raises(KeyError):
        cache.index_of(bytes(16))


def test_keys_that_end_in_zero_bytes_are_found(tmp_path: Path):
    """numpy strips trailing zero bytes from its byte strings; the index must not."""
    candidates = (TokenRow(np.array([n, 1]), np.array([False, True])) for n in range(100_000))
    rows = [row for row, _ in zip((r for r in candidates if r.key[-1] == 0), range(3), strict=False)]
    assert len(rows) == 3
    with CacheWriter(tmp_path / "c", identity={}, vocab_size=50) as writer:
        for row in (TokenRow(np.array([1, 2]), np.array([False, True])), *rows):
            writer.append(row, random_teacher(np.random.default_rng(0), row, 50))
    cache = TeacherCache(tmp_path / "c")
    assert [cache.index_of(row.key) for row in rows] == [1, 2, 3]
    for other in (rows[0].key[:-1], rows[0].key[:-1] + b"\1", rows[0].key + b"\0", b""):
        with pytest.raises(KeyError):
            cache.index_of(other)


def test_all_positions(tmp_path: Path):
    rows = write_cache(tmp_path / "all", lengths=[5, 1, 0, 9], positions="all", codec=CodecConfig.lossless())
    cache = TeacherCache(tmp_path / "all")
    assert [len(row.teacher) for row in cache] == [4, 0, 0, 8]
    for got, (row, teacher) in zip(cache, rows, strict=True):
        assert_same_row(got, row, teacher)


def test_draws_come_back(with_draws):
    directory, rows = with_draws
    cache = TeacherCache(directory)
    for got, (row, teacher) in zip(cache, rows, strict=True):
        assert_same_row(got, row, teacher)
    assert_same_row(pickle.loads(pickle.dumps(cache))[4], *rows[4])
    cache.validate(full=True)
    drawn = TailDraws.concatenate([row.teacher.draws for row in cache])
    assert drawn.rate == 9 and drawn.counts.min() == 0 and drawn.counts.max() > 9


@pytest.mark.parametrize("draw_rate", [0, 5])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, draw_rate: int):
    for name in ("a", "b"):
        write_cache(tmp_path / name, lengths=LENGTHS, draw_rate=draw_rate, min_prob=0.02)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert Manifest.read(tmp_path / "a") == Manifest.read(tmp_path / "b")


def test_the_manifest_says_what_is_on_disk(written):
    directory, rows = written
    manifest = Manifest.read(directory)
    for shard in manifest.shards:
        data = (directory / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)
    assert sum(s.num_rows for s in manifest.shards) == len(rows)
    assert sum(s.num_tokens for s in manifest.shards) == sum(LENGTHS)
    assert sum(s.num_positions for s in manifest.shards) == sum(len(t) for _, t in rows)
    assert sum(s.num_entries for s in manifest.shards) == sum(t.num_entries for _, t in rows)


def test_pyarrow_and_datasets_open_the_shards(written, tmp_path: Path):
    directory, rows = written
    tables = [
        pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in sorted(directory.glob("*.arrow"))
    ]
    table = pa.concat_tables(tables)
    table.validate(full=True)
    assert table.column("input_ids").to_pylist() == [row.input_ids.tolist() for row, _ in rows]
    assert table.column("loss_mask").to_pylist() == [row.loss_mask.tolist() for row, _ in rows]
    assert table.column("key").to_pylist() == [row.key for row, _ in rows]
    datasets = pytest.importorskip("datasets")
    files = [str(file) for file in sorted(directory.glob("*.arrow"))]
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
    assert loaded["input_ids"][4] == rows[4][0].input_ids.tolist()


def test_large_shards_learn_ranks_from_their_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("formats.disk.shard.SAMPLE_ENTRIES", 500)
    rng = np.random.default_rng(5)
    with ShardWriter(tmp_path / "s.arrow", vocab_size=97, codec=CodecConfig.lossless(), max_k=64) as writer:
        for _ in range(30):
            row = random_row(rng, 20, 97)
            writer.append(row, random_teacher(rng, row, 97).prune(1e-3, 64))
        info = writer.close("shard-00000.arrow")
    assert info.num_rows == 30 and info.name == "shard-00000.arrow"


# --- what must be refused ---------------------------------------------------------------------------------


def test_writers_refuse_what_does_not_fit(tmp_path: Path):
    row = TokenRow(np.arange(5), np.array([False, True, True, False, True]))
    rng = np.random.default_rng(0)
    teacher = random_teacher(rng, row, 50)
    with CacheWriter(tmp_path / "c", identity={}, vocab_size=50) as writer:
        writer.append(row, teacher)
        with pytest.raises(ValueError, match="one teacher distribution per position"):
            writer.append(row, teacher.slice(0, 2))
        with pytest.raises(ValueError, match="vocab_size"):
            writer.append(row, random_teacher(rng, row, 51))
        with pytest.raises(ValueError, match="input_ids"):
            writer.append(TokenRow(np.array([1, -2, 3, 4, 5]), row.loss_mask), teacher)
        with pytest.raises(FormatError, match="plain name"):
            writer.add_file("../evil", b"")
    assert len(TeacherCache(tmp_path / "c")) == 1
    with pytest.raises(FormatError, match="empty directory"):
        CacheWriter(tmp_path / "c", identity={}, vocab_size=50)
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "c" / "shard-00000.arrow", vocab_size=50)


def test_writers_refuse_draws_of_another_rate(tmp_path: Path):
    row, rng = TokenRow(np.arange(3), np.array([False, True, True])), np.random.default_rng(0)
    for number, (declared, given) in enumerate(((0, 4), (4, 0), (4, 5))):
        with (
            pytest.raises(ValueError, match=f"must have rate {declared}, got {given}"),
            CacheWriter(
                tmp_path / str(number), identity={}, vocab_size=97, codec=CodecConfig(draw_rate=declared)
            ) as writer,
        ):
            writer.append(row, random_teacher(rng, row, 97, draw_rate=given))


def test_an_interrupted_writer_leaves_no_cache(tmp_path: Path):
    with (
        pytest.raises(RuntimeError),
        CacheWriter(tmp_path / "c", identity={}, vocab_size=50, positions="loss", rows_per_shard=1) as w,
    ):
        for _ in range(2):
            w.append(TokenRow(np.arange(3), np.zeros(3, bool)), TopKLogprobs.empty(50))
        raise RuntimeError
    with pytest.raises(IncompleteCacheError, match="unfinished"):
        TeacherCache(tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_an_empty_cache_is_a_cache(tmp_path: Path):
    with CacheWriter(tmp_path / "c", identity={}, vocab_size=50):
        pass
    cache = TeacherCache(tmp_path / "c")
    cache.validate(full=True)
    assert len(cache) == 0 and list(cache) == [] and cache.summary()["num_rows"] == 0
    with pytest.raises(KeyError):
        cache.index_of(bytes(16))
    assert cache.lengths().tolist() == []


def test_missing_paths_are_named(tmp_path: Path):
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FormatError, match=str(tmp_path)):
            TeacherCache(missing)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError):
        TeacherCache(tmp_path / "file")


# --- many shards, processes, places -----------------------------------------------------------------------


def test_opening_ten_thousand_shards_opens_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_cache(tmp_path / "one", lengths=[4, 9, 3])
    manifest = Manifest.read(tmp_path / "one")
    shard = manifest.shards[0]
    data = (tmp_path / "one" / shard.name).read_bytes()
    many = tmp_path / "many"
    many.mkdir()
    (many / "notes.txt").write_bytes(b"auxiliary")
    shards = []
    for number in range(10_000):
        fields = vars(shard) | {"name": f"shard-{number:05d}.arrow"}
        shards.append(ShardInfo(**fields))
        if number in (0, 1, 9_999):
            (many / shards[-1].name).write_bytes(data)
    fields = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    Manifest(**(fields | {"shards": shards})).write(many)

    opened: list[str] = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)) or original(path, *rest))
    cache = TeacherCache(many)
    assert len(cache) == 30_000
    assert opened == [str(many / "manifest.json")]
    assert cache[29_999].key == cache[2].key and cache[3].key == cache[0].key
    with pytest.raises(CorruptShardError, match=r"shard-00002\.arrow"):
        cache[6]


def test_only_so_many_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("formats.cache.MAX_OPEN_SHARDS", 2)
    write_cache(tmp_path / "c", lengths=[3] * 20, rows_per_shard=2)
    cache = TeacherCache(tmp_path / "c")
    for index in (0, 5, 9, 0, 19, 3):
        cache[index]
        assert len(cache._open) <= 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same_rows(written, method: str):
    directory, rows = written
    cache = TeacherCache(directory)
    expected = [row.key for row, _ in rows]
    assert [row.key for row in cache] == expected  # the parent has shards open when it forks
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        parts = list(pool.map(keys_in_worker, [(cache, start) for start in range(3)]))
    for start, part in enumerate(parts):
        assert part == expected[start::3]


def test_a_pickle_notices_a_rebuilt_cache(tmp_path: Path):
    write_cache(tmp_path / "c", lengths=[3, 4])
    data = pickle.dumps(TeacherCache(tmp_path / "c"))
    assert len(data) < 400
    assert len(pickle.loads(data)) == 2
    for file in (tmp_path / "c").iterdir():
        file.unlink()
    write_cache(tmp_path / "c", lengths=[3, 5])
    with pytest.raises(FormatError, match="rebuilt"):
        pickle.loads(data)


def test_reading_from_a_memory_file_system(with_draws):
    fsspec = pytest.importorskip("fsspec")
    directory, rows = with_draws
    memory = fsspec.filesystem("memory")
    for file in directory.iterdir():
        memory.pipe_file(f"/remote/{file.name}", file.read_bytes())
    cache = TeacherCache("memory://remote")
    cache.validate(full=True)
    for got, (row, teacher) in zip(pickle.loads(pickle.dumps(cache)), rows, strict=True):
        assert_same_row(got, row, teacher)
    with pytest.raises(FormatError):
        TeacherCache("memory://elsewhere")


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A static server that honours `Range`, as object stores do, and counts the bytes it sends."""

    sent: list[int] = []  # noqa: RUF012

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        asked = self.headers.get("Range")
        if asked:
            start, stop = asked.removeprefix("bytes=").split("-")
            part = data[int(start) : int(stop) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        self.sent.append(len(part))
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_remote_row_costs_a_range_and_not_a_shard(tmp_path: Path):
    pytest.importorskip("aiohttp")
    rows = write_cache(tmp_path / "c", lengths=[60] * 60, vocab_size=300, rows_per_shard=60, rows_per_batch=2)
    size = (tmp_path / "c" / "shard-00000.arrow").stat().st_size
    handler = functools.partial(RangeHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        cache = TeacherCache(f"http://127.0.0.1:{server.server_port}/c")
        assert cache[31].key == rows[31][0].key
        RangeHandler.sent.clear()
        assert cache[7].key == rows[7][0].key
        assert 0 < sum(RangeHandler.sent) < size / 10
    finally:
        server.shutdown()
        server.server_close()


def test_formats_needs_no_torch():
    code = """
import sys
import formats.inspect.inspect_cache, formats.writer, formats.disk.shard, formats.inspect.picture
heavy = {"torch", "transformers", "vllm", "matplotlib", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
