"""Tools and tool calls as the chat templates of transformers expect them.

A call is `{"type": "function", "function": {"name": ..., "arguments": {...}}}` or, without the wrapping,
`{"name": ..., "arguments": {...}}`. Files hold arguments as an object or as its JSON text (OpenAI's way, and the only
one that survives a column file unchanged); here they become objects. A template that wants text gets text from
`cache_builder/rows/template.py`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from cache_builder.corpus.field import CALL, is_given
from cache_builder.corpus.fields import refuse_fields
from cache_builder.corpus.json_text import parse_json
from cache_builder.corpus.readers import Record
from cache_builder.corpus.values import kind_of, sequence_of
from formats.errors import CorpusError

MOST_LEVELS = 100
"""Of objects and lists within each other; templates and Python's own writer of JSON recurse."""


def json_value(value: Any, what: str, where: str, *, levels: int = MOST_LEVELS) -> Any:
    """`value` itself, if it is what JSON can hold; a template would fail on anything else, or print it its own way.

    Raises:
        CorpusError: a date, bytes, a number that is none; more than `levels` of nesting.
    """
    if levels == 0:
        raise CorpusError(
            f"{what} must not be nested deeper than {MOST_LEVELS} levels, got more in {where}; mend it"
        )
    if isinstance(value, Mapping):
        return {str(key): json_value(item, what, where, levels=levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, what, where, levels=levels - 1) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    got = str(value) if isinstance(value, float) else kind_of(value)
    raise CorpusError(f"{what} must hold JSON values, got {got} in {where}; write them as JSON text")


def _parsed(value: Any, what: str, where: str) -> Any:
    """JSON text as what it says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, where)
    except json.JSONDecodeError:
        raise CorpusError(
            f"{what} must be JSON, got {value!r:.40} in {where}; mend or drop the record"
        ) from None


def tools_of(record: Record, column: str, where: str) -> list[Any] | None:
    """Descriptions of tools for the chat template. Each may be JSON text, and so may its `parameters`."""
    if not is_given(record.values.get(column)):
        return None
    tools = [tool_schema(tool, column, where) for tool in sequence_of(record, column)]
    if column == "functions":  # OpenAI's older form
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tools or None


def tool_schema(tool: Any, column: str, where: str) -> dict[str, Any]:
    """One description of a tool."""
    if isinstance(tool, str) and tool.lstrip().startswith("{"):
        tool = _parsed(tool, column, where)
    if not isinstance(tool, Mapping):
        raise CorpusError(f"{column} must be a list of JSON schemas, got another list in {where}")
    tool = json_value(tool, column, where)
    for holder in (tool, tool.get("function")):
        if isinstance(holder, dict) and isinstance(holder.get("parameters"), str):
            holder["parameters"] = _parsed(holder["parameters"], f"parameters of {column}", where)
    return dict(tool)


def tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a turn, arguments parsed.

    Raises:
        CorpusError: no list of objects, or arguments that are no JSON object.
    """
    value = _parsed(value, "tool_calls", where)
    if not isinstance(value, list):
        raise CorpusError(
            f"tool_calls must be a list, got {kind_of(value)} in {where}; mend or drop the record"
        )
    return [_call(call, where) for call in value]


def function_call(value: Any, where: str) -> list[dict[str, Any]]:
    """The call that OpenAI's older `function_call`, or a ShareGPT turn of that name, holds; JSON text or object."""
    value = _parsed(value, "function_call", where)
    calls = [
        {"type": "function", "function": call} for call in (value if isinstance(value, list) else [value])
    ]
    return [_call(call, where) for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = _parsed(call, "a tool call", where)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise CorpusError(
            f"a tool call must be an object with a function's name and arguments, got another value in {where}; "
            "mend or drop the record"
        )
    call = json_value(call, "a tool call", where)
    function = call.get("function", call)
    refuse_fields(function, CALL, where)
    if "arguments" in function:
        arguments = function["arguments"]
        arguments = {} if arguments == "" else _parsed(arguments, "arguments of a tool call", where)
        if not isinstance(arguments, dict):
            raise CorpusError(
                f"arguments of a tool call must be an object or its JSON text, got {kind_of(arguments)} in {where}; "
                "mend or drop the record"
            )
        function["arguments"] = json_value(arguments, "arguments of a tool call", where)
    return dict(call)
