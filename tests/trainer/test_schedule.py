"""The first step trains, whatever the schedule and however short the run; nothing else of a schedule changes."""

import io

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from formats.errors import ConfigError
from trainer.schedule import check_schedule, first_step_trains, schedule_arguments

RATE = 0.25
NEEDED = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 1},
}
WARMED = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt"]
WARMED += ["cosine_with_min_lr", "warmup_stable_decay"]


def rates(schedule: str, num_steps: int, warmup: int, *, ours: bool, **given) -> np.ndarray:
    """The learning rate of every step, as an optimiser sees it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    made = get_scheduler(
        schedule,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs={**NEEDED.get(schedule, {}), **given},
    )
    if ours:
        made = first_step_trains(made, schedule, warmup, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return np.asarray(found)


@pytest.mark.parametrize("schedule", WARMED)
def test_the_warm_up_climbs_from_a_share_of_the_rate_to_the_rate(schedule):
    """W = 4: a quarter, a half, three quarters, all of it; then what transformers gives."""
    warmup, num_steps = 4, 10
    found, theirs = (rates(schedule, num_steps, warmup, ours=ours) for ours in (True, False))
    np.testing.assert_allclose(found[:warmup], RATE * np.arange(1, warmup + 1) / warmup, rtol=1e-12)
    np.testing.assert_array_equal(found[warmup:], theirs[warmup:])
    assert theirs[0] == 0.0  # what is repaired


@pytest.mark.parametrize("schedule", [*WARMED, "cosine_warmup_with_min_lr"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_tiny_runs_train_in_every_step(schedule, num_steps):
    """A share of 5 % is one step of warm-up; the only step of a run then has the whole rate."""
    found = rates(schedule, num_steps, 1, ours=True)
    assert found[0] == pytest.approx(RATE) and (found > 0).all()


@pytest.mark.parametrize("schedule", ["constant", *WARMED])
def test_without_a_warm_up_nothing_changes(schedule):
    np.testing.assert_array_equal(*(rates(schedule, 6, 0, ours=ours) for ours in (True, False)))


def test_a_continued_schedule_goes_on_where_it_was():
    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
        theirs = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=8)
        return optimizer, first_step_trains(theirs, "linear", 3, 8)

    expected = rates("linear", 8, 3, ours=True)
    optimizer, schedule = made()
    for _ in range(2):
        optimizer.step()
        schedule.step()
    state, parameters = schedule.state_dict(), optimizer.state_dict()
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    optimizer, schedule = made()
    optimizer.load_state_dict(parameters)
    schedule.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(2, 8):
        assert optimizer.param_groups[0]["lr"] == expected[step]
        optimizer.step()
        schedule.step()


def check(schedule: str, num_steps: int, warmup: float = 0, **given):
    args = TrainingArguments(
        output_dir="nowhere",
        eval_strategy="steps",
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=given,
        warmup_steps=warmup,
        use_cpu=True,
    )

    def make(optimizer, steps):
        warm = args.get_warmup_steps(steps)
        made = get_scheduler(schedule, optimizer, warm, steps, scheduler_specific_kwargs=given)
        return first_step_trains(made, schedule, warm, steps)

    check_schedule(make, args, num_steps)


@pytest.mark.parametrize(
    ("schedule", "given", "message"),
    [
        ("cosine", {"num_cycle": 2}, "cosine takes num_cycles; got num_cycle"),
        ("linear", {"power": 2}, "linear takes none; got power"),
        ("polynomial", {"power": "two"}, "training.lr_scheduler_kwargs of polynomial"),
        ("polynomial", {"lr_end": 1.0}, "must be smaller than initial lr"),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "Unknown decay type"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "num_stable_steps": 2}, "got learning rate 0 in step"),
        (
            "cosine_warmup_with_min_lr",
            {"min_lr_rate": 0.0, "warmup_lr_rate": 0.0},
            "learning rate 0 in step 1 of",
        ),
        ("reduce_lr_on_plateau", {"patient": 2}, "reduce_lr_on_plateau takes"),
        ("reduce_lr_on_plateau", {"factor": 2.0}, "Factor should be < 1.0"),
        ("greedy", {"patient": 2}, "greedy takes"),
    ],
)
def test_schedules_that_cannot_be_or_train_nothing_are_refused(schedule, given, message):
    with pytest.raises(ConfigError) as error:
        check(schedule, 10, 0.05, **given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("schedule", [*WARMED, "constant", "cosine_warmup_with_min_lr"])
def test_schedules_as_they_are_meant_pass(schedule, num_steps):
    check(schedule, num_steps, 0 if schedule == "constant" else 0.05, **NEEDED.get(schedule, {}))


def test_a_schedule_may_touch_zero_in_between():
    check("cosine", 9, 0, num_cycles=1.0)
    assert "num_cycles" in schedule_arguments("cosine")
