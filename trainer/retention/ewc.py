"""Elastic weight consolidation: a weight is held as strongly as the initial model's predictions depend on it.

Kirkpatrick et al. 2017 (arXiv 1612.00796), Eq. 3: what a model knows of an earlier task, given by a cache of such
text. Without more that model, theta_k, is the one that the run starts from; in a chain of tasks there is one penalty
per task, each with the weights after that task and with F there. fisher.py says how F is estimated and normalised.

Cost: two more copies of the trained weights per task (theta_k and F, which is at least float32; theta0 is shared with
the other methods), and once, before the first step, the computation of about four thirds of a training step per batch
of rows.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from formats.disk.token_row import IGNORED
from formats.errors import ConfigError
from trainer.data.dataset import CachedDataset
from trainer.data.sampler import sample_rows
from trainer.retention.anchor import Anchor, local, placed_like
from trainer.retention.fisher import Fisher, estimate_fisher
from trainer.retention.fisher_file import load_fisher, save_fisher
from trainer.retention.method import RetentionMethod, add_quadratic
from trainer.retention.settings import EwcSettings
from trainer.running import RunningTrainer


class Ewc(RetentionMethod):
    """Adds coef / 2 * sum_i F_i (theta_i - theta_k,i)^2 over all trained parameters, tied ones once.

    Args:
        settings: coefficient, rows and kind of labels.
        dataset: the rows of `settings.cache`, opened with `loss="ce"`.
        task: its number among several, from 0.
        theta_k: the weights after that task, not placed yet; None for theta0.
        weights: fingerprint of the model of theta_k, to know a kept F by.
        seed: of the choice of rows and of the labels that are drawn.
        say: called on rank 0 with a line about the estimate.

    Raises:
        ConfigError: no token of the chosen rows carries loss.
    """

    name = "ewc"

    def __init__(
        self,
        settings: EwcSettings,
        dataset: CachedDataset,
        *,
        task: int = 0,
        theta_k: Anchor | None = None,
        weights: str | None = None,
        seed: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.settings, self.dataset, self.seed, self.say = settings, dataset, seed, say
        self.task, self.theta_k, self.of_weights = task, theta_k, weights
        self.rows = sample_rows(dataset, settings.num_rows, seed)
        if not any((dataset[row]["labels"][1:] != IGNORED).any() for row in self.rows.tolist()):
            raise ConfigError(
                f"ewc.cache must have tokens that carry loss, got none in {len(self.rows)} rows of "
                f"{dataset.name}; build it from plain text"
            )
        self._weights: Fisher | None = None

    @property
    def fisher(self) -> Fisher:
        """Plain parameter name -> this rank's part of F, once it is known."""
        assert self._weights is not None, "prepare first"
        return self._weights

    def prepare(self, trainer: RunningTrainer, anchor: Anchor) -> None:
        """Read F of an interrupted run, or estimate it at theta_k and keep it in the run's directory."""
        if self.theta_k is not None:
            self.theta_k.place(trainer.evaluation_model())
            anchor = self.theta_k
        if self._weights is not None:
            return
        run_dir = Path(trainer.args.output_dir or ".")
        key = {
            "cache": self.dataset.cache.identity.digest(),
            "num_rows": self.settings.num_rows,
            "labels": self.settings.labels,
            "seed": self.seed,
            **({} if self.of_weights is None else {"weights": self.of_weights}),
        }
        trainer.accelerator.wait_for_everyone()
        kept = load_fisher(run_dir, key, self.task)
        found = torch.tensor(int(kept is not None), device=trainer.args.device)
        if trainer.args.world_size > 1:  # all ranks read it, or all estimate
            found = trainer.accelerator.reduce(found, reduction="sum")
        if kept is not None and int(found) == trainer.args.world_size:
            self._weights = {h.name: placed_like(kept.pop(h.name), h.parameter) for h in anchor.held}
            return
        started = time.perf_counter()
        # A resumed run has the weights of its checkpoint; it gets here when the kept F was lost.
        elsewhere = self.theta_k is not None or trainer.state.global_step
        with anchor.restored() if elsewhere else nullcontext():
            fisher, num_tokens = estimate_fisher(
                trainer, anchor.held, self.dataset, self.rows, self.settings.labels, self.seed
            )
        self._keep(trainer, run_dir, fisher, key)
        self._weights = {name: local(value) for name, value in fisher.items()}
        if trainer.args.process_index == 0:
            which = f"ewc.{self.task}" if self.task else "ewc"
            self.say(
                f"{which}: Fisher information of {len(self.rows)} rows, {num_tokens:,} tokens "
                f"({self.settings.labels} labels) in {time.perf_counter() - started:.0f} s"
            )

    def _keep(self, trainer: RunningTrainer, run_dir: Path, fisher: Fisher, key: dict) -> None:
        """Rank 0 writes whole tensors; under FSDP all ranks help to gather them."""
        first, whole = trainer.args.process_index == 0, {}
        for name, value in fisher.items():
            gathered = value.full_tensor() if hasattr(value, "full_tensor") else value
            if first:
                whole[name] = gathered.cpu()
        if first:
            save_fisher(run_dir, whole, key, self.task)
        trainer.accelerator.wait_for_everyone()

    def add_gradients(self, anchor: Anchor, scale: float) -> torch.Tensor:
        """Adds coef * F * (theta - theta_k)."""
        return add_quadratic(self.theta_k or anchor, self.settings.coef, self.fisher, scale)
