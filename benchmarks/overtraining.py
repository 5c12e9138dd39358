"""Does a longer pretrained model forget more, and does label annealing delay that? A ladder of tiny models.

Springer et al. 2025 ("Overtrained Language Models Are Harder to Fine-Tune") found that with more pretraining the same
change of the weights costs more, until a longer pretrained model is the worse one after it. Here the same small
model is pretrained on more and more prose (overtraining_ladder.py), then every one of them

    gets Gaussian noise on its weights (`anneal probe noise`), and
    is fine-tuned on code at fixed rates, directly and with label annealing (`anneal probe tune`),

and is measured on held-out prose. `turns at`: the model after which more pretraining makes the result worse.

    python benchmarks/overtraining.py [--out runs/overtraining] [--scale small|full|quick] [--tokens A:B] [--plot FILE]

The same command goes on where it was stopped, and a longer ladder (`--tokens`) keeps what is there. `small`: a
quarter of an hour of one core.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from overtraining_ladder import ROOT, SCALES, Scale, name_of, prepare, pretrain
from pool_here import InThisProcess
from stdlib_text import documents

from cache_builder import BuildConfig, build_cache
from formats.disk.durable import atomic_write_bytes
from formats.progress import ConsoleProgress
from trainer.evaluation.tradeoff_picture import COLOURS, MARKERS
from trainer.probe.noise import NoiseCurve, NoisePoint, probe_noise
from trainer.probe.tune import TuneConfig, TuneReport, probe_tune

GAMMAS = (0.25, 0.5, 1.0, 2.0, 4.0)
DRAWS = 4
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
KL_COEFS = (0.0, 1.0, 4.0)
TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "disable_tqdm": True,
}
SHARE = 0.9
"""Of the gain of direct fine-tuning at its best rate: where methods are compared at equal learning."""
MARKER = ".anneal-overtraining"


def build(corpus: str, model: str, out: str, options: Mapping[str, Any]) -> None:
    """A cache, with every position."""
    build_cache(BuildConfig(corpus=corpus, model=model, out=out, **options))


def texts_of(folder: Path, scale: Scale, model: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """The caches of held-out text, and the corpus that is learnt: name -> path."""
    found = {"train": str(folder / "code.jsonl"), "prose": "", "code": ""}
    sizes = {
        "code.jsonl": ("target-train", scale.tuning_bytes),
        "code-heldout.jsonl": ("target-heldout", scale.heldout_bytes),
    }
    for file, (split, size) in sizes.items():
        if not (folder / file).exists():
            lines = [json.dumps({"text": d.text}) + "\n" for d in documents("code", split, max_bytes=size)]
            (folder / file).write_text("".join(lines), encoding="utf-8")
    for name, file in (("prose", "heldout.jsonl"), ("code", "code-heldout.jsonl")):
        found[name] = str(folder / "heldout" / name)
        if not (folder / "heldout" / name / "manifest.json").exists():
            build(str(folder / file), str(model), found[name], options)
    return found


def noise_of(folder: Path, model: Path, text: str) -> NoiseCurve:
    """What noise costs one model on prose, remembered."""
    place = folder / "noise" / f"{model.name}.json"
    settings = {"gammas": list(GAMMAS), "draws": DRAWS}
    if place.exists() and (found := json.loads(place.read_text()))["settings"] == settings:
        points = [NoisePoint(**point) for point in found["points"]]
        return NoiseCurve(ce=found["ce"], points=points)
    curve = probe_noise({model.name: model}, {"prose": text}, gammas=GAMMAS, draws=DRAWS)[model.name]["prose"]
    stored = [dataclasses.asdict(point) for point in curve.points]
    place.parent.mkdir(exist_ok=True)
    atomic_write_bytes(place, json.dumps({"settings": settings, "ce": curve.ce, "points": stored}).encode())
    return curve


def turn_of(losses: Sequence[float]) -> int | None:
    """The place of the lowest loss of a ladder; None where it is the last one, so that nothing turned."""
    place = min(range(len(losses)), key=losses.__getitem__)
    return None if place == len(losses) - 1 else place


def rises_of(values: Sequence[float]) -> str:
    """`5 of 6`: at how many steps of the ladder a value rises."""
    return f"{sum(b > a for a, b in pairwise(values))} of {len(values) - 1}"


def at_equal_learning(points: Sequence[tuple[float, float]], goal: float) -> float | None:
    """Source loss where a gain is first reached.

    Args:
        points: (gain on the target, source loss) over rising rates, from (0, the loss before) on.
        goal: the gain; between two points the line that joins them is taken.

    Returns:
        None if no rate reaches it.
    """
    for (gain, loss), (next_gain, next_loss) in pairwise(points):
        if gain < goal <= next_gain:
            return loss + (next_loss - loss) * (goal - gain) / (next_gain - gain)
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """Everything that was measured."""

    labels: Sequence[str]
    noise: Mapping[str, NoiseCurve]
    tuned: TuneReport

    def of(self, kl_coef: float, rate: float, what: str) -> list[float]:
        """A value of the tuned models at one rate and strength, over the ladder."""
        runs = {r.label: r for r in self.tuned.runs if (r.kl_coef, r.learning_rate) == (kl_coef, rate)}
        return [getattr(runs[label], what) for label in self.labels]

    def equal_learning(self, kl_coef: float) -> list[float | None]:
        """Source loss at `SHARE` of the gain that direct fine-tuning has at its best rate, over the ladder."""
        found = []
        for label in self.labels:
            source, target = self.tuned.before[label]
            goal = SHARE * (target - self.tuned.best(0.0)[label].target_ce)
            runs = [r for r in self.tuned.runs if (r.label, r.kl_coef) == (label, kl_coef)]
            runs.sort(key=lambda r: r.learning_rate)
            found.append(
                at_equal_learning([(0.0, source), *((target - r.target_ce, r.source_ce) for r in runs)], goal)
            )
        return found

    def noisy(self, number: int) -> list[float]:
        """Loss on prose with the noise of one strength, over the ladder."""
        curves = [self.noise[label] for label in self.labels]
        return [curve.ce + curve.points[number].delta_ce for curve in curves]

    def runs(self, what: str) -> dict[str, list[float]]:
        """A value of all tuned models: rate and strength -> over the ladder."""
        asked = self.tuned.config
        return {
            f"kl_coef {kl:g}, lr {rate:g}": self.of(kl, rate, what)
            for kl in asked.kl_coefs
            for rate in asked.learning_rates
        }

    def left_of_last(self, values: Sequence[float]) -> float:
        """Of what the last step of the ladder brought on prose, the share that is left in these losses."""
        before = [self.noise[label].ce for label in self.labels[-2:]]
        return (values[-2] - values[-1]) / (before[0] - before[1])

    def text(self) -> str:
        """Tables as Markdown."""
        strengths = self.tuned.config.kl_coefs
        best = {kl: [self.tuned.best(kl)[label] for label in self.labels] for kl in strengths}
        curves = [self.noise[label] for label in self.labels]
        cost = {f"gamma {g:g}": [c.points[n].delta_ce for c in curves] for n, g in enumerate(GAMMAS)}
        rates = [
            f"| kl_coef {kl:g}, rate | {' | '.join(f'{run.learning_rate:g}' for run in best[kl])} | |"
            for kl in strengths
        ]
        parts = {
            "Loss on prose, as pretrained": self._losses({"": [c.ce for c in curves]}),
            "What noise costs on prose": self._costs(cost),
            "Loss on prose with noise": self._losses(
                {f"gamma {g:g}": self.noisy(n) for n, g in enumerate(GAMMAS)}
            ),
            "What fine-tuning on code costs on prose": self._costs(self.runs("lost")),
            "Loss on prose after fine-tuning": self._losses(self.runs("source_ce")),
            "Loss on code after fine-tuning": self._losses(self.runs("target_ce")),
            "The rate of lowest loss on code, and the loss on prose there": [
                *rates,
                *self._losses({f"kl_coef {kl:g}": [run.source_ce for run in best[kl]] for kl in strengths}),
            ],
            f"Loss on prose at {100 * SHARE:g} % of direct fine-tuning's best gain on code": self._losses(
                {f"kl_coef {kl:g}": self.equal_learning(kl) for kl in strengths}
            ),
        }
        tuned = {name: self.left_of_last(values) for name, values in self.runs("source_ce").items()}
        noisy = {f"gamma {g:g}": self.left_of_last(self.noisy(n)) for n, g in enumerate(GAMMAS)}
        last = "\n".join(f"| {name} | {100 * share:.0f} % |" for name, share in (noisy | tuned).items())
        end = f"What is left of the gain on prose from {self.labels[-2]} to {self.labels[-1]}"
        head = f"| | {' | '.join(self.labels)} |"
        return f"{end}:\n\n| | left |\n|---|---|\n{last}\n\n" + "\n\n".join(
            f"{title}:\n\n{head} {'rises' if 'cost' in title else 'turns at'} |\n|---|"
            + "---|" * (len(self.labels) + 1)
            + "\n"
            + "\n".join(rows)
            for title, rows in parts.items()
        )

    def _costs(self, rows: Mapping[str, Sequence[float]]) -> list[str]:
        return [
            f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} | {rises_of(values)} |"
            for name, values in rows.items()
        ]

    def _losses(self, rows: Mapping[str, Sequence[float | None]]) -> list[str]:
        lines = []
        for name, values in rows.items():
            known = [value for value in values if value is not None]
            place = turn_of(known) if len(known) == len(values) else None
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            lines.append(f"| {name} | {' | '.join(cells)} | {'-' if place is None else self.labels[place]} |")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        noise = {label: [dataclasses.asdict(p) for p in curve.points] for label, curve in self.noise.items()}
        equal = {f"{kl:g}": self.equal_learning(kl) for kl in self.tuned.config.kl_coefs}
        return {
            "labels": list(self.labels),
            "noise": noise,
            "tuned": self.tuned.to_dict(),
            "equal_learning": equal,
        }

    def plot(self, path: Path) -> None:
        """Loss on prose over the ladder: with noise, and after fine-tuning at each strength."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        before = [self.noise[label].ce for label in self.labels]
        asked = self.tuned.config
        panels = [("noise on the weights", [(f"gamma {g:g}", self.noisy(n)) for n, g in enumerate(GAMMAS)])]
        for kl in asked.kl_coefs:
            lines = [(f"lr {rate:g}", self.of(kl, rate, "source_ce")) for rate in asked.learning_rates]
            panels.append((f"tuned on code, kl_coef {kl:g}" if kl else "tuned on code, direct", lines))
        size = (3.6 * len(panels), 3.6)
        figure, axes_ = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
        for axes, (title, lines) in zip(axes_, panels, strict=True):
            axes.plot(self.labels, before, "k--", label="as pretrained")
            for number, (name, values) in enumerate(lines):
                axes.plot(
                    self.labels, values, MARKERS[number % 7], ls="-", color=COLOURS[number % 7], label=name
                )
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("tokens of pretraining")
            axes.grid(color="#e3e5e8", linewidth=0.6)
            axes.legend(frameon=False, fontsize=8)
        axes_[0].set_ylabel("loss on held-out prose, nats")
        axes_[0].set_ylim(min(before) - 0.1, max(max(before) + 0.6, min(before) + 2.0))
        figure.savefig(path, dpi=100)


