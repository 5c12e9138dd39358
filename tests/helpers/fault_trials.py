"""Builds that are killed, starved and raced, and what became of them. Run as a script, one process per kind
of trial.

Every trial forks a child that builds; the child dies, fails or competes; further children run the same
command until the cache is complete; then it is compared, byte for byte, with an undisturbed build, and its
rows with the corpus. The parent stays small and without threads, so that forking it is safe and cheap.

    python tests/helpers/fault_trials.py KIND '{"trials": 20}'     prints one JSON object
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

from deterministic_build import (
    SeededTeacher,
    contents,
    make_config,
    make_rows,
    make_source,
)
from failing_calls import Failing

from cache_builder.build import build_cache
from cache_builder.commit import shard_committer
from cache_builder.commit.signals import BuildInterrupted
from formats.cache import TeacherCache
from formats.disk import row_encoder
from formats.errors import AnnealError

NUM_ROWS, ROWS_PER_SHARD, DRAW_RATE = 40, 10, 8
TRACEBACK_EXIT = 99
building = False
LOG = Path(tempfile.gettempdir()) / f"anneal-faults-{os.getpid()}.log"


def build(
    out: Path,
    *,
    seconds_per_row: float = 0.0,
    step: Callable[[str], None] = lambda name: None,
    **changes: Any,
):
    global building
    config = make_config(out, **{"heartbeat_seconds": 0.05, **changes})
    source = make_source(NUM_ROWS, rows_per_shard=ROWS_PER_SHARD, draw_rate=DRAW_RATE)
    building = True
    report = build_cache(
        config,
        source=source,
        make_teacher=lambda config, source: SeededTeacher(
            seconds_per_row=seconds_per_row, draw_rate=DRAW_RATE
        ),
        step=step,
    )
    building = False
    return report


def fork(out: Path, prepare: Callable[[], None] = lambda: None, **options: Any) -> int:
    """Start a child that builds and exits as the command line would; its errors go to `LOG`."""
    pid = os.fork()
    if pid:
        return pid
    code = 0
    log = open(LOG, "a", buffering=1)  # noqa: SIM115
    try:
        prepare()
        build(out, **options)
    except BuildInterrupted as error:
        log.write(f"{error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        # Before or after the build Ctrl-C is the command line's business; within it, it must not get through.
        code = TRACEBACK_EXIT if building else 128 + signal.SIGINT
    except AnnealError as error:
        log.write(f"{error}\n")
        code = 1 if "\n" not in str(error) else TRACEBACK_EXIT
    except BaseException:
        log.write(traceback.format_exc())
        code = TRACEBACK_EXIT
    finally:
        os._exit(code)


def wait(pid: int, seconds: float = 60.0) -> int:
    """Exit code of the child, negative for a signal; one that hangs is killed and counted as 98."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 98


class Trials:
    """Counts what happened; `check` runs the command to its end and looks at the cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts: Counter[str] = Counter(
            trials=0, rows_lost=0, rows_doubled=0, files_different=0, unclean=0
        )
        self.details: list[str] = []
        reference = root / "reference"
        self.steps: list[str] = []
        build(reference, step=self.steps.append)
        self.expected = contents(reference)
        self.keys = Counter(row.key for row in make_rows(NUM_ROWS))

    def fresh(self) -> Path:
        """A directory for the next trial; the last one's is deleted."""
        out = self.root / "trial"
        shutil.rmtree(out, ignore_errors=True)
        LOG.write_text("")
        self.counts["trials"] += 1
        return out

    def ended(self, code: int, allowed: tuple[int, ...], what: str) -> None:
        """Note a child that ended in another way than it may."""
        if code not in allowed:
            self.counts["unclean"] += 1
            self.details.append(f"{what}: exit {code}: {LOG.read_text()[-2000:]}")

    def check(self, out: Path, what: str) -> None:
        """Run the same command undisturbed, then compare."""
        self.ended(wait(fork(out)), (0,), f"{what}, resumed")
        try:
            found = Counter(row.key for row in TeacherCache(out).rows())
        except AnnealError as error:
            found = Counter()
            self.details.append(f"{what}: {error}")
        self.counts["rows_lost"] += (self.keys - found).total()
        self.counts["rows_doubled"] += (found - self.keys).total()
        if contents(out) != self.expected:
            self.counts["files_different"] += 1
            self.details.append(
                f"{what}: {sorted(set(contents(out).items()) ^ set(self.expected.items()))[:4]}"
            )


def every_step(trials: Trials) -> None:
    """SIGKILL between any two operations of the protocol."""
    for number, name in enumerate(trials.steps):
        out = trials.fresh()
        seen = 0

        def step(current: str, number: int = number) -> None:
            nonlocal seen
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        trials.ended(wait(fork(out, step=step)), (-signal.SIGKILL,), f"killed at step {name}")
        trials.check(out, f"killed at step {name}")
    trials.counts["steps"] = len(trials.steps)


def random_kills(trials: Trials, num_kills: int = 20, seed: int = 0, number: int = signal.SIGKILL) -> None:
    """A signal at a random moment, and again with even odds while it resumes; until so many have hit."""
    generator = random.Random(seed)
    began = time.monotonic()
    wait(fork(trials.fresh(), seconds_per_row=0.002))
    trials.counts["trials"] -= 1
    duration = time.monotonic() - began
    while trials.counts["killed"] < num_kills:
        out = trials.fresh()
        what = f"signal {number} in trial {trials.counts['trials']}"
        while True:
            began = time.monotonic()
            pid = fork(out, seconds_per_row=0.002)
            time.sleep(generator.uniform(0, duration))
            os.kill(pid, number)
            code = wait(pid)
            trials.counts["killed"] += code != 0
            trials.ended(code, (0, -number, 128 + number), what)
            if code == 0:  # it was finished before the signal came: aim earlier
                duration *= 0.97
            if generator.random() < 0.5:
                break
        trials.check(out, what)


