"""From a `TeacherConfig` to vLLM's `EngineArgs`: architecture, typed user settings, refusals."""

import dataclasses
import difflib
import enum
import json
import os
import types
import typing
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from cache_builder.teachers.engine_args import by_name, refuse_data_parallel
from cache_builder.teachers.model_config import attention_softcap
from cache_builder.teachers.protocol import TeacherConfig
from cache_builder.teachers.vllm_plugin import (
    teacher_architecture,
    text_architectures,
    wrapped_architectures,
)
from formats.errors import ConfigError, one_line

CPU_KV_CACHE_BYTES = 1 << 30
"""A prefill needs little: the rows of one step.  vLLM's own default is a share of the whole memory."""

GRAPH_ARGS = {"cudagraph_capture_sizes", "max_cudagraph_capture_size"}
"""Who sets one of these has chosen CUDA graphs."""

QUANTISED_HEAD = "only supported for an unquantized lm_head"
"""vLLM's words where the output head has to be computed in another type than it is stored in and cannot be."""

CPU_BACKENDS = ("CPU_", "AMX_")
"""How the names of attention backends begin that run on a CPU."""
RESERVED_ARGS = {
    "model": "--model",
    "revision": "--revision",
    "dtype": "--dtype",
    "seed": "--seed",
    "max_model_len": "--max-length",
    "runner": None,
    "convert": None,
    "skip_tokenizer_init": None,
    "enable_prefix_caching": None,
    "additional_config": None,
    "scheduler_cls": None,
    "generation_config": None,
    "override_generation_config": None,
}
"""Set by the teacher itself, with the option of the command line that does it, if any."""


