"""From the name of an engine to a running teacher or sampler."""

from cache_builder.teachers.protocol import ENGINES, Sampler, Teacher, TeacherConfig
from formats.errors import ConfigError


def make_teacher(engine: str, config: TeacherConfig) -> Teacher:
    """Load the model in the named engine.

    Raises:
        ConfigError: unknown engine, an engine that is not installed, or settings it does not accept.
    """
    if engine == "vllm":
        from cache_builder.teachers.vllm_teacher import VLLMTeacher

        return VLLMTeacher(config)
    if engine == "transformers":
        from cache_builder.teachers.transformers_teacher import TransformersTeacher

        return TransformersTeacher(config)
    raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")


def make_sampler(engine: str, config: TeacherConfig) -> Sampler:
    """The same for generation.

    Raises:
        ConfigError: as `make_teacher`.
    """
    if engine == "vllm":
        from cache_builder.teachers.vllm_sampler import VLLMSampler

        return VLLMSampler(config)
    if engine == "transformers":
        from cache_builder.teachers.transformers_sampler import TransformersSampler

        return TransformersSampler(config)
    raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
