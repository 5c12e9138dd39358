"""Let the model write the rows of a recipe, and keep them in the build's directory batch by batch.

Each row has random numbers of its own, and a batch is always the same rows, given to the engine alone: so a killed
build goes on at its first missing batch and ends with the rows of an undisturbed one.

Memory: one batch of rows, and some 100 bytes per row to find repetitions.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cache_builder.commit.build_directory import BuildDirectory
from cache_builder.commit.capture import started
from cache_builder.commit.engine_record import EngineRecord
from cache_builder.commit.shard_committer import Step, no_step
from cache_builder.generation.recipe import Recipe
from cache_builder.rows.preview import render_row
from cache_builder.teachers.protocol import Sampler, SampleRequest, TeacherError
from formats.disk.token_row import TokenRow
from formats.progress import Progress, counted, format_seconds


class GeneratedRows(Iterator[TokenRow]):
    """The rows of a recipe in order; those that are not on the disk yet are written first.

    Args:
        batch_rows: rows of a batch, the same in every command that works on this build.
        make_sampler: starts the engine, when the first row is missing; it is stopped before the first row is handed
            out.
        tokenizer: to show the first row.
        step: called after every committed batch; for fault tests.

    Raises:
        EngineStartError, ConfigError: the engine did not start.
        TeacherError: it failed, or wrote what no row can be; what is committed stays.
        IdentityMismatchError: another kind of engine wrote the first rows.
        OSError: the disk is full or fails.
    """

    def __init__(
        self,
        directory: BuildDirectory,
        recipe: Recipe,
        batch_rows: int,
        make_sampler: Callable[[], Sampler],
        *,
        tokenizer: Any = None,
        progress: Progress | None = None,
        step: Step = no_step,
    ) -> None:
        self._directory, self._recipe, self._make_sampler = directory, recipe, make_sampler
        self._tokenizer, self._progress, self._step = tokenizer, progress or Progress(), step
        num_rows = recipe.config.num_rows
        self._batches = [(at, min(at + batch_rows, num_rows)) for at in range(0, num_rows, batch_rows)]
        self.num_tokens = self.num_targets = self.num_ended = self.num_repeated = 0
        """Of the rows handed out: tokens, new tokens, rows that end by themselves, rows that another one equals."""
        self.num_rows = 0
        self._keys: set[bytes] = set()
        self._rows = self._all()

    def __next__(self) -> TokenRow:
        return next(self._rows)

    def counts(self) -> dict[str, Any]:
        """What was written, as numbers and as sentences."""
        cut = self.num_rows - self.num_ended
        notes = [
            f"{self.num_ended} of {self.num_rows} rows end by themselves, {cut} at {self._recipe.max_length} tokens",
            *([f"{self.num_repeated} rows repeat another"] if self.num_repeated else []),
            *self._recipe.prompts.notes(),
        ]
        return {
            "num_rows": self.num_rows,
            "num_tokens": self.num_tokens,
            "num_targets": self.num_targets,
            "num_ended": self.num_ended,
            "num_repeated": self.num_repeated,
            "notes": notes,
        }

    def _all(self) -> Iterator[TokenRow]:
        self.write_missing()
        for first, last in self._batches:
            rows = self._directory.read_generated(first, last)
            if rows is None:
                raise TeacherError(
                    f"generated rows must stay as they were written, got other bytes for rows {first} to {last - 1} in "
                    f"{self._directory}; run the same command again"
                )
            for row in rows:
                self._count(row)
                yield row

    def _count(self, row: TokenRow) -> None:
        self.num_rows += 1
        self.num_tokens += len(row)
        self.num_targets += int(row.loss_mask.sum())
        self.num_ended += int(row.input_ids[-1]) in self._recipe.stop_tokens
        self.num_repeated += row.key in self._keys
        self._keys.add(row.key)

    def write_missing(self) -> None:
        """Write and commit the rows that are not on the disk yet; done by the first row that is asked for, if not
        before.
        """
        missing = [batch for batch in self._batches if self._directory.read_generated(*batch) is None]
        if not missing:
            return
        num_rows, num_left = self._recipe.config.num_rows, sum(last - first for first, last in missing)
        if num_left < num_rows:
            self._progress.note(f"resuming: {num_rows - num_left} of {num_rows} rows are generated")
        self._progress.note("starting the engine to write rows")
        sampler = started(self._make_sampler)
        try:
            self._directory.settle_sampler(EngineRecord.of(sampler))
            self._progress.start("generate", num_rows, num_rows - num_left)
            self._progress.running()
            began, num_tokens = time.monotonic(), 0
            for first, last in missing:
                rows = self._written(sampler, first, last)
                self._directory.write_generated(first, rows)
                num_tokens += sum(int(row.loss_mask.sum()) for row in rows)
                self._step(f"generated {first}")
            seconds = time.monotonic() - began
            self._progress.note(
                f"wrote {counted(num_left, 'row')}, {counted(num_tokens, 'new token')} in {format_seconds(seconds)} "
                f"({num_tokens / max(seconds, 1e-9):,.0f} tokens/s)"
            )
        finally:
            sampler.close()
            self._progress.finish()
        if self._tokenizer is not None and (shown := self._directory.read_generated(*self._batches[0])):
            self._progress.note(f"first row: {len(shown[0])} tokens\n{render_row(shown[0], self._tokenizer)}")

    def _prompts(self, sampler: Sampler, first: int, last: int) -> list[np.ndarray]:
        """What the rows first:last begin with; the model writes the user's turns among it."""
        recipe = self._recipe
        if (turn := recipe.prompts.turn) is None:
            return [recipe.prompt(row) for row in range(first, last)]
        requests = [recipe.turn_request(row) for row in range(first, last)]
        written = dict(self._sampled(sampler, requests, first))
        return [turn.prompt(written[index]) for index in range(last - first)]

    def _written(self, sampler: Sampler, first: int, last: int) -> list[TokenRow]:
        """The rows first:last, by the engine."""
        prompts = self._prompts(sampler, first, last)
        requests = [self._recipe.request(first + index, prompt) for index, prompt in enumerate(prompts)]
        rows: dict[int, TokenRow] = {}
        for number, tokens in self._sampled(sampler, requests, first):
            rows[number] = self._recipe.row(prompts[number], tokens)
            self._progress.advance(1, len(tokens))
        return [rows[number] for number in range(len(requests))]

    @staticmethod
    def _sampled(
        sampler: Sampler, requests: Sequence[SampleRequest], first: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """What the engine writes to every request, as it comes; the first is of row number `first`."""
        answered: set[int] = set()
        for number, tokens in sampler.sample(requests):
            if not 1 <= len(tokens) <= requests[number].max_new_tokens:
                raise TeacherError(
                    f"a row must get 1 to {requests[number].max_new_tokens} new tokens, got {len(tokens)} in row "
                    f"{first + number}"
                )
            answered.add(number)
            yield number, tokens
        if len(answered) < len(requests):
            raise TeacherError(f"the engine must write {len(requests)} rows, got {len(answered)}")
