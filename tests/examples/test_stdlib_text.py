"""The demo's text: splits that share nothing and are the same everywhere, and the command writing them."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import stdlib_text
from stdlib_text import Document

EXAMPLES = Path(__file__).parents[2] / "examples"

LIGHT_SPLITS = [
    (domain, split)
    for domain, splits in stdlib_text.SPLITS.items()
    for split in splits
    if split != "base-train"
]


@functools.cache
def documents(domain: str, split: str) -> list[Document]:
    return stdlib_text.documents(domain, split)


def keys(rows: list[Document]) -> set[str]:
    """Split keys of the modules of a split (topics have names of their own)."""
    return {stdlib_text.split_key(row.name) for row in rows if not row.name.startswith("topic ")}


def long_paragraphs(rows: list[Document]) -> set[str]:
    found = (" ".join(part.split()) for row in rows for part in row.text.split("\n\n"))
    return {part for part in found if len(part) >= 60}


@pytest.mark.parametrize(
    ("domain", "split", "min_bytes"),
    [
        ("prose", "source-train", 1_200_000),
        ("prose", "source-heldout", 150_000),
        ("code", "target-train", 3_000_000),
        ("code", "target-heldout", 500_000),
    ],
)
def test_splits_are_large_enough_for_the_demo(domain: str, split: str, min_bytes: int) -> None:
    assert sum(len(row.text.encode()) for row in documents(domain, split)) > min_bytes


def test_no_module_and_no_topic_is_on_both_sides() -> None:
    train = documents("prose", "source-train") + documents("code", "target-train")
    heldout = documents("prose", "source-heldout") + documents("code", "target-heldout")
    assert not keys(train) & keys(heldout)
    assert not {row.name for row in train} & {row.name for row in heldout}


def test_heldout_prose_does_not_occur_in_training_prose() -> None:
    heldout = long_paragraphs(documents("prose", "source-heldout"))
    assert len(heldout) > 500
    assert not heldout & long_paragraphs(documents("prose", "source-train"))


def test_the_split_of_well_known_modules_never_moves() -> None:
    """The committed model was trained with this split: changing it would leak held-out text into its past."""
    heldout = (
        "typing",
        "doctest",
        "difflib",
        "datetime",
        "_pydatetime",
        "contextlib",
        "multiprocessing.pool",
    )
    training = ("asyncio.locks", "argparse", "pathlib", "pathlib._local", "json.decoder", "unittest.mock")
    assert all(stdlib_text.is_heldout(stdlib_text.split_key(name)) for name in heldout)
    assert not any(stdlib_text.is_heldout(stdlib_text.split_key(name)) for name in training)
    assert stdlib_text.is_heldout("topic import") and not stdlib_text.is_heldout("topic assert")


@pytest.mark.parametrize(
    ("module", "key"),
    [
        ("_pydatetime", "datetime"),
        ("_strptime", "strptime"),
        ("pathlib._abc", "pathlib"),
        ("__future__", "future"),
    ],
)
def test_private_twins_and_submodules_share_a_key(module: str, key: str) -> None:
    assert stdlib_text.split_key(module) == key


@pytest.mark.parametrize(
    ("domain", "split"),
    [
        pytest.param(*names, marks=pytest.mark.slow) if names[1].endswith("train") else names
        for names in LIGHT_SPLITS
    ],
)
def test_reading_again_gives_the_same_documents(domain: str, split: str) -> None:
    again = stdlib_text.documents(domain, split)
    assert again == documents(domain, split)
    assert len({row.name for row in again}) == len(again)


def test_nothing_depends_on_the_stdlib_test_package() -> None:
    for domain, split in LIGHT_SPLITS:
        assert "test" not in keys(documents(domain, split))


SOURCE = '''\
"""Module text,
on two lines."""
# a comment
class A:
    """Class text."""

    def f(self):
        """Function text of some length."""
        return """not a docstring"""
'''


def test_docstrings_are_cut_out_of_code_and_nothing_else() -> None:
    tree = ast.parse(SOURCE)
    assert stdlib_text.without_docstrings(SOURCE, tree) == (
        '# a comment\nclass A:\n\n    def f(self):\n        return """not a docstring"""\n'
    )
    assert stdlib_text.docstrings("m", tree) == [
        ("m", "Module text,\non two lines."),
        ("m.A.f", "Function text of some length."),
    ]


def test_code_of_a_real_module_has_lost_its_docstrings_and_kept_its_statements() -> None:
    (code,) = (row.text for row in documents("code", "target-heldout") if row.name == "csv")
    assert "class DictReader:" in code and "return self._fieldnames" in code
    assert "Find the dialect" not in code and '"""' not in code.split("class Dialect")[0]


def test_command_writes_rows_within_the_byte_limit(tmp_path: Path) -> None:
    out = tmp_path / "code.jsonl"
    command = [
        sys.executable,
        str(EXAMPLES / "stdlib_text.py"),
        "--domain",
        "code",
        "--split",
        "target-heldout",
    ]
    subprocess.run([*command, "--out", str(out), "--max-bytes", "100000"], check=True)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows and all(set(row) == {"text", "name"} and row["text"].strip() for row in rows)
    assert sum(len(row["text"].encode()) for row in rows) <= 100_000
    assert [row["name"] for row in rows] == [
        row.name for row in documents("code", "target-heldout")[: len(rows)]
    ]


def test_an_unknown_split_is_refused_in_one_line(tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    command = [
        sys.executable,
        str(EXAMPLES / "stdlib_text.py"),
        "--domain",
        "prose",
        "--split",
        "target-train",
    ]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "the split of prose must be one of source-train, source-heldout, base-train" in done.stderr
    assert not out.exists()
