"""Which positions of a row carry the KL, and what each of them weighs.

P: captured positions of a row.
"""

import numpy as np

from formats.cache import TeacherCache
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from formats.logprobs.entropy import entropy
from formats.logprobs.topk import TopKLogprobs
from trainer.objective import NEEDS_PROMPTS, Choice


def chosen_positions(kl_on: str, tokens: TokenRow, positions_P: np.ndarray) -> np.ndarray | None:
    """bool [P]: the positions that carry the KL; None for all of them."""
    if kl_on not in ("target", "prompt"):
        return None
    carries_loss_P = tokens.loss_mask[positions_P + 1]
    return carries_loss_P if kl_on == "target" else ~carries_loss_P


def gate_weights(gate: Choice, topk: TopKLogprobs) -> np.ndarray | None:
    """float32 [P]: weight of each position's KL; None where all weigh 1."""
    if gate.name == "unsure":
        return -np.expm1(np.minimum(topk.label_logprobs, np.float32(0.0)))
    if gate.name == "entropy":
        return (entropy(topk) < gate.value).astype(np.float32)
    return None


def require_positions(cache: TeacherCache, kl_on: str) -> None:
    """Refuse a cache without a position that carries the KL.

    Raises:
        ConfigError: the cache was built without prompt positions, or no token of it is of the wanted kind.
    """
    mode = cache.manifest.positions
    if kl_on in NEEDS_PROMPTS and mode != "all":
        raise ConfigError(
            f"kl_on: {kl_on} needs a cache of all positions, got one of those whose token carries loss: {cache.path}; "
            "build it with `anneal cache build --positions all`"
        )
    if kl_on not in ("target", "prompt") or mode != "all":
        return
    for number in range(len(cache)):
        tokens = cache.tokens(number)
        chosen = chosen_positions(kl_on, tokens, tokens.positions(mode))
        if chosen is not None and chosen.any():
            return
    kind = "carries loss" if kl_on == "target" else "carries none"
    raise ConfigError(f"kl_on: {kl_on} needs positions whose token {kind}, got none in {cache.path}")
