"""The reference teacher: transformers, one row at a time, no padding, no batching.

Slow and plain on purpose.  It is the fallback where vLLM does not run, and the other side of every comparison
that holds the vLLM teacher to account.  Only the selected positions are projected (`logits_to_keep`); a row's
logits exist once, [P, V] in the type of the head.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from cache_builder.reduction import kernels
from cache_builder.reduction.reduce import reduce_logits
from cache_builder.teachers.protocol import TeacherConfig, check_numbers, check_row
from cache_builder.teachers.transformers_model import HeldModel
from cache_builder.teachers.wire import pack, unpack
from formats.disk.token_row import TokenRow
from formats.logprobs.tail_draws import starts
from formats.logprobs.topk import TopKLogprobs


class TransformersTeacher(HeldModel):
    """A `transformers.AutoModelForCausalLM` as a teacher.

    Engine arguments: `device` (default: cuda when available, else cpu), `attn_implementation`,
    `trust_remote_code`.

    Raises:
        ConfigError: the model cannot be loaded, or an engine argument is unknown.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        super().__init__(config)
        triton = kernels.run_on(self._device.type, self.vocab_size)
        self._description["reduction"] = "triton" if triton else "plain"

    @torch.inference_mode()
    def _predict(self, row: TokenRow, positions: np.ndarray) -> TopKLogprobs:
        input_ids_1L = torch.from_numpy(row.input_ids.astype(np.int64)).to(self._device).unsqueeze(0)
        keep = torch.from_numpy(positions.astype(np.int64)).to(self._device)
        logits_PV = self._model(input_ids=input_ids_1L, logits_to_keep=keep, use_cache=False).logits[0]
        assert logits_PV.shape == (len(positions), self.vocab_size), logits_PV.shape
        reduced = reduce_logits(
            logits_PV,
            self.config.capture,
            labels_N=input_ids_1L[0, keep + 1],
            starts_N=torch.from_numpy(starts(row.key, positions)).to(self._device),
        )
        return unpack(pack(reduced).cpu(), self.vocab_size, self.config.capture.draw_rate)

    def prefill(self, rows: Iterable[TokenRow]) -> Iterator[TopKLogprobs]:
        """See `Teacher.prefill`."""
        for number, row in enumerate(rows):
            check_row(row, number, max_length=self.config.max_length, vocab_size=self.vocab_size)
            positions = row.positions(self.config.capture.positions)
            if len(positions) == 0:
                yield TopKLogprobs.empty(self.vocab_size, self.config.capture.draw_rate)
            else:
                yield check_numbers(self._predict(row, positions), number)
