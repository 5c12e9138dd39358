"""Reading speed, side by side in one run on one core: decoding, a per-token Python decoder, random against
sequential rows, and opening a cache of many shards.

Teachers are made at random with 20 entries per position on average, and decoded once more with 12 tail draws
per position; all figures of one run are comparable, no two runs on different machines are.

    python benchmarks/reader.py [--rows 256] [--length 1024] [--shards 10000]
"""

import argparse
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "formats"))
from independent_reader import read_payload, unseal

from formats import CacheWriter, Manifest, ShardInfo, TailDraws, TeacherCache, TokenRow, TopKLogprobs
from formats.codec.payload import Codec
from formats.codec.rank_table import from_text
from formats.logprobs.ragged import offsets_of
from formats.logprobs.tail_function import TAIL_BETAS

VOCAB_SIZE = 128_256
ENTRIES = 20
DRAW_RATE = 8
DRAWS = 12
REPEATS = 5


def random_teacher(rng: np.random.Generator, count: int) -> TopKLogprobs:
    """Heads of 1 to 2 * ENTRIES - 1 tokens with Zipf-like ids and probabilities, without draws."""
    sizes = rng.integers(1, 2 * ENTRIES, count)
    offsets = offsets_of(sizes)
    total = int(offsets[-1])
    # Distinct within a head: a Zipf-like start plus steps of at least one.
    steps = np.minimum(rng.zipf(1.3, total), 3000)
    running = np.cumsum(steps)
    token_ids = running - np.repeat(running[offsets[:-1]] - steps[offsets[:-1]], sizes)
    weights = rng.pareto(0.7, total) + 1e-3
    tail_mass = rng.uniform(1e-4, 0.2, count)
    weights *= np.repeat((1 - tail_mass) / np.add.reduceat(weights, offsets[:-1]), sizes)
    rest = np.log(VOCAB_SIZE - sizes)
    each = np.log(tail_mass) - rest
    nodes = rest[:, None] + each[:, None] * np.array(TAIL_BETAS)
    return TopKLogprobs(
        offsets, token_ids, np.log(weights), nodes, VOCAB_SIZE, TailDraws.none(count), np.full(count, np.nan)
    )


def with_labels(rng: np.random.Generator, topk: TopKLogprobs, label_ids: np.ndarray) -> TopKLogprobs:
    """The same with a logprob for every next token."""
    labels = rng.uniform(-14, -6, len(topk)).astype(np.float32)
    positions, entries = topk.kept_labels(label_ids)
    labels[positions] = topk.logprobs[entries]
    return replace(topk, label_logprobs=labels)


def with_draws(rng: np.random.Generator, topk: TopKLogprobs) -> TopKLogprobs:
    """The same with 12 draws per position on average, of tokens from all over the tail."""
    counts = rng.binomial(2 * DRAWS, 0.5, len(topk))
    position = np.repeat(np.arange(len(topk)), counts)
    token_ids = (VOCAB_SIZE * rng.random(len(position)) ** 3).astype(np.int64)
    head = np.repeat(np.arange(len(topk)), topk.counts) * VOCAB_SIZE + topk.token_ids
    keep = ~np.isin(position * VOCAB_SIZE + token_ids, head)
    offsets = offsets_of(np.bincount(position[keep], minlength=len(topk)))
    drawn = TailDraws(offsets, token_ids[keep], rng.uniform(-14, -6, keep.sum()), DRAW_RATE)
    return replace(topk, draws=drawn)


def consume(rows: Iterable[Any]) -> None:
    """Use up `rows` and keep none, as a training loop does: keeping all would time the page faults."""
    deque(rows, maxlen=0)


def best(task: Callable[[], Any], repeats: int = REPEATS) -> float:
    """CPU seconds of the fastest of some repeats: a busy machine does not distort them much."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        task()
        seconds.append(time.process_time() - start)
    return min(seconds)


def many_shards(source: Path, target: Path, count: int) -> None:
    """A cache whose manifest lists `count` shards, of which the first and the last exist."""
    manifest = Manifest.read(source)
    first = manifest.shards[0]
    target.mkdir()
    names = [f"shard-{number:05d}.arrow" for number in range(count)]
    for name in (names[0], names[-1]):
        shutil.copy(source / first.name, target / name)
    shards = [ShardInfo(**(vars(first) | {"name": name})) for name in names]
    fields = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    Manifest(**(fields | {"shards": shards})).write(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=10_000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "cache"
        mask = np.ones(args.length, bool)
        mask[0] = False
        start = time.process_time()
        settings: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_k": 128}
        with CacheWriter(directory, identity={}, **settings) as writer:
            for _ in range(args.rows):
                row = TokenRow(rng.integers(0, VOCAB_SIZE, args.length), mask)
                writer.append(row, with_labels(rng, random_teacher(rng, args.length - 1), row.label_ids()))
        positions = args.rows * (args.length - 1)
        print(f"written: {positions / (time.process_time() - start):,.0f} positions/s, generation included")
        cache = TeacherCache(directory)
        reader = cache.shard(0)
        stored = [reader.row(index) for index in range(args.rows)]
        payloads = [(bytes(payload), tokens.label_ids()) for tokens, payload in stored]
        count = args.length - 1

        decode = best(lambda: consume(reader.codec.decode(*payload) for payload in payloads))
        rate = positions / decode
        print(f"decode: {rate:,.0f} positions/s on one core at {ENTRIES} entries per position")
        settings = unseal(reader._file.metadata[b"anneal"])
        ranked_ids = from_text(settings["ranked_ids"], VOCAB_SIZE)
        drawn_codec = Codec(replace(cache.manifest.codec, draw_rate=DRAW_RATE), VOCAB_SIZE, 128, ranked_ids)
        drawn_rows = (with_draws(rng, reader.teacher(index)[1]) for index in range(args.rows))
        pairs = zip(drawn_rows, payloads, strict=True)
        drawn_payloads = [(drawn_codec.encode(row, labels), labels) for row, (_, labels) in pairs]
        drawn = best(lambda: consume(drawn_codec.decode(*payload) for payload in drawn_payloads))
        print(f"with {DRAWS} draws per position: {positions / drawn:,.0f} positions/s, {decode / drawn:.2f}x")
        sequential = best(lambda: consume(cache[index] for index in range(args.rows)))
        print(f"rows in order (map, key check, decode): {positions / sequential:,.0f} positions/s")
        orders = [rng.permutation(args.rows).tolist() for _ in range(REPEATS)]
        randomly = best(lambda: consume(cache[index] for index in orders.pop()))
        print(f"rows at random: {randomly / sequential:.2f}x the time of rows in order")

        plain = best(lambda: read_payload(payloads[0][0], payloads[0][1].tolist(), settings), repeats=1)
        slow = count / plain
        print(f"a per-entry Python decoder: {slow:,.0f} positions/s; ours is {rate / slow:,.0f}x as fast")

        many = Path(temporary) / "many"
        many_shards(directory, many, args.shards)
        seconds = best(lambda: TeacherCache(many))
        tracemalloc.start()
        opened = TeacherCache(many)
        megabytes = tracemalloc.get_traced_memory()[0] / 2**20
        tracemalloc.stop()
        print(f"opening {args.shards:,} shards ({len(opened):,} rows): {seconds:.2f} s, {megabytes:.0f} MiB")
        last = best(lambda: TeacherCache(many)[len(opened) - 1])
        print(f"opening it and reading its last row: {last:.2f} s")


if __name__ == "__main__":
    main()
