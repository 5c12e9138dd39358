"""What an encoding costs and what it loses: bytes per token against the error of the gradient, losers
included.

For every position of held-out prose and code there is a teacher p and a student q some fine-tuning steps
away (see small_model.py). The reference is the gradient of KL(p_T || q_T) with respect to the student's
logits over the full vocabulary, beta * (q - p); an encoding's error is the norm of the difference to it
over the norm of it, both over all tokens. Tail draws are noise to that measure, which they take away from
the mean of many tokens; so the error of the *step*, of the gradient added up over all tokens, is given too.
Our rows are encoded and decoded by the product's codec; the rivals are plain references of their *layouts*,
with their values left exact, so their own quantisation costs them nothing here.

    python benchmarks/encoding.py [--model DIR] [--rows 8] [--steps 200] [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small_model import DOMAINS, ROW_TOKENS, Pair, load

from formats import TopKLogprobs
from formats.codec.config import CodecConfig
from formats.codec.payload import Codec, section_bytes
from formats.codec.quantise import quantise_probabilities
from formats.codec.rank_table import permutations, rank_by_frequency
from formats.logprobs.ragged import rank_in_segment, segment_order, segment_sum
from formats.logprobs.tail_draws import TailDraws, draw, starts
from formats.logprobs.tail_function import TAIL_BETAS
from trainer.loss.kl import LARGEST_RATIO, LARGEST_SHARE

TEMPERATURES = (0.5, 0.75, 1.0, 2.0, 4.0)
CHUNK = 128
CAPTURE_K = 256
STEP_TEMPERATURES = (1.0, 2.0)
DRAW_RATES = (4, 8, 12, 16, 20)
DEFAULT = "p >= 1e-2, draws at 8"


@dataclass(frozen=True)
class Encoded:
    """What a reader holds of one row: heads, and at each temperature what to make of them."""

    topk: TopKLogprobs
    bytes: float
    """Of the whole row."""
    tail: str
    """`exact`: A at the temperature; `one`: the T = 1 mass at every temperature; `none`: renormalised;
    `sampled`: weights are counts of draws."""


@dataclass(frozen=True)
class Captured:
    """Rows as an engine hands them over: generous heads, and draws at every rate."""

    rows: list[TopKLogprobs]
    labels: list[np.ndarray]
    """Of every row: the token that comes next at each position."""
    draws: dict[int, list[TailDraws]]

    def drawn(self, rate: int) -> list[TopKLogprobs]:
        """The rows with the draws of one rate."""
        if not rate:
            return self.rows
        return [replace(row, draws=draws) for row, draws in zip(self.rows, self.draws[rate], strict=True)]


def capture(pair: Pair) -> Captured:
    """The `CAPTURE_K` most probable tokens and the tail of every position, one item per row."""
    rows, count = [], len(pair.token_ids_N)
    drawn: dict[int, list[TailDraws]] = {rate: [] for rate in DRAW_RATES}
    successors_N = np.roll(pair.token_ids_N, -1)  # the last of a row is followed by the next row's first
    for start in range(0, count, ROW_TOKENS):
        parts = []
        tails: dict[int, list[TailDraws]] = {rate: [] for rate in DRAW_RATES}
        for a in range(start, start + ROW_TOKENS, CHUNK):
            teacher, _ = pair.logprobs(a, a + CHUNK)
            ids = np.argpartition(-teacher, CAPTURE_K, axis=1)[:, :CAPTURE_K]
            values = np.take_along_axis(teacher, ids, 1)
            rest = teacher.copy()
            np.put_along_axis(rest, ids, -np.inf, 1)
            peak = rest.max(1)
            nodes = [np.log(np.exp(b * (rest - peak[:, None])).sum(1)) + b * peak for b in TAIL_BETAS]
            offsets = np.arange(CHUNK + 1) * CAPTURE_K
            none = TailDraws.none(CHUNK)
            labels = teacher[np.arange(CHUNK), successors_N[a : a + CHUNK]]
            parts.append(
                TopKLogprobs(
                    offsets, ids.ravel(), values.ravel(), np.stack(nodes, 1), teacher.shape[1], none, labels
                )
            )
            outside = np.isfinite(rest)
            ends = np.concatenate([[0], np.cumsum(outside.sum(1))])
            begin = starts(b"", np.arange(a, a + CHUNK))
            for rate, found in tails.items():
                found.append(draw(ends, outside.nonzero()[1], rest[outside], rate, begin))
        rows.append(TopKLogprobs.concatenate(parts))
        for rate, found in tails.items():
            drawn[rate].append(TailDraws.concatenate(found))
    return Captured(rows, np.split(successors_N, len(rows)), drawn)


# --- encodings --------------------------------------------------------------------------------------------


Encoding = Callable[[Captured], list[Encoded]]


def fixed(k: int, per_position: float, tail: str) -> Encoding:
    """The k most probable tokens of every position at so many bytes."""
    return lambda captured: [
        Encoded(row.prune(0.0, k), per_position * len(row), tail) for row in captured.rows
    ]


def sampled(draws: int) -> Encoding:
    """Draws from p, stored as (id, count) in 3 bytes: random-sampling distillation."""

    def encode(captured: Captured) -> list[Encoded]:
        rng = np.random.default_rng(0)
        out = []
        for row in captured.rows:
            counts, ids, logs = [], [], []
            for p in range(len(row)):
                a, b = row.offsets[p : p + 2]
                prob = np.exp(row.logprobs[a:b].astype(np.float64))
                drawn = np.flatnonzero(times := rng.multinomial(draws, prob / prob.sum()))
                counts.append(len(drawn))
                ids.append(row.token_ids[a:b][drawn])
                logs.append(np.log(times[drawn] / draws))
            offsets = np.concatenate([[0], np.cumsum(counts)])
            topk = replace(row, offsets=offsets, token_ids=np.concatenate(ids), logprobs=np.concatenate(logs))
            out.append(Encoded(topk, 3 * topk.num_entries, "sampled"))
        return out

    return encode


def ours(min_prob: float, max_k: int = 128, draw_rate: int = 0, **settings: object) -> Encoding:
    """The product's codec, rank table learned from the rows themselves."""

    def encode(captured: Captured) -> list[Encoded]:
        config = CodecConfig(draw_rate=draw_rate, **settings)  # type: ignore[arg-type]
        heads = [row.prune(min_prob, max_k) for row in captured.drawn(draw_rate)]
        ranked = rank_by_frequency(np.concatenate([head.token_ids for head in heads]), heads[0].vocab_size)
        codec = Codec(config, heads[0].vocab_size, max_k, ranked if config.rank_ids else None)
        pairs = list(zip(heads, captured.labels, strict=True))
        payloads = [codec.encode(head, labels) for head, labels in pairs]
        return [
            Encoded(codec.decode(payload, labels), len(payload), "exact")
            for payload, (_, labels) in zip(payloads, pairs, strict=True)
        ]

    return encode


