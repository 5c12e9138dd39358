"""Low-rank adapters through `peft`: attach before training, merge afterwards, and only where both agree."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formats.errors import ConfigError, one_line
from formats.install import how_to_install
from trainer.config import LoraSettings
from trainer.loading import load_model
from trainer.multimodal import encoders

ADAPTER_DIRECTORY = "adapter"
ALL_LINEAR = "all-linear"
"""All linear modules but the output head."""
MERGE_TOLERANCE = 1e-3
"""Largest deviation of a merged module's output, relative to what its adapter adds (float32: 1e-6)."""


def attach_adapters(model: Any, settings: LoraSettings, seed: int = 0) -> Any:
    """`model` with fresh adapters, whose product is zero: it still computes what it did.

    Args:
        seed: of the adapters' random factors; nothing else of the process decides them.

    Raises:
        ConfigError: peft is missing, no module matches, a name matches none, or the adapters could not be merged
            exactly although the settings ask for it.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(f"lora needs peft, which is not installed; {how_to_install('lora')}") from None
    targets = targets_in(model, settings.target_modules)
    beside = "|".join(map(re.escape, encoders(model)))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        exclude_modules=rf"(?:{beside})(?:\..*)?" if beside else None,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {one_line(error)}") from None
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # factors of no size that there is
        raise ConfigError(f"lora.r {settings.r} is more than this machine holds: {one_line(error)}") from None
    require_sound_adapters(adapted, merged=settings.merge)
    return adapted


def targets_in(model: nn.Module, targets: str | Sequence[str]) -> str | list[str]:
    """What `lora.target_modules` says, as peft takes it: a list is of name endings, a text a regular expression.

    Raises:
        ConfigError: a name that no module outside the encoders ends in, which peft would leave out beside others, or a
            text that is neither such a name nor a regular expression.
    """
    if targets == ALL_LINEAR:
        return ALL_LINEAR
    beside = tuple(f"{name}." for name in encoders(model))
    names = [name for name, _ in model.named_modules() if name and not f"{name}.".startswith(beside)]

    def has(ending: str) -> bool:
        return any(name == ending or name.endswith(f".{ending}") for name in names)

    if isinstance(targets, str):
        if has(targets):
            return [targets]
        try:
            re.compile(targets)
        except re.error as error:
            raise ConfigError(
                f"lora.target_modules must be {ALL_LINEAR}, a name ending, a regular expression or a list of name "
                f"endings, got {targets!r}: {error}"
            ) from None
        return targets
    for ending in targets:
        if not has(ending):
            some = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if "proj" in name))
            raise ConfigError(
                f"lora.target_modules must name modules, got {ending!r}, in which none ends"
                f"{f'; there are {some}' if some else ''}"
            )
    return list(targets)


def require_sound_adapters(model: nn.Module, *, merged: bool = True) -> None:
    """Refuse adapters that do not run, or cannot be folded into the weights without changing what the model
    computes.

    An adapter acts on one module. Where the weight belongs to another module as well, as the embedding of a
    tied model does to the output head, folding it in would change that one too. Tying it apart instead would
    give the result a tensor and a size that the initial model does not have. Of every kind of adapted module
    one is merged for trial, a copy with random adapters, and compared with itself.

    Args:
        model: a model with fresh adapters of peft.
        merged: whether they are to be folded in at all.

    Raises:
        ConfigError: names the module and the reason.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    tried: set[tuple[type, ...]] = set()
    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(layer, AuxiliaryTrainingWrapper):  # a trained copy, or trained rows, of a module
            base = layer.original_module
        elif isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
        else:
            continue
        short = name_before_peft(name)
        advice = f"leave {short.rsplit('.', 1)[-1]} out, or set lora.merge: false to save the adapter alone"
        for parameter in base.parameters(recurse=False):
            others = [other for other in owners[id(parameter)] if not other.startswith(f"{name}.")]
            if others and merged:
                raise ConfigError(
                    f"lora.target_modules: an adapter on {short} cannot be merged, because its weight is also "
                    f"{name_before_peft(others[0])}, which would change with it; {advice}"
                )
        kind = (type(layer), type(base))
        if kind in tried or not isinstance(layer, BaseTunerLayer):
            continue
        tried.add(kind)
        try:
            deviation = merge_deviation(layer)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ConfigError(
                f"lora.target_modules: peft cannot put an adapter on {short} ({type(base).__name__}): "
                f"{one_line(error)}; name the modules that are to have one"
            ) from None
        if merged and deviation is not None and not deviation <= MERGE_TOLERANCE:
            raise ConfigError(
                f"lora.target_modules: an adapter on {short} ({type(base).__name__}) cannot be merged exactly "
                f"(relative deviation {deviation:.2g}); {advice}"
            )


@torch.no_grad()
def merge_deviation(layer: Any) -> float | None:
    """How far a merged copy of an adapted module is from an unmerged one, relative to what the adapter adds.

    None for a module that cannot be tried by itself; the check of the saved model sees to that.
    Memory: one copy of the module in float32.
    """
    base = layer.get_base_layer()
    width = getattr(layer, "in_features", None)
    if getattr(base, "weight", None) is None or base.weight.ndim != 2 or not isinstance(width, int):
        return None
    trial = copy.deepcopy(layer).float().eval()
    generator = torch.Generator().manual_seed(0)
    if isinstance(base, nn.Embedding):
        inputs = torch.arange(min(8, width), device=base.weight.device)
    else:
        inputs = torch.randn(8, width, generator=generator).to(base.weight.device)
    plain = trial(inputs)  # fresh adapters add nothing
    for parameter in trial.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) / 8)
    adapted = trial(inputs)
    trial.merge()
    added = (adapted - plain).abs().max().clamp_min(1e-12)
    return float((trial(inputs) - adapted).abs().max() / added)


def name_before_peft(name: str) -> str:
    """The name of a module or parameter before peft wrapped it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".weight", "")


def merge_adapters(model_dir: Path, adapter_dir: Path) -> Any:
    """The initial model in float32 with the saved adapter folded into its weights."""
    from peft import PeftModel

    model = load_model(model_dir, dtype="float32")
    return PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload()
