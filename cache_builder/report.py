"""What a build or a dry run found, as data and as the text a user reads."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from formats.capture_settings import CaptureSettings
from formats.identity.teacher_identity import TeacherIdentity, short
from formats.progress import counted, format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The state in which a build left its directory, and what this run contributed."""

    out: str
    """Directory of the cache."""
    complete: bool
    """Whether the manifest is written: the directory is a cache."""
    was_complete: bool
    """Whether it was a cache before this run, which then did nothing."""
    num_shards: int
    """Shards planned."""
    num_shards_done: int
    """Shards on the disk."""
    num_rows: int
    """Rows of the whole cache."""
    num_tokens: int
    """Tokens of the whole cache."""
    num_positions: int
    """Positions with a teacher distribution, of the whole cache."""
    num_bytes: int
    """Bytes of all shards on the disk."""
    num_rows_captured: int = 0
    """Rows that this run captured."""
    num_tokens_captured: int = 0
    """Tokens that this run captured."""
    seconds: float = 0.0
    """Time this run spent capturing, without the start of the engine."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Identity of the finished cache; empty before."""

    @property
    def tokens_per_second(self) -> float:
        """Of this run."""
        return self.num_tokens_captured / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Of what is on the disk, over tokens; 0 while nothing is."""
        done = self.num_tokens if self.complete else 0
        return self.num_bytes / done if done else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def text(self) -> str:
        """A summary of a few lines."""
        if self.was_complete:
            return (
                f"{self.out} is complete: {counted(self.num_rows, 'row')}, {self.num_tokens} tokens "
                f"in {counted(self.num_shards, 'shard')}; nothing to do (--overwrite builds it anew)"
            )
        lines = []
        if self.num_rows_captured:
            lines.append(
                f"captured {self.num_rows_captured} rows, {self.num_tokens_captured} tokens "
                f"in {format_seconds(self.seconds)} "
                f"({self.num_rows_captured / max(self.seconds, 1e-9):.1f} rows/s, "
                f"{self.tokens_per_second:,.0f} tokens/s)"
            )
        if not self.complete:
            lines.append(
                f"{self.out}: {self.num_shards_done} of {self.num_shards} shards are on the disk; "
                "the same command without --shards finishes the cache"
            )
            return "\n".join(lines)
        lines.append(
            f"{self.out}: {counted(self.num_rows, 'row')}, {self.num_tokens} tokens, "
            f"{self.num_positions} positions, {counted(self.num_shards, 'shard')}, "
            f"{format_bytes(self.num_bytes)} ({self.bytes_per_token:.1f} bytes/token)"
        )
        lines += records_line(self.identity.get("corpus", {}))
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What a build would do; no engine was started and nothing was written."""

    out: str
    """Directory that the build would make."""
    state: str
    """What is there now."""
    num_rows: int
    """Rows of the corpus."""
    num_tokens: int
    """Their tokens."""
    num_positions: int
    """Positions that would be captured."""
    num_shards: int
    """Shards."""
    estimated_bytes: int
    """Rough size of the cache; `anneal cache estimate` measures it."""
    identity: TeacherIdentity
    """Identity of the cache, but for what only the running engine can tell."""
    corpus: Mapping[str, Any]
    """What the tokeniser counted."""
    at_most: bool = False
    """Whether tokens, positions, shards and bytes are bounds: rows that the model has yet to write."""
    announcements: tuple[str, ...] = ()
    """How records become rows."""
    sample: str = ""
    """One decoded, masked example."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **{k: v for k, v in vars(self).items() if k != "identity"},
            "identity": self.identity.to_dict(),
        }

    def text(self) -> str:
        """About a screen."""
        share = 100 * self.num_positions / max(self.num_tokens, 1)
        most = "at most " if self.at_most else ""
        lines = [
            *([self.sample] if self.sample else self.announcements),
            *records_line({"counts": self.corpus, "notes": self.corpus.get("notes", [])}),
            f"rows       {self.num_rows}",
            f"tokens     {most}{self.num_tokens}",
            f"positions  {most}{self.num_positions} ({share:.1f} % of the tokens)",
            f"shards     {most}{self.num_shards}",
            f"size       about {format_bytes(self.estimated_bytes)} "
            + ("if every row is that long" if self.at_most else "(`anneal cache estimate` measures it)"),
            f"output     {self.out}: {self.state}",
            "identity",
        ]
        for section, entries in self.identity.to_dict().items():
            lines += [f"  {section}.{key}: {short(value)}" for key, value in sorted(entries.items())]
        return "\n".join(lines)


def records_line(corpus: Mapping[str, Any]) -> list[str]:
    """What became of the records, or of the rows that the model wrote, as one line; none if nobody counted them."""
    if "num_ended" in corpus.get("counts", {}):
        return [f"generated  {'; '.join(corpus.get('notes', ()))}"]
    if "num_records" not in corpus.get("counts", {}):
        return []
    told = "; ".join(corpus.get("notes", ())) or "none skipped, none cut"
    return [f"records    {corpus['counts']['num_records']}: {told}"]


def rough_bytes(
    num_tokens: int,
    num_positions: int,
    capture: CaptureSettings,
) -> int:
    """A guess at the size of a cache from settings alone, within a factor of about two.

    From SmolLM2-135M-Instruct on news text (docs/benchmarks.md, "Three teachers"): kept tokens and tail take 35, 28
    and 22 bytes per position at p >= 5e-3, 1e-2 and 2e-2, a power law; a sharper model takes less. A rate of 8 draws
    some 15 tokens of 2.1 bytes. Ids and mask take five bytes per token.
    """
    kept = min(28.0 * (1e-2 / max(capture.min_prob, 1e-6)) ** 0.36, 2.0 * capture.max_k + 6)
    per_position = kept + 4.0 * capture.draw_rate
    return round(num_tokens * 5 + num_positions * per_position)
