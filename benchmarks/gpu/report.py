"""What a section of the GPU smoke run finds: one printed line each, at once, and all of them as data."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """Where a section runs.

    Args:
        device: of everything that is measured.
        tiny: sizes that a CPU finishes in seconds: a trial of the section, not a measurement.
        out: folder for whatever the section wants to leave behind.
    """

    device: torch.device
    tiny: bool
    out: Path


@dataclass(frozen=True)
class Finding:
    """One line: `pass`, `FAIL` or `info`."""

    verdict: str
    section: str
    name: str
    value: float | str | None
    unit: str = ""
    bound: str = ""

    def __str__(self) -> str:
        value = f"{self.value:.6g}" if isinstance(self.value, float) else str(self.value)
        words = (self.verdict.ljust(4), self.section.ljust(10), f"{self.name}:", value, self.unit, self.bound)
        return " ".join(word for word in words if word)


@dataclass
class Report:
    """Collects the findings of a section, and prints each as it comes.

    Args:
        section: its name.
        write: called with all findings so far after each of them.
    """

    section: str
    write: Callable[[list[dict[str, Any]]], None] = lambda findings: None
    findings: list[Finding] = field(default_factory=list)

    def info(self, name: str, value: float | str, unit: str = "") -> None:
        """A figure without a bound."""
        self._add("info", name, value, unit)

    def check(
        self,
        name: str,
        value: float,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """A figure that passes inside its bounds; NaN is outside all of them.

        Raises:
            ValueError: no bound was given: such a check cannot fail.
        """
        if at_most is None and at_least is None:
            raise ValueError(f"a check needs a bound, got none for {name}; use info")
        number = float(value)
        passed = not math.isnan(number)
        passed &= at_most is None or number <= at_most
        passed &= at_least is None or number >= at_least
        bounds = [
            f"{sign} {bound:g}" for sign, bound in (("<=", at_most), (">=", at_least)) if bound is not None
        ]
        self._add("pass" if passed else "FAIL", name, number, unit, f"({' and '.join(bounds)})")

    def failed(self, name: str, why: str) -> None:
        """Something did not work at all."""
        self._add("FAIL", name, why)

    def _add(self, verdict: str, name: str, value: float | str, unit: str = "", bound: str = "") -> None:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1_000_000:
            value = float(value)
        finding = Finding(verdict, self.section, name, value, unit, bound)
        self.findings.append(finding)
        print(finding, flush=True)
        self.write([asdict(each) for each in self.findings])
