"""`merge`: from an initial model and tuned ones to a model directory that transformers and vLLM load.

Everything is checked before anything is written. The result grows in a hidden directory beside its place and
gets its name in one rename, so there is a whole model or none. Time: two reads of every model, the
first for its fingerprint, and one write.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_json, fsync_directory, fsync_file, locked
from formats.errors import ConfigError
from formats.identity.fingerprint import ModelFingerprint
from formats.progress import Progress, counted
from trainer.checkpoint import writing_to
from trainer.loading import quiet_transformers
from trainer.merging.fisher import FisherOfModels
from trainer.merging.methods import Merge, merge_of, moved, require_peft, weighted_mean
from trainer.merging.models import Models
from trainer.merging.settings import FORMULAS, MergeConfig, setting_text
from trainer.merging.soup import Tasted, greedy_soup
from trainer.merging.trim import WholeModelTrim
from trainer.preflight.continuation import contents_of
from trainer.result.lineage import joined, lineage_of, to_record
from trainer.result.model_card import card_head
from trainer.result.run_directory import RECORD_NAME
from trainer.result.weight_distance import DistanceSums


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A model that was merged, and from how much."""

    out: Path
    """The model directory."""
    num_models: int
    """Tuned models that went in."""
    num_tensors: int
    """Tensors of the result."""
    seconds: float
    """Wall time."""
    tasted: tuple[Tasted, ...] = ()
    """A greedy soup: what was found of every model, the best first."""

    def line(self) -> str:
        """The last line for the user."""
        models = counted(self.num_models, "model")
        if len(self.tasted) > self.num_models:
            models = f"{self.num_models} of {len(self.tasted)} models"
        return f"merged {models}, {self.num_tensors} tensors in {self.seconds:.0f} s; model in {self.out}"