def unquantised(min_prob: float, max_k: int = 128) -> Encoding:
    """The same heads and tails in float32."""

    def encode(captured: Captured) -> list[Encoded]:
        heads = [row.prune(min_prob, max_k) for row in captured.rows]
        return [Encoded(head, 8 * head.num_entries + 29 * len(head), "exact") for head in heads]

    return encode


ENCODINGS: dict[str, Encoding] = {
    "exact top-64, tail bucket, raw": fixed(64, 64 * 6, "exact"),
    "top-64 renormalised, raw": fixed(64, 64 * 6, "none"),
    "DistillKit layout k=64, renormalised": fixed(64, 192, "none"),
    "DistillKit layout k=128, renormalised": fixed(128, 328, "none"),
    "DistillKit layout k=128, T=1 bucket": fixed(128, 328, "one"),
    "Megatron layout k=64, T=1 bucket": fixed(64, 264, "one"),
    "50 draws": sampled(50),
    "p >= 1e-3, float32": unquantised(1e-3),
    "p >= 2e-3, float32": unquantised(2e-3),
    "p >= 2.5e-3, float32": unquantised(2.5e-3),
    "p >= 5e-3, float32": unquantised(5e-3),
    "p >= 1e-3": ours(1e-3),
    "p >= 2e-3": ours(2e-3),
    "p >= 2.5e-3": ours(2.5e-3),
    "p >= 3e-3": ours(3e-3),
    "p >= 1e-2": ours(1e-2),
    "p >= 5e-3": ours(5e-3),
    "p >= 5e-3, draws at 4": ours(5e-3, draw_rate=4),
    "p >= 5e-3, draws at 8": ours(5e-3, draw_rate=8),
    "p >= 5e-3, draws at 12": ours(5e-3, draw_rate=12),
    "p >= 5e-3, draws at 16": ours(5e-3, draw_rate=16),
    "p >= 5e-3, draws at 20": ours(5e-3, draw_rate=20),
    "p >= 2.5e-3, draws at 8": ours(2.5e-3, draw_rate=8),
    "p >= 1e-2, draws at 8": ours(1e-2, draw_rate=8),
    "p >= 1e-2, draws at 16": ours(1e-2, draw_rate=16),
    "p >= 5e-3, draws at 12, 32 draw steps": ours(5e-3, draw_rate=12, draw_steps=32),
    "p >= 2e-3, 8-bit sqrt(p)": ours(2e-3, sqrt_steps=255, linear_steps=0),
    "p >= 2e-3, 10-bit sqrt(p)": ours(2e-3, sqrt_steps=1023, linear_steps=0),
    "p >= 2e-3, steps 240 + 2000, tails 64": ours(2e-3, sqrt_steps=240, linear_steps=2000, tail_steps=64),
    "p >= 2e-3, steps 320 + 2000": ours(2e-3, sqrt_steps=320, linear_steps=2000),
    "p >= 1e-3, steps 320 + 2000": ours(1e-3, sqrt_steps=320, linear_steps=2000),
    "p >= 1e-3, steps 480 + 1500": ours(1e-3, sqrt_steps=480, linear_steps=1500),
    "p >= 1e-3, steps 600 + 1300": ours(1e-3, sqrt_steps=600, linear_steps=1300),
    "p >= 1.5e-3": ours(1.5e-3),
    "p >= 2e-3, 64 tail steps": ours(2e-3, tail_steps=64),
    "p >= 2e-3, raw id order": ours(2e-3, rank_ids=False),
    "p >= 2e-3, zstd 3": ours(2e-3, zstd_level=3),
    "p >= 2e-3, zstd 19": ours(2e-3, zstd_level=19),
}


