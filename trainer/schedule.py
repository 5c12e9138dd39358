"""The learning rate's schedule, with one change: the first step trains.

The schedules of transformers give step i of a warm-up of W steps the rate i / W, counted from 0: the first step of
every run has the rate 0, and so has the only step of a run of one (a share of 5 % is rounded up to one step). Here
step i has the rate that transformers gives step i + 1: it climbs from rate / W to the rate, and what follows the
warm-up is unchanged.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from formats.errors import ConfigError, one_line

STARTS_ABOVE_ZERO = ("cosine_warmup_with_min_lr",)
"""Schedules whose warm-up begins above 0 in transformers already."""
OWN_PARAMETERS = frozenset({"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs"})
LONGEST_WALK = 100_000
"""Steps of a schedule that are looked at before training."""


def first_step_trains(scheduler: Any, schedule: str, num_warmup_steps: int, num_training_steps: int) -> Any:
    """The same schedule, whose warm-up is taken one step earlier. Schedules without a warm-up come back as they are.

    Args:
        scheduler: as `transformers.get_scheduler` made it, not stepped yet.
        schedule: its `lr_scheduler_type`.
        num_warmup_steps: W.
        num_training_steps: of the run; behind its end the last rate stays.
    """
    if not isinstance(scheduler, LambdaLR) or schedule in STARTS_ABOVE_ZERO or num_warmup_steps < 1:
        return scheduler
    optimizer = scheduler.optimizer
    for group, rate in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = rate
    last = num_training_steps - 1
    return LambdaLR(optimizer, [_earlier(factor, num_warmup_steps, last) for factor in scheduler.lr_lambdas])


def _earlier(factor: Callable[[int], float], num_warmup_steps: int, last: int) -> Callable[[int], float]:
    def shifted(step: int) -> float:
        step = min(step, last)  # asked once more after the last step, where some schedules divide by zero
        if step == num_warmup_steps - 1:
            return 1.0  # the top; a schedule that ends there has fallen to 0 one step later
        return factor(step + 1 if step < num_warmup_steps else step)

    return shifted


def check_schedule(make: Callable[[torch.optim.Optimizer, int], Any], args: Any, max_steps: int) -> None:
    """Make the schedule of a run for a parameter that nobody trains, and walk it.

    Args:
        make: (optimiser, steps) -> the schedule, as the run will make it.
        args: the run's TrainingArguments.
        max_steps: steps of the run.

    Raises:
        ConfigError: an argument is unknown or no value, or there are steps that train nothing.
    """
    schedule, given = str(args.lr_scheduler_type.value), dict(args.lr_scheduler_kwargs or {})
    known = schedule_arguments(schedule)
    for name in given:
        if name not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise ConfigError(f"training.lr_scheduler_kwargs: {schedule} takes {takes}; got {name}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        scheduler = make(optimizer, max_steps)
        factors = _factors(scheduler, max_steps)
    except (TypeError, ValueError, ArithmeticError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"training.lr_scheduler_kwargs of {schedule}, got {given}: {one_line(error)}"
        ) from None
    _refuse_idle_steps(factors, schedule, max_steps)


def _factors(scheduler: Any, max_steps: int) -> list[float]:
    """The factors on the learning rate of the first steps; none of schedules that follow a metric."""
    if not isinstance(scheduler, LambdaLR):
        return []
    return [float(scheduler.lr_lambdas[0](step)) for step in range(min(max_steps, LONGEST_WALK))]


def _refuse_idle_steps(factors: list[float], schedule: str, max_steps: int) -> None:
    """Refuse a first step, or two in a row, that train nothing; a schedule may touch 0 in between, or end there."""
    for step, factor in enumerate(factors):
        if not math.isfinite(factor):
            raise ConfigError(
                f"training.lr_scheduler_kwargs of {schedule} give step {step + 1} the factor {factor}"
            )
        idle = factor <= 0 and (step == 0 or factors[step - 1] <= 0)
        if idle:
            raise ConfigError(
                f"training.lr_scheduler_type {schedule} must train in every step, got learning rate 0 in step "
                f"{step + 1} of {max_steps}; change lr_scheduler_kwargs, warmup_steps or the number of steps"
            )


def schedule_arguments(schedule: str) -> frozenset[str]:
    """Names that `lr_scheduler_kwargs` may hold for this schedule."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
    from transformers.trainer_utils import SchedulerType

    maker: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(schedule)]
    if schedule == "reduce_lr_on_plateau":
        maker = torch.optim.lr_scheduler.ReduceLROnPlateau
    elif schedule == "greedy":
        maker = GreedyLR
    return frozenset(inspect.signature(maker).parameters) - OWN_PARAMETERS
