"""The cross-entropy of every row of an evaluation, for intervals that draw rows again.

Evaluation adds up whole batches. Where single rows are wanted, the hidden states that reach the output head are kept
until the batch is done and projected once more, row by row, on the positions that carry loss: one more pass through
the output head, none through the model, and the sums of the evaluation stay what they are, bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import torch

from formats.disk.token_row import IGNORED
from trainer.data.collator import split_batch
from trainer.loop.output_head import OutputHead
from trainer.loss.label_annealing_loss import label_annealing_loss


class RowLosses:
    """Collects (sum of cross-entropies in nats, tokens that carry loss) per row, in the cache's order.

    `add` every batch after the model ran on it, `remove` at the end.
    """

    def __init__(self, head: OutputHead, num_rows: int) -> None:
        self.head = head
        self.ce: list[float] = [0.0] * num_rows
        self.tokens: list[int] = [0] * num_rows
        self._hidden_BSD: torch.Tensor | None = None
        self._hook = head.module.register_forward_pre_hook(self._keep)

    def _keep(self, module: Any, args: tuple[Any, ...]) -> None:
        self._hidden_BSD = args[0].detach()

    @torch.no_grad()
    def add(self, batch: Mapping[str, Any], rows: list[int]) -> None:
        """What the model has just computed for `batch`, whose sequences are these rows of the cache."""
        hidden_BSD, self._hidden_BSD = self._hidden_BSD, None
        assert hidden_BSD is not None and len(rows) == len(hidden_BSD), "one sequence per row"
        _, labels_N, _ = split_batch(batch)
        labels_BS = labels_N.reshape(hidden_BSD.shape[:2])
        for row, hidden_SD, labels_S in zip(rows, hidden_BSD, labels_BS, strict=True):
            found = label_annealing_loss(
                hidden_SD,
                self.head.module.weight,
                labels_S,
                num_ce=1.0,
                bias_V=getattr(self.head.module, "bias", None),
                logit_softcap=self.head.softcap,
                logit_scale=self.head.scale,
                vocab_size=self.head.vocab_size,
                kernel=self.head.kernel,
            )
            self.ce[row] = float(found.ce)
            self.tokens[row] = int((labels_S != IGNORED).sum())

    def remove(self) -> None:
        """Stop watching."""
        self._hook.remove()
