"""What `vllm_pooler` imports of vLLM, for a machine without it: three types that hold data and do nothing.

`TeacherPooler` is the product's own class; only where its inputs come from is stood in for. The tests of
cache_builder/teachers run the same class with vLLM's real types.
"""

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch


class Pooler(torch.nn.Module):
    """As in vllm.model_executor.layers.pooler.abstract."""


class PoolingStates:
    """What vLLM keeps of a request between two steps."""

    def __init__(self) -> None:
        self.hidden_states_cache: list[Any] = []

    def clean(self) -> None:
        """As vLLM's."""
        self.hidden_states_cache.clear()


@dataclass
class Cursor:
    """Lengths of the requests of a step, on the CPU."""

    num_scheduled_tokens_cpu: torch.Tensor
    seq_lens_cpu: torch.Tensor
    prompt_lens_cpu: torch.Tensor

    def get_finished_mask(self) -> list[bool]:
        """Which requests end with this step."""
        return torch.eq(self.prompt_lens_cpu, self.seq_lens_cpu).tolist()


@dataclass
class Asked:
    """vLLM's PoolingParams, as far as the pooler looks."""

    extra_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class PoolingMetadata:
    """Requests of one step."""

    pooling_params: list[Asked]
    pooling_states: list[PoolingStates]
    cursor: Cursor

    def get_pooling_cursor(self) -> Cursor:
        """As vLLM's."""
        return self.cursor


def install() -> None:
    """Let `import vllm...` of these three names find the stand-ins, in this process."""
    contents: dict[str, dict[str, object]] = {
        "vllm.model_executor.layers.pooler.abstract": {"Pooler": Pooler},
        "vllm.tasks": {"PoolingTask": str},
        "vllm.v1.pool.metadata": {"PoolingMetadata": PoolingMetadata},
    }
    for name, members in contents.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:length]), types.ModuleType(".".join(parts[:length])))
        vars(sys.modules[name]).update(members)


def whole_step(
    lengths: list[int], keys: list[bytes], labels: list[bytes], names: tuple[str, str]
) -> PoolingMetadata:
    """A step in which every request is prefilled whole.

    Args:
        names: of the key and of the labels in what a request asks for.
    """
    number = torch.tensor(lengths, dtype=torch.int32)
    asked = [Asked({names[0]: key, names[1]: label}) for key, label in zip(keys, labels, strict=True)]
    return PoolingMetadata(asked, [PoolingStates() for _ in lengths], Cursor(number, number, number))
