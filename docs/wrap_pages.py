"""Wraps the prose of Markdown pages, so that no line of it is longer than 116 characters.

python docs/wrap_pages.py README.md docs/*.md

Tables, headings, code blocks, front matter and indented formulas stay as they are. Running it twice changes nothing.
"""

import re
import sys
import textwrap
from pathlib import Path

WIDTH = 116
LONGEST = 120
"""Pages are wrapped where a paragraph has a line longer than this; shorter lines keep the breaks they have."""

ITEM = re.compile(r"(?P<indent> *)(?P<mark>[-*]|\d+\.) +")

MARK = re.compile(r"[-+*>=]|#+|\d+[.)]|\|.*")
GLUE = "\0"


def wrapped(paragraph: list[str]) -> list[str]:
    """One paragraph or list item, its continuation lines indented as before."""
    if max(map(len, paragraph)) <= LONGEST:
        return paragraph
    first = ITEM.match(paragraph[0])
    indent = " " * (first.end() if first else len(paragraph[0]) - len(paragraph[0].lstrip()))
    start = paragraph[0][: first.end()] if first else indent
    words = " ".join([paragraph[0][len(start) :], *paragraph[1:]]).split()
    for at in range(len(words) - 1, 0, -1):
        if MARK.fullmatch(
            words[at].split(GLUE)[0]
        ):  # at the start of a line it would begin a list, a quotation, a table
            words[at - 1 : at + 1] = [words[at - 1] + GLUE + words[at]]
    lines = textwrap.wrap(
        " ".join(words),
        WIDTH,
        initial_indent=start,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in lines]


def wrap_page(text: str) -> str:
    """The page with its prose wrapped."""
    lines: list[str] = []
    paragraph: list[str] = []
    fence = front = False

    def flush() -> None:
        if paragraph:
            lines.extend(wrapped(paragraph))
            paragraph.clear()

    for number, line in enumerate(text.splitlines()):
        if line == "---" and (number == 0 or front):
            front = not front
            lines.append(line)
            continue
        if line.lstrip().startswith("```"):
            fence = not fence
            flush()
            lines.append(line)
        elif fence or front or not line.strip() or line.lstrip().startswith(("|", "#", "!", "<", "===")):
            flush()
            lines.append(line)
        elif line.startswith("    ") and not paragraph:
            lines.append(line)
        else:
            if ITEM.match(line):
                flush()
            paragraph.append(line)
    flush()
    return "\n".join(lines) + "\n"


def main(pages: list[str]) -> None:
    for page in map(Path, pages):
        old = page.read_text(encoding="utf-8")
        if (new := wrap_page(old)) != old:
            page.write_text(new, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
