"""The smoke run's driver: a section that dies, hangs or fails takes nothing with it; no check passes by accident."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SECTIONS = {
    "ceilings": "report.check('two', 2, 'GB/s', at_most=2)",
    "gradients": "report.info('before', 1.0); import os; os.kill(os.getpid(), 11)",
    "loss": "report.check('one', 1, at_least=2); import time; time.sleep(600)",
    "step": "raise ValueError('of its own')",
    "last": "report.info('still here', str(place.tiny))",
}
"""Name -> what it does; `last` is one that the driver does not know by name."""


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """(stdout, smoke.json, names of the files left) of a run over sections of all kinds."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "gpu").mkdir()
    shutil.copy(BENCHMARKS / "gpu_smoke.py", folder)
    for name in ("__init__.py", "report.py"):
        shutil.copy(BENCHMARKS / "gpu" / name, folder / "gpu")
    for name, body in SECTIONS.items():
        source = f"SECONDS: int = 2\n\n\ndef run(report, place):\n    {body}\n"
        (folder / "gpu" / f"{name}.py").write_text(source)
    command = [sys.executable, str(folder / "gpu_smoke.py"), "--out", str(folder / "out"), "--device", "cpu"]
    done = subprocess.run([*command, "--tiny"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    left = sorted(path.name for path in (folder / "out").iterdir())
    return done.stdout, json.loads((folder / "out" / "smoke.json").read_text()), left


def test_every_section_runs_whatever_became_of_the_others(smoke):
    printed, found, _ = smoke
    assert list(found["sections"]) == ["ceilings", "gradients", "loss", "step", "last"]
    verdicts = {
        name: [(f["verdict"], f["name"]) for f in part["findings"]]
        for name, part in found["sections"].items()
    }
    assert verdicts == {
        "ceilings": [("pass", "two")],
        "gradients": [("info", "before"), ("FAIL", "process")],
        "loss": [("FAIL", "one"), ("FAIL", "process")],
        "step": [("FAIL", "section")],
        "last": [("info", "still here")],
    }
    assert (
        "ended with -11" in printed and "ran past its 10 s" in printed and "ValueError: of its own" in printed
    )
    assert "pass ceilings   two: 2 GB/s (<= 2)" in printed


def test_one_file_holds_everything_beside_the_logs_of_failures(smoke):
    assert smoke[2] == ["gradients.log", "loss.log", "smoke.json", "step.log"]


def test_no_number_passes_that_is_none(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gpu.report import Report

    report = Report("here")
    report.check("nan", math.nan, at_most=1)
    report.check("too large", 2, at_most=1)
    report.check("inside", 1, at_least=1, at_most=1)
    assert [finding.verdict for finding in report.findings] == ["FAIL", "FAIL", "pass"]
    with pytest.raises(ValueError, match="needs a bound"):
        report.check("anything", 1)
    assert capsys.readouterr().out.count("\n") == 3
