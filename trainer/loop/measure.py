"""Means of a model over a loader, without gradients: cross-entropy, KL, and what it says of each token.

One loop serves the check before the first update, evaluation during training and `anneal eval`. Sums and
counts are kept apart until the end, so batches of any size and any number of ranks give the same means.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from formats.errors import DivergenceError
from trainer.loop.output_head import OutputHead
from trainer.loss.token_measures import FIELDS as TOKEN_FIELDS
from trainer.loss.token_measures import NUM_SUMS

LOSS_FIELDS = 6
FIELDS = LOSS_FIELDS + NUM_SUMS
TOKEN_MEANS = ("accuracy", "entropy", "confidence", "calibration_error")


def perplexity_of(ce: float) -> float:
    """exp of a mean cross-entropy in nats; infinite where that is no number of this machine, or none at all."""
    return math.exp(ce) if ce < 700 else math.inf


@dataclass(frozen=True)
class Measurement:
    """Means over all targets of a loader, in nats."""

    ce: float
    """Cross-entropy per token that carries loss; NaN without any."""
    kl: float
    """KL(initial || model) per teacher position, at the dataset's temperature; NaN without any."""
    num_ce: int
    """Tokens that carry loss."""
    num_kl: int
    """Positions with teacher targets."""
    kept_mass: float
    """Mean probability the teacher gives to the tokens the cache kept."""
    student_kept_mass: float
    """Mean probability the model gives to them."""
    accuracy: float
    """Share of the tokens that carry loss whose most probable token is the right one; NaN without any."""
    entropy: float
    """Mean entropy of the prediction at these tokens."""
    confidence: float
    """Mean probability of the most probable token."""
    calibration_error: float
    """Mean over ten equal bins of confidence, weighted by tokens, of |confidence - accuracy|."""
    kept: float
    """Share of the known tokens that the model has right too; NaN without any."""
    num_known: int
    """Tokens that the initial model had right with a probability above one half."""

    @property
    def perplexity(self) -> float:
        """exp(ce)."""
        return perplexity_of(self.ce)

    def require_finite(self, what: str) -> "Measurement":
        """Itself.

        Raises:
            DivergenceError: a mean over tokens that are there is not finite.
        """
        for name, value, count in (("CE", self.ce, self.num_ce), ("KL", self.kl, self.num_kl)):
            if count and not math.isfinite(value):
                raise DivergenceError(
                    f"the {name} of {what} must be finite, got {value}: the model has diverged on it, and nothing is "
                    "published; use a lower training.learning_rate, or check that cache with `anneal cache inspect`"
                )
        return self

    def to_dict(self) -> dict[str, float | int | None]:
        """What a record of an evaluation holds; None where there is nothing to take a mean of."""
        return {
            "ce": self.ce if self.num_ce else None,
            "perplexity": self.perplexity if self.num_ce else None,
            "kl": self.kl if self.num_kl else None,
            "num_tokens": self.num_ce,
            "num_positions": self.num_kl,
            "kept_mass": self.kept_mass if self.num_kl else None,
            **self.of_tokens(),
        }

    def of_tokens(self) -> dict[str, float | int | None]:
        """The part of it beside cross-entropy and KL."""
        means = {name: getattr(self, name) if self.num_ce else None for name in TOKEN_MEANS}
        return {**means, "kept": self.kept if self.num_known else None, "num_known": self.num_known}

    @classmethod
    def of_sums(cls, sums: torch.Tensor) -> "Measurement":
        """From float64 [FIELDS]: sums of ce, kl, kept mass and student kept mass, then the two counts, then
        those of `TokenMeasures`.
        """
        ce, kl, kept, student, num_ce, num_kl = sums[:LOSS_FIELDS].tolist()
        tokens = dict(zip(TOKEN_FIELDS, sums[LOSS_FIELDS:].tolist(), strict=False))
        gaps = sums[LOSS_FIELDS + len(TOKEN_FIELDS) :]

        def mean(total: float, count: float) -> float:
            return total / count if count else math.nan

        return cls(
            ce=mean(ce, num_ce),
            kl=mean(kl, num_kl),
            num_ce=int(num_ce),
            num_kl=int(num_kl),
            kept_mass=mean(kept, num_kl),
            student_kept_mass=mean(student, num_kl),
            accuracy=mean(tokens["right"], num_ce),
            entropy=mean(tokens["entropy"], num_ce),
            confidence=mean(tokens["confidence"], num_ce),
            calibration_error=mean(float(gaps.abs().sum()), num_ce),
            kept=mean(tokens["kept"], tokens["known"]),
            num_known=int(tokens["known"]),
        )


def batch_sums(model: nn.Module, head: OutputHead, batch: dict[str, Any], kl_direction: str) -> torch.Tensor:
    """float64 [FIELDS] on the CPU: what one batch, already on the model's device, adds to the sums."""
    with torch.no_grad():
        output = head.loss(
            model, batch, kl_direction=kl_direction, num_ce=1.0, num_kl=1.0, measure_tokens=True
        )
    assert output.tokens is not None
    values = (
        output.ce,
        output.kl,
        output.kept_mass * output.num_kl,
        output.student_kept_mass * output.num_kl,
    )
    sums = torch.stack([value.to(output.tokens) for value in (*values, output.num_ce, output.num_kl)])
    return torch.cat([sums, output.tokens]).double().cpu()


def measure(
    model: nn.Module,
    head: OutputHead,
    batches: Iterable[dict[str, Any]],
    *,
    kl_direction: str = "forward",
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    on_batch: Callable[[], None] = lambda: None,
) -> Measurement:
    """Run the model over all batches and average.

    Args:
        model: as it is called in training (under FSDP the wrapped one), with `head` installed.
        batches: collated batches of this rank; every rank must have the same number of them.
        kl_direction: `forward` or `reverse`.
        prepare: moves a batch to the model's device.
        reduce: adds float64 [FIELDS] over all ranks.
        on_batch: called after each batch.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(FIELDS, dtype=torch.float64)
    try:
        for batch in batches:
            sums += batch_sums(model, head, prepare(batch), kl_direction)
            on_batch()
    finally:
        model.train(was_training)
    return Measurement.of_sums(reduce(sums))


def metrics_of(found: Measurement, kl_coef: float, *, learns: bool) -> dict[str, float]:
    """What an evaluation while training logs: means in nats, and `loss`, that of the run.

    Args:
        learns: whether the run has a cross-entropy; without one its loss is the KL alone.
    """
    metrics: dict[str, float] = {
        "ce": found.ce,
        "perplexity": found.perplexity,
        "num_tokens": found.num_ce,
        **{name: value for name, value in found.of_tokens().items() if value is not None},
    }
    loss = found.ce if learns and found.num_ce else 0.0
    if found.num_kl:
        metrics |= {"kl": found.kl, "kept_mass": found.kept_mass}
        loss += kl_coef * found.kl
    return metrics | {"loss": loss}
