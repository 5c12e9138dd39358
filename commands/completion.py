"""What the shell offers for the values of options: words of an enumeration, caches, models, settings.

Called at every press of the tab key, so nothing heavy is imported and no large tree is walked.
"""

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from formats.disk.manifest import MANIFEST_NAME
from formats.identity.config_file import ADAPTER_FILE

Complete = Callable[[str], list[str]]

ENGINES = ("vllm", "transformers")
BACKENDS = ("auto", *ENGINES)
DTYPES = ("float32", "bfloat16", "float16")
STARTS = ("dialogue", "empty-turn", "bos")
POSITIONS = ("all", "loss")
LAYOUTS = ("positions", "topk")
KL_DIRECTIONS = ("forward", "reverse")
MERGES = ("wise-ft", "task-arithmetic", "ties", "soup", "fisher")
TRIMS = ("model", "tensor")
INTEGERS = ("none", "int4:32", "int8:32")
RULES = ("keep-gain:0.9", "nearest:0.9", "budget:5%", "paper")
ANCHORS = ("previous", "initial")
CONTROLS = ("direct", "multitask", "never-seen")
METRICS = ("ce", "accuracy")
RANKS = ("low-ppl", "random")

DEPTH, MOST = 3, 2000
"""How far below the typed folder is looked, and at how many folders in all."""
HOME = Path(__file__).resolve().parents[1]


def words(*values: str) -> Complete:
    """Those of these words that begin so."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def caches(incomplete: str) -> list[str]:
    """Directories of finished caches, also behind `NAME=`."""
    return _found(incomplete, MANIFEST_NAME)


def models(incomplete: str) -> list[str]:
    """Directories of models and adapters, also behind `LABEL=`."""
    return _found(incomplete, "config.json", ADAPTER_FILE)


def suites(incomplete: str) -> list[str]:
    """Suites of `anneal bench`."""
    from trainer.bench.suites import SUITES

    return words(*SUITES)(incomplete)


def settings(incomplete: str) -> list[str]:
    """`KEY=` of `--set`: the settings of a run, and `training.KEY=`, which transformers calls so."""
    from trainer.preflight.arguments import ARGUMENTS

    of_training = [
        f"training.{name}" for name, argument in ARGUMENTS.items() if argument.handling == "passed"
    ]
    return [f"{name}=" for name in (*_fields("TrainConfig"), *of_training) if name.startswith(incomplete)]


def _fields(name: str) -> list[str]:
    """Names of the fields of a class in trainer/config.py, read from its source: importing it loads torch."""
    tree = ast.parse((HOME / "trainer" / "config.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    entries = (node.target for node in found.body if isinstance(node, ast.AnnAssign))
    return [entry.id for entry in entries if isinstance(entry, ast.Name)]


def _found(incomplete: str, *marks: str) -> list[str]:
    """Directories that hold one of these files and whose path begins so, the nearest first."""
    label, equals, path = incomplete.rpartition("=")
    folder, _, beginning = path.rpartition("/")
    if path.startswith("/") and not folder:
        folder = "/"
    return [label + equals + place for place in _walk(folder, beginning, marks)]


def _walk(folder: str, beginning: str, marks: tuple[str, ...]) -> Iterator[str]:
    pending, seen = [(folder, 0)], 0
    while pending and seen < MOST:
        place, depth = pending.pop(0)
        try:
            entries = sorted(entry.name for entry in os.scandir(place or ".") if entry.is_dir())
        except OSError:
            continue
        for name in entries:
            if name.startswith(".") or (depth == 0 and not name.startswith(beginning)):
                continue
            seen += 1
            found = os.path.join(place, name)
            if any(os.path.isfile(os.path.join(found, mark)) for mark in marks):
                yield found
            elif depth + 1 < DEPTH:
                pending.append((found, depth + 1))