def run(folder: Path, scale: Scale) -> Ladder:
    """Everything that is not there yet, and what was found."""
    prepare(folder, scale)
    models = {name_of(n): pretrain(folder, n, scale) for n in scale.tokens}
    assert all(models.values())
    places = {label: path for label, path in models.items() if path is not None}
    options = {"engine": "transformers", "dtype": "float32", "max_length": scale.context}
    texts = texts_of(folder, scale, next(iter(places.values())), options)
    noise = {label: noise_of(folder, path, texts["prose"]) for label, path in places.items()}
    config = TuneConfig(
        models={label: (str(path), None) for label, path in places.items()},
        text=texts["train"],
        source={"prose": texts["prose"]},
        target={"code": texts["code"]},
        out=str(folder / "tuned"),
        learning_rates=RATES,
        kl_coefs=KL_COEFS,
        training=TRAINING,
        build=options,
    )
    tuned = probe_tune(config, build=build, pool=InThisProcess(), progress=ConsoleProgress())
    if tuned.failed:
        raise SystemExit("\n".join(f"failed: {name}: {line}" for name, line in tuned.failed.items()))
    found = Ladder(labels=list(places), noise=noise, tuned=tuned)
    atomic_write_bytes(folder / "results.json", json.dumps(found.to_dict(), indent=1).encode())
    return found


