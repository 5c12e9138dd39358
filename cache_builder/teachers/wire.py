"""What travels from the engine to the builder for one request: a single int32 tensor.

    num_positions, num_entries, num_draws, triton
    counts [P] | token_ids [E] | logprobs [E] | log_tail_nodes [P * K] | label_logprobs [P]
    draw_counts [P] | draw_ids [S] | draw_logprobs [S]

Floats travel as their bits.  One flat tensor per request passes through vLLM's serialisation as a buffer, and
numpy views give it back: no Python object per token on either side.

`triton` is 1 where the reduction ran as Triton kernels: only the process that runs it knows.

P: positions, E: kept entries, K: tail nodes, S: tail draws.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from cache_builder.reduction.reduce import ReducedRows
from formats.logprobs.ragged import offsets_of
from formats.logprobs.tail_draws import TailDraws
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs

HEADER = 4


class Part(NamedTuple):
    """Some of the rows of a request: `ReducedRows` as bits."""

    words: tuple[torch.Tensor, ...]
    """int32, flat: its fields in their order."""
    sizes: tuple[int, int, int]
    """Positions, entries, draws."""


def part_of(rows: ReducedRows) -> Part:
    """All of them."""
    return split(rows, [len(rows.counts)], [len(rows.token_ids)], [len(rows.draw_ids)])[0]


def split(
    rows: ReducedRows, positions: Sequence[int], entries: Sequence[int], draws: Sequence[int]
) -> list[Part]:
    """The rows of several requests, by how much each has of everything: a step of short rows has hundreds of them, and
    what is done for every part of every request takes a GPU's host longer than the reduction."""
    tails = [number * len(TAIL_BETAS) for number in positions]
    # In the order of the fields.
    sizes = (positions, entries, entries, tails, positions, positions, draws, draws)
    columns = (
        column.reshape(-1).view(torch.int32).split(list(size))
        for column, size in zip(rows, sizes, strict=True)
    )
    words = zip(*columns, strict=True)
    return [Part(*each) for each in zip(words, zip(positions, entries, draws, strict=True), strict=True)]


def pack(rows: ReducedRows, *, triton: bool = False) -> torch.Tensor:
    """int32 [4 + P * (3 + K) + 2E + 2S], on the device of `rows`."""
    return pack_all([[part_of(rows)]], triton=triton)[0]


def pack_all(requests: Sequence[Sequence[Part]], *, triton: bool = False) -> list[torch.Tensor]:
    """`pack` of each request, whose parts are joined, as pieces of one tensor."""
    if not requests:
        return []
    totals = [
        [sum(numbers) for numbers in zip(*(part.sizes for part in parts), strict=True)] for parts in requests
    ]
    headers = torch.tensor([[*total, int(triton)] for total in totals], dtype=torch.int32)
    on_device = headers.to(
        requests[0][0].words[0].device, non_blocking=True
    )  # made there, it would be waited for
    pieces: list[torch.Tensor] = []
    for header, parts in zip(on_device.unbind(), requests, strict=True):
        pieces.append(header)
        if len(parts) == 1:
            pieces += parts[0].words
        else:
            pieces += chain.from_iterable(zip(*(part.words for part in parts), strict=True))
    lengths = [
        HEADER + positions * (3 + len(TAIL_BETAS)) + 2 * (entries + draws)
        for positions, entries, draws in totals
    ]
    return list(torch.cat(pieces).split(lengths))


def reduction_of(packed: torch.Tensor) -> str:
    """How the rows were reduced: `triton` or `plain`."""
    return "triton" if int(packed[HEADER - 1]) else "plain"


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
