"""`anneal cache estimate`: what a cache of this corpus would weigh, and how exact its gradients would be.

The whole corpus goes through the tokenizer once; a few rows, drawn uniformly, through the engine once at
generous settings. Every tighter setting follows from that capture exactly (entries move into the tail, where
tokens are drawn among them as well: `TopKLogprobs.prune`), lower rates of draws by leaving draws out; each is
stored with the real codec and read back. Reported for every pair of threshold and rate, at T = 1:

    bytes/pos.    of the stored sample per captured position, tokens and masks included
    missed mass   teacher probability outside the head, which draws make up for
    angle         between the gradient of a step and the exact one, as expected_angle.py foretells it
    KL            of the stored head and tail from the unquantised ones: what the codec alone costs

Recommended is the cheapest pair with an angle below one degree.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cache_builder.commit.capture import started
from cache_builder.commit.plan import require_work
from cache_builder.config import BuildConfig
from cache_builder.report import records_line
from cache_builder.source import BuildSource, open_source
from cache_builder.start import MakeTeacher, start_engine
from cache_builder.tools.deviation import compare
from cache_builder.tools.expected_angle import STEP_TOKENS, UNCERTAINTY, expected_angle
from cache_builder.tools.round_trip import stored_and_read
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from formats.logprobs import ragged
from formats.logprobs.tail_draws import TailDraws, starts
from formats.logprobs.topk import TopKLogprobs
from formats.progress import Progress, counted, format_bytes

GENEROUS_MIN_PROB = 1e-4
GENEROUS_MAX_K = 1024
MIN_PROBS = (2.5e-3, 5e-3, 1e-2, 2e-2, 5e-2)
TAIL_DRAWS = (0, 4, 8, 12, 16, 24)
MAX_ANGLE = 1.0
"""Degrees: the recommended setting is the smallest below it."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One line of the table."""

    min_prob: float
    """Setting."""
    tail_draws: int
    """Setting."""
    max_k: int
    """Setting."""
    bytes_per_position: float
    """Of the stored sample."""
    total_bytes: int
    """For the whole corpus."""
    entries_per_position: float
    """Mean head size."""
    draws_per_position: float
    """Mean number of tail draws."""
    missed_mean: float
    """Teacher probability outside the head, mean over positions."""
    missed_p95: float
    """Its 95th percentile."""
    kl_mean: float
    """KL of the stored distribution from the unquantised one, nats per position."""
    angle: float
    """Degrees between the gradient of a step and the exact one, expected."""


