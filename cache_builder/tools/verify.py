"""`anneal cache verify`: is every byte the one that was written, and are the numbers those of the model?

Bytes: every checksum of every file, and every row of a shard whose checksum is right. Numbers: random rows are
computed again by the *other* engine (a cache built by vLLM is checked by transformers, and the reverse), so that no bug
of one engine can vouch for itself. What the two differ by is printed beside what they may differ by: the codec's own
error, measured by storing and reading the recomputed rows, plus the noise of two engines in the cache's dtype.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.commit.capture import started
from cache_builder.rows.tokenizer_files import load_tokenizer
from cache_builder.teachers.engines import make_teacher
from cache_builder.teachers.protocol import TeacherConfig
from cache_builder.tools.deviation import compare
from cache_builder.tools.round_trip import stored_and_read
from formats.cache import CacheRow, TeacherCache
from formats.errors import ConfigError
from formats.identity.fingerprint import resolve_model
from formats.identity.teacher_identity import require_same_teacher
from formats.logprobs.tail_draws import POWER
from formats.logprobs.topk import TopKLogprobs
from formats.progress import Progress, counted
from formats.validate import problems

OTHER_ENGINE = {"vllm": "transformers", "transformers": "vllm"}
ENGINE_NOISE = {"float32": 5e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Mean |difference| of logprobs, in nats, that two engines may have. Measured on small models: 2e-4 in fp32
and 0.003 to 0.02 in bf16; a wrong model, a shifted row or another template gives whole nats."""
DRAW_DEVIATIONS, DRAW_SHARE = 5.0, 0.02
"""All draws together may differ from their expected number by so many standard deviations of independent
draws, and by this share of it. Which tokens are drawn is no matter: two engines share 0.8 to 0.96 of the
draws in fp32 and 0.4 to 0.1 in bf16, whose noise moves tokens along the line that the points pick from."""
ROW_FACTOR = 5.0
"""A single row may deviate by this many times the allowance for the mean."""
MOST_SHOWN = 20
"""Problems in the text."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked and what was found."""

    cache: str
    """The cache that was checked."""
    num_rows: int
    """Rows whose bytes were checked: all of them."""
    num_shards: int
    """Shards whose checksums were compared."""
    problems: tuple[str, ...] = ()
    """What is wrong, of every file its first problem; empty if nothing is."""
    compared: tuple[str, ...] = ()
    """Parts of the identity that were compared with the model."""
    built_by: str = ""
    """Engine and version that built the cache."""
    checked_by: str = ""
    """Engine and version that computed rows again; empty without a model."""
    num_recomputed: int = 0
    """Rows computed again."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Deviations in nats: logprob_mean, logprob_max, tail_mean, tail_max, label_mean, label_max (of the next
    tokens), kl_mean, kl_max, worst_row, and what is allowed: quantisation_mean, engine_noise, allowed_mean,
    label_allowed. With tail draws also draw_mean, draw_max
    and draw_allowed, in nats, of draws that both hold, and their share, draw_share."""
    num_only_one: int = 0
    """Entries that only one of the two heads holds."""
    largest_only_one: float = 0.0
    """The largest probability among them."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "ok": self.ok}

    def text(self) -> str:
        """About ten lines; the last one is the verdict."""
        lines = [
            f"{self.cache}: {counted(self.num_shards, 'shard')}, {counted(self.num_rows, 'row')}, "
            "every checksum compared"
        ]
        if self.compared:
            lines.append(f"same as the model's: {', '.join(self.compared)}")
        if self.checked_by:
            f = self.figures
            lines += [
                f"built by {self.built_by}; "
                f"{self.num_recomputed} random rows computed again by {self.checked_by}",
                "deviation in nats       mean        largest",
                f"  logprobs        {f['logprob_mean']:10.6f}     {f['logprob_max']:10.6f}",
                f"  tail function   {f['tail_mean']:10.6f}     {f['tail_max']:10.6f}",
                f"  next tokens     {f['label_mean']:10.6f}     {f['label_max']:10.6f}   "
                f"(allowed mean {f['label_allowed']:.6f})",
                f"  KL per position {f['kl_mean']:10.6f}     {f['kl_max']:10.6f}",
                f"allowed mean {f['allowed_mean']:.6f}: codec {f['quantisation_mean']:.6f} "
                f"(measured on these rows) + two engines {f['engine_noise']:.6f}",
                *_draw_lines(f),
                f"entries in one head only: {self.num_only_one}, "
                f"the largest with p = {self.largest_only_one:.2g}",
            ]
        lines += [f"WRONG: {problem}" for problem in self.problems[:MOST_SHOWN]]
        if len(self.problems) > MOST_SHOWN:
            lines.append(f"WRONG: {len(self.problems) - MOST_SHOWN} more like these; --json has all")
        lines.append("the cache is sound" if self.ok else "the cache must not be used")
        return "\n".join(lines)


def verify_cache(
    cache: str | Path,
    model: str | Path | None = None,
    *,
    rows: int = 32,
    engine: str | None = None,
    seed: int = 0,
    engine_args: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a cache; see the module's text.

    Args:
        model: directory or name of the teacher; None checks the bytes only.
        rows: how many random rows to compute again.
        engine: `vllm` or `transformers`; None takes the one that did not build the cache.
        seed: of the choice of rows.

    Raises:
        FormatError: not a cache at all. Damage within a cache is reported, not raised.
        IdentityMismatchError: `model` is not the teacher of this cache.
        ConfigError: the engine is not installed, or `rows` is below 1.
        EngineStartError: it did not start.
    """
    progress = progress or Progress()
    if rows < 1:
        raise ConfigError(f"rows must be at least 1, got {rows}")
    opened = TeacherCache(cache)
    teacher = opened.identity.teacher
    base: dict[str, Any] = {
        "cache": str(cache),
        "num_rows": len(opened),
        "num_shards": len(opened.manifest.shards),
        "built_by": f"{teacher.get('engine', 'unknown')} {teacher.get('engine_version', '')}".strip(),
    }
    progress.note(f"checking {counted(base['num_shards'], 'shard')}")
    if damaged := tuple(str(problem) for problem in problems(opened, full=True)):
        return VerifyReport(**base, problems=damaged)
    if model is None:
        return VerifyReport(**base)
    is_here = Path(model).expanduser().is_dir()  # the recorded revision is then of another place
    model_dir = resolve_model(model, None if is_here else teacher.get("revision"))
    base["compared"] = tuple(require_same_teacher(opened.identity, model_dir, load_tokenizer(model_dir)))
    chosen = np.random.default_rng(seed).permutation(len(opened))[:rows]
    stored = [opened[int(index)] for index in np.sort(chosen)]
    name = engine or OTHER_ENGINE.get(str(teacher.get("engine")), "transformers")
    progress.note(f"computing {len(stored)} rows again with {name}")
    config = _teacher_config(opened, stored, model_dir, engine_args or {})
    running = started(lambda: make_teacher(name, config))
    progress.start("recompute", len(stored))
    try:
        found = running.describe()
        again = []
        for row, topk in zip(stored, running.prefill([row.tokens for row in stored]), strict=True):
            again.append(topk)
            progress.advance(1, len(row))
    finally:
        running.close()
        progress.finish()
    return _judge(
        opened, stored, again, config.dtype, f"{name} {found.get('engine_version', '')}".strip(), base
    )


