"""From items to a batch: padding or packing, and the teacher's rows in the flattened [B * L] numbering.

A batch is a flat dict of tensors, so that any loader can pin and move it. `split_batch` turns it, on the
device, into what the model takes, the shifted labels and a `TeacherBatch`.

B: sequences, L: tokens of the longest one, N: B * L, P: positions with teacher targets, E: kept entries of
all of them, S: their tail draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formats.disk.token_row import IGNORED
from formats.errors import ConfigError
from trainer.data.dataset import Item
from trainer.data.teacher_batch import TeacherBatch

MODEL_COLUMNS = ("input_ids", "attention_mask", "position_ids")


class LabelAnnealingCollator:
    """Build a batch from items of `CachedDataset` (or lists of them, one list per sequence, when packing).

    The batch holds

        input_ids      int32 [B, L], padded on the right
        attention_mask bool [B, L], without packing
        position_ids   int32 [B, L], with packing: restarts at 0 with every row; by the restarts
                       transformers keeps attention within a row, so no mask is passed
        labels         int32 [B, L], not shifted, -100 where there is no cross-entropy
        teacher_rows   int32 [P], teacher_offsets int32 [P + 1], teacher_log_tail float32 [P]
        teacher_token_ids int32 [E], teacher_logprobs float32 [E]
        teacher_draw_offsets int32 [P + 1], teacher_draw_ids int32 [S], teacher_draw_logprobs and
                       teacher_draw_weights float32 [S], where the items carry them
        teacher_weights float32 [P], where an item carries them, 1 for the others
        temperature    float: the T at which the tail was taken, the same for all items
        num_tokens     int: tokens that are not padding

    Args:
        pad_token_id: fills `input_ids` behind the end; any id serves, padding is never attended or scored.
        packing: items come as lists of rows that share a sequence.
    """

    def __init__(self, pad_token_id: int = 0, *, packing: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.packing = packing

    def __call__(self, features: Sequence[Item | Sequence[Item]]) -> dict[str, Any]:
        sequences = [[feature] if isinstance(feature, Mapping) else list(feature) for feature in features]
        totals = [sum(len(item["input_ids"]) for item in items) for items in sequences]
        width = max(totals)
        shape = (len(sequences), width)
        input_ids = np.full(shape, self.pad_token_id, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        # Padding counts its own positions from 0: to the attention mask it is one more row.
        position_ids = np.zeros(shape, np.int32)
        attention_mask = np.zeros(shape, np.bool_)
        rows: list[np.ndarray] = []
        for b, items in enumerate(sequences):
            assert self.packing or len(items) == 1, "rows share a sequence only when packing"
            start = 0
            for item in items:
                stop = start + len(item["input_ids"])
                input_ids[b, start:stop] = item["input_ids"]
                labels[b, start:stop] = item["labels"]
                position_ids[b, start:stop] = np.arange(stop - start)
                attention_mask[b, start:stop] = True
                rows.append(item["teacher_positions"] + np.int32(b * width + start))
                start = stop
            position_ids[b, start:] = np.arange(width - start)
        items = [item for group in sequences for item in group]
        counts = np.concatenate([item["teacher_counts"] for item in items])
        offsets = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "teacher_rows": np.concatenate(rows),
            "teacher_offsets": offsets,
            "teacher_token_ids": np.concatenate([item["teacher_token_ids"] for item in items]),
            "teacher_logprobs": np.concatenate([item["teacher_logprobs"] for item in items]),
            "teacher_log_tail": np.concatenate([item["teacher_log_tail"] for item in items]),
        }
        batch |= _tail_draws(items) | _kl_weights(items)
        batch |= {"position_ids": position_ids} if self.packing else {"attention_mask": attention_mask}
        temperatures = {item["temperature"] for item in items}
        if len(temperatures) > 1:
            raise ConfigError(f"all rows of a batch must share one temperature, got {sorted(temperatures)}")
        extra = {"temperature": temperatures.pop(), "num_tokens": sum(totals)}
        return {name: torch.from_numpy(array) for name, array in batch.items()} | extra


def _tail_draws(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """The columns of tail draws; rows without teacher targets need none.

    Raises:
        ConfigError: some rows with targets have draws and others have none.
    """
    scored = [item for item in items if len(item["teacher_positions"])]
    having = ["teacher_draw_counts" in item for item in scored]
    if not any(having):
        return {}
    if not all(having):
        raise ConfigError(
            "all rows of a batch must have tail draws or none; build the caches alike, or make every "
            "CachedDataset with tail_draws=False"
        )
    counts = np.concatenate([item["teacher_draw_counts"] for item in scored])
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    names = ("teacher_draw_ids", "teacher_draw_logprobs", "teacher_draw_weights")
    columns = {name: np.concatenate([item[name] for item in scored]) for name in names}
    return columns | {"teacher_draw_offsets": offsets}


def _kl_weights(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """The column of the KL's weights, if any row has some: those without weigh 1 everywhere."""
    scored = [item for item in items if len(item["teacher_positions"])]
    if not any("teacher_weights" in item for item in scored):
        return {}
    parts = [
        item.get("teacher_weights", np.ones(len(item["teacher_positions"]), np.float32)) for item in scored
    ]
    return {"teacher_weights": np.concatenate(parts)}


def split_batch(batch: Mapping[str, Any]) -> tuple[dict[str, Any], torch.Tensor, TeacherBatch | None]:
    """(model inputs, labels_N, teacher) of a collated batch, on whatever device it is.

    labels_N is int64 [B * L] and shifted: labels_N[n] is the token that hidden row n predicts, or -100. The
    teacher is None when the batch has no teacher targets.
    """
    inputs = {name: batch[name] for name in MODEL_COLUMNS if name in batch}
    # With a cache of keys and values transformers does not look for packed rows, and attention leaks across
    # them.
    inputs["use_cache"] = False
    labels_BL = batch["labels"]
    shifted_BL = torch.full(labels_BL.shape, IGNORED, dtype=torch.int64, device=labels_BL.device)
    shifted_BL[:, :-1] = labels_BL[:, 1:]
    teacher = None
    if batch["teacher_rows"].numel():
        teacher = TeacherBatch(
            rows=batch["teacher_rows"].long(),
            offsets=batch["teacher_offsets"].long(),
            token_ids=batch["teacher_token_ids"],
            logprobs=batch["teacher_logprobs"],
            log_tail=batch["teacher_log_tail"],
            temperature=batch["temperature"],
            draw_offsets=batch["teacher_draw_offsets"].long() if "teacher_draw_offsets" in batch else None,
            draw_ids=batch.get("teacher_draw_ids"),
            draw_logprobs=batch.get("teacher_draw_logprobs"),
            draw_weights=batch.get("teacher_draw_weights"),
            weights=batch.get("teacher_weights"),
        )
    return inputs, shifted_BL.reshape(-1), teacher


def count_targets(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens with cross-entropy, positions with KL) of a collated batch, as `split_batch` will see them.

    Labels shift by one, so the first token of a sequence never counts, whatever its label.
    """
    return int((batch["labels"][:, 1:] != IGNORED).sum()), int(batch["teacher_rows"].numel())
