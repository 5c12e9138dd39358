"""Several earlier tasks: settings, their texts and models in; one penalty of elastic weight consolidation per task out.

Kirkpatrick et al. 2017 (arXiv 1612.00796) add one penalty per earlier task, each around the weights after that task.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from formats.errors import ConfigError
from formats.identity.fingerprint import ModelFingerprint
from trainer.data.dataset import CachedDataset
from trainer.loading import load_model
from trainer.retention.anchor import Anchor, trained_parameters
from trainer.retention.ewc import Ewc
from trainer.retention.settings import EwcSettings


def ewc_of(
    tasks: Sequence[EwcSettings],
    datasets: Sequence[CachedDataset],
    anchors: Sequence[Path | None],
    model: nn.Module,
    *,
    start: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Ewc]:
    """The methods of these tasks, in their order.

    Args:
        tasks, datasets, anchors: settings, text, and the directory of theta_k (None for theta0) of each.
        model: with the weights from which the run starts, not wrapped.
        start: fingerprint of these.
        seed, say: as in `Ewc`.

    Raises:
        ConfigError: a model has other tensors, or no token of a text carries loss.
    """
    return [
        Ewc(
            settings,
            dataset,
            task=number,
            theta_k=None if path is None else anchor_at(path, model),
            weights=start if path is None else ModelFingerprint.of(path).weights,
            seed=seed,
            say=say,
        )
        for number, (settings, dataset, path) in enumerate(zip(tasks, datasets, anchors, strict=True))
    ]


def anchor_at(path: Path, model: nn.Module) -> Anchor:
    """The weights of the model in `path` for every parameter of `model` that is trained, in its dtype.

    Raises:
        ConfigError: it has other tensors.
    """
    trained = trained_parameters(model)
    dtype = next(iter(trained.values())).dtype
    other: Any = load_model(path, dtype=str(dtype).removeprefix("torch."))
    found = {name: parameter.detach() for name, parameter in other.named_parameters()}
    shapes = [{name: list(p.shape) for name, p in which.named_parameters()} for which in (model, other)]
    for name in [*shapes[0], *(name for name in shapes[1] if name not in shapes[0])]:
        here, there = (which.get(name, "none") for which in shapes)
        if here != there:
            raise ConfigError(
                f"ewc.model must have the tensors of --model, got {there} for {name} in {path}, where it has {here}; "
                "give a model of the same chain"
            )
    return Anchor(model, {name: found[name].to(trained[name].dtype) for name in trained})
