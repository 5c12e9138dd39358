"""Values that JSON can say."""

import math
from collections.abc import Mapping
from typing import Any


def finite_json(value: Any) -> Any:
    """The same value, with None for every number that is not finite, in lists and under names too: JSON has no word
    for it.
    """
    if isinstance(value, Mapping):
        return {key: finite_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
