"""How fast the CPUs beside a device encode what it captures: the product's codec and shard writer, by processes and by
the encoder threads of one writer.

The rows are real reductions of random logits about as certain as a language model's on text: some six kept tokens and
twenty draws at a position.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from formats.codec.config import CodecConfig
from formats.codec.payload import Codec
from formats.codec.rank_table import rank_by_frequency
from formats.disk.row_encoder import EncoderThreads
from formats.disk.shard import ShardWriter
from formats.disk.token_row import TokenRow
from formats.logprobs.topk import TopKLogprobs

from .report import Place, Report

SECONDS = 55
LEVELS = (CodecConfig().zstd_level, 12, 6, 1)
PROCESSES = (1, 4, 16)
THREADS = (2, 4, 8)
RATE = 8
START_SECONDS = 0.5
"""From now on the workers that take part in a measurement have all heard of it."""
Rows = list[tuple[TokenRow, TopKLogprobs]]


def captured_rows(place: Place, num_rows: int, length: int, vocab: int) -> Rows:
    """Rows of `length` positions, through the reduction and the wire."""
    from cache_builder.reduction.reduce import reduce_logits
    from cache_builder.teachers.wire import pack, unpack
    from formats.capture_settings import CaptureSettings

    capture, device, rows = CaptureSettings(draw_rate=RATE), place.device, []
    # What is frequent is frequent everywhere: Zipf's law below the noise of a position.
    prior_V = -torch.arange(10, vocab + 10, device=device).log()
    for number in range(num_rows):
        rng = np.random.default_rng(number)
        row = TokenRow(rng.integers(0, vocab, length + 1), np.arange(length + 1) > 0)
        starts_P = torch.rand(length, dtype=torch.float64, device=device)
        labels_P = torch.from_numpy(row.input_ids[1:].astype(np.int64)).to(device)
        parts = []
        for begin in range(0, length, 256):
            chunk = slice(begin, min(begin + 256, length))
            noise_CV = torch.randn(chunk.stop - begin, vocab, device=device)
            certainty_C1 = 1.0 + 1.8 * torch.rand(len(noise_CV), 1, device=device)
            reduced = reduce_logits(
                (noise_CV.mul_(2.0) + prior_V).mul_(certainty_C1),
                capture,
                labels_N=labels_P[chunk],
                starts_N=starts_P[chunk],
            )
            parts.append(unpack(pack(reduced).cpu(), vocab, RATE))
        rows.append((row, TopKLogprobs.concatenate(parts)))
    return rows


_rows: Rows = []


def load(path: Path) -> None:
    """A worker's rows, once."""
    _rows[:] = pickle.loads(path.read_bytes())


def write(directory: str, level: int, begin: float, seconds: float, threads: int = 1) -> tuple[float, float]:
    """In a worker: shards of its rows from one time on, until another; positions/s and bytes/position."""
    if threads == 1:
        return _write(directory, level, begin, seconds, None)
    with EncoderThreads(threads) as pool:
        return _write(directory, level, begin, seconds, pool)


def _write(
    directory: str, level: int, begin: float, seconds: float, pool: EncoderThreads | None
) -> tuple[float, float]:
    positions = size = number = 0
    time.sleep(max(0.0, begin - time.monotonic()))
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        target = Path(directory) / f"shard-{os.getpid()}-{level}-{number}"
        writer = ShardWriter(
            target,
            vocab_size=_rows[0][1].vocab_size,
            positions="all",
            codec=CodecConfig(zstd_level=level, draw_rate=RATE),
            pool=pool,
        )
        for row, topk in _rows:
            writer.append(row, topk)
        info = writer.close()
        target.unlink()
        positions, size, number = positions + info.num_positions, size + info.num_bytes, number + 1
    return positions / (time.monotonic() - began), size / positions


def run(report: Report, place: Place) -> None:
    """See the module."""
    rows = captured_rows(place, *((3, 32, 1003) if place.tiny else (32, 2048, 128_256)))
    positions = sum(len(topk) for _, topk in rows)
    drawn = sum(len(topk.draws.token_ids) for _, topk in rows)
    report.info("CPUs of this process", float(len(os.sched_getaffinity(0))))
    report.info("kept tokens", sum(topk.num_entries for _, topk in rows) / positions, "per position")
    report.info("draws", drawn / positions, "per position")
    codec_alone(report, rows)
    processes = PROCESSES[:2] if place.tiny else PROCESSES
    seconds = 0.2 if place.tiny else 1.5
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows"
        path.write_bytes(pickle.dumps(rows))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes[-1], context, load, (path,)) as pool:
            for level in LEVELS:
                for number in processes if level == LEVELS[0] else processes[:1]:
                    list(
                        pool.map(time.sleep, [START_SECONDS] * processes[-1])
                    )  # all have started and are idle
                    begin = time.monotonic() + START_SECONDS
                    jobs = [pool.submit(write, directory, level, begin, seconds) for _ in range(number)]
                    found = [job.result() for job in jobs]
                    what = f"zstd {level}, {number} process{'es' * (number > 1)}"
                    report.info(f"{what}: codec, shard, disk", sum(rate for rate, _ in found), "positions/s")
                    if number == 1:
                        report.info(f"{what}: size", found[0][1], "bytes/position")
            for threads in THREADS[:1] if place.tiny else THREADS:
                job = pool.submit(write, directory, LEVELS[0], time.monotonic(), seconds, threads)
                what = f"zstd {LEVELS[0]}, 1 process, {threads} encoder threads"
                report.info(f"{what}: codec, shard, disk", job.result()[0], "positions/s")


def codec_alone(report: Report, rows: Rows) -> None:
    """One thread, nothing written."""
    vocab_size = rows[0][1].vocab_size
    sample = np.concatenate([ids for _, topk in rows for ids in (topk.token_ids, topk.draws.token_ids)])
    ranked = rank_by_frequency(sample, vocab_size)
    some = rows[:32]
    for level in LEVELS:
        codec = Codec(CodecConfig(zstd_level=level, draw_rate=RATE), vocab_size, 128, ranked)
        codec.encode(some[0][1], some[0][0].label_ids("all"))
        began = time.perf_counter()
        for row, topk in some:
            codec.encode(topk, row.label_ids("all"))
        taken = time.perf_counter() - began
        report.info(
            f"zstd {level}: codec alone, one thread",
            sum(len(topk) for _, topk in some) / taken,
            "positions/s",
        )
