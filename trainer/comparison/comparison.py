"""What `compare` returns: models side by side, in every form in which they are shown."""

from pathlib import Path
from typing import Any

from trainer.comparison.lines import Lines
from trainer.comparison.page import write_page
from trainer.comparison.picture import plot_comparison
from trainer.comparison.plain import comparison_to_dict
from trainer.comparison.table import comparison_text


class Comparison(Lines):
    """Models side by side."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values under stable keys; what is not finite is None."""
        return comparison_to_dict(self)

    def text(self) -> str:
        """Tables for people."""
        return comparison_text(self)

    def plot(self, path: str | Path) -> Path:
        """Draw the lines that have not diverged; those of one method have one colour and one line.

        Raises:
            ConfigError: all have, matplotlib is missing, or the file cannot be written.
        """
        return plot_comparison(self, path)

    def page(self, path: str | Path) -> Path:
        """Write everything as one HTML page that needs nothing else.

        Raises:
            ConfigError: the file cannot be written.
        """
        return write_page(self, path)
