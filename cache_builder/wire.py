"""What travels from the engine to the builder for one request: a single int32 tensor.

    num_positions, num_entries, num_features
    counts [P] | token_ids [M] | logprobs [M] | log_tail_nodes [P * B] | tail_moments [P * F]

Floats travel as their bits.  One flat tensor per request passes through vLLM's serialisation as a buffer, and
numpy views give it back: no Python object per token on either side.

P: positions, M: head entries, B: tail nodes, F: token features.
"""

import numpy as np
import torch

from cache_builder.reduce import ReducedRows
from formats.topk import TAIL_BETAS, TopKLogprobs

HEADER = 3


def pack(rows: ReducedRows) -> torch.Tensor:
    """int32 [3 + P + 2M + P * (B + F)], on the device of `rows`."""
    header = torch.tensor(
        [len(rows.counts), len(rows.token_ids), rows.tail_moments.shape[1]],
        dtype=torch.int32,
        device=rows.counts.device,
    )
    return torch.cat(
        [
            header,
            rows.counts,
            rows.token_ids,
            rows.logprobs.view(torch.int32),
            rows.log_tail_nodes.reshape(-1).view(torch.int32),
            rows.tail_moments.reshape(-1).view(torch.int32),
        ]
    )


def unpack(packed: torch.Tensor, vocab_size: int) -> TopKLogprobs:
    """The inverse of `pack`; the arrays are views of `packed` where the layout allows it."""
    flat = packed.numpy()
    num_positions, num_entries, num_features = (int(number) for number in flat[:HEADER])
    num_betas = len(TAIL_BETAS)
    expected = HEADER + num_positions * (1 + num_betas + num_features) + 2 * num_entries
    assert flat.dtype == np.int32 and len(flat) == expected, (flat.dtype, len(flat), expected)
    lengths = [num_positions, num_entries, num_entries, num_positions * num_betas]
    counts, token_ids, logprobs, tail, moments = np.split(flat[HEADER:], np.cumsum(lengths))
    offsets = np.zeros(num_positions + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return TopKLogprobs(
        offsets=offsets,
        token_ids=token_ids,
        logprobs=logprobs.view(np.float32),
        log_tail_nodes=tail.view(np.float32).reshape(num_positions, num_betas),
        vocab_size=vocab_size,
        tail_moments=moments.view(np.float32).reshape(num_positions, num_features),
    )
