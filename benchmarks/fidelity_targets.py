"""Teacher targets as different systems keep them, as dense [N, V] tensors where that is simplest.

N: positions, V: vocabulary, K: kept entries of a position.
"""

import numpy as np
import torch

from formats.features import TokenFeatures
from formats.topk import TAIL_BETAS, TopKLogprobs

MIN_PROB = 2.5e-3
MAX_K = 128


def capture(
    logits_NV: torch.Tensor,
    min_prob: float = MIN_PROB,
    max_k: int = MAX_K,
    features: TokenFeatures | None = None,
) -> TopKLogprobs:
    """Head (p >= min_prob, at most max_k, at least one), tail nodes and moments of full logits, in
    float64."""
    logprobs_NV = torch.log_softmax(logits_NV.double(), -1)
    values_NK, ids_NK = logprobs_NV.topk(min(max_k, logprobs_NV.shape[1]), dim=-1)
    keep_NK = values_NK >= np.log(min_prob)
    keep_NK[:, 0] = True
    rest_NV = logprobs_NV.scatter(1, ids_NK, torch.where(keep_NK, -torch.inf, values_NK))
    nodes = torch.stack([torch.logsumexp(beta * rest_NV, -1) for beta in TAIL_BETAS], dim=1)
    moments = np.zeros((len(logprobs_NV), 0))
    if features is not None:
        moments = rest_NV.exp().numpy() @ features.of(np.arange(logprobs_NV.shape[1])).astype(np.float64)
    return TopKLogprobs(
        offsets=np.concatenate([[0], keep_NK.sum(1).cumsum(0).numpy()]),
        token_ids=ids_NK[keep_NK].numpy().astype(np.int32),
        logprobs=values_NK[keep_NK].numpy().astype(np.float32),
        log_tail_nodes=nodes.numpy().astype(np.float32),
        vocab_size=logprobs_NV.shape[1],
        tail_moments=moments,
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


def tail_correction(
    topk: TopKLogprobs,
    logprobs_NV: torch.Tensor,
    logits_NV: torch.Tensor,
    temperature: float,
    num_draws: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """[N, V] what M tokens drawn from the teacher's tail at T = 1 add to the bucket's gradient.

    The bucket lacks beta (1 - P) (q~ - p~) on the tail. For a draw s of probability pi(s) the estimate is
    (q~(s) - p~(s)) / pi(s) at s: its mean is what is lacking, and every single draw is zero while q~ = p~.
    The sum over the tail is subtracted along q~, so that the gradient of every row still sums to zero.
    """
    beta = 1.0 / temperature
    tail_NV = torch.ones_like(logprobs_NV, dtype=torch.bool)
    row = np.repeat(np.arange(len(topk)), topk.counts)
    tail_NV[torch.as_tensor(row), torch.as_tensor(topk.token_ids).long()] = False

    def tail_shape(scores_NV: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores_NV.masked_fill(~tail_NV, -torch.inf), -1)

    p, q, drawn_from = tail_shape(beta * logprobs_NV), tail_shape(beta * logits_NV), tail_shape(logprobs_NV)
    tail_mass = 1.0 - torch.as_tensor(topk.head_mass(temperature)).double()[:, None]
    draws = torch.multinomial(drawn_from, num_draws, replacement=True, generator=generator)
    values = ((q - p) / drawn_from.clamp_min(1e-300)).gather(1, draws) / num_draws
    estimate = torch.zeros_like(p).scatter_add_(1, draws, values) - q * values.sum(1, keepdim=True)
    return beta * tail_mass * estimate
