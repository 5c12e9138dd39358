"""The checks that need the built trainer: is there something to train, can optimiser and schedule be made, do
checkpoints meet evaluations.
"""

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch

from formats.errors import ConfigError, one_line
from trainer.checks import check_flag
from trainer.preflight import best_model
from trainer.preflight.combinations import word
from trainer.preflight.memory import lasting_memory, require_room
from trainer.schedule import check_schedule

if TYPE_CHECKING:
    from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer

CHECKPOINTING = frozenset(
    {"every_n_layers", "offload", "use_reentrant", "context_fn", "determinism_check"}
    | {"debug", "preserve_rng_state", "early_stop"}
)
"""Names of gradient_checkpointing_kwargs."""
CHECKPOINTING_FLAGS = frozenset({"use_reentrant", "preserve_rng_state", "debug", "early_stop", "offload"})
"""Those that are true or false."""


def check_before_start(trainer: "LabelAnnealingTrainer") -> None:
    """Refuse what would fail, or train nothing, after the model was loaded.

    Raises:
        ConfigError: says what and what to do instead.
    """
    model, args = trainer.model, trainer.args
    assert model is not None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"training needs trainable weights, got none in {type(model).__name__}")
    _check_rows(trainer)
    _check_checkpointing(trainer)
    if args.device.type == "cuda":  # what is certain; `--dry-run` counts the rest as well
        require_room(lasting_memory(trainer), args.device)
    max_steps, _ = trainer.planned_steps()
    check_optimiser(args, model, trained)
    check_schedule(lambda optimizer, steps: _schedule(trainer, optimizer, steps), args, max_steps)
    need = best_model.chooses(vars(args))
    if need is None or not isinstance(trainer.eval_dataset, dict):
        return
    counts = {name: counts_of(dataset) for name, dataset in trainer.eval_dataset.items()}
    best_model.require_metric(str(args.metric_for_best_model), counts, learns=trainer.learns)
    if args.load_best_model_at_end:
        best_model.require_meetings(
            eval_steps=_resolved(args.eval_steps, max_steps),
            save_steps=_resolved(args.save_steps, max_steps),
            eval_delay=args.eval_delay,
            max_steps=max_steps,
            save_strategy=best_model.word(args.save_strategy),
            eval_strategy=best_model.word(args.eval_strategy),
        )


def _resolved(steps: float | None, max_steps: int) -> int:
    """A number of steps, or a share of all of them."""
    steps = steps or 1
    return max(math.ceil(max_steps * steps) if steps < 1 else int(steps), 1)


def _schedule(trainer: "LabelAnnealingTrainer", optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    from transformers import get_scheduler

    made = get_scheduler(
        trainer.args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=trainer.args.get_warmup_steps(max_steps),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=dict(trainer.args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
    )
    return trainer.schedule_of(made, max_steps)


def _check_rows(trainer: "LabelAnnealingTrainer") -> None:
    """Without a KL term, some row must carry a label."""
    datasets = [trainer.train_dataset, *(dataset for dataset, weight in trainer.mixed if weight)]
    if trainer.kl_coef == 0 and not any(counts_of(dataset)[0] for dataset in datasets):
        raise ConfigError(
            "training with kl_coef 0 needs tokens that carry loss, got caches without any; raise kl_coef"
        )


def _check_checkpointing(trainer: "LabelAnnealingTrainer") -> None:
    """Unknown names would fail in the first step."""
    given = dict(trainer.args.gradient_checkpointing_kwargs or {})  # type: ignore[arg-type]
    for name in given:
        if name not in CHECKPOINTING:
            known = ", ".join(sorted(CHECKPOINTING))
            raise ConfigError(f"training.gradient_checkpointing_kwargs are {known}; got {name}")
        if name in CHECKPOINTING_FLAGS:  # a word such as `no` would count as true
            check_flag(f"training.gradient_checkpointing_kwargs.{name}", given[name])


def counts_of(dataset: Any) -> tuple[int, int]:
    """(tokens that carry loss, teacher positions) of a `CachedDataset`; of the former only whether there are any."""
    cache = dataset.cache
    positions = cache.manifest.num_positions
    if dataset.loss == "kl":
        return 0, positions
    has_labels = (cache.manifest.positions == "loss" and positions) or any(
        cache.tokens(row).loss_mask[1:].any() for row in range(len(cache))
    )
    return int(bool(has_labels)), 0 if dataset.loss == "ce" else positions


def check_optimiser(args: Any, model: torch.nn.Module, trained: list[torch.nn.Parameter]) -> None:
    """Make the optimiser of a run for a parameter that nobody trains.

    Raises:
        ConfigError: its package is missing, or it refuses a value.
    """
    from transformers import Trainer

    name = word(args.optim)
    bound = "layerwise" in name or "lomo" in name
    # Those two hang hooks on the model when they are made, so only their packages are looked for.
    probe = torch.nn.Parameter(torch.zeros_like(trained[0].detach().reshape(-1)[:1]))
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, None if bound else model)  # type: ignore[arg-type]
        if inspect.isclass(kind) and not {"params", "model", "optimizer_dict"} & settings.keys():
            kind([probe], **settings)  # type: ignore[call-arg]
    except (
        ImportError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        reason = one_line(error, None, whole=True)
        if bound and "pass a" in reason:
            return
        raise ConfigError(f"training.optim {name} cannot be used here: {reason}") from None
