"""Teacher targets as different systems keep them, as dense [N, V] tensors where that is simplest.

N: positions, V: vocabulary, K: kept entries of a position.
"""

import numpy as np
import torch

from formats.logprobs.tail_draws import TailDraws, draw
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs

MIN_PROB = 5e-3
MAX_K = 128


def capture(
    logits_NV: torch.Tensor,
    min_prob: float = MIN_PROB,
    max_k: int = MAX_K,
    draw_rate: int = 0,
    starts_N: np.ndarray | None = None,
) -> TopKLogprobs:
    """Kept tokens (p >= min_prob, at most max_k, at least one), tail nodes and draws of full logits, in
    float64."""
    logprobs_NV = torch.log_softmax(logits_NV.double(), -1)
    values_NK, ids_NK = logprobs_NV.topk(min(max_k, logprobs_NV.shape[1]), dim=-1)
    keep_NK = values_NK >= np.log(min_prob)
    keep_NK[:, 0] = True
    rest_NV = logprobs_NV.scatter(1, ids_NK, torch.where(keep_NK, -torch.inf, values_NK))
    nodes = torch.stack([torch.logsumexp(beta * rest_NV, -1) for beta in TAIL_BETAS], dim=1)
    drawn = TailDraws.none(len(logprobs_NV))
    if draw_rate:
        assert starts_N is not None
        tail_NV = rest_NV > -torch.inf
        offsets = np.concatenate([[0], tail_NV.sum(1).cumsum(0).numpy()])
        ids = tail_NV.nonzero()[:, 1].numpy()
        drawn = draw(offsets, ids, rest_NV[tail_NV].numpy(), draw_rate, starts_N)
    return TopKLogprobs(
        offsets=np.concatenate([[0], keep_NK.sum(1).cumsum(0).numpy()]),
        token_ids=ids_NK[keep_NK].numpy().astype(np.int32),
        logprobs=values_NK[keep_NK].numpy().astype(np.float32),
        log_tail_nodes=nodes.numpy().astype(np.float32),
        vocab_size=logprobs_NV.shape[1],
        draws=drawn,
    )


def topk_targets(
    topk: TopKLogprobs, temperature: float, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """([N, V] true p_T of the kept tokens and zero elsewhere, [N, 1] their mass).

    The true normalisation comes from the stored tail: at T != 1 more than top-k caches without one can know.
    """
    row = np.repeat(np.arange(len(topk)), topk.counts)
    probs = np.exp(topk.logprobs / temperature - topk.log_partition(temperature)[row])
    dense = torch.zeros(len(topk), vocab_size, dtype=torch.float64)
    dense[torch.as_tensor(row), torch.as_tensor(topk.token_ids).long()] = torch.as_tensor(probs).double()
    return dense, dense.sum(1, keepdim=True)


def sampled_targets(
    logprobs_NV: torch.Tensor, temperature: float, num_draws: int, generator: torch.Generator
) -> torch.Tensor:
    """[N, V] targets from draws at T = 1: counts, weighted by p_T / p_1 and normalised."""
    draws = torch.multinomial(logprobs_NV.exp(), num_draws, replacement=True, generator=generator)
    counts = torch.zeros_like(logprobs_NV).scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    weighted = counts * ((1.0 / temperature - 1.0) * logprobs_NV).exp()
    return weighted / weighted.sum(1, keepdim=True)