OPERATIONS = ("write", "fsync", "replace", "link", "mkdir", "unlink", "rmdir")


def failing_calls(
    trials: Trials, stride: int = 1, codes: tuple[int, ...] = (errno.ENOSPC, errno.EIO)
) -> None:
    """The n-th write, fsync, rename, link, mkdir, unlink or rmdir fails, for every n (or every
    `stride`-th)."""
    flag = trials.root / "struck"
    for kind in OPERATIONS:
        for code in codes:
            number = 1
            while True:
                out = trials.fresh()
                flag.unlink(missing_ok=True)
                failing = Failing(kind, number, code, out, flag)
                what = f"{kind} number {number} fails with {errno.errorcode[code]}"
                trials.ended(wait(fork(out, failing.install)), (0, 1), what)
                if not flag.exists():
                    trials.counts["trials"] -= 1
                    break
                trials.counts[f"failed {kind}"] += 1
                trials.check(out, what)
                number += stride


def concurrent_writers(
    trials: Trials, num_trials: int = 2, num_writers: int = 8, kill: int = 0, seed: int = 0
) -> None:
    """The same command many times at once; `kill` of the processes die at random moments."""
    generator = random.Random(seed)
    for trial in range(num_trials):
        out = trials.fresh()
        pids = [fork(out, seconds_per_row=0.004) for _ in range(num_writers)]
        victims = set(generator.sample(pids, kill))
        for pid in victims:
            time.sleep(generator.uniform(0, 0.3))
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            allowed = (0, -signal.SIGKILL) if pid in victims else (0,)
            trials.ended(wait(pid), allowed, f"writer of trial {trial}")
        trials.check(out, f"{num_writers} writers, trial {trial}")
    trials.counts["writers"] = num_writers


def jumping_clock(trials: Trials, num_trials: int = 2, seed: int = 0) -> None:
    """Three writers whose wall clocks jump by years in either direction at every look."""
    for trial in range(num_trials):
        out = trials.fresh()

        def jump(trial: int = trial) -> None:
            generator = random.Random(f"{seed} {trial} {os.getpid()}")
            real = time.time

            def jumping() -> float:
                return real() + generator.uniform(-1e8, 1e8)

            time.time = jumping
            time.time_ns = lambda: int(jumping() * 1e9)

        for pid in [fork(out, jump, seconds_per_row=0.002) for _ in range(3)]:
            trials.ended(wait(pid), (0,), f"jumping clock, trial {trial}")
        trials.check(out, f"jumping clock, trial {trial}")


def full_disk(trials: Trials) -> None:
    """A real file system without room (tmpfs, where we may mount one), else a limit on the size of files."""
    mount = trials.root / "small"
    mount.mkdir()
    needed = sum(path.stat().st_size for path in (trials.root / "reference").iterdir())
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={needed}", "tmpfs", str(mount)], capture_output=True
        ).returncode
        == 0
    )
    trials.counts["tmpfs"] = int(mounted)
    try:
        for kilobytes in [needed * k // 8 >> 10 for k in range(1, 8)] if mounted else (1, 2, 4):
            trials.fresh()
            out = (mount if mounted else trials.root) / "trial"
            shutil.rmtree(out, ignore_errors=True)

            def limit(kilobytes: int = kilobytes) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))

            if mounted:
                subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(mount)], check=True)
            code = wait(fork(out) if mounted else fork(out, limit))
            trials.ended(code, (1,), f"full disk at {kilobytes} KiB")
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
            trials.check(out, f"full disk at {kilobytes} KiB")
    finally:
        if mounted:
            subprocess.run(["umount", str(mount)], check=True)


KINDS: dict[str, Callable[..., None]] = {
    "every step": every_step,
    "random kills": random_kills,
    "failing calls": failing_calls,
    "concurrent writers": concurrent_writers,
    "jumping clock": jumping_clock,
    "full disk": full_disk,
}


def run(kind: str, threads: int = 1, **options: Any) -> dict[str, Any]:
    """All trials of one kind, in this process; counts and what went wrong. Builds are encoded by so many threads, the
    one that they are compared with by one."""
    shard_committer.encoder_threads = lambda: 1
    with tempfile.TemporaryDirectory(prefix="anneal-faults-") as root:
        trials = Trials(Path(root))
        shard_committer.encoder_threads = lambda: threads
        row_encoder.GROUP_NUMBERS = 1 << 16 if threads == 1 else 64  # some ten groups a shard
        began = time.monotonic()
        try:
            KINDS[kind](trials, **options)
        finally:
            LOG.unlink(missing_ok=True)
        return {
            "kind": kind,
            **trials.counts,
            "seconds": round(time.monotonic() - began, 1),
            "details": trials.details[:10],
        }


def run_apart(kind: str, timeout: float = 3600, **options: Any) -> dict[str, Any]:
    """`run` in a process of its own, which is small enough to be forked safely."""
    result = subprocess.run(
        [sys.executable, __file__, kind, json.dumps(options)], capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"))))
