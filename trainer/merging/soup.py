"""A greedy soup: models enter one by one, the best first, each if the average does not get worse with it.

Wortsman et al. 2022 (arXiv 2203.05482, recipe 1): sort the models by how well they do on held-out data, begin with the
best one, and add each of the others in that order where the average of the weights with it is at least as good. Here
"well" is a low cross-entropy per token on a cache; only its tokens are read.

Time: one evaluation per model and one per model tried after the first. Memory: of one evaluation. Disk: one more model.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from formats.progress import Progress
from trainer.evaluation.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class Tasted:
    """What the recipe found of one model."""

    model: int
    """Its place among the models that were given."""
    loss: float
    """Cross-entropy per token of the model alone, nats."""
    soup_loss: float
    """That of the soup with it; of the first, its own."""
    entered: bool

    def to_dict(self) -> dict[str, Any]:
        """What the record of a merge holds of it beside the model's name."""
        return {"loss": self.loss, "soup_loss": self.soup_loss, "entered": self.entered}


def greedy_soup(
    models: Sequence[Path],
    cache: str,
    average: Callable[[Sequence[int], Path], None],
    work: Path,
    progress: Progress,
) -> list[Tasted]:
    """Which models enter.

    Args:
        models: their directories.
        cache: directory of held-out text.
        average: writes the average of the models of these places to a new directory, complete enough to be loaded.
        work: a directory that does not exist; it is made, and removed.
        progress: a phase of rows for each evaluation.

    Returns:
        All models in the order in which they were tried, the best first.

    Raises:
        ConfigError: no token of the cache carries loss, or a model's loss is not finite.
        FormatError: the cache is missing or broken.
        IdentityMismatchError: it is of another tokenizer.
    """

    def loss_of(model: Path, label: str) -> float:
        found = evaluate(model, {"held-out text": cache}, kl=False, progress=progress, label=f"{label}: ")
        loss = found["held-out text"]["ce"]
        if loss is None:
            raise ConfigError(
                f"--by must have tokens that carry loss, got none in {cache}; build it from plain text"
            )
        return float(loss)

    losses = [loss_of(model, model.name) for model in models]
    for model, loss in zip(models, losses, strict=True):
        if not math.isfinite(loss):
            raise ConfigError(
                f"models of a soup must have a finite loss, got {loss} for {model} on {cache}; leave it out"
            )
    order = sorted(range(len(models)), key=losses.__getitem__)
    best = order[0]
    entered, current = [best], losses[best]
    found = [Tasted(model=best, loss=current, soup_loss=current, entered=True)]
    for place in order[1:]:
        try:
            average(sorted([*entered, place]), work)
            with_it = loss_of(work, f"with {models[place].name}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        better = with_it <= current
        found.append(Tasted(model=place, loss=losses[place], soup_loss=with_it, entered=better))
        progress.note(
            f"{models[place].name}: {losses[place]:.4f} nats alone, the soup {current:.4f} without it and "
            f"{with_it:.4f} with it; {'added' if better else 'left out'}"
        )
        if better:
            entered, current = [*entered, place], with_it
    return found
