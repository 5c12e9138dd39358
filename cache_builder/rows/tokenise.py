"""A corpus to token rows: batches of records through the tokenizer, cut to `max_length`, as a stream.

Documents longer than a row are split. Every row after the first starts with the tokens that the tokenizer
puts before a text (BOS), then repeats the last token of the row before, without loss: so each token of a
document is a target exactly once, with a context, at the price of one or two tokens per row. Everything else
is truncated on the right. Empty records, and rows without a target, are skipped. All of it is counted
(`counts.py`); nothing is shuffled, and
the same corpus, tokenizer and settings give the same rows.

N: tokens of a document, L: tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from cache_builder.corpus.corpus import Corpus, CorpusConfig
from cache_builder.corpus.examples import Conversation, Example, PromptCompletion, Text, convert
from cache_builder.corpus.field import is_given
from cache_builder.corpus.readers import Record
from cache_builder.corpus.ready_tokens import Tokens
from cache_builder.rows.chat import ChatEncoder
from cache_builder.rows.counts import TokeniseStats
from cache_builder.rows.encoding import Encoded, SpecialTokens, encode_documents, encode_spans
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError, CorpusError
from formats.progress import counted

MAX_BATCH_CHARS = 1 << 22


def tokenise(
    corpus: Corpus, tokenizer: Any, config: CorpusConfig | None = None, *, num_outputs: int | None = None
) -> "TokenisedRows":
    """The rows of a corpus, one at a time; `.stats` counts along.

    `config` defaults to the corpus's own. Errors in a record surface when it is reached.

    Args:
        num_outputs: rows of the model's output head, where known: no token may lie beyond them.

    Raises:
        ConfigError: the tokenizer lacks what the layout needs, or `max_length` leaves no room for text.
        CorpusError: a record is malformed, or the whole corpus gives no row.
    """
    return TokenisedRows(corpus, tokenizer, config or corpus.config, num_outputs)


def uses_chat_template(corpus: Corpus, tokenizer: Any) -> bool:
    """Whether records become text through the tokenizer's chat template."""
    return corpus.layout.uses_chat_template or (corpus.format == "Alpaca" and bool(tokenizer.chat_template))


