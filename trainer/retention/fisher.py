"""The diagonal of the Fisher information of a model's next-token predictions, per token.

    F_i = 1 / N * sum over rows r of ( d/dtheta_i  sum over tokens t of r  log p(y_rt | x_r,<t) )^2

N is the number of tokens of all rows that carry loss. The gradient is that of the SUM over a row's tokens,
squared, summed over rows and divided by tokens. With y drawn from the model itself the scores of different
tokens are uncorrelated given the text, so F is in expectation the mean over tokens of the squared score, the
true Fisher, and  1/2 sum_i F_i (theta_i - theta0_i)^2  is to second order what the diagonal contributes to
KL(initial || model) per token. With y of the text (the empirical Fisher) the scores of one row are correlated
and do not average to zero; it costs one forward pass less and is a different quantity.

Cost: per row one forward and backward pass, and one forward pass more to draw labels; a row at a time,
because the square is taken of one row's gradient. Memory: one row's logits [tokens, vocabulary] while labels
are drawn, one gradient, and F in float32.

Ranks share the rows; under FSDP, whose backward pass mixes what the ranks compute, all compute the same one.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from formats.disk.token_row import IGNORED
from trainer.data.dataset import CachedDataset
from trainer.loading import unwrapped
from trainer.retention.anchor import Held, local
from trainer.running import RunningTrainer

SEED = 0xF15
"""Keeps the drawn labels apart from everything else that `training.seed` decides."""
Fisher = dict[str, torch.Tensor]
"""Plain parameter name -> F, at least float32, sharded like the parameter."""


def draw_labels(
    model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor, vocab_size: int | None, seed: list[int]
) -> torch.Tensor:
    """Labels [1, S], not shifted: where `labels` has a token, one drawn from the model's own prediction.

    Args:
        model: as it is called in training; its head is in its usual mode.
        inputs: of one row, for the model.
        labels: of that row, -100 where there is no loss.
        vocab_size: so many outputs are tokens; None for all.
        seed: of the draws, which are the same on every rank.
    """
    generator = torch.Generator(labels.device)
    generator.manual_seed(int(np.random.SeedSequence([*seed, SEED]).generate_state(1)[0]))
    with torch.no_grad():
        logits_SV = model(**inputs).logits[0, :-1, :vocab_size].float()
        drawn_S = torch.multinomial(logits_SV.softmax(-1), 1, generator=generator)[:, 0]
    result = labels.clone()
    result[0, 1:] = torch.where(labels[0, 1:] == IGNORED, labels[0, 1:], drawn_S.to(labels.dtype))
    return result


def row_gradients(trainer: RunningTrainer, held: list[Held], batch: dict[str, Any]) -> list[Any]:
    """This rank's parts of the gradient of -log p, summed over the tokens of one row; None for zero."""
    parameters = [entry.parameter for entry in held]
    if trainer.is_fsdp_enabled:  # averages over ranks, which all compute this row
        trainer.head.loss(trainer.evaluation_model(), batch, num_ce=1.0).loss.backward()
        found = [entry.gradient for entry in held]
        for parameter in parameters:
            parameter.grad = None
        return found
    # Not `backward`: DDP listens to gradients that are accumulated, and would reduce them.
    model = unwrapped(trainer.evaluation_model())
    loss = trainer.head.loss(model, batch, num_ce=1.0).loss
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def estimate_fisher(
    trainer: RunningTrainer,
    held: list[Held],
    dataset: CachedDataset,
    rows: np.ndarray,
    labels: str,
    seed: int,
) -> tuple[Fisher, int]:
    """Estimate F at the present weights, in evaluation mode. Collective.

    Args:
        trainer: ready to train; its random state and gradients are left as they are (there are none).
        held: the parameters.
        dataset: rows of text, without teacher columns.
        rows: which of them.
        labels: `sampled` or `data`.
        seed: of the labels that are drawn.

    Returns:
        F, and N.
    """
    args, sharded = trainer.args, trainer.is_fsdp_enabled
    fisher = {}
    for entry in held:
        wide = torch.promote_types(entry.parameter.dtype, torch.float32)
        fisher[entry.name] = torch.zeros_like(entry.parameter, dtype=wide, requires_grad=False)
    num_tokens = torch.zeros((), dtype=torch.int64, device=args.device)
    model = trainer.evaluation_model()
    was_training = model.training
    model.eval()
    mine = rows if sharded else rows[args.process_index :: args.world_size]
    for row in mine.tolist():
        batch = trainer.device_batch([dataset[row]])
        with trainer.compute_loss_context_manager():
            if labels == "sampled":
                inputs = {"input_ids": batch["input_ids"], "use_cache": False}
                vocab_size = trainer.head.vocab_size
                batch["labels"] = draw_labels(model, inputs, batch["labels"], vocab_size, [seed, row])
            gradients = row_gradients(trainer, held, batch)
        num_tokens += (batch["labels"][:, 1:] != IGNORED).sum()
        for entry, gradient in zip(held, gradients, strict=True):
            if gradient is not None:
                square = gradient.detach().to(fisher[entry.name].dtype).square_()
                local(fisher[entry.name]).add_(square)
    model.train(was_training)
    if args.world_size > 1 and not sharded:
        num_tokens = trainer.accelerator.reduce(num_tokens, reduction="sum")
        fisher = {name: trainer.accelerator.reduce(value, reduction="sum") for name, value in fisher.items()}
    total = int(num_tokens)
    assert total, "rows without loss are refused when the method is made"
    for value in fisher.values():
        local(value).div_(total)
    return fisher, total
