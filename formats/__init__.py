"""What a teacher cache is: its on-disk format, reader, writer, identity and statistics.

numpy, pyarrow and zstandard only; never torch, vLLM or transformers, so that a cache can be inspected
anywhere.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AnnealError": "errors",
    "ConfigError": "errors",
    "CorruptShardError": "errors",
    "CorpusError": "errors",
    "FormatError": "errors",
    "IdentityMismatchError": "errors",
    "IncompleteCacheError": "errors",
    "UnsupportedVersionError": "errors",
    "ConsoleProgress": "progress",
    "Progress": "progress",
    "TokenRow": "disk.token_row",
    "content_key": "disk.token_row",
    "TAIL_BETAS": "logprobs.tail_function",
    "TailDraws": "logprobs.tail_draws",
    "TopKLogprobs": "logprobs.topk",
    "CodecConfig": "codec.config",
    "ShardInfo": "disk.manifest",
    "Manifest": "disk.manifest",
    "ShardWriter": "disk.shard",
    "ShardReader": "disk.shard",
    "CacheRow": "cache_row",
    "CaptureSettings": "capture_settings",
    "CacheWriter": "writer",
    "TeacherCache": "cache",
    "TeacherIdentity": "identity.teacher_identity",
    "ModelFingerprint": "identity.fingerprint",
    "TokenizerFingerprint": "identity.fingerprint",
    "resolve_model": "identity.fingerprint",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'formats' has no attribute {name!r}")
    value = getattr(import_module(f"formats.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
