"""Which engine a build's settings name, started for capture or for generation."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from cache_builder.config import BuildConfig
from cache_builder.pace import WAVES_PER_SHARD
from cache_builder.source import BuildSource

if TYPE_CHECKING:
    from cache_builder.teachers.protocol import Sampler, Teacher, TeacherConfig

MakeTeacher = Callable[[BuildConfig, BuildSource], "Teacher"]
MakeSampler = Callable[[BuildConfig, BuildSource], "Sampler"]


def start_engine(config: BuildConfig, source: BuildSource) -> "Teacher":
    """The engine that the settings name."""
    from cache_builder.teachers.engines import make_teacher

    return make_teacher(config.engine, _teacher_config(config, source))


def start_sampler(config: BuildConfig, source: BuildSource) -> "Sampler":
    """The same engine for generation."""
    from cache_builder.teachers.engines import make_sampler

    return make_sampler(config.engine, _teacher_config(config, source))


def _teacher_config(config: BuildConfig, source: BuildSource) -> "TeacherConfig":
    from cache_builder.teachers.protocol import TeacherConfig

    return TeacherConfig(
        model=str(source.model_dir),
        dtype=config.dtype,
        head_dtype=config.head_dtype,
        capture=config.capture,
        max_length=source.max_length,
        wave_tokens=max(source.settings.tokens_per_shard // WAVES_PER_SHARD, 1),
        engine_args=dict(config.engine_args),
    )
