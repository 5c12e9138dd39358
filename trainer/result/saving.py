"""The trained model as a directory: the files of the initial model with trained weights in them.

Names, dtypes and files of the weights, `config.json`, tokenizer and `generation_config.json` are the initial
model's, so that whatever serves that one serves this one, and a next stage trains from it. Only a `save_dtype`
changes the dtypes, in weights and `config.json` alike. With `lora.merge: false` the adapter alone is saved.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formats.errors import AnnealError, ConfigError
from trainer.config import LoraSettings
from trainer.loading import unwrapped
from trainer.result.lora import ADAPTER_DIRECTORY, merge_adapters
from trainer.result.stored_weights import StoredWeights, write_like
from trainer.running import RunningTrainer

COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates"),
    *("generation_config.json", "*processor_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""What a server needs beside weights and `config.json`, the code that `auto_map` names, and the licence."""
DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class ResultLayout:
    """Where each weight of the model in memory goes.

    Use `ResultLayout.of`.
    """

    stored: StoredWeights
    """The initial model's tensors."""
    dtype: torch.dtype | None
    """Of the result's floating tensors; None for what each of the initial model's is stored in."""
    kept: tuple[str, ...]
    """Tensors that transformers does not load, such as layers for speculative decoding: as they were."""

    @classmethod
    def of(cls, model: Any, model_dir: Path, dtype: str) -> "ResultLayout":
        """Find every weight of `model`, just loaded from `model_dir`, among the stored ones.

        Args:
            model: a transformers model, not wrapped, without adapters; its weights are not read.
            model_dir: the initial model.
            dtype: `same`, or a name of torch.

        Raises:
            ConfigError: a weight of the model is not stored under a name and shape that would be written.
        """
        stored = StoredWeights(model_dir)
        state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        found = stored_form(model, state)
        for name, tensor in found.items():
            known = stored.tensors.get(name)
            if known is not None and known.shape != tuple(tensor.shape):
                raise ConfigError(
                    f"the initial model's weights must have the shapes of its architecture, got "
                    f"{list(known.shape)} for {name} in {model_dir}, where {type(model).__name__} has "
                    f"{list(tensor.shape)}; its config.json belongs to another model"
                )
        homes = {name: set(stored_form(model, {name: state[name]})) for name in _alias_names(model)}
        for names in tied_groups(model):
            if any(homes[name] & stored.tensors.keys() for name in names):
                for name in names:
                    for home in homes[name]:
                        found.pop(home, None)
        parameters = {name: state[name] for name, _ in model.named_parameters()}
        missing = sorted((set(stored_form(model, parameters)) & found.keys()) - stored.tensors.keys())
        if missing:
            raise ConfigError(
                f"the initial model must store every weight of its architecture, got none for {missing[0]} in "
                f"{model_dir}, which transformers then draws at random; complete the model"
            )
        everything = stored_form(model, state)
        kept = tuple(name for name in stored.tensors if name not in everything)
        return cls(stored, None if dtype == "same" else getattr(torch, dtype), kept)

    @property
    def stored_dtypes(self) -> set[torch.dtype]:
        """The floating dtypes of the initial model's weights."""
        return self.stored.float_dtypes

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The floating dtypes of the result's weights."""
        return self.stored_dtypes if self.dtype is None else {self.dtype}

    @property
    def num_bytes(self) -> int:
        """The size of the result's weights."""
        return self.stored.num_bytes(self.dtype)

    def write(self, model: Any, state: Mapping[str, torch.Tensor], target: Path) -> None:
        """Write `state`, the whole weights of `model`, and `config.json` to the directory `target`.

        Raises:
            AnnealError: a weight is not finite, or not in the dtype in which it is saved.
        """
        state = stored_form(model, dict(state))

        def tensor_of(name: str) -> torch.Tensor:
            if name in self.kept:
                tensor = self.stored[name]
                return tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor
            known, tensor = self.stored.tensors[name].dtype, state[name]
            if not tensor.is_floating_point():
                return tensor.cpu()
            saved = tensor.to(self.dtype or known)
            if not bool(torch.isfinite(saved).all()):
                raise AnnealError(
                    f"saved weights must be finite, got infinity or NaN in {name} as {saved.dtype}"
                    f"{'' if bool(torch.isfinite(tensor).all()) else ', where training left it so'}; "
                    "use a smaller learning rate, or save_dtype: bfloat16"
                )
            return saved.cpu()

        write_like(self.stored, target, tensor_of, self.dtype)
        write_config(self.stored.path, target, self.dtype)


def stored_form(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names, and cut as, the files have them from which `model` was loaded."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def tied_groups(model: Any) -> list[list[str]]:
    """Names of parameters that are one and the same: tied weights."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _alias_names(model: Any) -> list[str]:
    return [name for names in tied_groups(model) for name in names]


def write_config(model_dir: Path, target: Path, dtype: torch.dtype | None) -> None:
    """The initial model's `config.json`, byte for byte unless it has to name another dtype."""
    source = model_dir / "config.json"
    if dtype is None:
        shutil.copyfile(source, target / source.name)
        return
    name = str(dtype).removeprefix("torch.")

    def renamed(config: dict[str, Any]) -> dict[str, Any]:
        nested = {k: renamed(v) for k, v in config.items() if isinstance(v, dict) and k.endswith("config")}
        return config | nested | {key: name for key in DTYPE_KEYS if key in config}

    config = renamed(json.loads(source.read_text(encoding="utf-8")))
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = name
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (target / source.name).write_text(text, encoding="utf-8")


def copy_companions(model_dir: Path, target: Path) -> None:
    """Copy the initial model's `COMPANIONS`, byte for byte."""
    for pattern in COMPANIONS:
        for path in sorted(model_dir.glob(pattern)):
            if path.is_dir():
                shutil.copytree(path, target / path.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, target / path.name)


def save_result(
    trainer: RunningTrainer,
    target: Path,
    model_dir: Path,
    lora: LoraSettings | None,
    layout: ResultLayout | None,
) -> dict[str, torch.Tensor] | None:
    """Write model and tokenizer to `target`. Collective: under FSDP every rank helps to gather the weights.

    Args:
        trainer: after training.
        target: an existing, empty directory.
        model_dir: the initial model, into which adapters are merged.
        lora: the adapters' settings, None for full fine-tuning.
        layout: of the weights; None when the adapter alone is saved, in the dtype it was trained in.

    Returns:
        The weights that were written, by their names in memory and before they were rounded; None on other
        processes than the first, and for an adapter.

    Raises:
        AnnealError: a weight is not finite, or not in the dtype in which it is saved.
    """
    first = trainer.args.process_index == 0
    written = None
    if lora is not None:
        adapter = target / ADAPTER_DIRECTORY if lora.merge else target
        trainer.save_model(str(adapter), _internal_call=True)
        if first and layout is not None:
            merged = merge_adapters(model_dir, adapter)
            written = dict(merged.state_dict())
            layout.write(merged, written, target)
    else:
        assert layout is not None
        state = whole_state(trainer)
        if first:
            written = state
            layout.write(unwrapped(trainer.model), state, target)
    if first:
        copy_companions(model_dir, target)
    return written


def whole_state(trainer: RunningTrainer) -> dict[str, torch.Tensor]:
    """The trained weights, gathered where they are sharded; only rank 0 has them then. Collective."""
    if trainer.is_fsdp_enabled:
        return dict(trainer.accelerator.get_state_dict(trainer.model))
    return dict(unwrapped(trainer.model).state_dict())
