"""The `vllm.general_plugins` entry point: a teacher variant of every text-generation architecture.

vLLM calls `register` in each of its processes.  For every architecture `X` that generates text it adds
`AnnealX`, which resolves lazily to a real subclass of vLLM's own class (see `vllm_pooler`), so that no model
code is imported here and nothing changes for anyone who does not ask for an `Anneal...` architecture.
"""

PREFIX = "Anneal"
MODULE = "cache_builder.vllm_pooler"


def teacher_architecture(architecture: str) -> str:
    """The name under which `architecture` is registered as a teacher."""
    return PREFIX + architecture


def text_architectures() -> list[str]:
    """Architectures that generate text from text: vLLM's own, and those its Transformers backend runs."""
    from vllm.model_executor.models import registry

    names = {**registry._TEXT_GENERATION_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    names |= {name: target for name, target in registry._TRANSFORMERS_BACKEND_MODELS.items()}
    return sorted(name for name, (_, target) in names.items() if _generates_text(target))


def _generates_text(class_name: str) -> bool:
    return "MultiModal" not in class_name and not class_name.endswith(
        ("EmbeddingModel", "ForSequenceClassification")
    )


def register() -> None:
    """Register the teacher variants; safe to call more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in text_architectures():
        teacher = teacher_architecture(name)
        ModelRegistry.register_model(teacher, f"{MODULE}:{teacher}")
        # Some architectures adjust the engine's configuration; the table is keyed by name.
        if name in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[teacher] = MODELS_CONFIG_MAP[name]
