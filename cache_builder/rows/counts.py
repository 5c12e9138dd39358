"""What happened to the records of a corpus: every one that was dropped, cut, split or altered, by name."""

from dataclasses import asdict, dataclass, field
from typing import Any

from formats.progress import counted


@dataclass
class TokeniseStats:
    """Counts so far."""

    num_records: int = 0
    """Records read."""
    num_rows: int = 0
    """Rows handed out."""
    num_tokens: int = 0
    """Tokens in those rows."""
    num_targets: int = 0
    """Tokens that carry loss in those rows."""
    num_split: int = 0
    """Documents split into several rows."""
    num_truncated: int = 0
    """Records cut off at `max_length`."""
    num_truncated_tokens: int = 0
    """Tokens lost by that."""
    num_too_short: int = 0
    """Records skipped because they have fewer than two tokens."""
    num_empty: int = 0
    """Records skipped because the text, or every answer, is nothing but white space."""
    num_without_target: int = 0
    """Records skipped because no token of them carries loss: there was no target, or it was cut off."""
    num_empty_turns: int = 0
    """Assistant turns of nothing but white space in conversations with other answers: context without loss."""
    num_turns_without_loss: int = 0
    """Assistant turns that a field of the data (`weight`, `train`, `loss`, ...) excepts from the loss."""
    num_shortened_turns: int = 0
    """Assistant turns that the chat template shortens when more turns follow (it drops their reasoning)."""
    unread_fields: dict[str, int] = field(default_factory=dict)
    """Fields of messages that the chat template does not read, and how many messages have them."""
    unread_columns: dict[str, int] = field(default_factory=dict)
    """Columns that are not read and that the first record does not have, and how many records have them."""

    def to_dict(self) -> dict[str, Any]:
        """All counts by name."""
        return asdict(self)

    def notes(self) -> list[str]:
        """One sentence for each thing that was left out or altered; empty if nothing was."""
        remarks = (
            (self.num_split, "document", "split into several rows"),
            (self.num_truncated, "record", f"truncated ({self.num_truncated_tokens} tokens cut off)"),
            (self.num_too_short, "record", "skipped: fewer than two tokens"),
            (self.num_empty, "record", "skipped: empty text or answer"),
            (self.num_without_target, "record", "skipped: no token carries loss"),
            (self.num_empty_turns, "empty assistant turn", "without loss"),
            (self.num_turns_without_loss, "assistant turn", "without loss, as the data says"),
            (self.num_shortened_turns, "earlier assistant turn", "shortened by the chat template"),
        )
        notes = [f"{counted(count, noun)} {remark}" for count, noun, remark in remarks if count]
        for what, unread in (
            ("fields of messages that the chat template does not read", self.unread_fields),
            ("columns not read, of later records than the first", self.unread_columns),
        ):
            if unread:
                found = ", ".join(f"{name} ({count})" for name, count in sorted(unread.items()))
                notes.append(f"{what}: {found}")
        return notes
