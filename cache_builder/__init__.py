"""Corpus, or rows that the model writes itself -> token rows -> teacher -> shards.

Importing this package loads nothing heavy: every public name is imported from its module on first use.
The functions `tokenise` and `preview` live in the modules of the same names.
"""

import importlib
from typing import Any

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
