"""Fine-tuning at fixed learning rates over models: does each one forget more than the one before it?

Springer et al. 2025, section 3.2: the checkpoints of one pretraining run are all tuned at the same rates. `anneal probe
tune` adds kl_coef beside the rate: whether label annealing delays catastrophic overtraining is the same table with
another line.

caches/LABEL           the tuning text by each model, where KL needs it (or once, by the first model, where it does not)
runs/LABEL/KL,RATE     ordinary run directories
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from formats.errors import ConfigError, naming
from formats.identity.fingerprint import resolve_model
from formats.progress import Progress
from formats.table import aligned
from trainer.chain.caches import Build, CacheMaker, Look, require_caches
from trainer.chain.plan import PlacedRun
from trainer.chain.readings import read_model
from trainer.checks import check_output
from trainer.evaluation.weight_distance import weight_distance
from trainer.recipe import resolve_training
from trainer.sweep.names import number_text
from trainer.sweep.pools import LocalPool, Pool
from trainer.sweep.runs import Runs, is_finished, require_same
from trainer.sweep.sweep import held

REGIMES = {
    "constant": "the best rate is the same for all models",
    "slowly decreasing": "the best rate falls by one step of the grid in all",
    "quickly decreasing": "the best rate falls by more than one step of the grid",
    "rising": "the best rate rises",
    "back and forth": "the best rate of the last model is that of the first, and others have another",
}
"""Their Fig. 7, and those that it does not have."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What is tuned.

    Raises:
        ConfigError: a list is empty or holds a number that is none of its kind; `training` has a learning rate.
    """

    models: Mapping[str, tuple[str, str | None]]
    """Label -> (model, revision), in the order of pretraining."""
    text: str
    """What is learnt: a corpus, or, without KL, a cache."""
    source: Mapping[str, str]
    """Name -> cache of held-out text like that of pretraining."""
    target: Mapping[str, str]
    """Name -> cache of held-out text of what is learnt."""
    out: str
    learning_rates: Sequence[float]
    kl_coefs: Sequence[float] = (0.0,)
    training: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_output("--out", self.out, "a directory")
        for name, numbers, low, rule in (
            ("--lr", self.learning_rates, 1e-30, "above 0"),
            ("--kl-coef", self.kl_coefs, 0.0, "of at least 0"),
        ):
            if not numbers or any(not low <= number < float("inf") for number in numbers):
                raise ConfigError(f"{name} must be numbers {rule}, got {list(numbers)}")
            if len(set(numbers)) < len(numbers):
                raise ConfigError(f"{name} must name each number once, got {list(numbers)}")
        if "learning_rate" in self.training:
            raise ConfigError(
                "--lr gives the learning rates, so training.learning_rate must be left out, got "
                f"{self.training['learning_rate']}"
            )
        for name, texts in (("--source", self.source), ("--target", self.target)):
            if not texts:
                raise ConfigError(f"{name} needs held-out text, got none; write {name} NAME=CACHE")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One model at one rate and strength."""

    label: str
    kl_coef: float
    learning_rate: float
    lost: float
    """Mean over source texts of the cross-entropy after tuning less that before, in nats."""
    source_ce: float
    target_ce: float
    distance: float
    """||theta - theta0||."""


@dataclass(kw_only=True)
class TuneReport:
    """Every finished run."""

    config: TuneConfig
    before: Mapping[str, tuple[float, float]]
    """Label -> (source, target) cross-entropy before tuning."""
    runs: Sequence[Tuned]
    failed: Mapping[str, str]

    def best(self, kl_coef: float) -> dict[str, Tuned]:
        """Label -> the rate of lowest target loss."""
        found = {}
        for label in self.config.models:
            runs = [run for run in self.runs if run.label == label and run.kl_coef == kl_coef]
            if runs:
                found[label] = min(runs, key=lambda run: run.target_ce)
        return found

    def regime(self, kl_coef: float) -> str | None:
        """Which one of `REGIMES`, of the best rate over models; None with fewer than two models or rates."""
        grid = sorted(self.config.learning_rates)
        if len(grid) < 2:
            return None
        places = [grid.index(run.learning_rate) for run in self.best(kl_coef).values()]
        return regime_of(places)

    def forgets_more(self, kl_coef: float, rate: float) -> bool | None:
        """Whether at a fixed rate every model loses more than the one before it; None with fewer than two."""
        lost = [run.lost for run in self.runs if (run.kl_coef, run.learning_rate) == (kl_coef, rate)]
        return None if len(lost) < 2 else all(b > a for a, b in pairwise(lost))

    def text(self) -> str:
        """For people."""
        rows: list[tuple[str, ...]] = [
            ("model", "kl_coef", "lr", "nats lost", "source nats", "target nats", "distance", "")
        ]
        of_rates = len(self.config.learning_rates) > 1
        best = {id(run) for kl in self.config.kl_coefs for run in self.best(kl).values() if of_rates}
        for run in self.runs:
            rows.append(
                (
                    run.label,
                    number_text(run.kl_coef),
                    number_text(run.learning_rate),
                    f"{run.lost:+.4f}",
                    f"{run.source_ce:.4f}",
                    f"{run.target_ce:.4f}",
                    f"{run.distance:.3f}",
                    "<- best target" if id(run) in best else "",
                )
            )
        parts = [aligned(rows)]
        lines = []
        for kl in self.config.kl_coefs:
            if (regime := self.regime(kl)) is not None:
                lines.append(f"kl_coef {number_text(kl)}: {regime}: {REGIMES[regime]}")
            for rate in self.config.learning_rates:
                more = self.forgets_more(kl, rate)
                if more is not None:
                    what = (
                        "every model forgets more than the one before"
                        if more
                        else "forgetting does not rise throughout"
                    )
                    lines.append(f"kl_coef {number_text(kl)}, lr {number_text(rate)}: {what}")
        parts += ["\n".join(lines)] if lines else []
        parts += [f"failed: {name}: {line}" for name, line in sorted(self.failed.items())]
        parts.append("nats lost: on the source, against the same model before tuning; one seed")
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        return {
            "before": [
                {"label": label, "source_ce": s, "target_ce": t} for label, (s, t) in self.before.items()
            ],
            "runs": [asdict(run) for run in self.runs],
            "regime": {number_text(kl): self.regime(kl) for kl in self.config.kl_coefs},
            "failed": dict(self.failed),
        }


