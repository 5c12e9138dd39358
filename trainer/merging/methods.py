"""The arithmetic of a merge, for one tensor: theta0 and the tuned theta_i in, the merged theta out.

wise-ft          (1 - alpha) theta0 + alpha theta1                      Wortsman et al. 2022, arXiv 2109.01903
task-arithmetic  theta0 + scale * sum_i (theta_i - theta0)              Ilharco et al. 2023, arXiv 2212.04089
ties             theta0 + scale * TIES(theta_i - theta0)                Yadav et al. 2023, arXiv 2306.01708

TIES keeps of every task vector the `density` largest entries by magnitude (trim), takes per entry the sign
that the trimmed vectors agree on by weight (elect), and averages those of that sign (disjoint mean). peft
trims tensor by tensor, where the paper trims a model's task vector as a whole; so does this.

Everything is computed in float32 (float64 for tensors that are stored so).
"""

from collections.abc import Callable, Sequence

import torch

from formats.errors import ConfigError
from formats.install import how_to_install
from trainer.merging.settings import MergeConfig

Merge = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]


def merge_of(config: MergeConfig) -> Merge:
    """The function of (theta0, [theta_1, ...]), all of one shape and floating dtype, that gives the merged
    tensor in that dtype.

    Raises:
        ConfigError: ties without peft.
    """
    if config.method == "ties":
        require_peft()

    def merge(initial: torch.Tensor, tuned: Sequence[torch.Tensor]) -> torch.Tensor:
        if config.method == "wise-ft":
            assert config.alpha is not None
            return (1 - config.alpha) * initial + config.alpha * tuned[0]
        vectors = [tensor - initial for tensor in tuned]
        assert config.scale is not None
        if config.method == "task-arithmetic":
            return initial + config.scale * torch.stack(vectors).sum(0)
        assert config.density is not None
        return initial + config.scale * ties_of(vectors, config.density)

    return merge


def ties_of(vectors: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES of task vectors of one shape, unscaled."""
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, ties

    if density < 1:
        return ties(vectors, torch.ones(len(vectors), dtype=vectors[0].dtype), density)
    stacked = torch.stack(vectors)  # nothing to trim, of which peft would warn for every tensor
    return disjoint_merge(stacked, calculate_majority_sign_mask(stacked))


def require_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft.utils.merge_utils  # noqa: F401
    except ImportError:
        raise ConfigError(f"ties needs peft, which is not installed; {how_to_install('lora')}") from None
