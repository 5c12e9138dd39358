"""The matrix alone, of finished models of any origin in their order: what did each release lose?"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.disk.durable import atomic_write_json
from formats.errors import ConfigError
from formats.finite_json import finite_json
from formats.identity.fingerprint import resolve_model
from formats.named_path import short_name
from formats.progress import Progress
from formats.table import aligned
from trainer.chain.caches import Build, CacheMaker, Look, require_caches
from trainer.chain.config import ChainConfig
from trainer.chain.plan import heldout_needs
from trainer.chain.readings import read_model
from trainer.chain.report import REPORT_NAME, ChainReport, Row, cells_table
from trainer.sweep.sweep import held


@dataclass(kw_only=True)
class ReleaseReport:
    """Models in their order, texts, and what became worse."""

    columns: Sequence[str]
    rows: Sequence[Row]
    metric: str = "ce"

    @property
    def goodness(self) -> np.ndarray:
        """[models, texts], higher is better."""
        return np.stack([row.goodness(self.columns, self.metric) for row in self.rows])

    def lost(self) -> dict[str, dict[str, Any]]:
        """Text -> how the last model stands to the best one before it.

        `lost` is positive where an earlier model was better: max over earlier models of R minus R of the last one.
        `worst_step` names the model that lost most against the one before it.
        """
        R, found = self.goodness, {}
        for number, column in enumerate(self.columns):
            best = int(np.argmax(R[:-1, number]))
            with np.errstate(invalid="ignore"):  # from one diverged model to another is no step
                steps = np.nan_to_num(np.diff(R[:, number]), nan=0.0, posinf=np.inf, neginf=-np.inf)
            worst = int(np.argmin(steps))
            found[column] = {
                "lost": float(R[best, number] - R[-1, number]),
                "best": self.rows[best].label,
                "worst_step": self.rows[worst + 1].label if steps[worst] < 0 else None,
                "step": float(steps[worst]) if steps[worst] < 0 else 0.0,
            }
        return found

    def text(self) -> str:
        """For people."""
        unit = "accuracy" if self.metric == "accuracy" else "nats"
        losses = [("text", f"{unit} lost", "since", "most of it by", "in that step")]
        for column, found in self.lost().items():
            step = "-" if found["worst_step"] is None else f"{-found['step']:.4f}"
            losses.append((column, f"{found['lost']:+.4f}", found["best"], found["worst_step"] or "-", step))
        return (
            cells_table(self.rows, self.columns, self.metric)
            + "\n\n"
            + aligned(losses)
            + f"\n\nlost: the best earlier model minus {self.rows[-1].label}, above zero where something was forgotten"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        shown = {
            "columns": list(self.columns),
            "metric": self.metric,
            "rows": [{"label": row.label, "kind": row.kind, "directory": row.directory} for row in self.rows],
            "R": self.goodness.tolist(),
            "lost": self.lost(),
        }
        return finite_json(shown)


def free_label(model: str, taken: Collection[str]) -> str:
    """What the initial model is called: the last part of its name, if no other one is called that."""
    names = itertools.chain([short_name(model), "initial"], (f"initial-{n}" for n in itertools.count(2)))
    return next(name for name in names if name not in taken)


def read_releases(
    models: Mapping[str, str],
    texts: Mapping[str, str],
    out: Path,
    *,
    initial: str | None = None,
    metric: str = "ce",
    limit: int | None = None,
    progress: Progress | None = None,
) -> ReleaseReport:
    """Evaluate models in their order on held-out texts.

    Args:
        models: label -> directory or hub name, the oldest first.
        texts: name -> cache.
        out: remembers evaluations and takes matrix.json.
        initial: a model before all of them.

    Raises:
        ConfigError: fewer than two models, no text, or `out` is the directory of a chain.
        AnnealError: as `evaluate`.
    """
    if initial is not None:
        models = {free_label(initial, models): initial, **models}
    if len(models) < 2:
        raise ConfigError(
            f"a report on releases needs two models at least, got {len(models)}; name the one before with --initial"
        )
    if not texts:
        raise ConfigError("a report on releases needs held-out texts, got none; write --heldout NAME=CACHE")
    require_caches(texts, "--heldout")
    if (out / "stages").exists():
        raise ConfigError(
            f"a report on releases takes a directory of its own, got {out}, the matrix of whose chain it would "
            "overwrite; choose another --out"
        )
    directories = {
        label: resolve_model(model, what="--initial" if model == initial else "MODEL")
        for label, model in models.items()
    }
    with held(out, "report"):
        rows = []
        for number, (label, directory) in enumerate(directories.items()):
            kind = "initial" if number == 0 and initial is not None else "release"
            results = read_model(label, directory, texts, out / "evaluations", limit=limit, progress=progress)
            rows.append(Row(label=label, kind=kind, directory=str(directory), results=results))
        report = ReleaseReport(columns=list(texts), rows=rows, metric=metric)
        atomic_write_json(out / REPORT_NAME, report.to_dict())
    return report


def read_finished(
    config: ChainConfig,
    *,
    build: Build | None = None,
    look: Look | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ChainReport:
    """The whole report of a chain whose stages were made elsewhere (`tasks: {NAME: {model: DIR, heldout: CACHE}}`).

    Raises:
        ConfigError: the initial model is missing.
        AnnealError: as `evaluate`.
    """
    if config.model is None:
        raise ConfigError("a chain of finished models needs the initial one too; add model (--model)")
    out = Path(config.out)
    needs = heldout_needs(config, maker := CacheMaker(out=out, options=config.build, build=build, look=look))
    maker.refuse_idle(*(need.text for need in needs.values()))
    stages = {
        f"{number}-{task}": (str(entry.model), "stage", task)
        for number, (task, entry) in enumerate(config.tasks.items(), 1)
    }
    models: dict[str, tuple[str, str, str | None]] = {
        free_label(config.model, stages): (config.model, "initial", None),
        **stages,
    }
    directories = {
        label: resolve_model(model, what=f"tasks.{task}.model" if task else "--model")
        for label, (model, _, task) in models.items()
    }
    with held(out, "chain"):
        for need in needs.values():
            maker.make(need.text, need.model, need.place)
        texts = {name: need.place for name, need in needs.items()}
        rows = []
        for number, (label, (_, kind, learnt)) in enumerate(models.items()):
            results = read_model(
                label, directories[label], texts, out / "evaluations", limit=limit, progress=progress
            )
            rows.append(
                Row(
                    label=label,
                    kind=kind,
                    directory=str(directories[label]),
                    results=results,
                    stage=number,
                    task=learnt,
                )
            )
        report = ChainReport(config=config, columns=list(texts), rows=rows, failed={})
        atomic_write_json(out / REPORT_NAME, report.to_dict())
    return report
