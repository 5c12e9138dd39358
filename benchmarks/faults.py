"""Faults a build survives: tried, rows lost, rows doubled, files that differ from an undisturbed build.

    python benchmarks/faults.py             all of it, about half an hour on two cores
    python benchmarks/faults.py --quick     a tenth of it

Every trial kills, starves or races real builds of a deterministic teacher, resumes with the same command and
compares the result byte for byte (tests/helpers/fault_trials.py). Prints the table of docs/reliability.md;
exits with 1 if a single figure but the number of trials is not 0.
"""

import argparse
import errno
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "tests" / "helpers"),
]

from fault_trials import run_apart  # noqa: E402

FIGURES = ("rows_lost", "rows_doubled", "files_different", "unclean")


def plan(share: float) -> list[tuple[str, str, dict[str, Any]]]:
    """What is tried: description, kind of trial, options. `share` scales the numbers of trials."""

    def times(number: int) -> int:
        return max(2, round(number * share))

    stride = max(1, round(1 / share))
    return [
        ("SIGKILL at every step of the protocol", "every step", {}),
        ("SIGKILL at random moments, resumed, killed again", "random kills", {"num_kills": times(200)}),
        ("SIGTERM at random moments", "random kills", {"num_kills": times(50), "number": signal.SIGTERM}),
        ("Ctrl-C at random moments", "random kills", {"num_kills": times(50), "number": signal.SIGINT}),
        ("the n-th write, fsync, rename, link, mkdir, unlink or rmdir fails: disk full", "failing calls",
         {"stride": stride, "codes": [errno.ENOSPC]}),
        ("the same: I/O error", "failing calls", {"stride": stride, "codes": [errno.EIO]}),
        ("eight writers at once", "concurrent writers", {"num_trials": times(20)}),
        ("eight writers, four of them killed", "concurrent writers", {"num_trials": times(20), "kill": 4}),
        ("wall clocks that jump by years", "jumping clock", {"num_trials": times(10)}),
        ("a full disk (tmpfs)", "full disk", {}),
    ]  # fmt: skip


def main() -> int:
    """Run everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    arguments = parser.parse_args()
    print("| fault | tried | rows lost | rows doubled | files that differ | unclean exits |")
    print("|---|---|---|---|---|---|")
    bad = 0
    for what, kind, options in plan(0.1 if arguments.quick else 1.0):
        result = run_apart(kind, **options)
        tried = max(result["trials"], result.get("killed", 0))  # a trial may be killed several times
        print(
            f"| {what} | {tried} | " + " | ".join(str(result[name]) for name in FIGURES) + " |",
            flush=True,
        )
        for detail in result["details"]:
            print(detail, file=sys.stderr)
        bad += sum(result[name] for name in FIGURES)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
