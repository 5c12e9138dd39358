"""Everything that only a GPU can tell, in a few minutes: ceilings of the card first, then each claim beside them.

    python benchmarks/gpu_smoke.py --out smoke                          # one CUDA device, no network, no vLLM
    python benchmarks/gpu_smoke.py --out smoke --only loss step         # some sections
    python benchmarks/gpu_smoke.py --out smoke --device cpu --tiny      # a trial of the sections: no measurement

A section is a module of benchmarks/gpu with `SECONDS`, its time limit, and `run(report, place)`. Each runs in a process
of its own: a fault of one takes nothing with it. The next one is loaded while one runs, and waits for its turn before
it touches the device. Every finding is printed when it is made (`pass`, `FAIL` or `info`), and DIR/smoke.json is
written anew after every section; logs stay where something failed. The exit code is 0 unless this script itself breaks.
"""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECTIONS = ("ceilings", "gradients", "loss", "reduction", "pooler", "step", "end_to_end", "encoder")
"""By importance: what a budget cuts off is the end."""
SLOWER = 5
"""Times a section's limit: for a trial on a busy CPU."""
LOADING = 120.0
"""Seconds that importing a section may take."""
GRACE = 5.0
"""Seconds between asking a section to end and ending it."""


def write_json(path: Path, content: Any) -> None:
    """Never half-written."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def available() -> list[str]:
    """The sections that are there, in order; others of the folder that have a time limit come last."""
    found = {path.stem: path for path in (HERE / "gpu").glob("*.py") if seconds_of(path) is not None}
    return [name for name in SECTIONS if name in found] + sorted(found.keys() - set(SECTIONS))


def seconds_of(path: Path) -> int | None:
    """`SECONDS` of a module, read without importing it."""
    found = re.search(r"^SECONDS(?:: int)? = (\d+)$", path.read_text(), re.MULTILINE)
    return int(found[1]) if found else None


def ready_mark(out: Path, name: str) -> Path:
    """There while a section is loaded and waits for its turn."""
    return out / f"{name}.ready"


# --- one section, in its own process -------------------------------------------------------------------------


def run_section(name: str, device_name: str, tiny: bool, out: Path) -> None:
    """Import a section, wait for a line on stdin, run it; findings go to stdout and to DIR/NAME.json."""
    import torch
    from gpu.report import Place, Report

    section = importlib.import_module(f"gpu.{name}")
    ready_mark(out, name).touch()
    if not sys.stdin.readline():
        return  # the driver ended
    report = Report(name, lambda findings: write_json(out / f"{name}.json", findings))
    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device(device_name)
    try:
        section.run(report, Place(device, tiny, out))
    except Exception as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        report.failed("section", f"{type(error).__name__}: {str(error)[:600]} ({place})")


class Section:
    """A section's process: loaded at once, started by `run`."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.out = name, args.out
        self.seconds = (seconds_of(HERE / "gpu" / f"{name}.py") or 0) * (SLOWER if args.tiny else 1)
        self.log = args.out / f"{name}.log"
        for left in (args.out / f"{name}.json", ready_mark(args.out, name)):
            left.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--out", str(args.out)]
        command += ["--device", args.device, "--section", name, *(["--tiny"] if args.tiny else [])]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,
        )

    def run(self, limit: float) -> dict[str, Any]:
        """Let it run for `limit` seconds at most; its findings, those of a section that died included."""
        self._await_loading()
        started = time.perf_counter()
        trouble = None
        try:
            if self.process.stdin is not None:
                self.process.stdin.write("go\n")
                self.process.stdin.close()
            code = self.process.wait(limit)
            if code:
                trouble = f"ended with {code}: {self._last_words()}"
        except subprocess.TimeoutExpired:
            trouble = f"ran past its {limit:.0f} s: {self._last_words()}"
        except OSError as error:
            trouble = f"died while loading: {error}: {self._last_words()}"
        self.end()
        path = self.out / f"{self.name}.json"
        findings = json.loads(path.read_text()) if path.exists() else []
        path.unlink(missing_ok=True)  # one file holds them all: some machines hand back a few only
        if trouble is not None:
            # Written here, as importing gpu.report would load torch.
            found = {"verdict": "FAIL", "section": self.name, "name": "process", "value": trouble}
            findings.append({**found, "unit": "", "bound": ""})
            print(f"FAIL {self.name} process: {trouble}", flush=True)
        elif all(finding["verdict"] != "FAIL" for finding in findings):
            self.log.unlink()
        return {"seconds": time.perf_counter() - started, "findings": findings}

    def _await_loading(self) -> None:
        """Wait until the section is loaded, died, or took too long: its time limit begins then."""
        mark, until = ready_mark(self.out, self.name), time.perf_counter() + LOADING
        while not mark.exists() and self.process.poll() is None and time.perf_counter() < until:
            time.sleep(0.05)
        mark.unlink(missing_ok=True)

    def end(self) -> None:
        """End the process and all it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()

    def _last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return " | ".join(lines[-3:])[-600:] or "nothing on stderr"


# --- all of them ---------------------------------------------------------------------------------------------


def run_all(names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Every section in turn while the budget lasts."""
    started = time.perf_counter()
    found: dict[str, Any] = {"device": args.device, "tiny": args.tiny, "sections": {}}
    coming = Section(names[0], args) if names else None
    for number, name in enumerate(names):
        section = coming
        assert section is not None
        after = names[number + 1] if number + 1 < len(names) else None
        left = args.budget - (time.perf_counter() - started)
        if left < 1:
            section.end()
            ready_mark(args.out, name).unlink(missing_ok=True)
            print(f"info {name}: not run, the budget of {args.budget:g} s is spent", flush=True)
            found["sections"][name] = {"seconds": 0.0, "findings": [], "skipped": True}
            coming = Section(after, args) if after else None
            continue
        coming = Section(after, args) if after else None
        print(f"---- {name}, at {time.perf_counter() - started:.0f} s", flush=True)
        found["sections"][name] = section.run(min(section.seconds, left))
        found["seconds"] = time.perf_counter() - started
        write_json(args.out / "smoke.json", found)
    return found


def summary(found: dict[str, Any]) -> str:
    """How many of each verdict, by section, and every failure once more."""
    lines = [f"\n==== {found.get('seconds', 0):.0f} s"]
    failures = []
    for name, section in found["sections"].items():
        verdicts = [finding["verdict"] for finding in section["findings"]]
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("pass", "FAIL", "info"))
        lines.append(
            f"{name:12s} {section['seconds']:5.0f} s  {'not run' if section.get('skipped') else counts}"
        )
        failures += [finding for finding in section["findings"] if finding["verdict"] == "FAIL"]
    for finding in failures:
        value = str(finding["value"])[:300]
        lines.append(
            f"FAIL {finding['section']}: {finding['name']}: {value} {finding['unit']} {finding['bound']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for smoke.json and the logs")
    names = available()
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="SECTION", help=", ".join(names)
    )
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="SECTION")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a trial on a CPU")
    parser.add_argument(
        "--budget", type=float, default=420.0, metavar="SECONDS", help="for all sections together"
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section:
        run_section(args.section, args.device, args.tiny, args.out)
        return
    found = run_all([name for name in names if name in args.only and name not in args.skip], args)
    write_json(args.out / "smoke.json", found)
    print(summary(found), flush=True)


if __name__ == "__main__":
    main()
