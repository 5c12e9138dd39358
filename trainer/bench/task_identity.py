"""What makes a task this task: its settings, the code they name, and its data, each as a hash.

Machine paths are left out, so that a folder of tasks may move.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from formats.identity.fingerprint import sha256_json

PLACES = frozenset({"config_source", "data_files", "data_dir", "cache_dir"})
"""Keys that say where something lies; what lies there is in the other hash."""


def task_hash(task: Any) -> str:
    """SHA-256 of the settings and of the Python files that their functions come from."""
    config = getattr(task, "config", None)
    content = config.to_dict(keep_callable=True) if config is not None else {}
    content.pop("num_fewshot", None)  # stands beside the hash, under its own name
    functions = list(_functions(content))
    if type(task).__module__.split(".")[:2] != ["lm_eval", "api"]:  # a task that is a class of its own
        functions.append(type(task))
    files = sorted({_source_file(function) for function in functions} - {None}, key=str)
    code = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file]
    return sha256_json([_plain(content), sorted(code)])


def data_hash(task: Any, *, with_examples: bool) -> str:
    """SHA-256 of all items, and of those that examples are taken from."""
    digest = hashlib.sha256()
    for documents in (task.eval_docs, *([task.fewshot_docs() or []] if with_examples else [])):
        for document in documents:
            digest.update(document_hash(document).encode())
        digest.update(b"|")
    return digest.hexdigest()


def document_hash(document: Any) -> str:
    """SHA-256 of one item."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _functions(value: Any) -> Iterator[Callable[..., Any]]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _functions(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _functions(part)
    elif callable(value):
        yield value


def _source_file(function: Any) -> str | None:
    function = getattr(function, "func", function)  # functools.partial
    try:
        return inspect.getsourcefile(function)
    except TypeError:
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        return getattr(module, "__file__", None)


def _plain(value: Any) -> Any:
    """The value as JSON has it; functions by their names."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items() if key not in PLACES}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
