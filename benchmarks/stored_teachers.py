"""A teacher's held-out rows, captured once and stored at every threshold and rate with the real codec.

P: positions of a row, V: vocabulary, K: candidates of a head, E: kept entries, R: rows, S: tokens of a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from teacher_models import Subject

from formats.codec.config import CodecConfig
from formats.codec.payload import Codec, section_bytes
from formats.codec.rank_table import rank_by_frequency
from formats.logprobs import ragged
from formats.logprobs.tail_draws import POWER, TailDraws, starts
from formats.logprobs.tail_function import TAIL_BETAS
from formats.logprobs.topk import TopKLogprobs

MIN_PROBS = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 0.1)
RATES = (0, 2, 4, 6, 8, 12, 16, 24)
MAX_K = 128


@dataclass(frozen=True)
class Setting:
    """One way to store the teacher."""

    min_prob: float
    rate: int
    codec: CodecConfig = field(default_factory=CodecConfig)

    @property
    def name(self) -> str:
        """For tables."""
        default, parts = CodecConfig(), [f"p >= {self.min_prob:g}, draws at {self.rate}"]
        for key, value in vars(self.codec).items():
            if value != getattr(default, key):
                parts.append(f"{key} {value}")
        return ", ".join(parts)


def grid() -> list[Setting]:
    """All pairs."""
    return [Setting(min_prob, rate) for min_prob in MIN_PROBS for rate in RATES]


def codec_variants(pairs: Sequence[tuple[float, int]]) -> list[Setting]:
    """What the codec could do more coarsely, one thing at a time and together."""
    found = []
    for min_prob, rate in pairs:
        for options in (
            {"probabilities": "float32"},
            {"sqrt_steps": 280, "linear_steps": 900},
            {"sqrt_steps": 140, "linear_steps": 450},
            {"sqrt_steps": 70, "linear_steps": 225},
            {"sqrt_steps": 280, "linear_steps": 225},
            {"sqrt_steps": 120, "linear_steps": 120},
            {"sqrt_steps": 60, "linear_steps": 60},
            {"tail_steps": 64},
            {"tail_steps": 32},
            {"tail_steps": 16},
            {"draw_steps": 8},
            {"draw_steps": 4},
            {"draw_steps": 2},
            {"sqrt_steps": 140, "linear_steps": 450, "tail_steps": 64, "draw_steps": 8},
            {"sqrt_steps": 140, "linear_steps": 450, "tail_steps": 32, "draw_steps": 8},
            {"sqrt_steps": 120, "linear_steps": 120, "tail_steps": 32, "draw_steps": 8},
            {"sqrt_steps": 120, "linear_steps": 120, "tail_steps": 32, "draw_steps": 4},
            {"sqrt_steps": 60, "linear_steps": 60, "tail_steps": 16, "draw_steps": 4},
        ):
            if rate == 0 and options.keys() & {"draw_steps"}:
                continue
            found.append(Setting(min_prob, rate, replace(CodecConfig(), **options)))  # type: ignore[arg-type]
    return found


def pairs_of(texts: Sequence[str]) -> list[tuple[float, int]]:
    """`0.02:8` as (min_prob, rate)."""
    return [(float(p), int(rate)) for p, _, rate in (text.partition(":") for text in texts)]


def capture_row(
    logits_PV: torch.Tensor, label_ids: np.ndarray, rates: Sequence[int], starts_P: np.ndarray
) -> list[TopKLogprobs]:
    """One row at the lowest threshold, with draws of every rate: what the product captures, from full logits."""
    logprobs_PV = torch.log_softmax(logits_PV.double(), -1)
    labels_P = logprobs_PV[torch.arange(len(label_ids)), torch.as_tensor(label_ids).long()].numpy()
    values_PK, ids_PK = logprobs_PV.topk(min(MAX_K, logprobs_PV.shape[1]), dim=-1)
    keep_PK = values_PK >= math.log(min(MIN_PROBS))
    keep_PK[:, 0] = True
    rest_PV = logprobs_PV.scatter_(1, ids_PK, torch.where(keep_PK, -torch.inf, values_PK))
    nodes_PB = torch.stack([torch.logsumexp(beta * rest_PV, -1) for beta in TAIL_BETAS], dim=1)
    running_PV = rest_PV.mul(POWER).exp_().cumsum_(1).numpy()
    rest = rest_PV.numpy()
    heads = TopKLogprobs(
        offsets=np.concatenate([[0], keep_PK.sum(1).cumsum(0).numpy()]),
        token_ids=ids_PK[keep_PK].numpy().astype(np.int32),
        logprobs=values_PK[keep_PK].numpy().astype(np.float32),
        log_tail_nodes=nodes_PB.numpy().astype(np.float32),
        vocab_size=logprobs_PV.shape[1],
        draws=TailDraws.none(len(logprobs_PV)),
        label_logprobs=labels_P,
    )
    found = []
    for rate in rates:
        if rate == 0:
            found.append(heads)
            continue
        ids = []
        for position, running_V in enumerate(running_PV):
            points = np.arange(starts_P[position], rate * running_V[-1], 1.0)
            ids.append(np.searchsorted(rate * running_V, points, side="right"))
        counts = np.array([len(some) for some in ids])
        flat = np.concatenate(ids)
        logprobs = rest[np.repeat(np.arange(len(ids)), counts), flat]
        found.append(replace(heads, draws=TailDraws(ragged.offsets_of(counts), flat, logprobs, rate)))
    return found


def captures(subject: Subject, rows: int) -> dict[int, list[TopKLogprobs]]:
    """Rate to one item per row; kept in the work folder."""
    file = subject.work / f"{subject.name}-capture-{rows}.npz"
    if not file.exists():
        teacher = subject.teacher()
        arrays: dict[str, np.ndarray] = {}
        for number, row in enumerate(subject.held_out_RS[:rows]):
            with torch.no_grad():
                logits_PV = teacher(input_ids=row[None]).logits[0, :-1]
            begin = starts(row.numpy().astype("<i4").tobytes()[-8:], np.arange(len(row) - 1))
            rows_by_rate = capture_row(logits_PV, row[1:].numpy(), RATES, begin)
            for rate, topk in zip(RATES, rows_by_rate, strict=True):
                if rate == 0:
                    for name in ("offsets", "token_ids", "logprobs", "log_tail_nodes", "label_logprobs"):
                        arrays[f"{number}-{name}"] = getattr(topk, name)
                for name in ("offsets", "token_ids", "logprobs"):
                    arrays[f"{number}-{rate}-{name}"] = getattr(topk.draws, name)
        np.savez(file, vocab_size=logits_PV.shape[1], **arrays)  # type: ignore[arg-type]
    found: dict[int, list[TopKLogprobs]] = {rate: [] for rate in RATES}
    with np.load(file) as data:
        for number in range(rows):
            names = ("offsets", "token_ids", "logprobs", "log_tail_nodes", "label_logprobs")
            head = {name: data[f"{number}-{name}"] for name in names}
            for rate in RATES:
                drawn = {name: data[f"{number}-{rate}-{name}"] for name in names[:3]}
                draws = TailDraws(**drawn, rate=rate)
                found[rate].append(TopKLogprobs(**head, vocab_size=int(data["vocab_size"]), draws=draws))
    return found


@dataclass(frozen=True)
class Stored:
    """Rows after the codec."""

    rows: list[TopKLogprobs]
    sections: dict[str, float]
    """Bytes per position of every section, each compressed alone."""
    payload: float
    """Bytes per position."""
    entries: float
    draws: float
    mass: float


def store(setting: Setting, captured: dict[int, list[TopKLogprobs]], rows_RS: torch.Tensor) -> Stored:
    """Prune, encode and decode all rows of the captured rate; the rank table is learned from the same rows."""
    labels = [row[1:].numpy().astype(np.int32) for row in rows_RS]
    pruned = [row.prune(setting.min_prob, MAX_K) for row in captured[setting.rate]]
    ranked = rank_by_frequency(np.concatenate([row.token_ids for row in pruned]), pruned[0].vocab_size)
    config = replace(setting.codec, draw_rate=setting.rate)
    codec = Codec(config, pruned[0].vocab_size, MAX_K, ranked if config.rank_ids else None)
    pairs = list(zip(pruned, labels[: len(pruned)], strict=True))
    payloads = [codec.encode(*pair) for pair in pairs]
    count = sum(map(len, pruned))
    alone = section_bytes(codec, pairs[:8])
    scale = sum(map(len, payloads)) / count / sum(alone.values())
    parts = [size * scale for size in alone.values()]
    return Stored(
        rows=[codec.decode(payload, ids) for payload, (_, ids) in zip(payloads, pairs, strict=True)],
        sections=dict(zip(alone, parts, strict=True)),
        payload=sum(map(len, payloads)) / count,
        entries=sum(row.num_entries for row in pruned) / count,
        draws=sum(len(row.draws.token_ids) for row in pruned) / count,
        mass=float(np.concatenate([row.head_mass(1.0) for row in pruned]).mean()),
    )
