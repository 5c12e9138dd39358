"""Mutated caches against the reader, in subprocesses: a typed error or the identical rows, nothing else.

Small caches are built, with tail draws and without; each trial flips bits, overwrites words with extreme
values, cuts, repeats or splices one of their files, and opens and reads everything of that cache. Trials run
in child processes under a memory limit and a time limit, so that a crash, a hang or a runaway allocation is
counted instead of stopping the run.

    python benchmarks/fuzz.py [--trials 100000] [--seed 0]
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "formats"))

BATCH = 2_000
MEMORY_LIMIT = 1 << 31
SECONDS_PER_TRIAL = 0.5
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One of the kinds of damage."""
    kind, at = int(rng.integers(7)), int(rng.integers(len(data)))
    changed = bytearray(data)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        for where in rng.integers(len(data), size=int(rng.integers(2, 30))).tolist():
            changed[where] = int(rng.integers(256))
    elif kind == 2:
        width = int(rng.choice([1, 2, 4, 8]))
        value = int(EXTREMES[rng.integers(len(EXTREMES))]) % (1 << (8 * width))
        changed[at : at + width] = value.to_bytes(width, "little")
    elif kind == 3:
        return data[:at]
    elif kind == 4:
        length = int(rng.integers(1, 200))
        changed[at:at] = data[at : at + length]
    elif kind == 5:
        start = int(rng.integers(len(data)))
        changed[at : at + 64] = data[start : start + 64]
    else:
        del changed[at : at + int(rng.integers(1, 64))]
    return bytes(changed)


def contents(directory: Path) -> list[bytes]:
    """All that opening and reading yields."""
    from formats import TeacherCache

    cache = TeacherCache(directory)
    seen = [json.dumps([cache.manifest.identity, cache.manifest.codec.to_dict()]).encode()]
    for row in cache:
        t = row.teacher
        arrays = [row.input_ids, row.loss_mask, t.offsets, t.token_ids, t.logprobs, t.log_tail_nodes]
        arrays += [t.draws.offsets, t.draws.token_ids, t.draws.logprobs]
        seen.append(row.key + b"".join(np.ascontiguousarray(a).tobytes() for a in arrays))
    return seen


def child(directory: Path, seed: int, trials: int) -> None:
    """Run trials on the caches in `directory` and print counts as JSON; `wrong` holds descriptions of
    anything that must not happen."""
    from formats.errors import FormatError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    rng = np.random.default_rng(seed)
    expected = {cache: contents(cache) for cache in directory.iterdir()}
    files = sorted(directory.glob("*/*"))
    originals = {file: file.read_bytes() for file in files}
    counts: dict[str, int] = {"refused": 0, "identical": 0}
    wrong: list[str] = []
    for trial in range(trials):
        file = files[int(rng.integers(len(files)))]
        file.write_bytes(mutate(originals[file], rng))
        try:
            same = contents(file.parent) == expected[file.parent]
            counts["identical"] += same
            if not same:
                wrong.append(f"seed {seed} trial {trial}: {file.relative_to(directory)} read differently")
        except FormatError:
            counts["refused"] += 1
        except Exception as error:  # every other kind is what this looks for
            where = f"seed {seed} trial {trial}: {file.relative_to(directory)}"
            wrong.append(f"{where}: {type(error).__name__}: {error}")
        file.write_bytes(originals[file])
    print(json.dumps(counts | {"wrong": wrong}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), int(args.child[1]), int(args.child[2]))
        return
    from make_teachers import write_cache

    total = {"refused": 0, "identical": 0, "crashes": 0, "hangs": 0}
    wrong: list[str] = []
    start = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        original = Path(temporary) / "caches"
        for draw_rate in (0, 6):
            cache = original / f"rate-{draw_rate}"
            write_cache(
                cache,
                lengths=[6, 0, 11, 3],
                vocab_size=31,
                rows_per_shard=4,
                rows_per_batch=2,
                min_prob=0.05,  # leaves tails to draw from
                draw_rate=draw_rate,
            )
            (cache / "notes.txt").unlink()
        for number, done in enumerate(range(0, args.trials, BATCH)):
            trials = min(BATCH, args.trials - done)
            work = Path(shutil.copytree(original, Path(temporary) / f"work-{number}"))
            command = [sys.executable, __file__, "--child", str(work), str(args.seed + number), str(trials)]
            try:
                result = subprocess.run(
                    command, capture_output=True, text=True, timeout=60 + SECONDS_PER_TRIAL * trials
                )
            except subprocess.TimeoutExpired:
                total["hangs"] += 1
                continue
            if result.returncode:
                total["crashes"] += 1
                reason = f"exit {result.returncode}: {result.stderr[-300:]}"
                wrong.append(f"seed {args.seed + number}: {reason}")
                continue
            found = json.loads(result.stdout)
            wrong += found.pop("wrong")
            for name, count in found.items():
                total[name] += count
            shutil.rmtree(work)
            print(f"{done + trials:,} trials, {time.time() - start:.0f} s", file=sys.stderr)
    outcome = ", ".join(f"{value:,} {name}" for name, value in total.items())
    print(f"{args.trials:,} mutated caches: {outcome}")
    print(f"neither refused nor identical: {len(wrong)}")
    for line in wrong[:20]:
        print("  " + line)
    sys.exit(bool(wrong or total["crashes"] or total["hangs"]))


if __name__ == "__main__":
    main()
