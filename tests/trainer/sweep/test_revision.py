"""A sweep from a revision of a hub model that is not its newest one: trained, merged and compared from the same one."""

import json
import shutil
from pathlib import Path

import pytest
from caches import write_cache
from pool_here import InThisProcess
from runs import QUICK, copy_model, noise

from formats.identity.fingerprint import ModelFingerprint
from trainer.sweep.config import sweep_from_options
from trainer.sweep.sweep import run_sweep

NAME = "someone/tiny"


@pytest.fixture
def hub(tiny_llama_dir, tmp_path, monkeypatch) -> Path:
    """What was fetched of a hub model: `first`, which the caches are of, and `main`, which has other weights."""
    folder = tmp_path / "hub" / "models--someone--tiny"
    for commit, ref in (("a" * 40, "first"), ("b" * 40, "main")):
        snapshot = folder / "snapshots" / commit
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        if ref == "first":
            shutil.copytree(tiny_llama_dir, snapshot)
        else:
            copy_model(tiny_llama_dir, snapshot, noise(1))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder / "snapshots" / ("a" * 40)


def test_every_step_takes_the_revision(hub, llama_cache, tiny_llama_dir, tmp_path):
    text = str(write_cache(tmp_path / "text", tiny_llama_dir, num_rows=3))
    config = sweep_from_options(
        str(llama_cache),
        model=NAME,
        out=str(tmp_path / "out"),
        overrides=[*QUICK, "revision=first"],
        source={"source": text},
        target={"target": text},
        merge=["wise-ft:0.5"],
    )
    report = run_sweep(config, pool=InThisProcess())
    assert not report.failed and report.comparison.initial == "tiny"
    assert report.comparison.line("tiny").cells["source:source"].details["kl"] < 1e-6
    merged = tmp_path / "out" / "merges" / "direct+wise-ft,alpha=0.5"
    teacher = json.loads((merged / "anneal.json").read_text())["identity"]["teacher"]
    assert teacher["name"] == NAME and teacher["weights"] == ModelFingerprint.of(hub).weights
