"""Noise over models and strengths: the table, what it says, and a picture."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formats.finite_json import finite_json
from formats.picture_file import new_figure, require_plottable, save_figure
from formats.progress import counted
from formats.table import aligned
from trainer.evaluation.tradeoff_picture import COLOURS, MARKERS
from trainer.loop.measure import perplexity_of
from trainer.probe.noise import NoiseCurve


@dataclass(frozen=True, kw_only=True)
class NoiseReport:
    """What `probe_noise` found."""

    curves: Mapping[str, Mapping[str, NoiseCurve]]
    """Label -> text -> curve."""
    draws: int

    @property
    def texts(self) -> list[str]:
        """Names of the texts."""
        return list(next(iter(self.curves.values())))

    def best(self, text: str) -> dict[float, str]:
        """Strength -> the model of lowest loss with that much noise; one that has diverged is behind all others."""
        gammas = [point.gamma for point in next(iter(self.curves.values()))[text].points]
        found = {}
        for number, gamma in enumerate(gammas):
            losses = {label: c[text].ce + c[text].points[number].delta_ce for label, c in self.curves.items()}
            found[gamma] = min(losses, key=lambda label: (math.isnan(losses[label]), losses[label]))
        return found

    def text(self) -> str:
        """For people: per text a line per model, a column per strength."""
        parts = []
        for text in self.texts:
            gammas = [point.gamma for point in next(iter(self.curves.values()))[text].points]
            rows: list[tuple[str, ...]] = [
                (text, "perplexity", *(f"gamma {gamma:g}" for gamma in gammas), "c", "breaks at")
            ]
            for label, curves in self.curves.items():
                curve = curves[text]
                cells = [f"{p.delta_ce:+.2e}" for p in curve.points]
                c, ends = curve.curvature, curve.breaks_at
                last = ("-" if c is None else f"{c:.4g}", "-" if ends is None else f"{ends:g}")
                rows.append((label, f"{perplexity_of(curve.ce):.2f}", *cells, *last))
            parts.append(aligned(rows))
            if len(self.curves) > 1:
                last_label = list(self.curves)[-1]
                parts.append(self._verdict(text, last_label))
        parts.append(
            f"nats that noise costs, mean of {counted(self.draws, 'pair')} (+ and -); gamma: in units of initialisation"
            f"{self._errors()}\n"
            "c: nats per gamma^2 while it is quadratic (half the trace of the Hessian, weighted)\n"
            "breaks at: where noise costs more than 1.1 times that"
        )
        return "\n\n".join(parts)

    def _errors(self) -> str:
        """The largest relative standard error of all cells."""
        points = [p for of_text in self.curves.values() for curve in of_text.values() for p in curve.points]
        shares = [p.stderr / abs(p.delta_ce) for p in points if p.stderr is not None and p.delta_ce]
        return f"; standard errors up to {100 * max(shares):.0f} %" if shares else ""

    def _verdict(self, text: str, last: str) -> str:
        best = self.best(text)
        if len(set(best.values())) == 1:
            return f"{text}: {next(iter(best.values()))} is the best one at every gamma"
        worse = [f"{gamma:g} ({label})" for gamma, label in best.items() if label != last]
        return f"{text}: an earlier model is better than {last} at gamma {', '.join(worse)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys."""
        shown = {
            "draws": self.draws,
            "models": [
                {"label": label, "texts": {text: _curve(curve) for text, curve in curves.items()}}
                for label, curves in self.curves.items()
            ],
            "best": {
                text: {f"{gamma:g}": label for gamma, label in self.best(text).items()} for text in self.texts
            },
        }
        return finite_json(shown)

    def plot(self, path: Path) -> Path:
        """Draw loss against strength, or, of three models and more, perplexity over models (their Fig. 3).

        Raises:
            ConfigError: as `require_plottable`.
        """
        path = require_plottable(path)
        figure = new_figure(4.6 * len(self.texts) + 1.0, 3.8)
        for axes, text in zip(figure.subplots(1, len(self.texts), squeeze=False)[0], self.texts, strict=True):
            if len(self.curves) > 2:
                self._over_models(axes, text)
            else:
                self._over_strengths(axes, text)
            axes.set_title(text, loc="left", fontsize=11)
            axes.grid(color="#e3e5e8", linewidth=0.6)
            axes.legend(frameon=False, fontsize=9)
        return save_figure(figure, path, dpi=110)

    def _over_models(self, axes: Any, text: str) -> None:
        labels = list(self.curves)
        points = [self.curves[label][text].points for label in labels]
        axes.plot(
            labels, [perplexity_of(self.curves[label][text].ce) for label in labels], "k--", label="no noise"
        )
        for number, gamma in enumerate(point.gamma for point in points[0]):
            values = [of_model[number].perplexity for of_model in points]
            axes.plot(
                labels,
                values,
                MARKERS[number % 7],
                ls="-",
                color=COLOURS[number % 7],
                label=f"gamma {gamma:g}",
            )
        axes.set(ylabel="perplexity with noise", yscale="log")
        axes.tick_params(axis="x", rotation=20)

    def _over_strengths(self, axes: Any, text: str) -> None:
        for number, (label, curves) in enumerate(self.curves.items()):
            points = [point for point in curves[text].points if point.gamma > 0 and point.delta_ce > 0]
            xs = [point.gamma for point in points]
            axes.plot(
                xs, [p.delta_ce for p in points], MARKERS[number % 7], color=COLOURS[number % 7], label=label
            )
            if (c := curves[text].curvature) is not None and c > 0:
                axes.plot(xs, [c * gamma**2 for gamma in xs], "--", color=COLOURS[number % 7], linewidth=0.9)
        axes.set(xlabel="gamma", ylabel="nats that noise costs", xscale="log", yscale="log")


def _curve(curve: NoiseCurve) -> dict[str, Any]:
    return {
        "ce": curve.ce,
        "perplexity": perplexity_of(curve.ce),
        "curvature": curve.curvature,
        "breaks_at": curve.breaks_at,
        "points": [asdict(point) for point in curve.points],
    }
