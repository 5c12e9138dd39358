"""The summary and the row view as text for a terminal."""

from typing import Any

from formats.codec.quantise import LOWEST_LABEL
from formats.progress import counted, format_bytes
from formats.table import aligned

BAR = 40
RECORDS = {("corpus", "counts"), ("corpus", "notes")}
"""Parts of the identity that have lines of their own."""
PARTS = {
    "counts": "head sizes",
    "ids": "token ids",
    "probabilities": "probabilities",
    "tails": "tail function",
    "labels": "next tokens",
    "draw_counts": "numbers of draws",
    "draw_ids": "drawn token ids",
    "draw_logprobs": "drawn logprobs",
}


def _short(value: Any) -> str:
    text = str(value)
    is_hash = len(text) >= 40 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text if len(text) <= 80 else text[:77] + "..."


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    return aligned(rows, indent="  ").splitlines()


def _tail(codec: dict[str, Any]) -> str:
    """What is kept of the tails beside their mass."""
    rate = codec["draw_rate"]
    kept = [f"tail draws at rate {rate}"] if rate else []
    return ", ".join(kept) + "; " if kept else ""


def _identity(identity: dict[str, Any]) -> list[str]:
    lines = []
    for section, content in identity.items():
        pairs = content.items() if isinstance(content, dict) else [("", content)]
        shown = [
            f"{key} {_short(value)}".strip()
            for key, value in pairs
            if value not in (None, "", {}, []) and (section, key) not in RECORDS
        ]
        line = f"  {section:<14}"
        for item in shown:
            if len(line) + len(item) > 108:
                lines.append(line.rstrip(", ") + ",")
                line = " " * 16
            line += item + ", "
        lines.append(line.rstrip(", "))
    return lines


def _records(corpus: dict[str, Any]) -> list[str]:
    """What became of the records of the corpus, a line each; nothing in caches that did not count them, or whose
    writer has words of its own there."""
    counts = corpus.get("counts")
    lines = _written_rows(corpus)
    if isinstance(counts, dict) and type(counts.get("num_records")) is int:
        lines.append(f"records of the corpus: {counts['num_records']:,}")
        notes = _notes(corpus) or ["none skipped, none cut"]
    else:
        notes = _notes(corpus) if lines else []
    return ["", *lines, *(f"  {note}" for note in notes)] if lines else []


def _written_rows(corpus: dict[str, Any]) -> list[str]:
    """A line for every part of a merged corpus, however deep, whose rows the model wrote itself."""
    merged = corpus.get("merged")
    if isinstance(merged, list):
        return [line for part in merged if isinstance(part, dict) for line in _written_rows(part)]
    written, heat = corpus.get("generate"), corpus.get("generate_temperature", 1)
    if type(written) is not int or type(heat) not in (int, float):
        return []
    return [
        f"rows that the model wrote itself: {written:,} (temperature {heat:g}, seed {corpus.get('seed', 0)})"
    ]


def _notes(corpus: dict[str, Any]) -> list[Any]:
    notes = corpus.get("notes")
    return notes if isinstance(notes, list) else []


def _spread(name: str, values: dict[str, Any], digits: int) -> tuple[str, ...]:
    keys = ("mean", "min", "p5", "p25", "p50", "p75", "p95", "max")
    return (name, *(f"{values[key]:.{digits}f}" for key in keys))


