"""What a teacher cache is: its on-disk format, reader, writer, identity and statistics.

numpy, pyarrow and zstandard only; never torch, vLLM or transformers, so that a cache can be inspected
anywhere.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; `_HOME` is what Python does
    from formats.cache import TeacherCache as TeacherCache
    from formats.cache_row import CacheRow as CacheRow
    from formats.capture_settings import CaptureSettings as CaptureSettings
    from formats.codec.config import CodecConfig as CodecConfig
    from formats.disk.manifest import Manifest as Manifest
    from formats.disk.manifest import ShardInfo as ShardInfo
    from formats.disk.shard import ShardReader as ShardReader
    from formats.disk.shard import ShardWriter as ShardWriter
    from formats.disk.token_row import TokenRow as TokenRow
    from formats.disk.token_row import content_key as content_key
    from formats.errors import AnnealError as AnnealError
    from formats.errors import ConfigError as ConfigError
    from formats.errors import CorpusError as CorpusError
    from formats.errors import CorruptShardError as CorruptShardError
    from formats.errors import FormatError as FormatError
    from formats.errors import IdentityMismatchError as IdentityMismatchError
    from formats.errors import IncompleteCacheError as IncompleteCacheError
    from formats.errors import UnsupportedVersionError as UnsupportedVersionError
    from formats.identity.fingerprint import ModelFingerprint as ModelFingerprint
    from formats.identity.fingerprint import TokenizerFingerprint as TokenizerFingerprint
    from formats.identity.fingerprint import resolve_model as resolve_model
    from formats.identity.teacher_identity import TeacherIdentity as TeacherIdentity
    from formats.logprobs.tail_draws import TailDraws as TailDraws
    from formats.logprobs.tail_function import TAIL_BETAS as TAIL_BETAS
    from formats.logprobs.topk import TopKLogprobs as TopKLogprobs
    from formats.progress import ConsoleProgress as ConsoleProgress
    from formats.progress import Progress as Progress
    from formats.writer import CacheWriter as CacheWriter

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
