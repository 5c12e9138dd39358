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
        self.num_skipped = 0
        """fp16: steps that the loss scaler skipped, in this call of the Trainer."""
        self.num_taken = 0
        """Steps that changed the weights, in this call of the Trainer."""

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

    def require(self, least_over_ranks: Callable[[torch.Tensor], torch.Tensor], advice: str) -> None:
        """Raise if anything was not finite on any rank. Collective.

        Raises:
            DivergenceError: names what, and the first step.
        """
        first = least_over_ranks(self._first).tolist()
        if min(first) < NEVER:
            which = first.index(min(first))
            raise DivergenceError(
                f"the {KINDS[which]} must be finite, got NaN or infinity in step {min(first)}{advice}"
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
