"""`anneal cache estimate`: what a cache of this corpus would weigh and keep, for several settings.

The whole corpus goes through the tokenizer once; a few rows, drawn uniformly, through the engine once at
generous settings.  Every tighter setting follows from that capture exactly (entries move into the tail,
where tokens are drawn among them as well: `TopKLogprobs.prune`), is stored with the real codec and read back.
Reported at T = 1:

    bytes/token   of the stored sample, tokens and masks included
    missed mass   teacher probability outside the head: the training gradient errs by at most sqrt(2) times
                  it, and not at all at the initial weights
    KL            of the stored head and tail from the unquantised ones: what the codec alone costs
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cache_builder.build import MakeTeacher, start_engine
from cache_builder.commit.capture import EngineStartError
from cache_builder.commit.plan import require_work
from cache_builder.config import BuildConfig
from cache_builder.source import BuildSource, open_source
from cache_builder.tools.deviation import compare
from cache_builder.tools.round_trip import stored_and_read
from formats.disk.token_row import TokenRow
from formats.errors import AnnealError, ConfigError
from formats.logprobs.topk import TopKLogprobs
from formats.progress import Progress, format_bytes

GENEROUS_MIN_PROB = 1e-4
GENEROUS_MAX_K = 1024
MIN_PROBS = (3e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 3e-2)
MAX_MISSED_MASS = 0.05
"""The recommended setting is the smallest whose mean missed mass is at most this."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One line of the table."""

    min_prob: float
    """Setting."""
    max_k: int
    """Setting."""
    bytes_per_token: float
    """Of the stored sample."""
    total_bytes: int
    """For the whole corpus."""
    entries_per_position: float
    """Mean head size."""
    missed_mean: float
    """Teacher probability outside the head, mean over positions."""
    missed_p95: float
    """Its 95th percentile."""
    kl_mean: float
    """KL of the stored distribution from the unquantised one, nats per position."""


