"""A comparison on the terminal."""

from trainer.comparison.layout import Table, flips_table, main_table, notes_of
from trainer.comparison.lines import Lines


def comparison_text(comparison: Lines) -> str:
    """The table of models, that of flips where there are tasks, and what stands below."""
    parts = [table_text(main_table(comparison))]
    flips = flips_table(comparison)
    if flips is not None:
        parts.append(f"items against {comparison.initial}\n" + table_text(flips))
    parts.append("\n".join(notes_of(comparison)))
    return "\n\n".join(parts)


def table_text(table: Table) -> str:
    """Aligned columns: words to the left, numbers to the right; a group's name stands over its first columns."""
    columns = zip(table.header, *table.rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    starts = [at for at, group in enumerate(table.groups) if group]
    spans = {start: (starts[i + 1] if i + 1 < len(starts) else len(widths)) for i, start in enumerate(starts)}
    for start, stop in spans.items():  # a group that is wider than its columns widens the first of them
        room = sum(widths[start:stop]) + 2 * (stop - start - 1)
        widths[start] += max(0, len(table.groups[start]) - room)
    first = ""
    for at in range(len(widths)):
        if at in spans:
            room = sum(widths[at : spans[at]]) + 2 * (spans[at] - at - 1)
            first += table.groups[at].rjust(room) + "  "
        elif not any(start < at < stop for start, stop in spans.items()):
            first += " " * widths[at] + "  "
    lines = [first.rstrip()] if starts else []
    for row in (table.header, *table.rows):
        cells = [
            cell.ljust(width) if at < table.num_words else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
