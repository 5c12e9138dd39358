"""The runs that retention.py compares: every method at a few strengths, on one recipe.

A `Run` is trained from a cache; a `Merged` is put together from finished runs. Strengths were chosen so that
a method's own trade-off is visible. Methods that act while training have two strengths at the common rate,
and the stronger one at twice that rate too: what holds a model back may be spent on learning faster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

RECIPE: Mapping[str, Any] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "learning_rate": 5e-4,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""The demo's recipe at a rate at which direct fine-tuning learns; a run may differ in its rate or seed."""
FISHER_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run."""

    family: str
    """The method; runs of one family are joined in the picture."""
    strength: str
    """What sets it apart within its family."""
    kl_coef: float = 0.0
    """0 is direct fine-tuning."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Over `RECIPE`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of `anneal train`; SOURCE stands for the cache of source text."""

    @property
    def label(self) -> str:
        """Its name in the table and the picture."""
        return f"{self.family}, {self.strength}"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One merged model."""

    family: str
    """The method."""
    strength: str
    """What sets it apart within its family."""
    method: str
    """Of `anneal merge`."""
    tuned: Sequence[str]
    """Labels of the runs that are merged."""
    strengths: Mapping[str, Any]
    """Of `MergeConfig`."""

    @property
    def label(self) -> str:
        """Its name in the table and the picture."""
        return f"{self.family}, {self.strength}"


SOURCE = "{source}"


def _replay(weight: float) -> list[dict[str, Any]]:
    return [{"path": SOURCE, "weight": weight, "loss": "ce"}]


DIRECT, AGAIN, HIGHER = "direct, lr 5e-4", "direct, lr 5e-4 (seed 1)", "direct, lr 1e-3"
"""The runs that are merged."""


def _three(
    family: str, weak: tuple[str, dict[str, Any]], strong: tuple[str, dict[str, Any]], kl_coef: float = 0.0
) -> list[Run]:
    """A method at two strengths, and the stronger one at twice the learning rate as well."""
    common = partial(Run, family=family, kl_coef=kl_coef)
    return [
        common(strength=weak[0], settings=weak[1]),
        common(strength=strong[0], settings=strong[1]),
        common(strength=f"{strong[0]}, lr 1e-3", settings=strong[1], training={"learning_rate": 1e-3}),
    ]


def _ewc(coef: float) -> dict[str, Any]:
    return {"ewc": {"coef": coef, "cache": SOURCE, "num_rows": FISHER_ROWS}}


RUNS: tuple[Run, ...] = (
    *(
        Run(family="direct", strength=f"lr {rate}", training={"learning_rate": float(rate)})
        for rate in ("3e-4", "5e-4", "1e-3")
    ),
    Run(family="direct", strength="lr 5e-4 (seed 1)", training={"seed": 1}),
    *(
        Run(
            family="LoRA",
            strength=f"r 16, lr {rate}",
            training={"learning_rate": float(rate)},
            settings={"lora": {"r": 16}},
        )
        for rate in ("2e-3", "4e-3")
    ),
    *_three("L2", ("coef 0.1", {"l2": {"coef": 0.1}}), ("coef 0.3", {"l2": {"coef": 0.3}})),
    *_three("EWC", ("coef 100", _ewc(100.0)), ("coef 1000", _ewc(1000.0))),
    *_three(
        "SFA",
        ("beta 0.1", {"sfa": {"beta": 0.1, "period": 0.25}}),
        ("beta 0.25", {"sfa": {"beta": 0.25, "period": 0.25}}),
    ),
    *_three("replay", ("10%", {"caches": _replay(0.1)}), ("30%", {"caches": _replay(0.3)})),
    Run(family="label annealing", strength="kl_coef 1", kl_coef=1.0),
    Run(family="label annealing", strength="kl_coef 4", kl_coef=4.0),
    Run(
        family="label annealing",
        strength="kl_coef 4, lr 1e-3",
        kl_coef=4.0,
        training={"learning_rate": 1e-3},
    ),
    Run(
        family="label annealing + replay",
        strength="kl_coef 1, 10%",
        kl_coef=1.0,
        settings={"caches": _replay(0.1)},
    ),
)


def _merged(family: str, method: str, tuned: tuple[str, ...], note: str = "", **strengths: Any) -> Merged:
    words = ", ".join(f"{name} {value:g}" for name, value in strengths.items() if name != "trim")
    return Merged(
        family=family,
        strength=words + note,
        method=method,
        tuned=tuned,
        strengths=strengths,
    )


MERGES: tuple[Merged, ...] = (
    _merged("WiSE-FT", "wise-ft", (DIRECT,), alpha=0.75),
    _merged("WiSE-FT", "wise-ft", (DIRECT,), alpha=0.5),
    _merged("WiSE-FT", "wise-ft", (HIGHER,), ", lr 1e-3", alpha=0.5),
    _merged("task arithmetic", "task-arithmetic", (DIRECT, AGAIN), scale=0.5),
    _merged("task arithmetic", "task-arithmetic", (DIRECT, AGAIN), scale=0.3),
    _merged("TIES", "ties", (DIRECT, AGAIN), density=0.2, scale=1.0, trim="tensor"),
    _merged("TIES", "ties", (DIRECT, AGAIN), density=0.5, scale=1.0, trim="tensor"),
    _merged("TIES", "ties", (DIRECT, AGAIN), density=0.5, scale=0.5, trim="tensor"),
)


def one_of_each(entries: Sequence[Any]) -> list[Any]:
    """The first of every family, and what merges need: enough to see that everything runs."""
    seen: set[str] = set()
    chosen = []
    for entry in entries:
        if entry.family not in seen or entry.label in (DIRECT, AGAIN):
            chosen.append(entry)
        seen.add(entry.family)
    return chosen
