"""Values out of column files (Parquet, Arrow, a Hub data set) as JSON would hold them.

Columns store nested records less exactly than JSON does, and what they add must not be trained:

    a field that some other record has   is there, and null     taken out
    1 in a column that also holds 2.5    is 1.0                 made 1 again
    a map                                is a list of pairs     made an object
    JSON text of the type `arrow.json`   is text                parsed; nothing of the above applies within

A null or a 2.0 that was really meant, and the order of an object's keys, are lost in such a file; whoever needs
them writes the object as JSON text (docs/corpora.md). Values of the columns themselves keep their type.
"""

import json
import math
from typing import Any

EXACT = 2**53
"""Whole numbers below it are the same as a float."""


def plain(value: Any, kind: Any, *, decoded: bool = False, nested: bool = False) -> Any:
    """`value` of the Arrow type `kind` as JSON would hold it.

    Args:
        decoded: JSON text has been parsed already (the `datasets` library does).
        nested: within an object.
    """
    import pyarrow.types as types

    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value) if isinstance(value, str) and not decoded else value
    if types.is_struct(kind) and isinstance(value, dict):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        return {
            name: plain(item, fields[name], decoded=decoded, nested=True)
            for name, item in value.items()
            if item is not None
        }
    if types.is_map(kind):
        items = value.items() if isinstance(value, dict) else value
        return {key: plain(item, kind.item_type, decoded=decoded, nested=True) for key, item in items}
    if isinstance(value, list) and _is_list(kind):
        if _is_simple(kind.value_type) and not nested:
            return value
        return [plain(item, kind.value_type, decoded=decoded, nested=nested) for item in value]
    return _whole(value) if nested else value


def plain_untyped(value: Any, *, nested: bool = False) -> Any:
    """`plain` where nothing tells the types."""
    if isinstance(value, dict):
        return {name: plain_untyped(item, nested=True) for name, item in value.items() if item is not None}
    if isinstance(value, list) and (nested or any(isinstance(item, dict | list) for item in value[:1])):
        return [plain_untyped(item, nested=nested) for item in value]
    return _whole(value) if nested else value


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    tests = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _is_simple(kind: Any) -> bool:
    import pyarrow.types as types

    return not types.is_nested(kind) and not hasattr(kind, "extension_name")


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return value if value == 0 and math.copysign(1, value) < 0 else int(value)
    return value
