"""Corpus -> token rows -> teacher -> shards.

Importing this package loads nothing heavy: every public name is imported from its module on first use.
The functions `tokenise` and `preview` live in the modules of the same names.
"""

import importlib
from typing import Any

_MODULES = {
    "BuildConfig": "config",
    "BuildReport": "report",
    "PlanReport": "report",
    "BuildInterrupted": "signals",
    "ConsoleProgress": "progress",
    "Progress": "progress",
    "build_cache": "build",
    "build_cache_with_ray": "ray_pool",
    "estimate_cache": "estimate",
    "export_parquet": "export",
    "merge_caches": "merge",
    "plan_build": "dry_run",
    "pull_cache": "share",
    "push_cache": "share",
    "verify_cache": "verify",
    "CorpusConfig": "corpus",
    "open_corpus": "corpus",
    "Teacher": "teacher",
    "TeacherConfig": "teacher",
    "TeacherError": "teacher",
    "TransformersTeacher": "transformers_teacher",
    "VLLMTeacher": "vllm_teacher",
    "make_teacher": "teacher",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULES))
