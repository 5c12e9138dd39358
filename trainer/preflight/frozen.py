"""Parameters that are not trained: patterns in, `requires_grad` off. LP-FT (Kumar et al. 2022, arXiv 2202.10054)
trains the output head alone first and everything in a second run.

A tied weight is one parameter with several names: it is frozen if any of them matches.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from formats.errors import ConfigError


def freeze(
    model: nn.Module, patterns: Sequence[str], stored: Collection[torch.dtype], training: Mapping[str, Any]
) -> None:
    """Stop training every parameter of whose names a pattern is found.

    Args:
        model: not wrapped, without adapters.
        patterns: regular expressions, searched for in names such as `model.layers.0.mlp.up_proj.weight`.
        stored: floating dtypes of the initial model's files.
        training: the run's `training`.

    Raises:
        ConfigError: a pattern matches nothing, all together match everything, the dtype while training cannot hold the
            stored weights, or checkpointing would lose the gradients.
    """
    if not patterns:
        return
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    every = [name for group in names.values() for name in group]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in every):
            raise ConfigError(
                f"freeze must match names of parameters, got {pattern!r}, which matches none; they look like "
                f"{every[0]} and {every[-1]}"
            )
    frozen = [
        key
        for key, group in names.items()
        if any(re.search(pattern, name) for pattern in patterns for name in group)
    ]
    if len(frozen) == len(names):
        tied = next((group for group in names.values() if len(group) > 1), None)
        hint = f" ({' and '.join(tied)} are one tied weight)" if tied else ""
        raise ConfigError(
            f"freeze must leave something to train, got {list(patterns)}, which match all{hint}"
        )
    _require_exact(stored, {parameters[key].dtype for key in frozen})
    given = training.get("gradient_checkpointing_kwargs")
    if training.get("gradient_checkpointing") and isinstance(given, Mapping) and given.get("use_reentrant"):
        raise ConfigError(
            "freeze needs gradient checkpointing that is not reentrant, which would lose the gradients behind frozen "
            "weights; leave gradient_checkpointing_kwargs.use_reentrant out"
        )
    for key in frozen:
        parameters[key].requires_grad_(False)


def freeze_encoders(model: Any, beside: Mapping[str, Sequence[Any]], stored: Collection[torch.dtype]) -> None:
    """Stop training what a multimodal model has beside its text model.

    Args:
        model: not wrapped, without adapters.
        beside: its `encoders`.
        stored: floating dtypes of the initial model's files.

    Raises:
        ConfigError: nothing is left to train, or the dtype while training cannot hold the stored weights.
    """
    parameters = [parameter for group in beside.values() for parameter in group]
    if not parameters:
        return
    what = f"{type(model).__name__}, whose encoders stay as they are,"
    _require_exact(stored, {parameter.dtype for parameter in parameters}, what)
    for parameter in parameters:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "freeze must leave something to train, got patterns that match all of the text model, the only part of "
            f"{type(model).__name__} that is trained"
        )


def _require_exact(
    stored: Collection[torch.dtype], held: Collection[torch.dtype], what: str = "freeze"
) -> None:
    """A frozen weight comes back bit for bit only where the dtype while training holds every stored value."""
    for dtype in sorted(held, key=str):
        for other in sorted(stored, key=str):
            if torch.promote_types(other, dtype) != dtype:
                short, long = (str(each).removeprefix("torch.") for each in (dtype, other))
                raise ConfigError(
                    f"{what} needs a dtype that holds the stored weights exactly, got dtype: {short} for weights in "
                    f"{long}; use dtype: float32"
                )


def frozen_record(model: nn.Module, patterns: Sequence[str]) -> dict[str, Any] | None:
    """What `anneal.json` says of it; None where nothing was asked for."""
    if not patterns:
        return None
    parameters = list(model.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    return {
        "patterns": list(patterns),
        "num_tensors": len(frozen),
        "num_weights": sum(parameter.numel() for parameter in frozen),
        "of_weights": sum(parameter.numel() for parameter in parameters),
    }


def freeze_note(model: nn.Module, patterns: Sequence[str]) -> str | None:
    """One line for the user; None where nothing was asked for."""
    found = frozen_record(model, patterns)
    if found is None:
        return None
    share = 100 * found["num_weights"] / found["of_weights"]
    return f"freeze: {found['num_tensors']} tensors, {share:.1f} % of the weights, stay as they are"
