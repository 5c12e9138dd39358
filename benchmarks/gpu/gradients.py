"""The tests of the loss with everything on the device, against the same float64 references and tolerances."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from gpu.report import Place, Report

SECONDS: int = 100
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("tests/trainer/loss")
FILES = (
    "test_loss.py",
    "test_loss_draws.py",
    "test_kl_weights.py",
    "test_token_weights.py",
    "test_token_measures.py",
    "test_loss_integration.py",
    "test_accumulate.py",
)
TRITON = "loss_triton_cases.py"
NOT_HERE = "compiled or initial_model or model_over_batches or missing_is_refused"
"""What compiles for a CPU, runs a whole model, or says which kernel this machine lacks."""
SHOWN = 12
"""Failures listed one by one."""


def run(report: Report, place: Place) -> None:
    on_gpu = place.device.type == "cuda"
    chosen = "test_every_kind_of_head and padding" if place.tiny else f"not ({NOT_HERE})"
    # On a CPU `cpu:0` takes the way that a GPU takes.
    environment = {"ANNEAL_TEST_DEVICE": "cuda" if on_gpu else "cpu:0"}
    files = [str(FOLDER / name) for name in FILES]
    run_tests(report, place, "torch", files, chosen, environment, at_least=10 if place.tiny else 300)
    chosen = "test_reverse and plain" if place.tiny else ""
    environment = {"TRITON_INTERPRET": "0" if on_gpu else "1"}
    run_tests(
        report,
        place,
        "triton",
        [str(FOLDER / TRITON)],
        chosen,
        environment,
        at_least=4 if place.tiny else 100,
    )


def run_tests(
    report: Report,
    place: Place,
    kernel: str,
    files: list[str],
    chosen: str,
    environment: dict[str, str],
    *,
    at_least: int,
) -> None:
    """One run of pytest; its failures, one line each."""
    results = place.out / f"gradients-{kernel}.xml"
    results.unlink(missing_ok=True)
    workers = [] if place.tiny else ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    command += [f"--junitxml={results}", *(["-k", chosen] if chosen else []), *files]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (place.out / f"gradients-{kernel}.log").write_text(done.stdout)
    if not results.exists():
        report.failed(f"{kernel}: pytest", done.stdout[-500:])
        return
    cases = list(ET.parse(results).getroot().iter("testcase"))
    failures = [
        (case.get("name", ""), found)
        for case in cases
        for found in (case.find("failure"), case.find("error"))
        if found is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    report.check(f"{kernel}: tests run", len(cases) - skipped, at_least=at_least)
    report.check(f"{kernel}: tests failed", len(failures), f"of {len(cases)}", at_most=0)
    for name, found in failures[:SHOWN]:
        message = re.sub(r"\s+", " ", found.get("message", ""))
        report.failed(f"{kernel}: {name}", message[:240])