# --- error of the gradient --------------------------------------------------------------------------------


def chunks(pair: Pair) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """(row, position in the row, teacher, student logprobs [CHUNK, V])."""
    for start in range(0, len(pair.token_ids_N), CHUNK):
        yield start // ROW_TOKENS, start % ROW_TOKENS, *pair.logprobs(start, start + CHUNK)


def at_temperature(logprobs: np.ndarray, beta: float) -> np.ndarray:
    """softmax(beta * logprobs)."""
    weights = np.exp(beta * (logprobs - logprobs.max(1, keepdims=True)))
    return weights / weights.sum(1, keepdims=True)


def gradient(encoded: Encoded, head: TopKLogprobs, student: np.ndarray, temperature: float) -> np.ndarray:
    """The gradient [CHUNK, V] a loss forms from the encoding, for student probabilities at this
    temperature."""
    beta = 1 / temperature
    rows = np.repeat(np.arange(len(head)), head.counts)
    columns = head.token_ids
    log_head = head.log_head(temperature).astype(np.float64)
    if encoded.tail == "exact":
        log_z = np.logaddexp(log_head, head.log_tail(temperature))
    elif encoded.tail == "one":
        log_z = np.logaddexp(log_head, head.log_tail(1.0))
    else:
        log_z = log_head
    weight = beta * head.logprobs.astype(np.float64)
    if encoded.tail == "sampled":
        weight, log_z = head.logprobs.astype(np.float64), np.zeros(len(head))
    prob = np.exp(weight - np.repeat(log_z, head.counts))
    covered = segment_sum(prob, head.offsets)
    student_head = student[rows, columns]
    student_covered = segment_sum(student_head, head.offsets)
    scale = (covered - student_covered) / np.maximum(1 - student_covered, 1e-12)
    result = beta * student * scale[:, None]
    result[rows, columns] = beta * (student_head - prob)
    if head.draws.rate:
        draws = head.draws
        at, token = np.repeat(np.arange(len(head)), draws.counts), draws.token_ids
        tail_mass = np.exp(head.log_tail(temperature) - log_z)
        probability = np.exp(beta * draws.logprobs.astype(np.float64) - log_z[at])
        student_tail = student[at, token] / (1 - student_covered[at])
        ratio = tail_mass[at] * student_tail / probability
        scale = draws.weights * probability
        limited = np.minimum(ratio, np.maximum(LARGEST_SHARE / scale, LARGEST_RATIO))
        pull = beta * scale * (limited - 1)
        spread = np.bincount(at, pull, minlength=len(head)) / (1 - student_covered)
        outside = student * spread[:, None]
        outside[rows, columns] = 0.0
        result -= outside
        np.add.at(result, (at, token), pull)
    return result


