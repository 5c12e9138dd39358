"""The plan of a build: settings first, then the list of shards; each file is written once, never changed.

    _build/settings.json       identity, codec and shard sizes; committed exclusively, so the first command
                               decides and every other is compared with it
    _build/plan.json           the shards, with their counts and the hashes of their staged rows; its
                               presence ends planning

An interrupted planning starts again and overwrites the staged rows with the same bytes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_builder.commit.build_directory import build_directory
from cache_builder.commit.staging import StagedShard, cut, stage
from formats.disk.durable import atomic_write_bytes, commit_exclusive, temporary_name
from formats.disk.token_row import TokenRow
from formats.disk.unfinished_build import PLAN_NAME
from formats.errors import ConfigError, CorpusError, FormatError
from formats.identity.teacher_identity import Difference, TeacherIdentity, short

SETTINGS_NAME = "settings.json"
FORMAT = "anneal-build"
VERSION = 1

OPTION_OF = {
    ("teacher", "weights"): "model weights",
    ("teacher", "config"): "model configuration",
    ("teacher", "engine"): "--engine",
    ("teacher", "requested_dtype"): "--dtype",
    ("teacher", "engine_args"): "--engine-arg",
    ("corpus", "fingerprint"): "corpus contents",
    ("corpus", "split"): "--split",
    ("corpus", "limit"): "--limit",
    ("corpus", "seed"): "--seed",
    ("preprocessing", "max_length"): "--max-length",
    ("preprocessing", "min_prob"): "--min-prob",
    ("preprocessing", "max_k"): "--max-k",
    ("preprocessing", "positions"): "--positions",
    ("preprocessing", "text_column"): "--text-column",
    ("codec", "draw_rate"): "--tail-draws",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What two commands must share to work on one cache."""

    identity: TeacherIdentity
    """Everything that decides which numbers are stored."""
    codec: Mapping[str, Any]
    """How they are encoded."""
    rows_per_shard: int
    """Limit of rows per shard."""
    tokens_per_shard: int
    """Limit of tokens per shard."""

    @property
    def positions(self) -> str:
        """Which positions are captured."""
        return str(self.identity.preprocessing["positions"])

    def to_bytes(self) -> bytes:
        """JSON text of settings.json."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity.to_dict(),
            "codec": dict(self.codec),
            "rows_per_shard": self.rows_per_shard,
            "tokens_per_shard": self.tokens_per_shard,
        }
        return json.dumps(content, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Settings":
        """The inverse of `to_bytes`.

        Raises:
            FormatError: written by another version, or damaged.
        """
        content = _parse(data, SETTINGS_NAME)
        return cls(
            identity=TeacherIdentity.from_dict(content["identity"]),
            codec=content["codec"],
            rows_per_shard=content["rows_per_shard"],
            tokens_per_shard=content["tokens_per_shard"],
        )

    def differences(self, other: "Settings") -> list[str]:
        """Each setting in which `other` differs, as a phrase `--max-length: 2048 there, 1024 now`."""
        found: list[Difference] = self.identity.differences(other.identity)
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

    def require_same(self, other: "Settings", out: Path, what: str) -> None:
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
        """JSON text of plan.json."""
        content = {"format": FORMAT, "version": VERSION, "corpus": dict(self.corpus)}
        return json.dumps({**content, "shards": [asdict(shard) for shard in self.shards]}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Plan":
        """The inverse of `to_bytes`.

        Raises:
            FormatError: written by another version, or damaged.
        """
        content = _parse(data, PLAN_NAME)
        return cls(
            shards=tuple(StagedShard(**entry) for entry in content["shards"]),
            corpus=content["corpus"],
        )


def _parse(data: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
        known = content["format"] == FORMAT and content["version"] == VERSION
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise FormatError(
            f"_build/{name} must be of build version {VERSION}, got another one; start over with --overwrite"
        )
    return content


def settle_settings(out: Path, settings: Settings) -> None:
    """Make `settings` those of the build in `out`, or prove that they already are.

    Raises:
        ConfigError: a build with other settings is there; names them.
    """
    path = build_directory(out) / SETTINGS_NAME
    if not path.exists():
        temporary = temporary_name(path)
        temporary.write_bytes(settings.to_bytes())
        commit_exclusive(temporary, path)
    Settings.from_bytes(path.read_bytes()).require_same(settings, out, "an unfinished build")


def read_plan(out: Path) -> Plan | None:
    """The plan of the build in `out`; None while it is being made."""
    try:
        return Plan.from_bytes((build_directory(out) / PLAN_NAME).read_bytes())
    except FileNotFoundError:
        return None


def write_plan(
    out: Path,
    rows: Iterable[TokenRow],
    settings: Settings,
    *,
    describe: Callable[[], Mapping[str, Any]] = dict,
    on_shard: Callable[[int, StagedShard], None] = lambda index, shard: None,
) -> Plan:
    """Tokenise the corpus into staged rows and commit the plan. Memory: one shard of tokens.

    Args:
        rows: the corpus, read once.
        describe: called at the end, what the tokeniser counted.
        on_shard: called after each staged shard.

    Raises:
        CorpusError: there is nothing to capture.
        OSError: the disk is full or fails.
    """
    build = build_directory(out)
    shards: list[StagedShard] = []
    for group in cut(rows, settings.rows_per_shard, settings.tokens_per_shard):
        shards.append(stage(build, len(shards), group, settings.positions))
        on_shard(len(shards) - 1, shards[-1])
    plan = Plan(shards=tuple(shards), corpus=describe())
    require_work(plan.num_positions, plan.num_rows)
    atomic_write_bytes(build / PLAN_NAME, plan.to_bytes())
    return plan


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
