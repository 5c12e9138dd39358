"""What was measured of a finished model, told in its card: perplexity before and after, KL to the model before, `kept`.

MODEL/anneal.json   "measured": {"weights": FINGERPRINT, "texts": [one entry per text]}
MODEL/README.md     a section between two comments, and `model-index` in the front matter; the rest stays as it is

A text is a cache's whole text; parts of one, and rounded weights, are no property of the model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from formats.cache import TeacherCache
from formats.disk.durable import atomic_write_bytes, atomic_write_json, one_at_a_time
from formats.errors import FormatError
from formats.front_matter import CARD_NAME, join_card, split_card, table_cell, with_section
from trainer.result.lineage import own_weights
from trainer.result.run_directory import RECORD_NAME, read_record

BEGIN = "<!-- measured by anneal, which writes this section anew with every evaluation -->"
END = "<!-- end of what anneal measured -->"


@dataclass(frozen=True, kw_only=True)
class MeasuredText:
    """What the model says of one text."""

    name: str
    """What it was called."""
    cache: str
    """Digest of its cache: what it is known by."""
    role: str | None = None
    """`source`, what the initial model knew, or `target`, what was learnt; None where nobody said so."""
    before: float | None = None
    """Perplexity of the model that built the cache."""
    perplexity: float
    """Perplexity of this model."""
    kl: float | None = None
    """KL(that model || this one), nats per token."""
    kl_to: str | None = None
    """The name of that model; None where only tokens were read."""
    kept: float | None = None
    """Share of the tokens that it had right with a probability above one half, and this one has right too."""
    accuracy: float | None = None
    num_tokens: int
    """Tokens that carry loss."""


def measured_text(
    name: str,
    cache: TeacherCache,
    result: Mapping[str, Any],
    *,
    role: str | None = None,
    before: float | None = None,
) -> MeasuredText | None:
    """From what an evaluation found on a cache; None where that was a part of it, or no perplexity that is a number.

    Args:
        before: perplexity of the model that built the cache; by default read from the cache.
    """
    perplexity = result.get("perplexity")
    # A run evaluates nothing else, and does not count.
    whole = result.get("num_rows", len(cache)) == len(cache)
    if not whole or perplexity is None or not math.isfinite(perplexity):
        return None
    kl_to = result.get("kl_to")
    if before is None and kl_to is not None:
        before = teacher_perplexity(cache)
    return MeasuredText(
        name=name,
        cache=cache.digest,
        role=role,
        before=before if kl_to is not None else None,
        perplexity=float(perplexity),
        kl=result.get("kl"),
        kl_to=kl_to,
        kept=result.get("kept"),
        accuracy=result.get("accuracy"),
        num_tokens=int(result["num_tokens"]),
    )


def teacher_perplexity(cache: TeacherCache) -> float | None:
    """Perplexity of the model that built a cache on the tokens that carry loss; None where one is not stored."""
    total, count = 0.0, 0
    for number in range(len(cache)):
        row = cache[number]
        wanted_P = row.loss_mask[row.positions + 1]
        if int(wanted_P.sum()) != int(row.loss_mask[1:].sum()):
            return None
        total -= float(row.teacher.label_logprobs[wanted_P].astype(np.float64).sum())
        count += int(wanted_P.sum())
    return math.exp(total / count) if count and total / count < 700 else None


def add_measured(directory: Path, found: Sequence[MeasuredText | None], weights: str | None = None) -> bool:
    """Put texts into the record and the card of a finished run or merge; True where they were written.

    Nothing is done for a model that this program did not make, or where the place cannot be written. What was measured
    of other weights is dropped.

    Args:
        weights: the fingerprint of the model's weights, where it is known; by default read from its files.
    """
    texts = [entry for entry in found if entry is not None]
    card = directory / CARD_NAME
    if not texts or not card.is_file() or not _is_ours(read_record(directory)):
        return False
    weights = weights or own_weights(directory)
    try:
        with one_at_a_time(card):  # evaluations of one model on several texts may end together
            return _add(directory, card, texts, weights)
    except (OSError, UnicodeDecodeError, FormatError):
        return False


def _is_ours(record: Mapping[str, Any]) -> bool:
    return record.get("status") == "complete" or "merge" in record


def _add(directory: Path, card: Path, texts: Sequence[MeasuredText], weights: str | None) -> bool:
    record = read_record(directory)
    if not _is_ours(record):
        return False
    known = record.get("measured") or {}
    earlier = known.get("texts", []) if known.get("weights") == weights else []
    joined = _joined(earlier, texts)
    record["measured"] = {"weights": weights, "texts": joined}
    text = with_measured(card.read_text(encoding="utf-8"), joined, name=directory.resolve().name)
    atomic_write_json(directory / RECORD_NAME, record, allow_nan=True)
    atomic_write_bytes(card, text.encode())
    return True


def _joined(earlier: Sequence[Mapping[str, Any]], texts: Sequence[MeasuredText]) -> list[dict[str, Any]]:
    """The entries of a record with these in the places of those of the same caches, or behind them."""
    found = {str(entry["cache"]): dict(entry) for entry in earlier}
    for text in texts:
        before = found.get(text.cache, {})
        if text.role is None and before.get(
            "role"
        ):  # an evaluation without a role keeps the one that was given
            text = replace(text, role=before["role"], name=str(before["name"]))
        if text.kl_to is None and before.get("kl_to"):
            continue  # tokens alone say less of the same text
        found[text.cache] = asdict(text)
    return list(found.values())


def with_measured(card: str, texts: Sequence[Mapping[str, Any]], *, name: str) -> str:
    """A card with this section, and with the numbers as metadata of a model called `name`.

    Raises:
        FormatError: its front matter cannot be read.
    """
    front, body = split_card(card)
    front["model-index"] = [{"name": name, "results": [_result(text) for text in texts]}]
    return join_card(front, with_section(body, BEGIN, END, measured_section(texts)))


def measured_section(texts: Sequence[Mapping[str, Any]]) -> str:
    """The table, what was forgotten first, and what its columns are."""
    order = {"source": 0, "target": 1, None: 2}
    header = ["text", "perplexity before", "after", "KL", "KL to", "kept", "accuracy", "tokens"]
    lines = [
        "## What it kept and what it learnt",
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
    ]
    for text in sorted(texts, key=lambda text: order.get(text["role"], 2)):
        name = f"{text['name']} ({text['role']})" if text["role"] else text["name"]
        forms = (("before", ".3f"), ("perplexity", ".3f"), ("kl", ".5f"), ("kl_to", ""))
        shown = (*forms, ("kept", ".4f"), ("accuracy", ".4f"), ("num_tokens", ","))
        cells = [name, *("-" if text[key] is None else format(text[key], form) for key, form in shown)]
        lines.append(f"| {' | '.join(map(table_cell, cells))} |")
    return "\n".join(
        [
            *lines,
            "",
            "Held-out text. *Source* is what the model knew before and *target* what it learnt. Before: the model that "
            "built the text's cache, which KL is to: KL(that model \\|\\| this one) at T = 1 in nats per token. `kept` "
            "is the share of the tokens which that model had right with a probability above one half, and which this "
            "one has right too.",
            "",
        ]
    )


def _result(text: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `model-index`."""
    metrics = [
        {"type": "perplexity", "value": text["perplexity"], "name": "perplexity"},
        {"type": "perplexity", "value": text["before"], "name": f"perplexity of {text['kl_to']}"},
        {
            "type": "kl_divergence",
            "value": text["kl"],
            "name": f"KL({text['kl_to']} || model), nats per token",
        },
        {
            "type": "kept",
            "value": text["kept"],
            "name": f"share of what {text['kl_to']} knew that is still right",
        },
        {"type": "accuracy", "value": text["accuracy"], "name": "next-token accuracy"},
    ]
    return {
        "task": {"type": "text-generation"},
        "dataset": {
            "type": "teacher-cache",
            "name": f"{text['name']} ({text['role']})" if text["role"] else text["name"],
            "args": {"cache": text["cache"]},
        },
        "metrics": [metric for metric in metrics if metric["value"] is not None],
    }
