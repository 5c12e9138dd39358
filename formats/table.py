"""Tables for people: columns of equal width."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, indent: str = "") -> str:
    """A line per row; the first `left` columns stand to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sized = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if at < left else cell.rjust(width) for at, (cell, width) in sized]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