def _teacher_config(
    cache: TeacherCache, rows: list[CacheRow], model_dir: Path, engine_args: Mapping[str, Any]
) -> TeacherConfig:
    """The settings of the capture, for another engine and these rows."""
    teacher = cache.identity.teacher
    return TeacherConfig(
        model=str(model_dir),
        dtype=str(teacher.get("dtype") or teacher.get("requested_dtype", "auto")),
        head_dtype=str(teacher.get("requested_head_dtype", "float32")),
        capture=cache.manifest.capture,
        max_length=max([2, *(len(row) for row in rows)]),
        engine_args=engine_args,
    )


def _judge(
    cache: TeacherCache,
    stored: list[CacheRow],
    again: list[TopKLogprobs],
    dtype: str,
    checked_by: str,
    base: Mapping[str, Any],
) -> VerifyReport:
    manifest = cache.manifest
    read_back = stored_and_read(
        [row.tokens for row in stored],
        again,
        manifest.capture,
        manifest.codec,
    ).topk
    floor = compare(TopKLogprobs.concatenate(read_back), TopKLogprobs.concatenate(again))
    found = compare(
        TopKLogprobs.concatenate([row.teacher for row in stored]), TopKLogprobs.concatenate(again)
    )
    per_row = [_mean(compare(row.teacher, topk).logprobs) for row, topk in zip(stored, again, strict=True)]
    noise = ENGINE_NOISE.get(dtype, ENGINE_NOISE["bfloat16"])
    quantisation = _mean(floor.logprobs)
    allowed = quantisation + noise
    figures = {
        "logprob_mean": _mean(found.logprobs),
        "logprob_max": _max(found.logprobs),
        "tail_mean": _mean(found.tails),
        "tail_max": _max(found.tails),
        "label_mean": _mean(found.labels),
        "label_max": _max(found.labels),
        "label_allowed": _mean(floor.labels) + noise,
        "kl_mean": _mean(found.kl),
        "kl_max": _max(found.kl),
        "worst_row": max(per_row, default=0.0),
        "quantisation_mean": quantisation,
        "engine_noise": noise,
        "allowed_mean": allowed,
    }
    wrong = []
    if not figures["label_mean"] <= figures["label_allowed"]:
        wrong.append(
            f"logprobs of the next tokens must deviate by at most {figures['label_allowed']:.6f} nats on "
            f"average, got {figures['label_mean']:.6f}; labels and rows do not belong together"
        )
    if manifest.codec.draw_rate:
        figures["draw_mean"], figures["draw_max"] = _mean(found.draws), _max(found.draws)
        figures["draw_allowed"] = _mean(floor.draws) + noise
        figures["draw_share"] = len(found.draws) / max(found.num_draws, 1)
        if not figures["draw_mean"] <= figures["draw_allowed"]:
            wrong.append(
                f"logprobs of tail draws must deviate by at most {figures['draw_allowed']:.6f} nats on "
                f"average, got {figures['draw_mean']:.6f}; draws and logprobs do not belong together"
            )
        number, expected = _numbers_of_draws(stored, again)
        figures["draw_number"], figures["draw_expected"] = number, expected
        if abs(number - expected) > DRAW_DEVIATIONS * expected**0.5 + DRAW_SHARE * expected + 1:
            wrong.append(
                f"tail draws must be about as many as their rate says, {expected:.0f}, got {number:.0f}; "
                "estimates from them are biased"
            )
    if not figures["logprob_mean"] <= allowed:
        wrong.append(
            f"logprobs must deviate by at most {allowed:.6f} nats on average, "
            f"got {figures['logprob_mean']:.6f}; this is another model, or the rows are shifted"
        )
    if not figures["worst_row"] <= ROW_FACTOR * allowed:
        worst = int(np.argmax(per_row))
        wrong.append(
            f"every row must deviate by at most {ROW_FACTOR * allowed:.6f} nats on average, got "
            f"{figures['worst_row']:.6f} in the row with content key {stored[worst].key.hex()}"
        )
    return VerifyReport(
        **base,
        problems=tuple(wrong),
        checked_by=checked_by,
        num_recomputed=len(stored),
        figures=figures,
        num_only_one=found.num_only_one,
        largest_only_one=found.largest_only_one,
    )


def _draw_lines(figures: Mapping[str, float]) -> list[str]:
    if "draw_mean" not in figures:
        return []
    return [
        f"  tail draws      {figures['draw_mean']:10.6f}     {figures['draw_max']:10.6f}   "
        f"(allowed mean {figures['draw_allowed']:.6f}; {figures['draw_share']:.0%} drawn again)",
        f"  {figures['draw_number']:.0f} tail draws, {figures['draw_expected']:.0f} expected",
    ]


def _numbers_of_draws(stored: list[CacheRow], again: list[TopKLogprobs]) -> tuple[float, float]:
    """(draws of the stored rows, what their rate makes of the recomputed tails)."""
    number = sum(len(row.teacher.draws.token_ids) for row in stored)
    sums = [np.exp(topk.log_tail(1 / POWER).astype(np.float64)).sum() for topk in again]
    return float(number), float(stored[0].teacher.draws.rate * sum(sums)) if stored else 0.0


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _max(values: np.ndarray) -> float:
    return float(values.max()) if values.size else 0.0
