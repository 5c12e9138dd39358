"""How much of each cache an epoch takes: weights and shares in, units per unit of the target cache out."""

from collections.abc import Sequence

from formats.errors import ConfigError

MOST_UNITS = 2**31
"""Of one cache in an epoch: their order is held in memory."""


class Share(float):
    """A share of the tokens of the whole mixture, where a plain number is units per unit of the target."""

    __slots__ = ()


def amount_of(share: float | None, weight: float | None) -> float:
    """What a cache is mixed in with: a `Share` of the tokens, or a weight in rows per row of the target cache."""
    return Share(share) if share is not None else float(weight or 0)


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
        ConfigError: a share comes to less than half a unit, and so to none.
    """
    means = [tokens / units for tokens, units in zip(num_tokens, num_units, strict=True)]
    shares = sum(amount for amount in amounts if isinstance(amount, Share))
    by_weight = sum(
        amount * num_units[0] * mean
        for amount, mean in zip(amounts, means, strict=True)
        if not isinstance(amount, Share)
    )
    total = by_weight / (1 - shares)
    found = []
    for amount, mean in zip(amounts, means, strict=True):
        if isinstance(amount, Share):
            weight = amount * total / mean / num_units[0]
            require_drawn(amount, weight, num_units[0])
            found.append(weight)
        else:
            found.append(float(amount))
    return found


def require_drawn(amount: float, weight: float, num_target: int) -> None:
    """Refuse an amount that rounds to no unit of an epoch, or to more than there can be.

    Args:
        amount: as it was asked for.
        weight: units per unit of the target; 0 asks for none.
        num_target: units of the target.

    Raises:
        ConfigError: names the amount.
    """
    name = "share" if isinstance(amount, Share) else "weight"
    if weight * num_target > MOST_UNITS:
        raise ConfigError(
            f"caches.{name} {amount:g} comes to {weight * num_target:.3g} rows or packs of an epoch, of which there "
            f"can be {MOST_UNITS:,}; lower it"
        )
    if weight > 0 and round(weight * num_target) == 0:
        raise ConfigError(
            f"caches.{name} {amount:g} comes to {weight * num_target:.2f} rows or packs of an epoch's {num_target} of "
            "the target cache, and so to none; raise it, or leave the cache out"
        )