def teacher_architectures(model_config: Mapping[str, Any]) -> list[str]:
    """The `architectures` to run a model with: the teacher variant, then the model's own name.

    vLLM takes the first it can resolve; the second stays because parts of vLLM look for it by name.

    Raises:
        ConfigError: the model names no architecture, or one that does not turn text into text.
    """
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    names = model_config.get("architectures") or []
    if not names:
        raise ConfigError("config.json must name the model's architecture, got none under 'architectures'")
    name = names[0]
    known = text_architectures()
    if teacher_architecture(known[0]) not in ModelRegistry.get_supported_archs():
        raise ConfigError(
            "vLLM must load the plugin 'anneal', which it did not find; install this package with pip "
            "(a source tree: pip install -e .), and let VLLM_PLUGINS, if set, include anneal"
        )
    if name in wrapped_architectures() and find_spec("torchvision") is None:
        raise ConfigError(
            f"vLLM must find torchvision for {name}, got none; install the one of the same build as torch, or pass "
            "--engine transformers"
        )
    if name in known or name in wrapped_architectures():
        return [teacher_architecture(name), name]
    if name in ModelRegistry.get_supported_archs():
        raise ConfigError(
            f"the vllm engine captures decoder-only text models, alone or in {', '.join(wrapped_architectures())}, "
            f"got {name} (multimodal, encoder or pooling); use its text model's checkpoint, or --engine transformers"
        )
    import transformers

    if hasattr(transformers, name) and name.endswith("ForCausalLM"):
        experts = ("num_experts", "num_local_experts", "n_routed_experts")
        sparse = any((model_config.get(key) or 0) > 1 for key in experts)
        backend = "TransformersMoEForCausalLM" if sparse else "TransformersForCausalLM"
        return [teacher_architecture(backend), name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did its config mean {close[0]}?" if close else ""
    raise ConfigError(f"the architecture must be known to vLLM or transformers, got {name}{hint}")


def refuse_ignored_backend(arguments: Mapping[str, Any]) -> None:
    """On a CPU vLLM (0.32) takes its own attention, whichever it is told; a cache would record another one.

    Raises:
        ConfigError: one that does not run on a CPU is asked for.
    """
    asked = getattr(arguments.get("attention_backend"), "name", None)
    if asked is not None and not asked.startswith(CPU_BACKENDS):
        raise ConfigError(
            f"engine argument attention_backend must be one that runs on a CPU, got {asked}, for which vLLM would "
            "take CPU_ATTN without a word; leave it out"
        )


def refuse_ignored_softcap(model_config: Mapping[str, Any], dtype: str) -> None:
    """vLLM's CPU attention (0.32) applies an attention softcap in bf16 only; in fp32 it is silently left out.

    Raises:
        ConfigError: the model has one and would run without it.
    """
    from vllm.platforms import current_platform

    cap = attention_softcap(model_config)
    if cap is not None and dtype != "bfloat16" and current_platform.is_cpu():
        raise ConfigError(
            f"on a CPU vLLM honours attn_logit_softcapping ({cap:g} in this model) in bfloat16 only, "
            f"got {dtype}; pass --dtype bfloat16 or --engine transformers"
        )


def engine_arguments(config: TeacherConfig, *, dtype: str, architectures: list[str]) -> dict[str, Any]:
    """Keyword arguments of `EngineArgs` for prefill with the reduction of `vllm_pooler`.

    Raises:
        ConfigError: an engine argument is unknown, of the wrong type, or set by the teacher itself.
    """
    return _arguments(
        config,
        {
            "runner": "pooling",
            "additional_config": {"anneal": config.capture.to_dict()},
            "scheduler_cls": "cache_builder.teachers.vllm_waves.WaveScheduler",
            **({"language_model_only": True} if set(architectures) & set(wrapped_architectures()) else {}),
        },
        dtype=dtype,
        overrides={"architectures": architectures},
    )


def sampler_arguments(config: TeacherConfig, *, dtype: str) -> dict[str, Any]:
    """The same for generation.

    Raises:
        ConfigError: as `engine_arguments`.
    """
    # The model's own generation_config may hold a temperature and cuts of the distribution.
    return _arguments(config, {"runner": "generate", "generation_config": "vllm"}, dtype=dtype, overrides={})


def _arguments(
    config: TeacherConfig, kind: Mapping[str, Any], *, dtype: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    from vllm.platforms import current_platform

    user = typed_engine_args(config.engine_args)
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": dtype,
        "seed": config.seed,
        "max_model_len": config.max_length,
        "hf_overrides": {
            **dict(user.pop("hf_overrides", None) or {}),
            **overrides,
            "head_dtype": config.head_dtype,
        },
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # every position has to be computed, none may come from a cache
        "async_scheduling": False,  # with it, what shares a step depends on when results arrive
        "disable_log_stats": True,
        "use_tqdm_on_load": config.debug,
        **kind,
    }
    arguments |= platform_arguments(
        on_cpu=current_platform.is_cpu(), pooling=kind["runner"] == "pooling", user=user
    )
    return {**arguments, **user}


def platform_arguments(*, on_cpu: bool, pooling: bool, user: dict[str, Any]) -> dict[str, Any]:
    """What depends on where the engine runs.

    Args:
        user: typed arguments of the user's, which may be completed.

    Raises:
        ConfigError: vLLM would ignore one of them there.
    """
    if on_cpu:
        refuse_ignored_backend(user)
        kept = {} if "VLLM_CPU_KVCACHE_SPACE" in os.environ else {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
        # A prompt in parts sets a row's random numbers back, which those of a CPU cannot (vLLM 0.32, gpu_model_runner).
        whole = {} if pooling else {"enable_chunked_prefill": False}
        return {"enforce_eager": True, **kept, **whole}
    if not pooling or user.keys() & GRAPH_ARGS:
        return {}
    # A step of a prefill is larger than all graphs that vLLM would record at its start.
    given = user.pop("compilation_config", None)
    if given is None or isinstance(given, dict):
        return {"compilation_config": {"cudagraph_mode": "NONE", **(given or {})}}
    return {"compilation_config": given}


def typed_engine_args(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of the engine arguments and convert strings to the type `EngineArgs` declares.

    Raises:
        ConfigError: see `engine_arguments`.
    """
    from vllm import EngineArgs

    hints = _type_hints(EngineArgs)
    names = [field.name for field in dataclasses.fields(EngineArgs) if field.init]
    typed: dict[str, Any] = {}
    named = by_name(given)
    refuse_data_parallel(named)
    for name, value in named.items():
        if name in RESERVED_ARGS:
            option = RESERVED_ARGS[name]
            raise ConfigError(
                f"engine argument {name} is set by anneal, got {value!r}; "
                + (f"use {option}" if option else "leave it out")
            )
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"engine arguments must be vLLM's EngineArgs, got {name!r}{hint}")
        typed[name] = _convert(name, value, hints.get(name)) if isinstance(value, str) else value
    return typed


def _type_hints(cls: type) -> dict[str, Any]:
    """Resolved annotations; names that exist for type checkers only become `Any`."""
    unknown: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(cls, localns=unknown)
        except NameError as error:
            if not error.name or error.name in unknown:
                raise
            unknown[error.name] = typing.Any


def _convert(name: str, text: str, hint: Any) -> Any:
    """A string from the command line as the declared type: text stays text where text is allowed."""
    kinds = _plain_types(hint)
    if text.lower() in ("none", "null") and type(None) in kinds:
        return None
    for kind in kinds:
        if issubclass(kind, enum.Enum):
            return _member(name, text, kind)
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                pass
    if str in kinds:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict | list) or (not kinds & {bool, int, float} and value is not None):
        return value
    expected = "/".join(sorted(kind.__name__ for kind in kinds & {bool, int, float})) or "JSON"
    raise ConfigError(f"engine argument {name} must be {expected}, got {text!r}")


def _member(name: str, text: str, kind: type[enum.Enum]) -> enum.Enum:
    """A choice of vLLM's by its name, as its own command line takes it, or by its value."""
    for member in kind:
        if text.lower() in (member.name.lower(), str(member.value).lower()):
            return member
    known = ", ".join(member.name for member in kind)
    raise ConfigError(f"engine argument {name} must be one of {known}, got {text!r}")


def _plain_types(hint: Any) -> set[type]:
    """The builtin types a value may have, through unions, literals and annotations."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_plain_types(part) for part in typing.get_args(hint)))
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    if origin is typing.Annotated:
        return _plain_types(typing.get_args(hint)[0])
    if isinstance(origin, type):
        return {origin}
    if hint is typing.Any or hint is None:
        return {type(None)} if hint is None else set()
    return {hint} if isinstance(hint, type) else set()


def advised(cause: str) -> str:
    """A failure of the engine's, with what to do where we know it."""
    if QUANTISED_HEAD in cause:
        return f"{cause}; the model's output head is quantised: pass --head-dtype model"
    return cause


def engine_line(error: BaseException) -> str:
    """What vLLM says as one line; pydantic's preamble is left out."""
    marker = "Value error, "
    text = one_line(error, limit=10_000, whole=True)
    if marker in text:
        text = text.split(marker, 1)[1].split(" [type=")[0]
    return text[:300]
