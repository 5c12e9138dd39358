"""What travels from the engine to the builder for one request: a single int32 tensor.

    num_positions, num_entries, num_draws, compiled
    counts [P] | token_ids [E] | logprobs [E] | log_tail_nodes [P * K] | label_logprobs [P]
    draw_counts [P] | draw_ids [S] | draw_logprobs [S]

Floats travel as their bits.  One flat tensor per request passes through vLLM's serialisation as a buffer, and
numpy views give it back: no Python object per token on either side.

`compiled` is 1 where the reduction ran compiled: only the process that runs it knows.

P: positions, E: kept entries, K: tail nodes, S: tail draws.
"""

from collections.abc import Sequence

import numpy as np
import torch

from cache_builder.reduction.reduce import ReducedRows
from formats.logprobs.ragged import offsets_of
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs

HEADER = 4


def pack(rows: ReducedRows, *, compiled: bool = False) -> torch.Tensor:
    """int32 [4 + P * (3 + K) + 2E + 2S], on the device of `rows`."""
    return pack_all([rows], compiled=compiled)[0]


def pack_all(requests: Sequence[ReducedRows], *, compiled: bool = False) -> list[torch.Tensor]:
    """`pack` of each, as pieces of one tensor: a step of short rows has hundreds, and a launch for every part of every
    request would take a GPU's host longer than the reduction."""
    if not requests:
        return []
    headers = torch.tensor(
        [[len(rows.counts), len(rows.token_ids), len(rows.draw_ids), int(compiled)] for rows in requests],
        dtype=torch.int32,
    )
    on_device = headers.to(requests[0].counts.device, non_blocking=True)  # made there, it would be waited for
    parts: list[torch.Tensor] = []
    lengths: list[int] = []
    for header, rows in zip(on_device.unbind(), requests, strict=True):
        columns = [header, *(column.reshape(-1).view(torch.int32) for column in rows)]
        lengths.append(sum(map(len, columns)))
        parts += columns
    return list(torch.cat(parts).split(lengths))


def reduction_of(packed: torch.Tensor) -> str:
    """How the rows were reduced: `compiled` or `plain`."""
    return "compiled" if int(packed[HEADER - 1]) else "plain"


def unpack(packed: torch.Tensor, vocab_size: int, draw_rate: int) -> TopKLogprobs:
    """The inverse of `pack`; the arrays are views of `packed` where the layout allows it."""
    flat = packed.numpy()
    num_positions, num_entries, num_draws, _ = (int(number) for number in flat[:HEADER])
    num_betas = len(TAIL_BETAS)
    lengths = [
        *(num_positions, num_entries, num_entries),
        *(num_positions * num_betas, num_positions, num_positions, num_draws, num_draws),
    ]
    expected = HEADER + sum(lengths)
    assert flat.dtype == np.int32 and len(flat) == expected, (flat.dtype, len(flat), expected)
    parts = np.split(flat[HEADER:], np.cumsum(lengths[:-1]))
    counts, token_ids, logprobs, tail, labels, draw_counts, draw_ids, draw_logprobs = parts
    return TopKLogprobs(
        offsets=offsets_of(counts),
        token_ids=token_ids,
        logprobs=logprobs.view(np.float32),
        log_tail_nodes=tail.view(np.float32).reshape(num_positions, num_betas),
        vocab_size=vocab_size,
        label_logprobs=labels.view(np.float32),
        draws=TailDraws(offsets_of(draw_counts), draw_ids, draw_logprobs.view(np.float32), draw_rate),
    )
