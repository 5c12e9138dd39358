"""L2 towards the initial weights: every parameter is pulled back alike.

L2-SP of Li et al. 2018 (arXiv 1802.01483) without its plain decay of new layers, of which a language model
has none. Unlike weight decay, which pulls towards zero and past the optimiser, the pull goes through the
optimiser like the rest of the loss.

Cost: one more copy of the trained weights; a few elementwise operations per parameter and step.
"""

import torch

from trainer.retention.anchor import Anchor
from trainer.retention.method import RetentionMethod, add_quadratic
from trainer.retention.settings import L2Settings


class L2(RetentionMethod):
    """Adds coef / 2 * ||theta - theta0||^2 over all trained parameters, tied ones once."""

    name = "l2"

    def __init__(self, settings: L2Settings) -> None:
        self.settings = settings

    def add_gradients(self, anchor: Anchor, scale: float) -> torch.Tensor:
        """Adds coef * (theta - theta0)."""
        return add_quadratic(anchor, self.settings.coef, None, scale)