def regime_of(places: Sequence[int]) -> str | None:
    """From the places of the best rates in the grid, over models."""
    if len(places) < 2:
        return None
    fall = places[0] - places[-1]
    if fall < 0:
        return "rising"
    if fall == 0:
        return "constant" if len(set(places)) == 1 else "back and forth"
    return "slowly decreasing" if fall == 1 else "quickly decreasing"


def probe_tune(
    config: TuneConfig,
    *,
    build: Build | None = None,
    look: Look | None = None,
    pool: Pool | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> TuneReport:
    """Tune every model at every rate and strength, and measure; finished runs are skipped.

    Raises:
        AnnealError: before anything runs, what is wrong. A run that fails is no error: it is in the report.
        SweepStopped: SIGINT or SIGTERM ended it.
    """
    progress, out = progress or Progress(), Path(config.out)
    directories = {
        label: resolve_model(model, revision, what="MODEL")
        for label, (model, revision) in config.models.items()
    }
    maker = CacheMaker(out=out, options=config.build, build=build, look=look)
    first = next(iter(config.models))
    maker.check(config.text, "--text", maker.place(first, config.text))
    require_caches(config.source, "--source")
    require_caches(config.target, "--target")
    with_kl = any(config.kl_coefs)
    if with_kl and len(config.models) > 1 and maker.place(first, config.text) == config.text:
        raise ConfigError(
            f"--kl-coef needs a cache by each model, so --text must be a corpus, got the finished cache {config.text}"
        )
    maker.refuse_idle(config.text)
    places = {label: maker.place(label if with_kl else first, config.text) for label in config.models}
    runs = [
        _run(config, label, kl_coef, rate, places[label])
        for label in config.models
        for kl_coef in config.kl_coefs
        for rate in config.learning_rates
    ]
    with held(out, "probe"):
        for label in config.models if with_kl else [first]:
            maker.make(config.text, str(directories[label]), places[label])
        pool_runs = Runs(out, pool or LocalPool(), progress)
        for run in runs:
            require_same(run, out)
        pool_runs.complete(runs, "tuning")
        return _measure(config, directories, runs, pool_runs.failed, limit, progress)


def _run(config: TuneConfig, label: str, kl_coef: float, rate: float, cache: str) -> PlacedRun:
    model, revision = config.models[label]
    name = f"runs/{label}/kl_coef={number_text(kl_coef)},lr={number_text(rate)}"
    training = {"save_strategy": "no", **copy.deepcopy(dict(config.training)), "learning_rate": rate}
    settings = {
        "cache": cache,
        "model": model,
        "revision": revision,
        "kl_coef": kl_coef,
        "training": training,
    }
    varied = {"label": label, "kl_coef": kl_coef, "learning_rate": rate}
    run = PlacedRun(name=name, settings=settings, varied=varied, direct=not kl_coef)
    with naming(name):
        resolve_training(run.config(Path(config.out)))
    return run


def _measure(
    config: TuneConfig,
    directories: Mapping[str, Path],
    runs: Sequence[PlacedRun],
    failed: Mapping[str, str],
    limit: int | None,
    progress: Progress,
) -> TuneReport:
    out = Path(config.out)
    texts = {f"source {name}": text for name, text in config.source.items()}
    texts |= {f"target {name}": text for name, text in config.target.items()}

    def read(label: str, directory: Path) -> tuple[float, float]:
        found = read_model(label, directory, texts, out / "evaluations", limit=limit, progress=progress)
        means = []
        for side in ("source ", "target "):
            values = [float(result["ce"]) for name, result in found.items() if name.startswith(side)]
            means.append(sum(values) / len(values))
        return means[0], means[1]

    before = {label: read(label, directory) for label, directory in directories.items()}
    tuned = []
    for run in runs:
        if not is_finished(run.directory(out)):
            continue
        label = run.varied["label"]
        source, target = read(run.name.removeprefix("runs/"), run.directory(out))
        tuned.append(
            Tuned(
                label=label,
                kl_coef=run.varied["kl_coef"],
                learning_rate=run.varied["learning_rate"],
                lost=source - before[label][0],
                source_ce=source,
                target_ce=target,
                distance=weight_distance(run.directory(out), directories[label]).absolute,
            )
        )
    return TuneReport(config=config, before=before, runs=tuned, failed=dict(failed))
