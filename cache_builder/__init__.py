"""Corpus, or rows that the model writes itself -> token rows -> teacher -> shards.

Importing this package loads nothing heavy: every public name is imported from its module on first use.
The functions `tokenise` and `preview` live in the modules of the same names.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; `_MODULES` is what Python does
    from cache_builder.build import build_cache as build_cache
    from cache_builder.build_on_ray import build_cache_with_ray as build_cache_with_ray
    from cache_builder.commit.signals import BuildInterrupted as BuildInterrupted
    from cache_builder.config import BuildConfig as BuildConfig
    from cache_builder.corpus.corpus import CorpusConfig as CorpusConfig
    from cache_builder.corpus.corpus import open_corpus as open_corpus
    from cache_builder.generation.settings import GenerationConfig as GenerationConfig
    from cache_builder.report import BuildReport as BuildReport
    from cache_builder.report import PlanReport as PlanReport
    from cache_builder.teachers.engines import make_sampler as make_sampler
    from cache_builder.teachers.engines import make_teacher as make_teacher
    from cache_builder.teachers.protocol import Sampler as Sampler
    from cache_builder.teachers.protocol import SampleRequest as SampleRequest
    from cache_builder.teachers.protocol import Teacher as Teacher
    from cache_builder.teachers.protocol import TeacherConfig as TeacherConfig
    from cache_builder.teachers.protocol import TeacherError as TeacherError
    from cache_builder.teachers.transformers_teacher import TransformersTeacher as TransformersTeacher
    from cache_builder.teachers.vllm_teacher import VLLMTeacher as VLLMTeacher
    from cache_builder.tools.convert_distillkit import convert_distillkit as convert_distillkit
    from cache_builder.tools.convert_responses import convert_responses as convert_responses
    from cache_builder.tools.dry_run import plan_build as plan_build
    from cache_builder.tools.estimate import estimate_cache as estimate_cache
    from cache_builder.tools.export_parquet import export_parquet as export_parquet
    from cache_builder.tools.export_topk import export_topk as export_topk
    from cache_builder.tools.hub_share import pull_cache as pull_cache
    from cache_builder.tools.hub_share import push_cache as push_cache
    from cache_builder.tools.merge_caches import merge_caches as merge_caches
    from cache_builder.tools.verify import verify_cache as verify_cache

_MODULES = {
    "BuildConfig": "config",
    "BuildReport": "report",
    "GenerationConfig": "generation.settings",
    "PlanReport": "report",
    "BuildInterrupted": "commit.signals",
    "build_cache": "build",
    "build_cache_with_ray": "build_on_ray",
    "convert_distillkit": "tools.convert_distillkit",
    "convert_responses": "tools.convert_responses",
    "estimate_cache": "tools.estimate",
    "export_parquet": "tools.export_parquet",
    "export_topk": "tools.export_topk",
    "merge_caches": "tools.merge_caches",
    "plan_build": "tools.dry_run",
    "pull_cache": "tools.hub_share",
    "push_cache": "tools.hub_share",
    "verify_cache": "tools.verify",
    "CorpusConfig": "corpus.corpus",
    "open_corpus": "corpus.corpus",
    "SampleRequest": "teachers.protocol",
    "Sampler": "teachers.protocol",
    "Teacher": "teachers.protocol",
    "TeacherConfig": "teachers.protocol",
    "TeacherError": "teachers.protocol",
    "TransformersTeacher": "teachers.transformers_teacher",
    "VLLMTeacher": "teachers.vllm_teacher",
    "make_sampler": "teachers.engines",
    "make_teacher": "teachers.engines",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULES))