@dataclass(frozen=True, kw_only=True)
class EstimateReport:
    """The table, and what it rests on."""

    num_rows: int
    """Rows of the whole corpus."""
    num_tokens: int
    """Tokens of the whole corpus."""
    num_positions: int
    """Positions that a build would capture."""
    corpus: Mapping[str, Any]
    """What the tokeniser counted."""
    num_sampled_rows: int
    """Rows that went through the engine."""
    num_sampled_positions: int
    """Positions that went through the engine."""
    step_tokens: int
    """Positions that the gradient of a step is averaged over."""
    estimates: tuple[Estimate, ...]
    """By increasing min_prob, then tail_draws."""
    recommended: int | None
    """Index into `estimates`; None where no setting is below `MAX_ANGLE`."""
    configured: int
    """Index into `estimates`: the setting that was asked about."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def best_for_their_bytes(self) -> list[int]:
        """Indices, by falling bytes, of the settings that none beats in bytes without a larger angle."""
        found: list[int] = []
        by_bytes = sorted(range(len(self.estimates)), key=lambda i: self.estimates[i].bytes_per_position)
        for index in by_bytes:
            if not found or self.estimates[index].angle < self.estimates[found[-1]].angle:
                found.append(index)
        return found[::-1]

    def text(self) -> str:
        """A table of the settings worth choosing, and a recommendation."""
        lines = [
            f"corpus: {counted(self.num_rows, 'row')}, {self.num_tokens} tokens, {self.num_positions} positions; "
            f"sample: {self.num_sampled_rows} rows, {self.num_sampled_positions} positions",
            *records_line({"counts": self.corpus, "notes": self.corpus.get("notes", [])}),
            "min_prob  draws at  bytes/pos.       total  entries  draws  missed mass (95 %)  "
            "codec KL (nats)  angle (degrees)",
        ]
        shown = self.best_for_their_bytes()
        if self.configured not in shown:
            shown.insert(0, self.configured)
        for index in shown:
            e = self.estimates[index]
            marks = ["  <- recommended"] * (index == self.recommended)
            marks += ["  <- as configured"] * (index == self.configured)
            lines.append(
                f"{e.min_prob:8g}  {e.tail_draws:8d}  {e.bytes_per_position:10.1f}  "
                f"{format_bytes(e.total_bytes):>10}  {e.entries_per_position:7.1f}  "
                f"{e.draws_per_position:5.1f}  {e.missed_mean:10.2%} ({e.missed_p95:.2%})  "
                f"{e.kl_mean:15.2e}  {e.angle:15.2f}{''.join(marks)}"
            )
        lines.append(
            f"angle: between a step's KL gradient and the exact one, T = 1, {self.step_tokens} tokens per step; "
            f"foretold from the teacher alone, true within a factor of {UNCERTAINTY:g}"
        )
        best = None if self.recommended is None else self.estimates[self.recommended]
        if best is not None:
            asked = self.estimates[self.configured]
            smaller = asked.bytes_per_position < best.bytes_per_position
            enough = smaller and asked.angle < UNCERTAINTY * MAX_ANGLE
            lines.append(
                f"recommended: --min-prob {best.min_prob:g} --tail-draws {best.tail_draws} "
                f"(the fewest bytes below {MAX_ANGLE:g} degree)"
                + ("; the configured one is smaller, and as good as far as this can tell" if enough else "")
            )
        else:
            closest = min(self.estimates, key=lambda e: e.angle)
            lines.append(
                f"no setting tried is below {MAX_ANGLE:g} degree; the closest is --min-prob "
                f"{closest.min_prob:g} --tail-draws {closest.tail_draws} with {closest.angle:.2f}: "
                "more draws, or more tokens per step"
            )
        return "\n".join(lines)


def estimate_cache(
    config: BuildConfig,
    *,
    rows: int = 64,
    min_probs: Sequence[float] = MIN_PROBS,
    tail_draws: Sequence[int] = TAIL_DRAWS,
    step_tokens: int = STEP_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
    source: BuildSource | None = None,
    make_teacher: MakeTeacher = start_engine,
) -> EstimateReport:
    """Measure several settings on a sample. `config.out` is neither read nor written.

    Args:
        config: as for a build; its `max_k` caps the heads, its `min_prob` with its `tail_draws` is added to
            the table.
        rows: how many rows go through the engine.
        min_probs, tail_draws: the settings to tabulate, every pair of them.
        step_tokens: captured positions per step of the training to come; the angle depends on it.
        seed: of the choice of rows.

    Raises:
        ConfigError, CorpusError: bad settings or input.
        EngineStartError: the engine did not start.
    """
    if config.generate is not None:
        raise ConfigError(
            "an estimate reads a corpus, got generate, whose rows are not written yet; build some of them and divide"
        )
    if rows < 1 or not min_probs or not tail_draws:
        raise ConfigError(f"rows must be at least 1, got {rows}")
    if step_tokens < 1:
        raise ConfigError(f"step_tokens must be at least 1, got {step_tokens}")
    progress = progress or Progress()
    source = source or open_source(config)
    everything = source.open_rows()
    sample, num_rows, num_tokens, num_positions = _sample(everything, config, rows, seed, progress)
    generous = replace(
        config,
        min_prob=min(GENEROUS_MIN_PROB, config.min_prob, *min_probs),
        max_k=max(GENEROUS_MAX_K, config.max_k),
        draw_rate=max(*tail_draws, config.draw_rate),
    )
    captured = _capture(generous, source, sample, make_teacher, progress)
    asked = (config.min_prob, config.draw_rate)
    pairs = sorted({(p, rate) for p in min_probs for rate in tail_draws if p} | {asked})
    progress.start("store", len(pairs))
    estimates = []
    for min_prob, rate in pairs:
        estimates.append(_estimate(config, min_prob, rate, sample, captured, num_positions, step_tokens))
        progress.advance(1)
    progress.finish()
    good = [index for index, e in enumerate(estimates) if e.angle < MAX_ANGLE]
    return EstimateReport(
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_positions=num_positions,
        corpus=source.describe(everything),
        num_sampled_rows=len(sample),
        num_sampled_positions=sum(len(topk) for topk in captured),
        step_tokens=step_tokens,
        estimates=tuple(estimates),
        recommended=min(good, key=lambda i: estimates[i].bytes_per_position) if good else None,
        configured=pairs.index(asked),
    )


def _sample(
    rows: Iterable[TokenRow], config: BuildConfig, size: int, seed: int, progress: Progress
) -> tuple[list[TokenRow], int, int, int]:
    """Rows drawn uniformly in one pass (reservoir sampling), and the counts of the whole corpus."""
    generator = np.random.default_rng(seed)
    chosen: list[tuple[int, TokenRow]] = []
    num_rows = num_tokens = num_positions = 0
    progress.start("tokenise", None)
    for row in rows:
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
    teacher = started(lambda: make_teacher(config, source))
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


def at_rate(topk: TopKLogprobs, rate: int) -> TopKLogprobs:
    """The same with the draws of a lower rate: evenly spaced ones of those there are.

    Draws of a position are systematic, so every second one is what half the rate would have drawn; between
    such ratios the number is right and the spacing nearly even.
    """
    draws = topk.draws
    if rate == draws.rate:
        return topk
    if rate == 0:
        return replace(topk, draws=TailDraws.none(len(topk)))
    share = rate / draws.rate
    start = starts(b"", np.arange(len(topk)))[ragged.segment_of(draws.offsets)]
    place = ragged.rank_in_segment(draws.offsets)
    kept = np.floor((place + 1) * share + start) > np.floor(place * share + start)
    counts = ragged.segment_sum(kept.astype(np.int64), draws.offsets)
    thinned = TailDraws(ragged.offsets_of(counts), draws.token_ids[kept], draws.logprobs[kept], rate)
    return replace(topk, draws=thinned)


def _estimate(
    config: BuildConfig,
    min_prob: float,
    rate: int,
    sample: Sequence[TokenRow],
    captured: Sequence[TopKLogprobs],
    num_positions: int,
    step_tokens: int,
) -> Estimate:
    capture = replace(config.capture, min_prob=min_prob, draw_rate=rate)
    pruned = [at_rate(topk, rate).prune(capture.min_prob, capture.max_k) for topk in captured]
    codec = replace(config.codec, draw_rate=rate)
    stored = stored_and_read(sample, pruned, capture, codec)
    exact = TopKLogprobs.concatenate(pruned)
    missed = 1.0 - exact.head_mass(1.0)
    per_position = stored.info.num_bytes / max(len(exact), 1)
    return Estimate(
        min_prob=min_prob,
        tail_draws=rate,
        max_k=config.max_k,
        bytes_per_position=per_position,
        total_bytes=round(per_position * num_positions),
        entries_per_position=exact.num_entries / max(len(exact), 1),
        draws_per_position=len(exact.draws.token_ids) / max(len(exact), 1),
        missed_mean=float(missed.mean()),
        missed_p95=float(np.quantile(missed, 0.95)),
        kl_mean=float(compare(exact, TopKLogprobs.concatenate(stored.topk)).kl.mean()),
        angle=expected_angle(TopKLogprobs.concatenate(captured), exact, rate, step_tokens),
    )
