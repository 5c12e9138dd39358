"""Teacher targets as different systems keep them, as dense [N, V] tensors where that is simplest.

N: positions, V: vocabulary, K: kept entries of a position.
"""

import numpy as np
import torch

from formats.capture_settings import CaptureSettings
from formats.logprobs.tail_draws import TailDraws, draw
from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs

DEFAULT = CaptureSettings()


def capture(
    logits_NV: torch.Tensor,
    settings: CaptureSettings = DEFAULT,
    starts_N: np.ndarray | None = None,
    label_ids: np.ndarray | None = None,
) -> TopKLogprobs:
    """Kept tokens (p >= min_prob, at most max_k, at least one), tail nodes, draws and labels of full logits, in
    float64; without `starts_N` nothing is drawn, without `label_ids` the labels are unknown."""
    logprobs_NV = torch.log_softmax(logits_NV.double(), -1)
    values_NK, ids_NK = logprobs_NV.topk(min(settings.max_k, logprobs_NV.shape[1]), dim=-1)
    keep_NK = values_NK >= np.log(settings.min_prob)
    keep_NK[:, 0] = True
    rest_NV = logprobs_NV.scatter(1, ids_NK, torch.where(keep_NK, -torch.inf, values_NK))
    nodes = torch.stack([torch.logsumexp(beta * rest_NV, -1) for beta in TAIL_BETAS], dim=1)
    drawn = TailDraws.none(len(logprobs_NV))
    if settings.draw_rate and starts_N is not None:
        tail_NV = rest_NV > -torch.inf
        offsets = np.concatenate([[0], tail_NV.sum(1).cumsum(0).numpy()])
        ids = tail_NV.nonzero()[:, 1].numpy()
        drawn = draw(offsets, ids, rest_NV[tail_NV].numpy(), settings.draw_rate, starts_N)
    labels = np.full(len(logprobs_NV), np.nan)
    if label_ids is not None:
        labels = logprobs_NV.numpy()[np.arange(len(labels)), label_ids]
    return TopKLogprobs(
        offsets=np.concatenate([[0], keep_NK.sum(1).cumsum(0).numpy()]),
        token_ids=ids_NK[keep_NK].numpy().astype(np.int32),
        logprobs=values_NK[keep_NK].numpy().astype(np.float32),
        log_tail_nodes=nodes.numpy().astype(np.float32),
        vocab_size=logprobs_NV.shape[1],
        draws=drawn,
        label_logprobs=labels,
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