def summary_text(summary: dict[str, Any]) -> str:
    """A report of about forty lines."""
    s = summary
    settings = s["settings"]
    lines = [
        f"teacher cache {s['path']} (format {s['format_version']})",
        f"  {s['num_rows']:,} row{'s' * (s['num_rows'] != 1)}, {s['num_tokens']:,} tokens, "
        f"{s['num_positions']:,} positions with a teacher, "
        f"{counted(s['num_shards'], 'shard')}, {format_bytes(s['num_bytes'])}",
        f"  vocabulary {settings['vocab_size']:,}; heads: p >= {settings['min_prob']:g}, "
        f"at most {settings['max_k']:,}; {_tail(settings['codec'])}positions: {settings['positions']}",
        "",
        "identity",
        *_identity(s["identity"]),
        *_records(corpus if isinstance(corpus := s["identity"].get("corpus"), dict) else {}),
        "",
        "bytes per token",
    ]
    columns = [
        (name, f"{c['bytes_per_token']:.2f}", format_bytes(c["bytes"])) for name, c in s["columns"].items()
    ]
    lines += _table([*columns, ("total", f"{s['bytes_per_token']:.2f}", format_bytes(s["num_bytes"]))])
    if s["payload_parts"]:
        lines += ["", "payload, bytes per position"]
        parts = [
            (PARTS[name], f"{part['bytes_per_position']:.2f}") for name, part in s["payload_parts"].items()
        ]
        lines += _table([*parts, ("total", f"{s['payload_bytes_per_position']:.2f}")])
    sample = s["sample"]
    if sample["positions"] == 0:
        return "\n".join([*lines, "", "no position carries a teacher distribution"])
    of = "all rows"
    if not sample["complete"]:
        of = f"a sample of {sample['rows']:,} of {s['num_rows']:,} rows; --full for all"
    lines += ["", f"distributions ({sample['positions']:,} positions, {of})"]
    lines += _table(
        [
            ("", "mean", "min", "p5", "p25", "median", "p75", "p95", "max"),
            _spread("head size", s["head_size"], 1),
            *([_spread("tail draws", s["num_draws"], 1)] if s["num_draws"] else []),
            _spread("covered mass", s["head_mass"], 4),
            _spread("entropy, nats", s["entropy"], 3),
        ]
    )
    lines += _labels(s["label_nll"])
    lines += ["", "head sizes"]
    bins = s["head_size"]["histogram"]
    most = max(item["positions"] for item in bins)
    for item in bins:
        name = f"{item['from']}" if item["from"] == item["to"] else f"{item['from']}-{item['to']}"
        bar = "#" * round(BAR * item["positions"] / most)
        lines.append(f"  {name:>11}  {bar:<{BAR}} {item['positions'] / sample['positions']:6.1%}")
    lines += ["", "most uncertain positions (anneal cache inspect CACHE --row N shows a row)"]
    lines += _table(
        [
            ("row", "position", "entropy, nats", "covered mass"),
            *(
                (str(u["row"]), str(u["position"]), f"{u['entropy']:.3f}", f"{u['head_mass']:.4f}")
                for u in s["most_uncertain"]
            ),
        ]
    )
    return "\n".join(lines)


def _labels(nll: dict[str, Any]) -> list[str]:
    """What the teacher makes of the text itself."""
    if not nll:
        return []
    mean = "infinite" if nll["mean"] is None else f"{nll['mean']:.4f}"
    perplexity = "infinite" if nll["perplexity"] is None else f"{nll['perplexity']:.2f}"
    return [
        "",
        f"next tokens that carry loss ({nll['positions']:,}): mean NLL of the teacher {mean} nats, "
        f"perplexity {perplexity}",
    ]


def _quote(text: str, width: int) -> str:
    shown = repr(text)[1:-1]
    return f"'{shown}'" if len(shown) <= width else f"'{shown[: width - 3]}...'"


def row_text(view: dict[str, Any]) -> str:
    """The tokens of a row (targets of the loss in brackets), then one line per position."""
    tokens = "".join(f"[{t['text']}]" if t["loss"] else t["text"] for t in view["tokens"])
    lines = [
        f"row {view['row']}, key {view['key']}, {view['num_tokens']:,} tokens, "
        f"{len(view['positions']):,} positions with a teacher",
        "",
        tokens,
        "",
    ]
    if not view["positions"]:
        return "\n".join([*lines, "no position of this row carries a teacher distribution"])
    table = [("position", "token", "next", "log p(next)", "entropy", "head", "top alternatives")]
    for item in view["positions"]:
        top = "  ".join(f"{_quote(t['token'], 14)} {t['prob']:.3f}" for t in item["top"])
        table.append(
            (
                str(item["position"]),
                _quote(item["token"], 14),
                _quote(item["label"], 14),
                _label(item),
                f"{item['entropy']:.2f}",
                str(item["head_size"]),
                top,
            )
        )
    widths = [max(len(row[k]) for row in table) for k in range(6)]
    lines += [
        "  ".join(cell.rjust(w) for cell, w in zip(row[:6], widths, strict=True)) + "  " + row[6]
        for row in table
    ]
    return "\n".join(lines)


def _label(item: dict[str, Any]) -> str:
    """The logprob of the next token; where it is not kept, the lowest number stands for all below."""
    logprob = item["label_logprob"]
    if logprob is None:
        return "-inf"
    lowest = logprob == LOWEST_LABEL and not item["label_kept"]
    return f"{'<= ' * lowest}{logprob:.2f}"
