"""The reference teacher: transformers, one row at a time, no padding, no batching.

Slow and plain on purpose.  It is the fallback where vLLM does not run, and the other side of every comparison
that holds the vLLM teacher to account.  Only the selected positions are projected (`logits_to_keep`); a row's
logits exist once, [P, V] in the type of the head.
"""

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from cache_builder.reduction.reduce import reduce_logits
from cache_builder.teachers.fast_dtype import resolve_dtype
from cache_builder.teachers.model_config import attention_softcap, checkpoint_dtype, read_model_config
from cache_builder.teachers.protocol import TeacherConfig, check_numbers, check_row
from cache_builder.teachers.wire import pack, unpack
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError, one_line
from formats.logprobs.tail_draws import starts
from formats.logprobs.topk import TopKLogprobs

LOADING_ARGS = ("attn_implementation", "device", "revision", "trust_remote_code")


class TransformersTeacher:
    """A `transformers.AutoModelForCausalLM` as a teacher.

    Engine arguments: `device` (default: cuda when available, else cpu), `attn_implementation`, `revision`,
    `trust_remote_code`.

    Raises:
        ConfigError: the model cannot be loaded, or an engine argument is unknown.
    """

    def __init__(self, config: TeacherConfig) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        self.config = config
        if not config.debug:
            logging.disable_progress_bar()
        args = dict(config.engine_args)
        unknown = sorted(set(args) - set(LOADING_ARGS))
        if unknown:
            raise ConfigError(
                f"engine arguments of transformers are {', '.join(LOADING_ARGS)}, got {', '.join(unknown)}"
            )
        if isinstance(args.get("trust_remote_code"), str):
            args["trust_remote_code"] = args["trust_remote_code"].lower() in ("1", "true", "yes")
        self._device = torch.device(args.pop("device", "cuda" if torch.cuda.is_available() else "cpu"))
        model_config = read_model_config(config.model)
        dtype = resolve_dtype(
            config.dtype, checkpoint_dtype(model_config), on_cpu=self._device.type == "cpu", softcap=None
        )
        if (cap := attention_softcap(model_config)) is not None:
            # transformers' default kernel accepts such a model and leaves the softcap out without a word.
            chosen = args.setdefault("attn_implementation", "eager")
            if chosen == "sdpa":
                raise ConfigError(
                    f"attn_implementation must honour the model's attn_logit_softcapping ({cap:g}), got "
                    "sdpa, which ignores it; use eager"
                )
        try:
            model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, dtype), **args)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the model must load in transformers, got: {one_line(error, whole=True)}"
            ) from error
        self._model: Any = model.eval()
        self._model.to(self._device)
        self._dtype = dtype
        self._attention = str(getattr(model.config, "_attn_implementation", None))
        if config.head_dtype == "float32" and dtype != "float32":
            _head_in_float32(self._model)
        text_config = self._model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        context = getattr(text_config, "max_position_embeddings", None)
        if context is not None and config.max_length > context:
            raise ConfigError(
                f"max_length must be at most {context} (the model's context), got {config.max_length}; "
                f"pass --max-length {context}"
            )

    @torch.inference_mode()
    def _predict(self, row: TokenRow, positions: np.ndarray) -> TopKLogprobs:
        input_ids_1L = torch.from_numpy(row.input_ids.astype(np.int64)).to(self._device).unsqueeze(0)
        keep = torch.from_numpy(positions.astype(np.int64)).to(self._device)
        logits_PV = self._model(input_ids=input_ids_1L, logits_to_keep=keep, use_cache=False).logits[0]
        assert logits_PV.shape == (len(positions), self.vocab_size), logits_PV.shape
        reduced = reduce_logits(
            logits_PV,
            self.config.capture,
            labels_N=input_ids_1L[0, keep + 1],
            starts_N=torch.from_numpy(starts(row.key, positions)).to(self._device),
        )
        return unpack(pack(reduced).cpu(), self.vocab_size, self.config.capture.draw_rate)

    def prefill(self, rows: Iterable[TokenRow]) -> Iterator[TopKLogprobs]:
        """See `Teacher.prefill`."""
        for number, row in enumerate(rows):
            check_row(row, number, max_length=self.config.max_length, vocab_size=self.vocab_size)
            positions = row.positions(self.config.capture.positions)
            if len(positions) == 0:
                yield TopKLogprobs.empty(self.vocab_size, self.config.capture.draw_rate)
            else:
                yield check_numbers(self._predict(row, positions), number)

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        return {
            "engine": "transformers",
            "engine_version": importlib.metadata.version("transformers"),
            "torch_version": torch.__version__,
            "dtype": self._dtype,
            "head_dtype": "float32" if self.config.head_dtype == "float32" else self._dtype,
            "attention": self._attention,
            "platform": self._device.type,
        }

    def close(self) -> None:
        """See `Teacher.close`."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _head_in_float32(model: Any) -> None:
    """Project in fp32 whatever the type of the hidden states; a tied embedding keeps its own type."""
    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"head_dtype float32 needs an output layer, got {type(model).__name__} without one")
    wide = torch.nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    wide.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    if head.bias is not None:
        wide.bias = torch.nn.Parameter(head.bias.detach().float(), requires_grad=False)
    wide.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(), *inputs[1:]))
    model.set_output_embeddings(wide)
