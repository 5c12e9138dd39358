"""The file of a picture: refused before the work where it could not be, drawn without a display, and there only when it
is complete. matplotlib (the extra `plot`) is imported when a picture is drawn.
"""

import io
from pathlib import Path
from typing import Any

from formats.disk.durable import atomic_write_bytes
from formats.disk.output_file import misplaced
from formats.errors import ConfigError
from formats.install import how_to_install

FORMATS = (".png", ".svg", ".pdf")


def require_plottable(path: str | Path) -> Path:
    """Find out before the work whether a plot can be drawn and written to `path`; nothing is written.

    Raises:
        ConfigError: another ending, no place for it (`misplaced`), or matplotlib is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise _unwritable(path, "another ending")
    if reason := misplaced(path):
        raise _unwritable(path, reason)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"plots need matplotlib, which is not installed; {how_to_install('plot')}"
        ) from None
    return path


def _unwritable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"the plot must go to a writable .png, .svg or .pdf file, got {path}: {reason}")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches, with no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int) -> Path:
    """Write a figure as PNG, SVG or PDF, by the ending of `path`. Words are drawn as typed: a `$` is no formula.

    Raises:
        ConfigError: the file cannot be written.
    """
    _take_as_typed(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=dpi)
    try:
        atomic_write_bytes(path, drawn.getvalue())
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None
    return path


def _take_as_typed(figure: Any) -> None:
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatterMathtext

    powers = set()  # of ten, which are formulas
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        formatters = (axis.get_major_formatter(), axis.get_minor_formatter())
        if any(isinstance(formatter, LogFormatterMathtext) for formatter in formatters):
            powers |= set(axis.get_ticklabels(which="both"))
    for text in figure.findobj(Text):
        if text not in powers:
            text.set_parse_math(False)
