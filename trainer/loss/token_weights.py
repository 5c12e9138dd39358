"""Weights of single tokens' cross-entropy, and label smoothing.

With q the model's probability of the label, p0 the initial model's, and CE = -log q, a token adds w CE to the loss,
where w is a number and never differentiated:

    dft   q^a                                       arXiv 2508.05629 (a = 1)
    talr  q^(1/tau)                                 arXiv 2509.20758
    psft  r where r <= 1 + epsilon, else 0; r = q/p0    arXiv 2508.17784: the gradient of -min(r, clip(r))
    eaft  (entropy of the model's top 20 / ln 20)^a     arXiv 2601.02151

What depends on the cache alone (`flow`, `eaft0`) comes with the batch; `stm` has taken its tokens out of the labels.

Label smoothing (Szegedy et al., 2016) replaces the label by (1 - epsilon) of it and epsilon / V of every token:

    CE = log sum_j exp(z_j) - (1 - epsilon) z_label - epsilon mean_j z_j
    gradient: q_j - epsilon / V - (1 - epsilon) [j = label]

N: rows, C: rows of a chunk, V: vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from formats.errors import ConfigError
from trainer.objective import TOP, Choice, Objective


@dataclass(frozen=True)
class RowExtras:
    """What a chunk's logits are asked for beside the softmax terms."""

    top_entropy: bool = False
    """Entropy of the most probable tokens over ln TOP."""
    mean: bool = False
    """Mean of the logits."""


NO_EXTRAS = RowExtras()


@dataclass(frozen=True)
class LabelTerms:
    """What the batch says of the tokens that carry loss; each None where it says nothing."""

    weights_N: torch.Tensor | None = None
    """Weight of the row's cross-entropy."""
    logprobs_N: torch.Tensor | None = None
    """log p0 of the label."""

    def take(self, rows_C: torch.Tensor, dtype: torch.dtype) -> "LabelTerms":
        """Those of a chunk's rows."""
        picked = (
            None if part is None else part[rows_C].to(dtype) for part in (self.weights_N, self.logprobs_N)
        )
        return LabelTerms(*picked)


@dataclass(frozen=True)
class CrossEntropy:
    """How the cross-entropy of a row counts."""

    weighting: Choice
    smoothing: float
    terms: LabelTerms

    @classmethod
    def of(cls, objective: Objective, terms: LabelTerms, kernel: str) -> "CrossEntropy":
        """Checked against the batch and the kernel.

        Raises:
            ConfigError: the kernel does not read what is needed, or a number or column is missing.
        """
        objective.require_kernel(kernel)
        weighting = objective.weighting
        if weighting.name == "talr" and weighting.value is None:
            raise ConfigError("ce_weight talr needs its tau, got none; write talr:NATS")
        if weighting.name == "psft" and terms.logprobs_N is None:
            raise ConfigError(
                "ce_weight psft needs the initial model's logprobs of the labels, got a batch without; make the "
                "CachedDataset with the same objective"
            )
        if weighting.name in ("flow", "eaft0") and terms.weights_N is None:
            raise ConfigError(
                f"ce_weight {weighting.name} needs weights from the cache, got a batch without; make the "
                "CachedDataset with the same objective"
            )
        return cls(weighting, objective.label_smoothing, terms)

    @property
    def extras(self) -> RowExtras:
        """What it needs of the logits."""
        return RowExtras(top_entropy=self.weighting.name == "eaft", mean=self.smoothing > 0)

    @staticmethod
    def extras_of(objective: Objective) -> RowExtras:
        """What the cross-entropy of an objective needs of the logits, before there is a batch."""
        return CrossEntropy(objective.weighting, objective.label_smoothing, LabelTerms()).extras

    def row_weights(
        self, ce_C: torch.Tensor, top_entropy_C: torch.Tensor | None, terms: LabelTerms
    ) -> torch.Tensor | None:
        """[C]: weights from the labels' cross-entropy -log q and the chunk's terms; None where all are 1."""
        name, value = self.weighting.name, self.weighting.value or 1.0
        if name == "eaft":
            assert top_entropy_C is not None
            return top_entropy_C**value
        if name == "dft":
            return torch.exp(-value * ce_C)
        if name == "talr":
            return torch.exp(-ce_C / value)
        if name == "psft":
            assert terms.logprobs_N is not None
            log_ratio_C = -ce_C - terms.logprobs_N
            return torch.where(log_ratio_C <= math.log1p(value), log_ratio_C.exp(), torch.zeros_like(ce_C))
        return terms.weights_N if name in ("flow", "eaft0") else None


def top_entropy(logits_CV: torch.Tensor) -> torch.Tensor:
    """[C]: entropy of each row's most probable tokens, at most TOP and renormalised, over ln TOP."""
    log_probs = logits_CV.topk(min(TOP, logits_CV.shape[1]), dim=1, sorted=False).values.log_softmax(dim=1)
    return (log_probs.exp() * log_probs).sum(dim=1).neg() / math.log(TOP)
