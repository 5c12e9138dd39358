"""The `vllm.general_plugins` entry point: a teacher variant of every text-generation architecture.

vLLM calls `register` in each of its processes.  For every architecture `X` that generates text it adds
`AnnealX`, which resolves lazily to a real subclass of vLLM's own class (see `vllm_pooler`), so that no model
code is imported here and nothing changes for anyone who does not ask for an `Anneal...` architecture.

vLLM's engine process outlives a parent that was killed outright, and keeps its memory.  In processes that
were started under `child_environment`, `register` also starts a thread that ends the engine when its parent is gone.
"""

import multiprocessing
import os
import signal
import threading
import time

from formats.engine.environment import PARENT_VARIABLE

PREFIX = "Anneal"
MODULE = "cache_builder.teachers.vllm_pooler"
WRAPPERS = {
    *(
        "Gemma3ForConditionalGeneration",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
    ),
    *(
        "Llama4ForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
    ),
    *("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
    *("Qwen3VLMoeForConditionalGeneration", "Qwen3_5ForConditionalGeneration"),
    "Qwen3_5MoeForConditionalGeneration",
}
"""Multimodal architectures whose prediction of text from text is that of the text model they hold."""
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0


def teacher_architecture(architecture: str) -> str:
    """The name under which `architecture` is registered as a teacher."""
    return PREFIX + architecture


def text_architectures() -> list[str]:
    """Architectures that generate text from text: vLLM's own, and those its Transformers backend runs."""
    from vllm.model_executor.models import registry

    names = {**registry._TEXT_GENERATION_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    names |= {name: target for name, target in registry._TRANSFORMERS_BACKEND_MODELS.items()}
    return sorted(name for name, (_, target) in names.items() if _generates_text(target))


def wrapped_architectures() -> list[str]:
    """Architectures that hold a text model beside encoders of images or sound, and run as it without them."""
    from vllm.model_executor.models import registry

    return sorted(registry._MULTIMODAL_MODELS.keys() & WRAPPERS)


def _generates_text(class_name: str) -> bool:
    return "MultiModal" not in class_name and not class_name.endswith(
        ("EmbeddingModel", "ForSequenceClassification")
    )


def end_with_parent() -> None:
    """Watch the process that owns this engine, if it started us, and end when it does, or has ended already."""
    starter = multiprocessing.parent_process()  # says who started us also when that one is gone
    if starter is None or os.environ.get(PARENT_VARIABLE) != str(starter.pid):
        return
    parent = starter.pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="anneal-parent-watch", daemon=True).start()


def ask_for_amx() -> None:
    """Ask Linux for the tile registers that vLLM's attention uses on a CPU with AMX.

    vLLM 0.32 looks whether the processor has them and leaves the asking to oneDNN, which asks at its first large
    product. A model whose layers are smaller than that reaches the attention before, and SIGILL ends the process.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def register() -> None:
    """Register the teacher variants; safe to call more than once."""
    end_with_parent()
    ask_for_amx()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in [*text_architectures(), *wrapped_architectures()]:
        teacher = teacher_architecture(name)
        ModelRegistry.register_model(teacher, f"{MODULE}:{teacher}")
        # Some architectures adjust the engine's configuration; the table is keyed by name.
        if name in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[teacher] = MODELS_CONFIG_MAP[name]
