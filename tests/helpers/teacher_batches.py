"""Teacher targets without a dataset and a collator: from stored logprobs, or of no position at all."""

from collections.abc import Iterable

import numpy as np
import torch

from formats.logprobs.topk import TopKLogprobs
from trainer.data.teacher_batch import TeacherBatch


def batch_from_topk(
    rows: Iterable[int] | np.ndarray, topk: TopKLogprobs, temperature: float = 1.0, draws: bool = True
) -> TeacherBatch:
    """Targets of `topk`, whose position p belongs to hidden row `rows[p]`; `draws=False` leaves those out."""
    drawn: dict[str, torch.Tensor] = {}
    if draws and topk.draws.rate:
        drawn = {
            "draw_offsets": torch.as_tensor(topk.draws.offsets),
            "draw_ids": torch.as_tensor(topk.draws.token_ids),
            "draw_logprobs": torch.as_tensor(topk.draws.logprobs),
            "draw_weights": torch.as_tensor(topk.draws.weights),
        }
    return TeacherBatch(
        rows=torch.as_tensor(np.ascontiguousarray(rows, dtype=np.int64)),
        offsets=torch.as_tensor(np.ascontiguousarray(topk.offsets, dtype=np.int64)),
        token_ids=torch.as_tensor(np.ascontiguousarray(topk.token_ids, dtype=np.int32)),
        logprobs=torch.as_tensor(np.ascontiguousarray(topk.logprobs, dtype=np.float32)),
        log_tail=torch.as_tensor(np.ascontiguousarray(topk.log_tail(temperature), dtype=np.float32)),
        temperature=float(temperature),
        **drawn,
    )


def empty_batch(temperature: float = 1.0) -> TeacherBatch:
    """Targets for no row at all."""
    none = torch.empty(0)
    return TeacherBatch(none.long(), torch.zeros(1, dtype=torch.int64), none.int(), none, none, temperature)
