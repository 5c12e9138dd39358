"""Which prompts did not fit: the harness cuts them at the left without a word, so they are counted here."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.bench.catalogue import LoadedTask


def truncated_items(model: Any, task: LoadedTask, samples: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For every sample, whether one of its requests is longer than the model's context.

    Whole documents are read in windows and never cut. A written answer needs room: the harness keeps
    `max_gen_toks` tokens for it.
    """
    if not task.uses_template:
        return [False] * len(samples)
    room = int(model.max_length)
    cut: dict[int, bool] = {}
    for sample in samples:
        number = int(sample["doc_id"])
        if number in cut:  # the same item under another filter
            continue
        if task.generates:
            text, settings = sample["arguments"][0][0], sample["arguments"][0][1]
            answer = int(settings.get("max_gen_toks", model.max_gen_toks))
            cut[number] = _length(model, text) > room - answer
        else:
            # The last token of a choice is predicted, never read.
            cut[number] = any(_length(model, a[0] + a[1]) > room + 1 for a in sample["arguments"])
    return [cut[int(sample["doc_id"])] for sample in samples]


def _length(model: Any, text: str) -> int:
    return len(model.tok_encode(text))
