"""A frozen model in transformers, loaded as its settings say: what the teacher and the sampler of that engine share."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch

from cache_builder.teachers.fast_dtype import resolve_dtype
from cache_builder.teachers.model_config import attention_softcap, checkpoint_dtype, read_model_config
from cache_builder.teachers.protocol import TeacherConfig
from formats.errors import ConfigError, one_line

LOADING_ARGS = ("attn_implementation", "device", "trust_remote_code")
SPOKEN = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """The model on its device, and what alters its numbers."""

    model: Any
    device: torch.device
    dtype: str
    """Of the weights."""
    head_dtype: str
    """Of the output projection."""
    vocab_size: int
    """V: tokens the model predicts."""

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        return {
            "engine": "transformers",
            "engine_version": importlib.metadata.version("transformers"),
            "torch_version": torch.__version__,
            "dtype": self.dtype,
            "head_dtype": self.head_dtype,
            "attention": str(getattr(self.model.config, "_attn_implementation", None)),
            "platform": self.device.type,
        }


class HeldModel:
    """What the teacher and the sampler of this engine have in common: one loaded model, until it is closed.

    Raises:
        ConfigError: as `load_frozen`.
    """

    def __init__(self, config: TeacherConfig) -> None:
        loaded = load_frozen(config)
        self._model: Any = loaded.model
        self._device, self.vocab_size = loaded.device, loaded.vocab_size
        self._description = loaded.describe()

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        return dict(self._description)

    def close(self) -> None:
        """See `Teacher.close`."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def load_frozen(config: TeacherConfig) -> LoadedModel:
    """Load `AutoModelForCausalLM` for inference.

    Raises:
        ConfigError: it cannot be loaded, an engine argument is unknown, or `max_length` is beyond its context.
    """
    from transformers.utils import logging

    if not config.debug:
        logging.disable_progress_bar()
    args = dict(config.engine_args)
    unknown = sorted(set(args) - set(LOADING_ARGS))
    if unknown:
        raise ConfigError(
            f"engine arguments of transformers are {', '.join(LOADING_ARGS)}, got {', '.join(unknown)}"
            + ("; use --revision" if "revision" in unknown else "")
        )
    if isinstance(trusted := args.get("trust_remote_code"), str):
        args["trust_remote_code"] = SPOKEN.get(trusted.lower())
    if args.get("trust_remote_code", False) not in (True, False):
        raise ConfigError(f"engine argument trust_remote_code must be true or false, got {trusted!r}")
    device = torch.device(args.pop("device", "cuda" if torch.cuda.is_available() else "cpu"))
    model_config = read_model_config(config.model)
    dtype = resolve_dtype(
        config.dtype, checkpoint_dtype(model_config), on_cpu=device.type == "cpu", softcap=None
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
        kind = _kind_of_model(config.model, args)
        loaded = kind.from_pretrained(config.model, dtype=getattr(torch, dtype), **args)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the model must load in transformers, got: {one_line(error, whole=True)}"
        ) from error
    model: Any = loaded.eval()
    model.to(device)
    if config.head_dtype == "float32" and dtype != "float32":
        _head_in_float32(model)
    text_config = model.config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and config.max_length > context:
        raise ConfigError(
            f"max_length must be at most {context} (the model's context), got {config.max_length}; "
            f"pass --max-length {context}"
        )
    return LoadedModel(
        model=model,
        device=device,
        dtype=dtype,
        head_dtype="float32" if config.head_dtype == "float32" else dtype,
        vocab_size=int(text_config.vocab_size),
    )


def _kind_of_model(model: str, args: dict[str, Any]) -> Any:
    """The class that loads it: a multimodal model predicts text from text as the text model that it holds."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind = type(AutoConfig.from_pretrained(model, trust_remote_code=args.get("trust_remote_code")))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


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
