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

LABEL_COLUMNS = {"label_weights": 1.0, "label_logprobs": 0.0}
"""Columns of the tokens that carry loss, and what stands where an item has none."""
MODEL_COLUMNS = ("input_ids", "attention_mask", "position_ids")


class LabelAnnealingCollator:
    """Build a batch from items of `CachedDataset` (or lists of them, one list per sequence, when packing).

    The batch holds

        input_ids      int32 [B, L], padded on the right
        attention_mask bool [B, L], without packing
        position_ids   int32 [B, L], with packing: restarts at 0 with every row; by the restarts
                       transformers keeps attention within a row, so no mask is passed
        row_starts     int32 [R + 1], with packing: where each of the R rows, and each stretch of padding, begins
                       in the flattened [B * L] numbering, and where the last one ends; longest_row is an int
        labels         int32 [B, L], not shifted, -100 where there is no cross-entropy
        teacher_rows   int32 [P], teacher_offsets int32 [P + 1], teacher_log_tail float32 [P]
        teacher_token_ids int32 [E], teacher_logprobs float32 [E]
        teacher_draw_offsets int32 [P + 1], teacher_draw_ids int32 [S], teacher_draw_logprobs and
                       teacher_draw_weights float32 [S], where the items carry them
        teacher_weights float32 [P], where an item carries them, 1 for the others; teacher_masked bool [E]
        label_weights float32 [B, L], not shifted, where an item carries them; label_logprobs likewise
        temperature    float: the T at which the tail was taken, the same for all items
        num_tokens     int: tokens that are not padding

    Args:
        pad_token_id: fills `input_ids` behind the end; any id serves, padding is never attended or scored.
        packing: items come as lists of rows that share a sequence.

    Raises:
        ConfigError: rows share a sequence without packing, or some have another temperature or no tail draws.
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
        terms = {
            name: np.full(shape, fill, np.float32)
            for name, fill in LABEL_COLUMNS.items()
            if any(name in item for items in sequences for item in items)
        }
        rows: list[np.ndarray] = []
        starts: list[int] = []
        for b, items in enumerate(sequences):
            if not self.packing and len(items) != 1:
                raise ConfigError(
                    f"a sequence must be one row without packing, got {len(items)}; make the collator with packing=True"
                )
            start = 0
            for item in items:
                stop = start + len(item["input_ids"])
                input_ids[b, start:stop] = item["input_ids"]
                labels[b, start:stop] = item["labels"]
                position_ids[b, start:stop] = np.arange(stop - start)
                attention_mask[b, start:stop] = True
                for name in terms.keys() & item.keys():
                    terms[name][b, start:stop] = item[name]
                rows.append(item["teacher_positions"] + np.int32(b * width + start))
                starts.append(b * width + start)
                start = stop
            position_ids[b, start:] = np.arange(width - start)
            if start < width:
                starts.append(b * width + start)
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
        batch |= _tail_draws(items) | _optional(items)
        batch |= terms
        if self.packing:
            row_starts = np.array([*starts, input_ids.size], np.int32)
            batch |= {"position_ids": position_ids, "row_starts": row_starts}
        else:
            batch["attention_mask"] = attention_mask
        temperatures = {item["temperature"] for item in items}
        if len(temperatures) > 1:
            raise ConfigError(f"all rows of a batch must share one temperature, got {sorted(temperatures)}")
        extra = {"temperature": temperatures.pop(), "num_tokens": sum(totals)}
        if self.packing:
            extra["longest_row"] = int(np.diff(row_starts).max())
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


def _optional(items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Columns of the objective, if any row has them; the others count in full and mask nothing."""
    scored = [item for item in items if len(item["teacher_positions"])]
    columns = {}
    for name, like, fill in (
        ("teacher_weights", "teacher_log_tail", np.float32(1)),
        ("teacher_masked", "teacher_logprobs", np.False_),
    ):
        if any(name in item for item in scored):
            parts = [item.get(name, np.full(len(item[like]), fill)) for item in scored]
            columns[name] = np.concatenate(parts)
    return columns


def row_boundaries(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Where packed rows begin and end, as transformers' flash attention takes it; nothing without packing.

    From positions it would find packed rows only in a batch of one sequence, and attend across rows in a larger one;
    and every layer would ask the device anew.
    """
    if "row_starts" not in batch:
        return {}
    starts, longest = batch["row_starts"], batch["longest_row"]
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


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
            masked=batch.get("teacher_masked"),
        )
    return inputs, shifted_BL.reshape(-1), teacher


def shifted_terms(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`label_weights` and `label_logprobs` [B * L] where the batch has them, shifted as `split_batch` shifts labels."""
    terms = {}
    for name in LABEL_COLUMNS:
        if name in batch:
            shifted_BL = torch.zeros_like(batch[name])
            shifted_BL[:, :-1] = batch[name][:, 1:]
            terms[name] = shifted_BL.reshape(-1)
    return terms


def count_targets(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(tokens with cross-entropy, positions with KL) of a collated batch, as `split_batch` will see them.

    Labels shift by one, so the first token of a sequence never counts, whatever its label.
    """
    return int((batch["labels"][:, 1:] != IGNORED).sum()), int(batch["teacher_rows"].numel())
