"""How much of each cache an epoch takes: weights and shares in, units per unit of the target cache out."""

from collections.abc import Sequence

from formats.errors import ConfigError


class Share(float):
    """A share of the tokens of the whole mixture, where a plain number is units per unit of the target."""

    __slots__ = ()


def unit_weights(
    amounts: Sequence[float], num_units: Sequence[int], num_tokens: Sequence[int]
) -> list[float]:
    """Units (rows or packs) of every cache per unit of the first.

    With the target and the caches of a weight coming to T tokens per epoch, and shares of s_1, s_2, ..., the mixture
    has T / (1 - sum s) tokens, of which cache i gives s_i: so many of its units, whose tokens are taken at their mean.

    Args:
        amounts: of every cache a weight or a `Share`; the first is the target, whose weight is 1. Shares sum to
            less than 1.
        num_units: of every cache.
        num_tokens: of every cache, all units together.

    Raises:
        ConfigError: as `require_some`.
    """
    means = [tokens / units for tokens, units in zip(num_tokens, num_units, strict=True)]
    shares = sum(amount for amount in amounts if isinstance(amount, Share))
    by_weight = sum(
        amount * num_units[0] * mean
        for amount, mean in zip(amounts, means, strict=True)
        if not isinstance(amount, Share)
    )
    total = by_weight / (1 - shares)
    found = [
        amount * total / mean / num_units[0] if isinstance(amount, Share) else float(amount)
        for amount, mean in zip(amounts, means, strict=True)
    ]
    for amount, weight in zip(amounts, found, strict=True):
        require_some(amount, weight, num_units[0])
    return found


def require_some(amount: float, weight: float, num_units: int) -> None:
    """Refuse a share, or a weight other than 0, that comes to no unit once it is rounded, and so would be ignored.

    Args:
        amount: as it was given.
        weight: units per unit of the target cache.
        num_units: of the target cache.

    Raises:
        ConfigError: it does.
    """
    units, setting = weight * num_units, "share" if isinstance(amount, Share) else "weight"
    if amount and not round(units):
        raise ConfigError(
            f"caches.{setting} {amount:g} comes to {units:.2f} rows or packs of an epoch's {num_units} of the target "
            "cache, and so to none; raise it, or leave the cache out"
        )
