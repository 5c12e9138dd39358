"""What a corpus and a model look like, as far as it decides the settings: lengths, what carries loss, size, memory."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.corpus.corpus import CorpusConfig, open_corpus
from cache_builder.rows.preview import preview
from cache_builder.rows.tokenise import tokenise
from cache_builder.rows.tokenizer_files import load_tokenizer, model_context
from formats.identity.fingerprint import resolve_model, weight_files
from formats.identity.tensor_hash import read_header

SAMPLE = 512
"""Records that are tokenised for a look."""
LONGEST = 1 << 20
"""Tokens to which a row of the sample is cut, so that its whole length is seen."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen."""

    corpus: str
    """As given."""
    text_column: str | None
    """As given."""
    split: str | None
    """As given."""
    model: str
    """As given."""
    described: list[str]
    """How records become rows, and the first one."""
    num_records: int
    """Records of the sample."""
    whole: bool
    """Whether the sample is the whole corpus."""
    lengths: np.ndarray
    """int64 [rows], ascending: tokens of a row before it is cut."""
    loss_share: float
    """Share of the tokens that carry loss."""
    context: int | None
    """Tokens that the model was made for."""
    has_template: bool
    """Whether the model has a chat template."""
    num_parameters: int | None
    """Of the model, from its files' headers; None where they are no safetensors."""
    gpu_gib: float
    """Memory of the first GPU; 0 without one."""
    memory_gib: float
    """Of the machine."""

    def quantile(self, share: float) -> int:
        """Tokens that this share of the rows does not exceed."""
        return int(self.lengths[min(math.ceil(share * len(self.lengths)), len(self.lengths)) - 1])


def look_at(corpus: str, model: str, *, text_column: str | None = None, split: str | None = None) -> Look:
    """Tokenise the first records of a corpus and read a model's headers; no weights are loaded.

    Raises:
        ConfigError: no such model or corpus, or it has no tokenizer.
        CorpusError: the corpus is malformed, or gives no row.
        FormatError: a weight file has a damaged header.
    """
    directory = resolve_model(model)
    tokenizer = load_tokenizer(directory)
    read = CorpusConfig(source=corpus, text_column=text_column, split=split)
    rows = tokenise(open_corpus(replace(read, limit=SAMPLE, max_length=LONGEST)), tokenizer)
    lengths, with_loss = [], 0
    for row in rows:
        lengths.append(len(row))
        with_loss += int(row.loss_mask.sum())
    return Look(
        corpus=corpus,
        text_column=text_column,
        split=split,
        model=model,
        described=_described(read, tokenizer),
        num_records=rows.stats.num_records,
        whole=rows.stats.num_records < SAMPLE,
        lengths=np.sort(np.asarray(lengths, np.int64)),
        loss_share=with_loss / sum(lengths),
        context=model_context(directory),
        has_template=bool(tokenizer.chat_template),
        num_parameters=_parameters(directory),
        gpu_gib=_gpu_gib(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    )


def _described(corpus: CorpusConfig, tokenizer: Any) -> list[str]:
    """How records become rows, and the first row; without what depends on a length that is not chosen yet."""
    lines = preview(open_corpus(corpus), tokenizer, max_chars=400).splitlines()
    return [line for line in lines if not line.startswith(("corpus: ", "longer than "))]


def _parameters(directory: Path) -> int | None:
    """Numbers in a model's safetensors, from their headers."""
    total = 0
    for path in weight_files(directory):
        if path.suffix != ".safetensors":
            return None
        total += sum(math.prod(entry["shape"]) for entry in read_header(path)[0].values())
    return total


def _gpu_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