def merge(config: MergeConfig, progress: Progress | None = None) -> MergedModel:
    """Merge `config.tuned` with `config.initial` and write the result to `config.out`.

    Args:
        config: models, method, and what it takes.
        progress: a phase of tensors, and what a method does before; silent by default.

    Raises:
        ConfigError: a model, its tensors or the output directory do not fit.
        FormatError: a weight file is torn.
        IdentityMismatchError: a tuned model comes from another initial model, or has another tokenizer.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    quiet_transformers()
    if config.method == "ties":
        require_peft()
    if config.alpha is not None and config.alpha > 1:
        progress.note(
            f"alpha {config.alpha:g} lies beyond the tuned model: what it changed is changed further"
        )
    out = Path(config.out)
    require_empty(out)
    models = Models.open(config)
    distance = DistanceSums()

    def seen(merged: torch.Tensor, theta0: torch.Tensor) -> None:
        distance.add(merged, theta0)
        progress.advance(1)

    with staged(out) as staging, contextlib.ExitStack() as opened:
        tasted = taste(config, models, staging, progress)
        entered = sorted(entry.model for entry in tasted if entry.entered) or range(len(config.tuned))
        chosen = models.only(entered)
        fisher = fisher_of(config, chosen, staging, progress, opened)
        function_of = functions(config, chosen, fisher, progress)
        progress.start("merge", len(models.initial.shapes), unit="tensor")
        chosen.write(staging, function_of, seen)
        progress.finish()
        opened.close()
        record = record_of(config, models, tasted, fisher)
        record["distance"] = distance.distance().to_dict()
        card = merge_card(config, models.identity, tasted)
        (staging / "README.md").write_text(card, encoding="utf-8")
        atomic_write_json(staging / RECORD_NAME, record, allow_nan=True)
    return MergedModel(
        out=out,
        num_models=len(entered),
        num_tensors=len(models.initial.shapes),
        seconds=time.perf_counter() - started,
        tasted=tuple(tasted),
    )


def taste(config: MergeConfig, models: Models, staging: Path, progress: Progress) -> list[Tasted]:
    """What a greedy soup found of every model; empty for every other merge."""
    if config.by is None:
        return []

    def average(places: Sequence[int], target: Path) -> None:
        target.mkdir()
        models.only(places).write(target, lambda name: weighted_mean)

    return greedy_soup(models.tuned_dirs, config.by, average, staging / ".candidate", progress)


def fisher_of(
    config: MergeConfig, models: Models, staging: Path, progress: Progress, opened: contextlib.ExitStack
) -> FisherOfModels | None:
    """F of every model, for fisher; it is removed when `opened` is closed."""
    if config.method != "fisher":
        return None
    assert config.fisher is not None
    found = FisherOfModels(config.fisher, models, config.fisher_rows, staging / ".fisher", progress)
    opened.callback(found.close)
    return found


def functions(
    config: MergeConfig, models: Models, fisher: FisherOfModels | None, progress: Progress
) -> Callable[[str], Merge]:
    """Name of a tensor -> how it is merged. Reads the models where the method looks at all tensors first."""
    if fisher is not None:
        return lambda name: lambda theta0, others: weighted_mean(theta0, others, config.weights, fisher[name])
    if config.trim == "model" and config.density is not None and config.density < 1:
        trim = WholeModelTrim(models.initial, models.tuned, models.names, config.density, progress)

        def trimmed(name: str) -> Merge:
            def merge(theta0: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
                return moved(config, theta0, others, trim.kept(name, [other - theta0 for other in others]))

            return merge

        return trimmed
    plain = merge_of(config)
    return lambda name: plain


def record_of(
    config: MergeConfig, models: Models, tasted: Sequence[Tasted], fisher: FisherOfModels | None
) -> dict[str, Any]:
    """`anneal.json` but for the distance. The result descends from the models that went in."""
    found: dict[int, dict[str, Any]] = {entry.model: entry.to_dict() for entry in tasted}
    if fisher is not None:
        found = {place: {"fisher": key} for place, key in enumerate(fisher.keys)}
    tuned = [
        {"name": name, "weights": ModelFingerprint.of(path).weights, **found.get(place, {})}
        for place, (name, path) in enumerate(zip(config.tuned, models.tuned_dirs, strict=True))
    ]
    lineages = [lineage_of(models.initial_dir, config.initial)]
    lineages += [
        lineage_of(path, name)
        for entry, name, path in zip(tuned, config.tuned, models.tuned_dirs, strict=True)
        if entry.get("entered", True)
    ]
    return {
        "status": "complete",
        "identity": models.identity,
        "lineage": to_record(joined(lineages)),
        "by": None if config.by is None else contents_of(TeacherCache(config.by)),
        "merge": {"method": config.method, **config.settings(), "tuned": tuned},
    }


def require_empty(out: Path) -> None:
    """Refuse an output directory that holds something.

    Raises:
        ConfigError: it is not new or empty.
    """
    contents = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    if contents or (out.exists() and not out.is_dir()):
        what = f"which holds {contents[0]}" if contents else "which is a file"
        raise ConfigError(f"--out must be new or empty, got {out} {what}; choose another directory")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A hidden directory that becomes `out` when the block ends well, and is removed when it does not.

    Raises:
        ConfigError: it cannot be written, or another merge is under way there.
    """
    out = out.absolute()
    staging = out.with_name(f".{out.name}.merge.staging")
    made = [parent for parent in out.parents if not parent.exists()]  # innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"--out must be a place that can be written, got {out}: {error.strerror}") from None
    if not locked(lock):
        os.close(lock)
        raise ConfigError(
            f"--out must belong to one merge, got {out} in which another one is under way; wait for it"
        )
    try:
        for entry in staging.iterdir():  # of a merge that was killed
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        with writing_to(staging):
            yield staging
        for file in staging.iterdir():
            fsync_file(file)
        fsync_directory(staging)
        os.rename(staging, out)  # replaces an empty directory
        fsync_directory(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise
    finally:
        os.close(lock)


def merge_card(config: MergeConfig, identity: Mapping[str, Any], tasted: Sequence[Tasted] = ()) -> str:
    """The card as Markdown with the front matter that model hubs read."""
    base = str(identity["teacher"]["name"])
    title, formula = FORMULAS[config.method]
    lines = card_head(base, "merge", f"merged by {title}", relation="merge")
    lines += [f"The weights are `{formula}`, theta0 being those of `{base}`.", "", "| setting | value |"]
    lines += ["|---|---|", f"| initial model | `{base}` |"]
    lines += [f"| tuned model | `{name}` |" for name in config.tuned]
    lines += [f"| {name} | {setting_text(value)} |" for name, value in config.settings().items()]
    if tasted:
        lines += ["", "| model, the best first | its loss | the soup's with it | |", "|---|---|---|---|"]
        lines += [
            f"| `{config.tuned[entry.model]}` | {entry.loss:.4f} | {entry.soup_loss:.4f} | "
            f"{'added' if entry.entered else 'left out'} |"
            for entry in tasted
        ]
    lines += ["", "What was merged is recorded in `anneal.json`.", ""]
    return "\n".join(lines)
