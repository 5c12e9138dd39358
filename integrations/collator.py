"""Examples of somebody's prepared data set to one of our batches, by way of the cache."""

from collections.abc import Mapping, Sequence
from typing import Any

from integrations.joined_rows import JoinedRows
from trainer.data.collator import LabelAnnealingCollator
from trainer.data.dataset import Item


class UnitCollator:
    """Lists of items, one list for each sequence, to a batch.

    Args:
        packing: rows may share a sequence: position ids instead of a mask.
        flatten: all rows of a batch become one sequence. Flash attention needs it: of several sequences it does not
            look for the rows in them.
    """

    def __init__(self, pad_token_id: int, *, packing: bool = False, flatten: bool = False) -> None:
        self.flatten = flatten
        self.collate = LabelAnnealingCollator(pad_token_id, packing=packing)

    def __call__(self, units: Sequence[Item | Sequence[Item]]) -> dict[str, Any]:
        lists = [[unit] if isinstance(unit, Mapping) else list(unit) for unit in units]
        return self.collate([[item for unit in lists for item in unit]] if self.flatten else lists)


class JoiningCollator:
    """Examples with `input_ids`, `labels` and perhaps `seq_lengths`, or lists of examples that share a sequence.

    Raises:
        ConfigError: as `JoinedRows.items`.
    """

    def __init__(self, rows: JoinedRows, collate: UnitCollator) -> None:
        self.rows, self.collate = rows, collate

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        units = []
        for feature in features:
            examples = [feature] if isinstance(feature, Mapping) else list(feature)
            units.append([item for example in examples for item in self.rows.items(example)])
        return self.collate(units)
