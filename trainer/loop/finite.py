"""Loss, gradient and weights stay finite, or the run stops.

Every micro-batch and every step leave one number on the device; they are read when something would be logged, saved
or evaluated, and at the end. So nothing waits for the device in between, and nothing that is not finite is ever saved
or published. The message names the very step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from formats.errors import DivergenceError

KINDS = ("loss", "gradient")
NEVER = 2**62
SMALLEST_SCALE = 2.0**-14
"""fp16: a loss scale below this was halved thirty times in a row; then it is not the scale that overflows."""


class FiniteWatch:
    """Remembers the first step whose loss or gradient was not finite, without reading the device.

    Args:
        device: of the numbers.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((len(KINDS),), NEVER, dtype=torch.int64, device=device)
        self._scaled = torch.zeros(2, dtype=torch.int64, device=device)

    def see(self, kind: str, value: Any, step: int) -> None:
        """Note the loss of a micro-batch, or the norm of a step's gradient, of optimizer step `step`."""
        if value is None:
            return
        number = torch.as_tensor(value, device=self._first.device).detach()
        if hasattr(number, "full_tensor"):
            number = number.full_tensor()
        which = KINDS.index(kind)
        bad = ~torch.isfinite(number.float()).all()
        self._first[which] = torch.where(bad, self._first[which].clamp(max=step), self._first[which])

    def see_scaled(self, grad_norm: Any) -> None:
        """fp16: count a step that the loss scaler let through, or skipped as its gradient was not finite.

        accelerate's own flag misses the skips of fused optimisers, which get the scaler's verdict as an argument.
        """
        if grad_norm is not None:
            good = torch.isfinite(torch.as_tensor(grad_norm, device=self._scaled.device).detach().float())
            self._scaled += torch.stack([good, ~good])

    @property
    def scaled_steps(self) -> tuple[int, int]:
        """fp16: steps (taken, skipped) in this call of the Trainer."""
        taken, skipped = self._scaled.tolist()
        return taken, skipped

    def require_steps(self, scaler: Any, *, last: bool) -> None:
        """fp16: raise when no loss scale gives a finite gradient, or (at the end) none was ever found.

        Raises:
            DivergenceError: says what to use instead.
        """
        taken, skipped = self.scaled_steps
        hopeless = scaler.get_scale() < SMALLEST_SCALE
        if hopeless or (last and skipped and not taken):
            raise DivergenceError(
                f"fp16 must find a loss scale with a finite gradient, got {skipped} skipped and {taken} taken steps "
                f"at a scale of {scaler.get_scale():g}: use training.bf16: true, a lower learning rate, or more steps"
            )

    def require(
        self, least_over_ranks: Callable[[torch.Tensor], torch.Tensor], advice: Callable[[], str]
    ) -> None:
        """Raise if anything was not finite on any rank. Collective.

        Raises:
            DivergenceError: names what, and the first step.
        """
        first = least_over_ranks(self._first).tolist()
        if min(first) < NEVER:
            which = first.index(min(first))
            raise DivergenceError(
                f"the {KINDS[which]} must be finite, got NaN or infinity in step {min(first)}{advice()}"
            )


def all_finite(parameters: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """0-d bool on `device`: whether all of this rank's part of the parameters is finite."""
    good = torch.ones((), dtype=torch.bool, device=device)
    for parameter in parameters:
        local = parameter.detach()
        if hasattr(local, "to_local"):
            local = local.to_local()
        good &= torch.isfinite(local).all().to(device)
    return good


def least_of_ranks(values: torch.Tensor, world_size: int) -> torch.Tensor:
    """The smallest of every number over all processes. Collective."""
    if world_size > 1:
        values = values.clone()
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MIN)
    return values
