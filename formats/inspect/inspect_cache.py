"""`anneal cache inspect`: one call from options to text."""

import json
import os
from pathlib import Path

from formats.cache import TeacherCache
from formats.errors import ConfigError
from formats.inspect.row_view import view_row
from formats.inspect.summary import summarise
from formats.inspect.text import row_text, summary_text
from formats.picture_file import require_plottable


def inspect_cache(
    cache: str | os.PathLike[str],
    *,
    row: int | None = None,
    as_json: bool = False,
    plot: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    full: bool = False,
) -> str:
    """The report on a cache (or on one row of it) as text or JSON.

    Args:
        cache: directory or fsspec URL.
        row: show this row's tokens and their top alternatives instead of the summary.
        as_json: JSON with the keys of docs/inspect.md.
        plot: also write the distributions as a picture.
        model: also require that this model built the cache.
        full: decode every row instead of a sample.

    Raises:
        FormatError: not a cache, or damaged.
        ConfigError: no such row, `full` for a row alone, or a picture that cannot be written.
        IdentityMismatchError: `model` is another model.
    """
    if row is not None and full and plot is None:
        raise ConfigError(
            "--full is for the distributions over all rows, got it with --row; remove one of them"
        )
    if plot is not None:
        require_plottable(os.fspath(plot))
    opened = TeacherCache(cache)
    agreed: list[str] = []
    if model is not None:
        from formats.identity.teacher_identity import require_same_teacher

        agreed = require_same_teacher(opened.identity, Path(model))
    if row is not None:
        if not len(opened):
            raise ConfigError(f"--row needs a cache with rows, got none in {opened.path}")
        if not -len(opened) <= row < len(opened):
            raise ConfigError(f"--row must be from 0 to {len(opened) - 1}, got {row}")
        view = view_row(opened, row % len(opened))
        text = json.dumps(view, indent=2, allow_nan=False) if as_json else row_text(view)
        if plot is None:
            return text
    summary = summarise(opened, full=full)
    if plot is not None:
        from formats.inspect.picture import plot_cache

        plot_cache(opened, summary, plot, full=full)
        if row is not None:
            return text
    if as_json:
        return json.dumps(summary, indent=2, allow_nan=False)
    lines = [summary_text(summary)]
    if agreed:
        lines.append(f"\nbuilt with {model}: {', '.join(agreed)} agree")
    if plot is not None:
        lines.append(f"\npicture: {plot}")
    return "\n".join(lines)
