"""Linear weights in few bits: rounded while training, so that the quantised result computes what was trained.

Quantisation-aware training rounds a weight to its grid in every forward pass and passes the gradient through
(Jacob et al. 2018, arXiv 1712.05877); with the KL to the original model as the only loss it is quantisation-aware
distillation (QAD, arXiv 2601.20088), for which others keep the original in memory, and the cache has it already.
Rounding and integers are those of torchao: symmetric, one scale per group of inputs. Embeddings and output head stay
as they are.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from formats.errors import ConfigError
from formats.install import how_to_install
from trainer.objective import parse_choice

INTEGERS = ("int4", "int8")
FORMS = {"none": "", **dict.fromkeys(INTEGERS, "group size")}


@dataclass(frozen=True)
class WeightQuantization:
    """An integer type and how many inputs of a linear layer share one scale."""

    integer: str
    """int4 or int8."""
    group_size: int
    """Inputs per scale; it divides the inputs of every linear layer."""

    @classmethod
    def parse(cls, setting: str, text: object) -> "WeightQuantization | None":
        """Read `int4:SIZE`, `int8:SIZE` or `none`.

        Args:
            setting: its name, for messages.
            text: as typed.

        Raises:
            ConfigError: none of these, or a size that is no whole number.
        """
        choice = parse_choice(setting, text, FORMS)
        if choice.value is None:
            return None
        if choice.value != int(choice.value):
            raise ConfigError(f"{setting} {choice.name} needs a whole number of inputs, got {choice.value:g}")
        return cls(choice.name, int(choice.value))

    def prepare(self, model: Any) -> None:
        """Let every linear layer but the output head round its weight in the forward pass; in place.

        Args:
            model: a transformers model in training; its weights, and their names, stay what they are.

        Raises:
            ConfigError: torchao is missing, or a layer's inputs are not whole groups.
        """
        quantize_ = _torchao()
        self._require_whole_groups(model, "fake_quantize")
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weights = IntxFakeQuantizeConfig(
            getattr(torch, self.integer), group_size=self.group_size, is_symmetric=True
        )
        quantize_(model, QATConfig(weight_config=weights, step="prepare"), filter_fn=_is_body(model))

    def apply(self, model: Any) -> None:
        """Replace every linear weight but the output head's by what its integers stand for; in place.

        Args:
            model: a transformers model, not prepared.

        Raises:
            ConfigError: as `prepare`.
        """
        quantize_ = _torchao()
        self._require_whole_groups(model, "--quantize")
        from torchao.quantization import IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quant_primitives import MappingType

        integers = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, self.integer),
            granularity=PerGroup(self.group_size),
            mapping_type=MappingType.SYMMETRIC,
        )
        chosen = _is_body(model)
        quantize_(model, integers, filter_fn=chosen)
        for name, module in model.named_modules():
            if chosen(module, name):  # plain numbers again: the same products, without unpacking in each pass
                module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)

    def _require_whole_groups(self, model: Any, what: str) -> None:
        chosen = _is_body(model)
        for name, module in model.named_modules():
            if chosen(module, name) and module.in_features % self.group_size:
                raise ConfigError(
                    f"{what} needs a group size that divides the inputs of every linear layer, got "
                    f"{self.group_size} for {name} with {module.in_features}; 32 and 64 fit most models"
                )


def _torchao() -> Callable[..., None]:
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"quantised weights need torchao, got none installed; {how_to_install('quantize')}")
    from torchao.quantization import quantize_

    return quantize_


def _is_body(model: Any) -> Callable[[nn.Module, str], bool]:
    """Whether a module is a linear layer, and not the output head."""
    head = model.get_output_embeddings()
    return lambda module, name: isinstance(module, nn.Linear) and module is not head


def _fake_quantizers(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if (quantizer := getattr(module, "weight_fake_quantizer", None)) is not None:
            yield quantizer


@contextmanager
def as_stored(model: Any) -> Iterator[None]:
    """Let a prepared model compute with the weights as they are saved, without rounding; any other is left alone."""
    quantizers = list(_fake_quantizers(model))
    for quantizer in quantizers:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