def tokens_of(text: str) -> tuple[int, ...]:
    """`A:B` in millions, doubling, so two at least.

    Raises:
        ValueError: it is not of that form.
    """
    first, last = (round(float(part) * 1e6) for part in text.split(":"))
    if not 0 < 2 * first <= last:
        raise ValueError(text)
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return tuple(found)


def main() -> None:
    """Run, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "overtraining", help="folder of everything"
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="small", help="size of models and texts")
    parser.add_argument("--tokens", type=tokens_of, metavar="A:B", help="millions of pretraining, doubling")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="by default overtraining.png in --out")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / MARKER).exists():
        parser.error(f"--out must be new, empty, or made by this benchmark, got {args.out}; choose another")
    scale = SCALES[args.scale]
    scale = dataclasses.replace(scale, tokens=args.tokens or scale.tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    marker, settings = args.out / MARKER, repr(dataclasses.replace(scale, tokens=()))
    if marker.exists() and marker.read_text(encoding="utf-8") != settings:
        parser.error(f"--out holds a ladder of another scale, got {args.out}; choose another")
    marker.write_text(settings, encoding="utf-8")
    transformers.utils.logging.disable_progress_bar()
    found = run(args.out, scale)
    picture = args.plot or args.out / "overtraining.png"
    found.plot(picture)
    print(f"\n{found.text()}\n\npicture: {picture}")


if __name__ == "__main__":
    main()
