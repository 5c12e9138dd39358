"""The proof after the last step: the saved model must compute what the trained one does.

A few rows go through the live model before saving, and through the saved directory once it is written, loaded
as a user would load it. They must agree but for rounding. How much rounding may matter is measured on this
very model: its weights are moved at random by at most half a unit in the last place of the coarser dtype
(that of the file, or that of the live model's arithmetic), and the KL that this makes is the unit.

Cost: two forward passes over 256 tokens on the CPU of one process, and while they last one more copy of the
model in float32 in its memory (4 bytes per parameter). `verify_saved: false` leaves the proof out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formats.errors import AnnealError, ConfigError
from trainer.loading import load_model
from trainer.running import RunningTrainer

NUM_TOKENS = 256
"""Tokens that are compared."""
ROW_TOKENS = 128
"""Tokens of a row at most."""
MARGIN = 10.0
"""KL allowed, in units of the KL that rounding makes: a logit may be off by three times as much."""
FLOOR = 1e-4
"""Nats allowed in any case: what two exact implementations of attention differ by, and more."""


@dataclass(frozen=True)
class LivePredictions:
    """What the trained model says of a few rows, before it is saved."""

    rows: list[list[int]]
    """Token ids."""
    logprobs: list[torch.Tensor]
    """float32 [L - 1, V] of every row, on the CPU."""
    dtype: torch.dtype
    """In which the live model computes."""


def predict_rows(dataset: Any) -> list[list[int]]:
    """The first rows of a dataset, cut short, of `NUM_TOKENS` tokens together (fewer if it has fewer)."""
    rows: list[list[int]] = []
    left = NUM_TOKENS
    for index in range(len(dataset)):
        ids = [int(token) for token in dataset[index]["input_ids"][: min(ROW_TOKENS, left)]]
        if len(ids) > 1:
            rows.append(ids)
            left -= len(ids)
        if left < 2:
            break
    return rows


@torch.no_grad()
def logprobs_of(model: Any, row: list[int], device: torch.device) -> torch.Tensor:
    """float32 [L - 1, V] on the CPU."""
    logits_LV = model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits_LV.float(), -1).cpu()


def live_predictions(trainer: RunningTrainer, dataset: Any) -> LivePredictions:
    """The trained model's predictions, its weights being where they are. Collective."""
    args, model = trainer.args, trainer.evaluation_model()
    was_training = model.training
    model.eval()
    rows = predict_rows(dataset)
    logprobs = [logprobs_of(model, row, args.device) for row in rows]
    model.train(was_training)
    computed = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for flag, dtype in ((args.bf16, torch.bfloat16), (args.fp16, torch.float16)):
        computed = dtype if flag else computed
    return LivePredictions(rows, logprobs, computed)


@dataclass(frozen=True)
class SavedCheck:
    """How far the saved model is from the trained one."""

    kl: float
    """KL(trained || saved), nats per token."""
    allowed: float
    """What rounding may make of it."""
    ce: tuple[float, float]
    """Cross-entropy of the same tokens: trained, saved."""
    num_tokens: int
    """Tokens compared."""

    def line(self) -> str:
        """For the log."""
        return (
            f"saved model: KL(trained || saved) = {self.kl:.2e} nats over {self.num_tokens} tokens "
            f"(rounding explains {self.allowed:.2e})"
        )

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return {"kl": self.kl, "allowed": self.allowed, "num_tokens": self.num_tokens}

    def require_passed(self) -> None:
        """Refuse a saved model that is another one; NaN is refused too.

        Raises:
            AnnealError: says by how much it differs.
        """
        if not self.kl <= self.allowed:
            raise AnnealError(
                "the saved model must compute what the trained one does, got KL(trained || saved) = "
                f"{self.kl:.3g} nats over {self.num_tokens} tokens where rounding explains {self.allowed:.1g}, "
                f"cross-entropy {self.ce[0]:.4f} trained and {self.ce[1]:.4f} saved"
            )


def check_saved(live: LivePredictions, directory: Path, saved_dtype: torch.dtype) -> SavedCheck:
    """Load `directory` on the CPU and compare.

    Raises:
        AnnealError: it cannot be loaded.
    """
    try:
        model = load_model(directory, dtype="float32").eval()
    except ConfigError as error:
        raise AnnealError(f"the saved model must load, but did not: {error}") from None
    cpu = torch.device("cpu")
    saved = [logprobs_of(model, row, cpu) for row in live.rows]
    shake(model, max((saved_dtype, live.dtype), key=lambda dtype: torch.finfo(dtype).eps))
    shaken = [logprobs_of(model, row, cpu) for row in live.rows]
    num_tokens = sum(len(row) for row in saved)
    return SavedCheck(
        kl=mean_kl(live.logprobs, saved),
        allowed=FLOOR + MARGIN * mean_kl(saved, shaken),
        ce=(mean_ce(live.rows, live.logprobs), mean_ce(live.rows, saved)),
        num_tokens=num_tokens,
    )


@torch.no_grad()
def shake(model: Any, dtype: torch.dtype) -> None:
    """Move every weight at random by at most half a unit in the last place of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    half = torch.finfo(dtype).eps / 2
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(torch.rand(parameter.shape, generator=generator).mul_(2 * half).add_(1 - half))


def mean_kl(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """KL(left || right) per token."""
    total = sum(float((a.exp() * (a - b)).sum(dtype=torch.float64)) for a, b in zip(left, right, strict=True))
    return (0.0 if total < 0 else total) / sum(len(row) for row in left)  # NaN stays NaN


def mean_ce(rows: list[list[int]], logprobs: list[torch.Tensor]) -> float:
    """Cross-entropy per token of the rows."""
    total, count = 0.0, 0
    for row, values_LV in zip(rows, logprobs, strict=True):
        total -= float(values_LV.gather(1, torch.tensor(row[1:])[:, None]).sum())
        count += len(values_LV)
    return total / count
