"""What callbacks, retention methods and the saver may ask of a running Trainer: this, and nothing private.

They are written against this interface and the Trainer is built from them, so nothing here may know the Trainer's
own room: what comes from there is untyped.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments

from trainer.data.dataset import CachedDataset
from trainer.data.sampler import EpochBatches


class RunningTrainer(Protocol):
    """A `LabelAnnealingTrainer`, as others see it."""

    args: TrainingArguments
    state: TrainerState
    control: Any
    callback_handler: Any
    accelerator: Any
    model: Any
    head: Any
    """The `OutputHead`, installed."""
    stop_request: Any
    """`requested` says whether a signal has arrived."""
    epoch_batches: EpochBatches | None

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether weights are sharded."""
        ...

    def evaluation_model(self) -> nn.Module:
        """The model to call without gradients: sharded under FSDP, else the one inside DDP."""
        ...

    def device_batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of a dataset as one batch on the model's device, padded or packed as in training."""
        ...

    def loader_of_rows(self, dataset: CachedDataset, rows: Iterable[int], *, as_trained: bool) -> DataLoader:
        """This rank's share of the given rows, in batches as in training, or of the evaluation size."""
        ...

    def measure_rows(self, dataloader: DataLoader) -> Any:
        """The `Measurement` of a loader over all ranks. Collective."""
        ...

    def find_best_again(self) -> None:
        """After a continuation, or a move of the directory: where the best checkpoint so far is now."""
        ...

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """In which a loss is computed as in training."""
        ...

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write weights, or adapters, as transformers does."""
        ...

    def pause(self, seconds: float) -> None:
        """Leave so much time out of the throughput."""
        ...

    def restart_log_window(self) -> None:
        """Forget what was counted since the last log line: it was no training."""
        ...