@dataclass(frozen=True, kw_only=True)
class EstimateReport:
    """The table, and what it rests on."""

    num_rows: int
    """Rows of the whole corpus."""
    num_tokens: int
    """Tokens of the whole corpus."""
    num_positions: int
    """Positions that a build would capture."""
    num_sampled_rows: int
    """Rows that went through the engine."""
    num_sampled_positions: int
    """Positions that went through the engine."""
    estimates: tuple[Estimate, ...]
    """By increasing min_prob."""
    recommended: int
    """Index into `estimates`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def text(self) -> str:
        """A table and a recommendation."""
        lines = [
            f"corpus: {self.num_rows} rows, {self.num_tokens} tokens, {self.num_positions} positions; "
            f"sample: {self.num_sampled_rows} rows, {self.num_sampled_positions} positions",
            "min_prob  max_k  bytes/token       total  entries  missed mass (95 %)  codec KL (nats)",
        ]
        for index, e in enumerate(self.estimates):
            mark = "  <- recommended" if index == self.recommended else ""
            lines.append(
                f"{e.min_prob:8g}  {e.max_k:5d}  {e.bytes_per_token:11.1f}  "
                f"{format_bytes(e.total_bytes):>10}  {e.entries_per_position:7.1f}  "
                f"{e.missed_mean:10.2%} ({e.missed_p95:.2%})  {e.kl_mean:13.2e}{mark}"
            )
        best = self.estimates[self.recommended]
        lines.append(
            f"recommended: --min-prob {best.min_prob:g} --max-k {best.max_k} (the smallest that misses "
            f"at most {MAX_MISSED_MASS:.0%} of the teacher's probability on average)"
        )
        return "\n".join(lines)


def estimate_cache(
    config: BuildConfig,
    *,
    rows: int = 64,
    min_probs: Sequence[float] = MIN_PROBS,
    seed: int = 0,
    progress: Progress | None = None,
    source: BuildSource | None = None,
    make_teacher: MakeTeacher = start_engine,
) -> EstimateReport:
    """Measure several settings on a sample. `config.out` is neither read nor written.

    Args:
        config: as for a build; its `max_k` caps the heads, its `min_prob` is added to the table.
        rows: how many rows go through the engine.
        min_probs: the settings to tabulate.
        seed: of the choice of rows.

    Raises:
        ConfigError, CorpusError: bad settings or input.
        EngineStartError: the engine did not start.
    """
    if rows < 1 or not min_probs:
        raise ConfigError(f"rows must be at least 1, got {rows}")
    progress = progress or Progress()
    source = source or open_source(config)
    sample, num_rows, num_tokens, num_positions = _sample(source, config, rows, seed, progress)
    generous = replace(
        config,
        min_prob=min(GENEROUS_MIN_PROB, config.min_prob, *min_probs),
        max_k=max(GENEROUS_MAX_K, config.max_k),
    )
    config = replace(config, codec=replace(config.codec, draw_rate=config.draw_rate))
    captured = _capture(generous, source, sample, make_teacher, progress)
    settings = sorted({*min_probs, config.min_prob} - {0.0})
    num_sampled_tokens = sum(len(row) for row in sample)
    estimates = tuple(
        _estimate(config, min_prob, sample, captured, num_tokens, num_sampled_tokens) for min_prob in settings
    )
    good = [index for index, e in enumerate(estimates) if e.missed_mean <= MAX_MISSED_MASS]
    best = min(good, key=lambda i: estimates[i].bytes_per_token) if good else 0
    return EstimateReport(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_positions=num_positions,
        num_sampled_rows=len(sample),
        num_sampled_positions=sum(len(topk) for topk in captured),
        estimates=estimates,
        recommended=best,
    )


def _sample(
    source: BuildSource, config: BuildConfig, size: int, seed: int, progress: Progress
) -> tuple[list[TokenRow], int, int, int]:
    """Rows drawn uniformly in one pass (reservoir sampling), and the counts of the whole corpus."""
    generator = np.random.default_rng(seed)
    chosen: list[tuple[int, TokenRow]] = []
    num_rows = num_tokens = num_positions = 0
    progress.start("tokenise", None)
    for row in source.open_rows():
        if len(chosen) < size:
            chosen.append((num_rows, row))
        elif (slot := int(generator.integers(num_rows + 1))) < size:
            chosen[slot] = (num_rows, row)
        num_rows += 1
        num_tokens += len(row)
        num_positions += len(row.positions(config.positions))
        progress.advance(1, len(row))
    progress.finish()
    require_work(num_positions, num_rows)
    return [row for _, row in sorted(chosen, key=lambda pair: pair[0])], num_rows, num_tokens, num_positions


def _capture(
    config: BuildConfig,
    source: BuildSource,
    sample: Sequence[TokenRow],
    make_teacher: MakeTeacher,
    progress: Progress,
) -> list[TopKLogprobs]:
    progress.note(f"starting the engine ({config.engine})")
    try:
        teacher = make_teacher(config, source)
    except AnnealError:
        raise
    except Exception as error:
        raise EngineStartError(f"the engine must start, got {type(error).__name__}: {error}") from error
    progress.start("capture", len(sample))
    captured = []
    try:
        for row, topk in zip(sample, teacher.prefill(list(sample)), strict=True):
            captured.append(topk)
            progress.advance(1, len(row))
    finally:
        teacher.close()
        progress.finish()
    return captured


def _estimate(
    config: BuildConfig,
    min_prob: float,
    sample: Sequence[TokenRow],
    captured: Sequence[TopKLogprobs],
    num_tokens: int,
    num_sampled_tokens: int,
) -> Estimate:
    max_k = min(config.max_k, captured[0].vocab_size)
    pruned = [topk.prune(min_prob, max_k) for topk in captured]
    stored = stored_and_read(sample, pruned, positions=config.positions, max_k=max_k, codec=config.codec)
    exact = TopKLogprobs.concatenate(pruned)
    missed = 1.0 - exact.head_mass(1.0)
    per_token = stored.info.num_bytes / num_sampled_tokens
    return Estimate(
        min_prob=min_prob,
        max_k=config.max_k,
        bytes_per_token=per_token,
        total_bytes=round(per_token * num_tokens),
        entries_per_position=exact.num_entries / max(len(exact), 1),
        missed_mean=float(missed.mean()),
        missed_p95=float(np.quantile(missed, 0.95)),
        kl_mean=float(compare(exact, TopKLogprobs.concatenate(stored.topk)).kl.mean()),
    )
