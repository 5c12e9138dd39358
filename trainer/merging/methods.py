"""The arithmetic of a merge for one tensor, which takes theta0 and the tuned theta_i and gives the merged theta.

TIES keeps of every task vector the `density` largest entries by magnitude (trim), takes per entry the sign
that the trimmed and weighted vectors agree on by their sum (elect), and averages those of that sign (disjoint mean).
The weights come in before signs are elected, so a model of weight 0 has no say in them. peft trims tensor by tensor;
trim.py trims a model's task vector as a whole, as the paper does.

Everything is computed in float32 (float64 for tensors that are stored so).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from formats.errors import ConfigError
from formats.install import how_to_install
from trainer.merging.settings import MergeConfig

Merge = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
Kept = Sequence[torch.Tensor]
"""Per task vector which of its entries stay, as booleans of its shape."""


def merge_of(config: MergeConfig) -> Merge:
    """The function of (theta0, [theta_1, ...]), all of one shape and floating dtype, that gives the merged
    tensor, for methods that look at nothing else: all but ties with `trim: model`, and fisher.
    """

    def merge(initial: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
        if config.method == "wise-ft":
            assert config.alpha is not None
            return (1 - config.alpha) * initial + config.alpha * tuned[0]
        if config.method == "soup":
            return weighted_mean(initial, tuned, config.weights)
        return moved(config, initial, tuned)

    return merge


def moved(
    config: MergeConfig, initial: torch.Tensor, tuned: Sequence[torch.Tensor], kept: Kept | None = None
) -> torch.Tensor:
    """theta0 + scale * (what the weighted task vectors come to), by task arithmetic or ties.

    Args:
        config: of one of the two.
        initial, tuned: of one shape and floating dtype.
        kept: what `trim: model` leaves of each task vector.
    """
    assert config.scale is not None
    weights = [1.0] * len(tuned) if config.weights is None else list(config.weights)
    factors = [config.scale * weight for weight in weights]
    whole = config.density is None or config.density == 1
    if whole and sorted(factors) == [*([0.0] * (len(factors) - 1)), 1.0]:
        return tuned[factors.index(1)]  # and not theta0 plus a rounded difference
    vectors = [tensor - initial for tensor in tuned]
    if config.method == "task-arithmetic":
        weighted = [weight * vector for weight, vector in zip(weights, vectors, strict=True)]
        return initial + config.scale * torch.stack(weighted).sum(0)
    assert config.density is not None
    if kept is not None:
        trimmed = [torch.where(mask, v, 0) for mask, v in zip(kept, vectors, strict=True)]
        return initial + config.scale * ties_of(trimmed, 1.0, weights)
    return initial + config.scale * ties_of(vectors, config.density, weights)


def ties_of(
    vectors: Sequence[torch.Tensor], density: float, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """TIES of task vectors of one shape, trimmed one by one, unscaled."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune

    if density < 1:  # peft warns where there is nothing to trim
        vectors = [prune(vector, density, method="magnitude") for vector in vectors]
    if weights is not None:
        vectors = [weight * vector for weight, vector in zip(weights, vectors, strict=True)]
    stacked = torch.stack(list(vectors))
    return disjoint_merge(stacked, calculate_majority_sign_mask(stacked))


def weighted_mean(
    initial: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    fishers: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """sum_i w_i F_i theta_i / sum_i w_i F_i, entry by entry, in float64.

    Where all w_i F_i are zero no model has a say, and the entry is the mean with w_i alone: what one and the same F for
    all, however small, gives.

    Args:
        initial: not used; as every method is called.
        tuned: theta_i, of one shape.
        weights: w_i, not negative and not all zero; None for 1.
        fishers: F_i of that shape, not negative; None for 1.
    """
    plain = [1.0] * len(tuned) if weights is None else list(weights)
    if fishers is None:  # divided once: thirds that are rounded first miss the nearest float32
        return _sum_of(plain, tuned) / sum(plain)
    weighted = [weight * fisher.double() for weight, fisher in zip(plain, fishers, strict=True)]
    total = torch.stack(weighted).sum(0)
    known = total > 0
    total = torch.where(known, total, 1.0)
    shares = [
        torch.where(known, own / total, weight / sum(plain))
        for own, weight in zip(weighted, plain, strict=True)
    ]
    return _sum_of(shares, tuned)


def _sum_of(factors: Sequence[Any], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for factor, tensor in zip(factors, tensors, strict=True):
        total += factor * tensor.double()
    return total


def require_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft.utils.merge_utils  # noqa: F401
    except ImportError:
        raise ConfigError(f"ties needs peft, which is not installed; {how_to_install('lora')}") from None