def exact_name(name: str) -> str:
    """The same head in float32: `p >= 1e-3, 8-bit sqrt(p)` -> `p >= 1e-3, float32`."""
    return name.split(", ")[0] + ", float32"


@dataclass(frozen=True)
class Errors:
    """Relative errors of one encoding by temperature."""

    tokens: dict[float, float]
    """Over all tokens."""
    step: dict[float, float]
    """Of the sum over all tokens, at `STEP_TEMPERATURES`; empty for comparisons between encodings."""


def errors(pair: Pair, encodings: dict[str, list[Encoded]]) -> dict[str, Errors]:
    """Per encoding; `X (quantisation)` compares with `X, float32`."""
    vocab_size = pair.teacher_VD.shape[0]
    sums = {name: {t: np.zeros(vocab_size) for t in STEP_TEMPERATURES} for name in encodings}
    whole = {t: np.zeros(vocab_size) for t in STEP_TEMPERATURES}
    square = {name: dict.fromkeys(TEMPERATURES, 0.0) for name in encodings}
    against = {
        f"{name} (quantisation)": (name, exact)
        for name in encodings
        if (exact := exact_name(name)) in encodings
        and not name.endswith(("float32", "order", "zstd 3", "zstd 19"))
        and "draws at" not in name
    }
    square |= {name: dict.fromkeys(TEMPERATURES, 0.0) for name in against}
    norm = dict.fromkeys(TEMPERATURES, 0.0)
    for row, position, log_teacher, log_student in chunks(pair):
        for temperature in TEMPERATURES:
            beta = 1 / temperature
            student = at_temperature(log_student, beta)
            exact = beta * (student - at_temperature(log_teacher, beta))
            norm[temperature] += float((exact**2).sum())
            if temperature in whole:
                whole[temperature] += exact.sum(0)
            kept = {}
            for name, rows in encodings.items():
                head = rows[row].topk.slice(position, position + CHUNK)
                found = gradient(rows[row], head, student, temperature)
                square[name][temperature] += float(((found - exact) ** 2).sum())
                if temperature in whole:
                    sums[name][temperature] += (found - exact).sum(0)
                if any(name in pair_names for pair_names in against.values()):
                    kept[name] = found
            for name, (a, b) in against.items():
                square[name][temperature] += float(((kept[a] - kept[b]) ** 2).sum())
    return {
        name: Errors(
            {t: (v[t] / norm[t]) ** 0.5 for t in TEMPERATURES},
            {t: float(np.linalg.norm(e) / np.linalg.norm(whole[t])) for t, e in sums.get(name, {}).items()},
        )
        for name, v in square.items()
    }


# --- entropy ----------------------------------------------------------------------------------------------


