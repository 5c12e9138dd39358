"""The proof after the last step: the saved model must be the trained one, but for the rounding of its dtype.

A few rows go through the live model before saving. The saved directory is then loaded as a user would load it:

1. Every weight must be the trained one, rounded to the dtype it is saved in: equal, bit for bit.
2. As it is, or with the rounding undone (the trained weights in the places of the loaded ones), it must say what the
   live model says. So names, ties, merged adapters and `config.json` are right, whatever rounding costs.

Rounding is not judged, because it is no noise: an update below half a unit in the last place is lost, and updates
of a run point the same way. What it costs is measured and told. For the same reason both are tried: a live model
that computes under bfloat16 autocast rounds its weights to bfloat16 in every step, so that the rounded ones are its
own, and the unrounded ones are further away than noise (with L2 0.1 up to 0.075 nats; seen on a GPU). What remains
in 2. is the noise of two ways to compute the same; its unit is the KL that moving every weight at random by half a
unit in the last place of the live model's arithmetic makes on this very model.

Cost: three forward passes over 256 tokens on the CPU of one process, and meanwhile a copy of the model in float32 in
its memory (4 bytes per parameter) beside the trained weights. `verify_saved: false` leaves the proof out.
"""

from collections.abc import Iterable, Mapping
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
"""KL allowed, in units of the KL of half a last place: a logit may be off by three times as much."""
FLOOR = 1e-4
"""Nats allowed in any case: more than two exact implementations of attention differ by."""


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
    """How far the saved model is from the trained one, in nats per token."""

    kl: float
    """KL(trained || saved): what rounding costs, if the check is passed."""
    kl_unrounded: float
    """The same with the rounding undone."""
    allowed: float
    """How large that may be."""
    ce: tuple[float, float]
    """Cross-entropy of the same tokens: trained, saved."""
    num_tokens: int
    """Tokens compared."""

    def line(self) -> str:
        """For the log, of a check that is passed."""
        ce = f"CE {self.ce[0]:.4f} trained, {self.ce[1]:.4f} saved"
        kl, noise = (
            f"KL(trained || saved) = {self.kl:.2e} nats per token",
            f"up to {self.allowed:.2e} is noise",
        )
        if self.kl <= self.allowed:
            return (
                "saved model: right. Loaded again, it predicts what the trained one does: "
                f"{kl}, {noise} ({self.num_tokens} tokens; {ce})"
            )
        return (
            "saved model: right. Loaded again, it is the trained one, rounded to the dtype that it is saved in, which "
            f"costs {kl} ({ce}); without rounding {self.kl_unrounded:.2e}, {noise} ({self.num_tokens} tokens)"
        )

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        names = ("kl", "kl_unrounded", "allowed", "num_tokens")
        return {name: getattr(self, name) for name in names}

    def require_passed(self) -> None:
        """Refuse a saved model that is another one; NaN is refused too.

        Raises:
            AnnealError: says by how much it differs.
        """
        if not (self.kl <= self.allowed or self.kl_unrounded <= self.allowed):
            raise AnnealError(
                "the saved model must compute what the trained one does, got KL(trained || saved) = "
                f"{self.kl:.3g} nats over {self.num_tokens} tokens, {self.kl_unrounded:.3g} with its rounding undone "
                f"(at most {self.allowed:.1g}), cross-entropy {self.ce[0]:.4f} trained and {self.ce[1]:.4f} saved"
            )


def check_saved(
    live: LivePredictions,
    directory: Path,
    trained: Mapping[str, torch.Tensor] | None,
    dtypes: Iterable[torch.dtype],
) -> SavedCheck:
    """Load `directory` on the CPU and compare.

    Args:
        live: what the trained model said.
        directory: the saved model, or adapter.
        trained: the weights that were saved, by their names in memory, as training left them; None for an
            adapter, which is saved as it was trained.
        dtypes: in which floating weights are saved.

    Raises:
        AnnealError: it cannot be loaded, or a weight is not the trained one.
    """
    try:
        model = load_model(directory, dtype="float32").eval()
    except ConfigError as error:
        raise AnnealError(f"the saved model must load, but did not: {error}") from None
    cpu = torch.device("cpu")
    saved = [logprobs_of(model, row, cpu) for row in live.rows]
    unrounded = saved
    if trained is not None:
        undo_rounding(model, trained, set(dtypes))
        unrounded = [logprobs_of(model, row, cpu) for row in live.rows]
    shake(model, live.dtype)
    shaken = [logprobs_of(model, row, cpu) for row in live.rows]
    return SavedCheck(
        kl=mean_kl(live.logprobs, saved),
        kl_unrounded=mean_kl(live.logprobs, unrounded),
        allowed=FLOOR + MARGIN * mean_kl(unrounded, shaken),
        ce=(mean_ce(live.rows, live.logprobs), mean_ce(live.rows, saved)),
        num_tokens=sum(len(row) for row in saved),
    )


@torch.no_grad()
def undo_rounding(model: Any, trained: Mapping[str, torch.Tensor], dtypes: set[torch.dtype]) -> None:
    """Put the trained weights into the places of the loaded ones, which must be the same but for rounding.

    Raises:
        AnnealError: names a weight that is another one.
    """
    for name, parameter in model.named_parameters():
        weight = trained.get(name)
        if weight is None or weight.shape != parameter.shape:
            raise AnnealError(f"the saved model must have the trained one's weights, got another {name}")
        if not any(torch.equal(weight.to(dtype).to("cpu", parameter.dtype), parameter) for dtype in dtypes):
            names = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise AnnealError(
                f"the saved weights must be the trained ones in {names}, got others for {name}: up to "
                f"{float((weight.to('cpu', parameter.dtype) - parameter).abs().max()):.2g} apart"
            )
        parameter.data = weight.to("cpu", parameter.dtype)  # shares the memory of a weight on the CPU


@torch.no_grad()
def shake(model: Any, dtype: torch.dtype) -> None:
    """Move every weight at random by at most half a unit in the last place of `dtype`, out of place."""
    generator = torch.Generator().manual_seed(0)
    half = torch.finfo(dtype).eps / 2
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.rand(parameter.shape, generator=generator).mul_(2 * half).add_(1 - half)
            parameter.data = parameter.data * noise


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