class TokenisedRows(Iterator[TokenRow]):
    """Iterator over token rows, with statistics."""

    def __init__(
        self, corpus: Corpus, tokenizer: Any, config: CorpusConfig, num_outputs: int | None = None
    ) -> None:
        self.stats = TokeniseStats()
        """Counts up to the row handed out last."""
        self._corpus, self._tokenizer, self._config = corpus, tokenizer, config
        self._special = SpecialTokens.of(tokenizer)
        self._has_template = bool(tokenizer.chat_template)
        self._num_outputs = num_outputs
        uses_template = uses_chat_template(corpus, tokenizer)
        self._chat = (
            ChatEncoder(tokenizer, config.chat_template_kwargs, config.template_time)
            if uses_template
            else None
        )
        if config.chat_template_kwargs and not uses_template:
            raise ConfigError(
                f"template arguments need messages and a chat template, got {corpus.format}; leave them out"
            )
        least = len(self._special.prefix) + 2
        if config.max_length < least:
            raise ConfigError(
                f"max_length must be at least {least} (the tokenizer's leading tokens and two more), "
                f"got {config.max_length}"
            )
        self._rows = self._generate()

    def __next__(self) -> TokenRow:
        return next(self._rows)

    def describe(self) -> list[str]:
        """How records become rows here: sentences to announce before a build."""
        layout, config = self._corpus.layout, self._config
        columns = ", ".join(self._corpus.read_columns)
        lines = [
            self._corpus.announcement(),
            f"format: {layout.name} (columns {columns}), loss on {layout.loss}",
        ]
        if unread := self._corpus.unread_columns:
            lines.append(f"columns not read: {', '.join(unread)}")
        eos = self._special.appended_eos(config.append_eos)
        if self._chat is not None:
            how = "the template's generation markers" if self._chat.has_markers else "incremental rendering"
            lines.append(f"chat template: assistant turns found by {how}")
        elif layout.name == "Alpaca":
            lines.append("no chat template: records become ### Instruction / ### Input / ### Response text")
        if self._chat is None and layout.name != "input_ids":
            name = self._tokenizer.convert_ids_to_tokens(eos[0]) if eos else None
            own = "the tokenizer's own" if self._special.suffix else "nothing"
            lines.append(f"end: {name} appended" if name else f"end: {own} appended")
        lines.append(f"longer than {config.max_length} tokens: {'split' if layout.splits else 'truncated'}")
        return lines

    def _generate(self) -> Iterator[TokenRow]:
        stats = self.stats
        layout = self._corpus.layout
        announced = {*self._corpus.columns, *layout.required, *layout.optional}
        for records in batches(self._corpus, self._config.batch_size):
            for record in records:
                given = (name for name, value in record.values.items() if is_given(value))
                for name in chain(given, record.left_out):
                    if name not in announced:
                        stats.unread_columns[name] = stats.unread_columns.get(name, 0) + 1
            examples = [
                convert(
                    record,
                    layout,
                    has_chat_template=self._has_template,
                    vocab_size=len(self._tokenizer),
                )
                for record in records
            ]
            for encoded in self._encode(examples):
                stats.num_records += 1
                self._require_outputs(encoded)
                for row in self._cut(encoded):
                    stats.num_rows += 1
                    stats.num_tokens += len(row)
                    stats.num_targets += int(row.loss_mask.sum())
                    yield row
        if stats.num_rows == 0:
            skipped = "; ".join(stats.notes()) or "none"
            raise CorpusError(
                "the corpus must give at least one row of two tokens with a loss, got none from "
                f"{counted(stats.num_records, 'record')} ({skipped})"
            )

    def _encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """A batch of one kind of example; the layout fixes the kind."""
        if isinstance(examples[0], Text):
            return self._encode_text([example for example in examples if isinstance(example, Text)])
        if isinstance(examples[0], PromptCompletion):
            return self._encode_completions([e for e in examples if isinstance(e, PromptCompletion)])
        if isinstance(examples[0], Conversation):
            assert self._chat is not None
            encoded = self._chat.encode([e for e in examples if isinstance(e, Conversation)])
            stats, chat = self.stats, self._chat
            stats.num_shortened_turns = chat.num_shortened_turns
            stats.num_empty_turns = chat.num_empty_turns
            stats.num_turns_without_loss = chat.num_turns_without_loss
            stats.unread_fields = dict(chat.unread_fields)
            return encoded
        return [_encode_tokens(example) for example in examples if isinstance(example, Tokens)]

    def _encode_text(self, examples: list[Text]) -> list[Encoded]:
        texts = [example.text for example in examples]
        encoded = encode_documents(self._tokenizer, texts, self._special, append_eos=self._config.append_eos)
        return [
            Encoded(
                ids,
                np.arange(len(ids)) > 0,
                splittable=True,
                where=example.where,
                is_empty=self._special.is_blank(example.text),
            )
            for ids, example in zip(encoded, examples, strict=True)
        ]

    def _encode_completions(self, examples: list[PromptCompletion]) -> list[Encoded]:
        """Prompt and completion as one string; a token with a character of the completion is a target."""
        texts = [example.prompt + example.completion for example in examples]
        spans = [[(len(e.prompt), len(text))] for e, text in zip(examples, texts, strict=True)]
        encoded = []
        for example, text, (ids, mask) in zip(
            examples, texts, encode_spans(self._tokenizer, texts, spans), strict=True
        ):
            before, after = self._special.around(text, append_eos=self._config.append_eos)
            # What ends the sequence ends the completion, whoever puts it there.
            ends = [np.zeros(len(before), np.bool_), mask, np.ones(len(after), np.bool_)]
            encoded.append(
                Encoded(
                    np.array([*before, *ids, *after], dtype=np.int32),
                    np.concatenate(ends),
                    splittable=False,
                    where=example.where,
                    is_empty=self._special.is_blank(example.completion),
                )
            )
        return encoded

    def _require_outputs(self, encoded: Encoded) -> None:
        """Refuse a token that the model cannot predict, while it is known which record it comes from."""
        if self._num_outputs is None or not len(encoded.input_ids):
            return
        highest = int(encoded.input_ids.max())
        if highest >= self._num_outputs:
            token = self._tokenizer.convert_ids_to_tokens(highest)
            raise CorpusError(
                f"token ids must be from 0 to {self._num_outputs - 1} (the rows of the model's output head), got "
                f"{highest} ({token}) in {encoded.where}; use the tokenizer that belongs to the model"
            )

    def _cut(self, encoded: Encoded) -> Iterator[TokenRow]:
        ids, mask, stats = encoded.input_ids, encoded.loss_mask, self.stats
        max_length = self._config.max_length
        if encoded.is_empty:
            stats.num_empty += 1
            return
        if len(ids) < 2:
            stats.num_too_short += 1
            return
        mask = mask.copy()
        mask[0] = False
        if len(ids) > max_length and encoded.splittable:
            stats.num_split += 1
            yield from split_document(ids, mask, max_length, self._special.prefix)
            return
        if len(ids) > max_length:
            stats.num_truncated += 1
            stats.num_truncated_tokens += len(ids) - max_length
            ids, mask = ids[:max_length], mask[:max_length]
        if not mask.any():
            stats.num_without_target += 1
            return
        yield TokenRow(ids, mask)


def split_document(
    ids_N: np.ndarray, mask_N: np.ndarray, max_length: int, prefix: tuple[int, ...] = ()
) -> Iterator[TokenRow]:
    """Rows of at most `max_length` tokens in which every target of the document is a target exactly once.

    Rows after the first are `prefix`, the last token of the row before (context, no loss), and new tokens.
    `prefix` is repeated only if the document starts with it.
    """
    head = np.array(prefix if tuple(ids_N[: len(prefix)].tolist()) == prefix else (), dtype=np.int32)
    no_loss = np.zeros(len(head) + 1, dtype=np.bool_)
    room = max_length - len(no_loss)
    assert room > 0
    yield TokenRow(ids_N[:max_length], mask_N[:max_length])
    for start in range(max_length, len(ids_N), room):
        ids = np.concatenate([head, ids_N[start - 1 : start + room]])
        yield TokenRow(ids, np.concatenate([no_loss, mask_N[start : start + room]]))


def _encode_tokens(example: Tokens) -> Encoded:
    ids = example.input_ids.astype(np.int32)
    if example.loss_mask is None:
        return Encoded(ids, np.arange(len(ids)) > 0, splittable=True, where=example.where)
    return Encoded(ids, example.loss_mask.astype(np.bool_), splittable=False, where=example.where)


def batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Up to `size` records at a time; fewer long ones, so that a batch of books does not fill the memory."""
    batch: list[Record] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += sum(len(value) for value in record.values.values() if isinstance(value, str))
        if len(batch) == size or num_chars >= MAX_BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