def order_0(symbols: np.ndarray) -> float:
    """Bytes of an ideal order-0 coder that knows the symbol frequencies for nothing."""
    _, counts = np.unique(symbols, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def entropy_of_streams(rows: list[TopKLogprobs], min_prob: float) -> dict[str, float]:
    """Order-0 entropy in bytes of all rows' symbols, for ids by rank and by id, and for probability codes."""
    config = CodecConfig()
    heads = TopKLogprobs.concatenate([row.prune(min_prob, 128) for row in rows])
    ranked = rank_by_frequency(head_ids := heads.token_ids, heads.vocab_size)
    found = {}
    for name, keys in (
        ("gaps of ranks", permutations(ranked, heads.vocab_size)[1][head_ids]),
        ("gaps of ids", head_ids),
    ):
        order = segment_order(keys, heads.offsets)
        gaps = np.diff(keys[order].astype(np.int64), prepend=-1)
        first = rank_in_segment(heads.offsets) == 0
        gaps[first] = keys[order][first] + 1
        found[name] = order_0(gaps)
    found["ids by probability"] = order_0(head_ids)
    codes = quantise_probabilities(heads.logprobs, config.sqrt_steps, config.linear_steps)
    found["probability codes"] = order_0(codes)
    found["log p, 1/16 nat"] = order_0(np.rint(heads.logprobs * 16))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model", help="a local Hugging Face model as the teacher; default: train a small one"
    )
    parser.add_argument(
        "--rows", type=int, default=8, help=f"held-out rows of {ROW_TOKENS} tokens per domain"
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps of the small model")
    parser.add_argument("--only", default="", help="only encodings with this in their name")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    report: dict[str, object] = {}
    for domain, pair in load(args.model, args.steps, args.rows).items():
        assert domain in DOMAINS
        captured = capture(pair)
        rows = captured.rows
        tokens = sum(len(row) for row in rows)
        chosen = {name: encode for name, encode in ENCODINGS.items() if args.only in name}
        encodings = {name: encode(captured) for name, encode in chosen.items()}
        table = errors(pair, encodings)
        covered = np.mean([row.prune(2e-3, 128).head_mass(1.0).mean() for row in rows])
        sizes = {name: sum(item.bytes for item in items) / tokens for name, items in encodings.items()}
        entries = {name: sum(i.topk.num_entries for i in items) / tokens for name, items in encodings.items()}
        vocab_size = pair.teacher_VD.shape[0]
        print(f"\n{domain}: {tokens:,} tokens, V = {vocab_size:,}, mass of p >= 2e-3: {covered:.3f}")
        print(
            f"{'encoding':44} {'B/token':>8} {'entries':>8}"
            + "".join(f"{f'T={t:g}':>9}" for t in TEMPERATURES)
            + "".join(f"{f'step T={t:g}':>10}" for t in STEP_TEMPERATURES)
        )
        for name, found in table.items():
            columns = "".join(f"{100 * found.tokens[t]:>8.2f}%" for t in TEMPERATURES)
            columns += "".join(f"{100 * error:>9.2f}%" for error in found.step.values())
            size = f"{sizes[name]:8.1f} {entries[name]:8.1f}" if name in sizes else " " * 17
            print(f"{name:44} {size}{columns}")
        heads = [row.prune(2e-3, 128) for row in rows]
        ranked = rank_by_frequency(np.concatenate([h.token_ids for h in heads]), heads[0].vocab_size)
        parts = section_bytes(
            Codec(CodecConfig(), heads[0].vocab_size, 128, ranked),
            list(zip(heads, captured.labels, strict=True)),
        )
        streams = {name: size / tokens for name, size in entropy_of_streams(rows, 2e-3).items()}
        print(
            "p >= 2e-3, bytes/token by section: "
            + ", ".join(f"{k} {v / tokens:.2f}" for k, v in parts.items())
        )
        print("order-0 entropy, bytes/token: " + ", ".join(f"{k} {v:.2f}" for k, v in streams.items()))
        if not args.only:
            rival, default = sizes["DistillKit layout k=64, renormalised"], sizes[DEFAULT]
            print(f"{DEFAULT} against the smallest rival ({rival:.0f} B): {default / rival:.2f}x the bytes")
        report[domain] = {
            "bytes_per_token": sizes,
            "entries_per_token": entries,
            "error": {name: {f"{t:g}": v for t, v in e.tokens.items()} for name, e in table.items()},
            "step_error": {name: {f"{t:g}": v for t, v in e.step.items()} for name, e in table.items()},
            "sections": {name: size / tokens for name, size in parts.items()},
            "entropy": streams,
        }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
