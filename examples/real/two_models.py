"""The control of the board: a finished run once more, with the initial model in memory instead of a cache.

    python examples/real/two_models.py maths/runs/kl_coef=1 --out maths/runs/two-models

Settings, rows, batches and optimiser are those of the run (`anneal.yaml` in its folder). The loss is the paper's,
written out: in every step a second forward pass through the frozen initial model, and the KL over the whole
vocabulary. What the two runs differ in is what the cache leaves out. The result is an ordinary run directory, which
`anneal compare` takes beside the others.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from trainer.config_file import load_config
from trainer.data.collator import split_batch
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
from trainer.loss.label_annealing_loss import LabelAnnealingOutput
from trainer.run import train

PLAIN = {
    "kl_direction": "forward",
    "kl_gate": "none",
    "kl_target": "full",
    "ce_weight": "none",
    "label_smoothing": 0,
}
"""Settings of the runs that this script repeats; `kl_on`, `kl_coef` and `temperature` are free."""


class TwoModelTrainer(LabelAnnealingTrainer):
    """Cross-entropy + kl_coef * KL(initial model || model), both over the whole vocabulary."""

    initial_model: str
    """Directory of the initial model."""
    _initial: Any = None

    def initial(self) -> Any:
        """The frozen copy."""
        if self._initial is None:
            self._initial = AutoModelForCausalLM.from_pretrained(self.initial_model, dtype=torch.float32)
            self._initial.eval().requires_grad_(False).to(self.args.device)
        return self._initial

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch, as the base class counts it."""
        assert isinstance(num_items_in_batch, torch.Tensor) and not return_outputs
        num_ce, num_kl = num_items_in_batch[:2]
        arguments, labels_N, teacher = split_batch(inputs)
        assert teacher is not None, "a micro-batch without teacher positions has no KL to compare"
        z_NV = model(**arguments).logits.flatten(0, 1).float()
        with torch.no_grad():
            z0_PV = self.initial()(**arguments).logits.flatten(0, 1).float()[teacher.rows]
        beta = 1.0 / teacher.temperature
        log_p_PV = torch.log_softmax(beta * z0_PV, -1)
        log_q_PV = torch.log_softmax(beta * z_NV[teacher.rows], -1)
        kl = F.kl_div(log_q_PV, log_p_PV, log_target=True, reduction="sum") / num_kl
        ce = F.cross_entropy(z_NV, labels_N, reduction="sum") / num_ce
        loss = ce + self.kl_coef * kl
        assert self.log_window is not None
        everything = torch.ones((), device=loss.device)
        self.log_window.add(
            LabelAnnealingOutput(
                loss=loss,
                ce=ce.detach(),
                kl=kl.detach(),
                kept_mass=everything,
                student_kept_mass=everything,
                num_ce=(labels_N != -100).sum(),
                num_kl=torch.tensor(len(teacher), device=loss.device),
            )
        )
        return loss


def main() -> None:
    """Repeat a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished label annealing run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the control")
    arguments = parser.parse_args()
    if (arguments.out / "config.json").is_file():
        print(f"{arguments.out} is finished")
        return
    config = load_config(arguments.run / "anneal.yaml", overrides=[f"out={arguments.out}"])
    other = {name: getattr(config, name) for name, value in PLAIN.items() if getattr(config, name) != value}
    if other or config.lora is not None or config.caches or config.kl_budget is not None:
        parser.error(f"the run must be plain label annealing, got {other or 'lora, caches or kl_budget'}")
    TwoModelTrainer.initial_model = config.model
    print(train(config, trainer_class=TwoModelTrainer).line())


if __name__ == "__main__":
    main()
