"""A look at the data before a build: what was recognised, and one decoded row with its targets marked.

Targets stand between ⟦ and ⟧, so that they show without colour; with colour everything else is dimmed.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from cache_builder.corpus.corpus import Corpus, CorpusConfig
from cache_builder.rows.tokenise import tokenise
from formats.disk.token_row import TokenRow

OPEN, CLOSE = "⟦", "⟧"
_DIM, _RESET = "\x1b[2m", "\x1b[0m"
SAMPLE_BATCH = 16


def preview(
    corpus: Corpus,
    tokenizer: Any,
    config: CorpusConfig | None = None,
    *,
    color: bool = False,
    max_chars: int = 1600,
) -> str:
    """What was recognised and the first row of the corpus, about a screen of text; reads a few records only.

    Raises:
        CorpusError, ConfigError: as `tokenise`.
    """
    config = config or corpus.config
    # A seeded sample would read the whole corpus; for a look the first records will do.
    rows = tokenise(_first_records(corpus), tokenizer, replace(config, batch_size=SAMPLE_BATCH))
    row = next(rows)
    heading = f"sample: {len(row)} tokens, {int(row.loss_mask.sum())} with loss, between {OPEN} and {CLOSE}"
    sample = render_row(row, tokenizer, color=color, max_chars=max_chars)
    return "\n".join([*tokenise(corpus, tokenizer, config).describe(), heading, sample])


def _first_records(corpus: Corpus) -> Corpus:
    if corpus.config.seed is None or corpus.config.limit is None:
        return corpus
    return corpus.reconfigured(replace(corpus.config, seed=None))


def render_row(row: TokenRow, tokenizer: Any, *, color: bool = False, max_chars: int = 1600) -> str:
    """The text of a row with its targets in brackets; long stretches are shortened in their middle."""
    segments = _segments(row, tokenizer)
    budget = max(max_chars // max(len(segments), 1), 40)
    pieces, spent = [], 0
    for position, (text, is_target) in enumerate(segments):
        if spent > max_chars:
            pieces.append(f" … {len(segments) - position} more stretches")
            break
        shown = _shorten(text, budget)
        spent += len(shown)
        if is_target:
            pieces.append(f"{OPEN}{shown}{CLOSE}")
        else:
            pieces.append(f"{_DIM}{shown}{_RESET}" if color else shown)
    return "".join(pieces)


def _segments(row: TokenRow, tokenizer: Any) -> list[tuple[str, bool]]:
    """Stretches of equal mask with their text.

    Each is what it adds to the text of everything before it: tokenizers that mark spaces on words drop the
    leading space of a stretch decoded alone.
    """
    changes = (np.flatnonzero(np.diff(row.loss_mask)) + 1).tolist()
    segments, done = [], 0
    for start, end in zip([0, *changes], [*changes, len(row)], strict=True):
        text = tokenizer.decode(row.input_ids[:end].tolist(), skip_special_tokens=False)
        segments.append((_printable(text[done:]), bool(row.loss_mask[start])))
        done = len(text)
    return segments


def _printable(text: str) -> str:
    """Control characters, which could drive the terminal, as visible escapes."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)


def _shorten(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"
