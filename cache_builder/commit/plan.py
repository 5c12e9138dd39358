"""The plan of a build as two values: settings first, then the list of shards. Each is settled once.

`BuildDirectory` keeps them in `_build/settings.json` and `_build/plan.json`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_builder.commit.staging import StagedShard
from formats.capture_settings import CaptureSettings
from formats.disk.sealed_json import seal, unseal
from formats.disk.unfinished_build import PLAN_NAME
from formats.errors import ConfigError, CorpusError, FormatError
from formats.identity.teacher_identity import Difference, TeacherIdentity, short
from formats.progress import counted

FORMAT = "anneal-build"
VERSION = 3
"""Of the files of an unfinished build."""

OPTION_OF = {
    ("teacher", "weights"): "model weights",
    ("teacher", "config"): "model configuration",
    ("teacher", "engine"): "--engine",
    ("teacher", "requested_dtype"): "--dtype",
    ("teacher", "requested_head_dtype"): "--head-dtype",
    ("teacher", "engine_args"): "--engine-arg",
    ("corpus", "fingerprint"): "corpus contents",
    ("corpus", "split"): "--split",
    ("corpus", "limit"): "--limit",
    ("corpus", "seed"): "--seed",
    ("corpus", "generate"): "--generate",
    ("corpus", "generate_temperature"): "--generate-temperature",
    ("corpus", "generate_from"): "--generate-from",
    ("corpus", "prompts"): "--prompts or --generate-from",
    ("preprocessing", "max_length"): "--max-length",
    ("preprocessing", "min_prob"): "--min-prob",
    ("preprocessing", "max_k"): "--max-k",
    ("preprocessing", "positions"): "--positions",
    ("preprocessing", "text_column"): "--text-column",
    ("preprocessing", "chat_template_kwargs"): "--template-arg",
    ("preprocessing", "template_time"): "--template-time",
    ("codec", "draw_rate"): "--tail-draws",
}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What two commands must share to work on one cache."""

    identity: TeacherIdentity
    """Everything that decides which numbers are stored; two builds are compared by it and the codec."""
    capture: CaptureSettings
    """What of every prediction is stored, for those who do it; `identity` records the same."""
    codec: Mapping[str, Any]
    """How they are encoded."""
    rows_per_shard: int
    """Limit of rows per shard."""
    tokens_per_shard: int
    """Limit of tokens per shard."""

    def to_bytes(self) -> bytes:
        """Sealed JSON text of settings.json."""
        content = {
            "identity": self.identity.to_dict(),
            "capture": self.capture.to_dict(),
            "codec": dict(self.codec),
            "rows_per_shard": self.rows_per_shard,
            "tokens_per_shard": self.tokens_per_shard,
        }
        return sealed(content, indent=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> "BuildSettings":
        """The inverse of `to_bytes`.

        Raises:
            FormatError: written by another version, or damaged.
        """
        content = unsealed(data, "settings.json")
        return cls(
            identity=TeacherIdentity.from_dict(content["identity"]),
            capture=CaptureSettings(**content["capture"]),
            codec=content["codec"],
            rows_per_shard=content["rows_per_shard"],
            tokens_per_shard=content["tokens_per_shard"],
        )

    def differences(self, other: "BuildSettings") -> list[str]:
        """Each setting in which `other` differs, as a phrase `--max-length: 2048 there, 1024 now`."""
        both = (self.identity.corpus, other.identity.corpus)
        # What the fingerprint of generated text is made of is named by itself.
        ignore = [("corpus", "fingerprint")] if all("generate" in corpus for corpus in both) else []
        found: list[Difference] = self.identity.differences(other.identity, ignore=ignore)
        found += [
            Difference("codec", key, self.codec.get(key), other.codec.get(key))
            for key in sorted({*self.codec, *other.codec})
            if self.codec.get(key) != other.codec.get(key)
        ]
        found += [
            Difference("", name, getattr(self, name), getattr(other, name))
            for name in ("rows_per_shard", "tokens_per_shard")
            if getattr(self, name) != getattr(other, name)
        ]
        return [
            f"{OPTION_OF.get((d.section, d.key), f'{d.section} {d.key}'.strip())}: "
            f"{short(d.recorded)} there, {short(d.given)} now"
            for d in found
        ]

    def require_same(self, other: "BuildSettings", out: Path, what: str) -> None:
        """Raise unless `other` would build the same cache.

        Raises:
            ConfigError: names the settings that differ.
        """
        if found := self.differences(other):
            raise ConfigError(
                f"one directory holds one cache, but {out} holds {what} with other settings "
                f"({'; '.join(found)}); choose another --out, or discard it with --overwrite"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shards of a build."""

    shards: tuple[StagedShard, ...]
    """In row order."""
    corpus: Mapping[str, Any]
    """What the tokeniser counted: records, rows, truncated, skipped, ..."""

    @property
    def notes(self) -> list[str]:
        """One sentence for each thing that was left out or altered."""
        return list(self.corpus.get("notes", ()))

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_positions(self) -> int:
        """Captured positions of all shards."""
        return sum(shard.num_positions for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Sealed JSON text of plan.json."""
        return sealed({"corpus": dict(self.corpus), "shards": [asdict(shard) for shard in self.shards]})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Plan":
        """The inverse of `to_bytes`.

        Raises:
            FormatError: written by another version, or damaged.
        """
        content = unsealed(data, PLAN_NAME)
        return cls(
            shards=tuple(StagedShard(**entry) for entry in content["shards"]),
            corpus=content["corpus"],
        )


def identity_with_counts(identity: TeacherIdentity, plan: Plan) -> TeacherIdentity:
    """The identity of the finished cache with what became of the corpus's records, for people to read."""
    data = identity.to_dict()
    counts = {name: value for name, value in plan.corpus.items() if name != "notes"}
    if counts:
        data["corpus"] = {**data["corpus"], "counts": counts, "notes": plan.notes}
    return TeacherIdentity.from_dict(data)


def sealed(content: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """A JSON file of `_build/`, with its version and its own digest: what a later command reads is what was written."""
    return seal({"format": FORMAT, "version": VERSION, **content}, indent=indent)


def unsealed(data: bytes, name: str) -> dict[str, Any]:
    """The inverse of `sealed`.

    Raises:
        FormatError: written by another version, damaged, or edited.
    """
    try:
        content = unseal(data, name)
    except FormatError:
        content = {}
    if (content.pop("format", None), content.pop("version", None)) != (FORMAT, VERSION):
        raise FormatError(
            f"_build/{name} must be as build version {VERSION} wrote it, got a damaged file or another version's; "
            "start over with --overwrite"
        )
    return content


def selected_shards(wanted: tuple[int, int] | None, num_shards: int) -> list[int]:
    """The shards of a plan that a build is to capture; all of them where nobody asks for some.

    Raises:
        ConfigError: the plan has none of them.
    """
    if wanted is None:
        return list(range(num_shards))
    first, last = wanted
    if first >= num_shards:
        raise ConfigError(
            f"--shards must begin within the {counted(num_shards, 'shard')} of the plan, got {first}:{last}"
        )
    return list(range(first, min(last, num_shards)))


def require_work(num_positions: int, num_rows: int) -> None:
    """Refuse a corpus without a single token to predict.

    Raises:
        CorpusError: there is none.
    """
    if num_positions == 0:
        raise CorpusError(
            f"a corpus must hold at least one token that carries loss, got none in {num_rows} rows; "
            "check the columns, the loss mask and --max-length"
        )
