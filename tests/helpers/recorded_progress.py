"""A progress that remembers what it was told."""

from formats.progress import Progress


class RecordedProgress(Progress):
    """Phases in order (name, how many were done, how many in all), and the lines of information."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int | None]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, what: str, total: int | None, done: int = 0, *, unit: str = "row") -> None:
        self.phases.append((what, done, total))

    def advance(self, num_rows: int, num_tokens: int = 0) -> None:
        what, done, total = self.phases[-1]
        self.phases[-1] = (what, done + num_rows, total)
