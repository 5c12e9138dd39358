"""The wrapping of pages: words stay, nothing becomes a list or a table, and a second run changes nothing."""

import random
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
wrap_page = runpy.run_path(str(ROOT / "docs" / "wrap_pages.py"))["wrap_page"]
WORDS = [
    "a",
    "token",
    "-",
    "+",
    "1.",
    "#",
    "||",
    "model)",
    "`p >= 5e-3`",
    "KL(initial",
    "sometimes",
    "*",
    "of",
]


def test_words_stay_and_lines_fit() -> None:
    source = random.Random(0)
    for _ in range(200):
        text = "start " + " ".join(source.choices(WORDS, k=source.randint(1, 120)))
        for page in (text, f"- {text}\n  {text}", f"1. {text}\n2. {text}"):
            wrapped = wrap_page(page + "\n")
            assert wrapped.split() == page.split()
            assert wrap_page(wrapped) == wrapped
            starts = [line.split()[0] for line in wrapped.splitlines()]
            marks = [word for word in starts if word in ("-", "+", "1.", "#", "||", "*", "2.")]
            assert len(marks) == (0 if page == text else 1 if page.startswith("-") else 2)


def test_what_is_no_prose_stays() -> None:
    long = "word " * 40
    page = f"---\nkey: {long}\n---\n# {long}\n\n```\n{long}\n```\n\n| {long} | b |\n|---|---|\n\n    {long}\n"
    assert wrap_page(page) == page
    assert max(map(len, wrap_page(f"{long}\n").splitlines())) <= 120
