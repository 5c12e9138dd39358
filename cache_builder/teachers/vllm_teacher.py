"""The fast teacher: vLLM prefill through a pooling model that keeps its output head.

`vllm_plugin` registers a teacher variant of every text architecture, `vllm_pooler` reduces inside the
engine, and this class feeds rows and decodes answers.  Nothing is generated and no `prompt_logprobs` are
asked for.

Rows go to the engine in waves of a fixed number of tokens.  The engine begins a wave when all of its rows are
there and the wave before has ended (`vllm_waves`), so that what runs together in a step depends on the rows alone,
never on timing: the same call gives the same bits again.  A wave is sent, and the results of the one before are handed
out, while the engine computes.  In memory at any time: three waves of rows, two of results.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cache_builder.teachers.protocol import TeacherConfig, TeacherError, check_numbers, check_row
from cache_builder.teachers.vllm_engine import HeldEngine
from formats.disk.token_row import TokenRow
from formats.logprobs.topk import TopKLogprobs

STEPS_PER_WAVE = 16
"""Scheduler steps' worth of tokens in a wave: the pause between two waves is small beside it."""
PROBE_TOKENS = 4


@dataclass
class _Member:
    """One row of a wave, and its answer once it is there."""

    number: int
    row: TokenRow
    positions: np.ndarray
    result: TopKLogprobs | None = None


class VLLMTeacher(HeldEngine):
    """A vLLM engine as a teacher.

    The engine runs in processes of its own, which re-import the main module: a script that makes a
    `VLLMTeacher` needs the usual `if __name__ == "__main__":` guard.

    Raises:
        ConfigError: vLLM is not installed, does not know the architecture, or refuses a setting.
        TeacherError: the engine did not start.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        super().__init__(config, pooling=True)
        settings = self._engine.vllm_config
        self._wave_tokens = STEPS_PER_WAVE * int(settings.scheduler_config.max_num_batched_tokens)
        if config.wave_tokens is not None:
            self._wave_tokens = min(self._wave_tokens, config.wave_tokens)
        # How the engine reduces, it says with every answer.  So that it is known before the first row: one is asked.
        length = min(PROBE_TOKENS, config.max_length)
        list(self.prefill([TokenRow(np.zeros(length, np.int32), np.arange(length) > 0)]))

    def prefill(self, rows: Iterable[TokenRow]) -> Iterator[TopKLogprobs]:
        """See `Teacher.prefill`."""
        if self._engine is None:
            raise TeacherError("a closed teacher cannot prefill; make a new one")
        running: dict[str, _Member] = {}
        sent: deque[list[_Member]] = deque()
        try:
            for wave in self._waves(rows):
                self._send(wave, running)
                sent.append(wave)
                if len(sent) > 1:
                    yield from self._finished(sent.popleft(), running)
            while sent:
                yield from self._finished(sent.popleft(), running)
        finally:
            self._abort(running)  # the caller stopped early, or a row was refused

    def _waves(self, rows: Iterable[TokenRow]) -> Iterator[list[_Member]]:
        """Cut the rows into waves of `_wave_tokens` tokens that need the engine, or of one longer row."""
        wave: list[_Member] = []
        tokens = 0
        for number, row in enumerate(rows):
            check_row(row, number, max_length=self.config.max_length, vocab_size=self.vocab_size)
            member = _Member(number, row, row.positions(self.config.capture.positions))
            needed = len(row) if len(member.positions) else 0
            if wave and tokens + needed > self._wave_tokens:
                yield wave
                wave, tokens = [], 0
            wave.append(member)
            tokens += needed
        if wave:
            yield wave

    def _send(self, wave: list[_Member], running: dict[str, _Member]) -> None:
        """Hand a wave to the engine, which begins it when it may; rows without positions need no engine."""
        from vllm import PoolingParams
        from vllm.inputs.engine import tokens_input

        from cache_builder.teachers.vllm_pooler import (
            LABELS_KEY,
            POSITIONS_KEY,
            ROW_KEY,
            TASK,
            encode_labels,
            encode_positions,
        )
        from cache_builder.teachers.vllm_waves import WAVE_KEY

        last = next((member for member in reversed(wave) if len(member.positions)), None)
        for member in wave:
            if len(member.positions) == 0:
                member.result = TopKLogprobs.empty(self.vocab_size, self.config.capture.draw_rate)
                continue
            labels = member.row.label_ids(self.config.capture.positions)
            asked = {
                ROW_KEY: member.row.key,
                LABELS_KEY: encode_labels(labels),
                WAVE_KEY: member is last,
            }
            # No mask means every position that has a next token.
            if len(member.positions) < len(member.row) - 1:
                asked[POSITIONS_KEY] = encode_positions(member.positions, len(member.row))
            self._num_requests += 1
            request = str(self._num_requests)
            running[request] = member
            self._add(
                request,
                tokens_input(member.row.input_ids.tolist()),
                PoolingParams(task=TASK, extra_kwargs=asked, skip_reading_prefix_cache=True),
            )

    def _finished(self, wave: list[_Member], running: dict[str, _Member]) -> Iterator[TopKLogprobs]:
        """Drive the engine until every row of the wave is answered; then the answers."""
        from cache_builder.teachers.wire import reduction_of, unpack

        left = [member for member in wave if member.result is None]
        while left:
            for output in self._step():
                member = running.pop(output.request_id)
                self._check_reduction(reduction_of(output.outputs.data))
                result = unpack(output.outputs.data, self.vocab_size, self.config.capture.draw_rate)
                assert len(result) == len(member.positions), (len(result), len(member.positions))
                member.result = result
            left = [member for member in left if member.result is None]
        yield from _results(wave)

    def _check_reduction(self, found: str) -> None:
        """The first answer completes the description; what follows must keep to it.

        Raises:
            TeacherError: the engine reduces in another way than before, which changes last bits.
        """
        expected = self._description.setdefault("reduction", found)
        if found != expected:
            self.close()
            raise TeacherError(
                f"an engine must reduce all rows in one way, got {found} after {expected}; its kernels failed: set "
                "ANNEAL_TRITON=0 and start over with --overwrite"
            )

    def __enter__(self) -> "VLLMTeacher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _results(wave: list[_Member]) -> Iterator[TopKLogprobs]:
    for member in wave:
        result, member.result = member.result, None  # handed out: the caller decides how long it lives
        assert result is not None
        yield check_numbers(result, member.number)
