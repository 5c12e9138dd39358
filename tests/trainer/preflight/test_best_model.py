"""The best checkpoint is the best: its metric is known before training, and its direction is ours."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainingArguments

from formats.errors import ConfigError
from trainer import load_config, train
from trainer.config_file import config_from_dict
from trainer.data.dataset import CachedDataset
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer
from trainer.preflight.best_model import METRICS, full_name, require_metric
from trainer.recipe import resolve_training, training_arguments

BASE = {"cache": "c", "model": "m", "out": "o"}
ONE, TWO = {"held": "h"}, {"prose": "p", "code": "q"}
QUICK = [
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=4",
    "training.learning_rate=1e-3",
    "training.warmup_steps=0",
    "step0_rows=2",
]


def resolved(caches: dict, **training) -> dict:
    return resolve_training(config_from_dict({**BASE, "eval_caches": caches, "training": training}))


@pytest.mark.parametrize(
    ("name", "caches", "found"),
    [
        (None, ["held"], "eval_held_loss"),
        ("loss", ["held"], "eval_held_loss"),
        ("eval_loss", ["held"], "eval_held_loss"),
        ("kl", ["held"], "eval_held_kl"),
        ("held_kl", ["held"], "eval_held_kl"),
        ("eval_held_kl", ["held"], "eval_held_kl"),
        ("eval_x_ce", ["eval_x"], "eval_eval_x_ce"),
        ("code_perplexity", ["prose", "code"], "eval_code_perplexity"),
        ("loss", ["prose", "code"], None),
        (None, ["prose", "code"], None),
        ("held_head_mass", ["held"], None),  # the teacher's: no checkpoint changes it
        ("held_runtime", ["held"], None),
        ("bleu", ["held"], None),
        ("ce", [""], "eval_ce"),
    ],
)
def test_names_are_those_that_evaluation_will_give(name, caches, found):
    assert full_name(name, caches) == found


def test_every_metric_of_ours_is_better_when_lower():
    for metric in METRICS:
        found = resolved(ONE, load_best_model_at_end=True, metric_for_best_model=metric)
        assert (found["metric_for_best_model"], found["greater_is_better"]) == (f"eval_held_{metric}", False)
        assert resolved(ONE, **found) == found
        args = training_arguments(found, "o")
        assert args.greater_is_better is False and args.load_best_model_at_end


@pytest.mark.parametrize(
    ("training", "strategies"),
    [
        ({}, ("steps", 0.2, "steps", 0.2)),
        ({"eval_strategy": "epoch"}, ("epoch", None, "epoch", 0.2)),
        ({"save_strategy": "epoch"}, ("epoch", None, "epoch", None)),
        ({"eval_strategy": "steps", "eval_steps": 5}, ("steps", 5, "steps", 5)),
        ({"save_steps": 7}, ("steps", 7, "steps", 7)),
        ({"eval_steps": 2, "eval_strategy": "steps", "save_steps": 4}, ("steps", 2, "steps", 4)),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, ("epoch", None, "best", None)),
    ],
)
def test_evaluations_and_checkpoints_meet_where_only_one_was_typed(training, strategies):
    found = resolved(ONE, load_best_model_at_end=True, **training)
    names = ("eval_strategy", "eval_steps", "save_strategy")
    assert tuple(found.get(name) for name in names) == strategies[:3]
    if strategies[2] == "steps":
        assert found["save_steps"] == strategies[3]
    training_arguments(found, "o")


@pytest.mark.parametrize(
    ("caches", "training", "message"),
    [
        ({}, {"load_best_model_at_end": True}, "needs eval_caches, got none"),
        ({}, {"save_strategy": "best"}, "save_strategy: best needs eval_caches"),
        ({}, {"lr_scheduler_type": "greedy"}, "lr_scheduler_type: greedy needs eval_caches"),
        (
            TWO,
            {"load_best_model_at_end": True},
            "prose_loss, prose_ce, prose_perplexity, prose_kl, code_loss",
        ),
        (TWO, {"load_best_model_at_end": True, "metric_for_best_model": "loss"}, "got 'loss'"),
        (
            ONE,
            {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
            "held_kl; got 'accuracy'",
        ),
        (ONE, {"load_best_model_at_end": True, "greater_is_better": True}, "better when lower, got true"),
        (
            ONE,
            {"load_best_model_at_end": True, "metric_for_best_model": "held_kl", "greater_is_better": True},
            "contradicts metric_for_best_model held_kl",
        ),
        (ONE, {"save_strategy": "best"}, "save_strategy: best needs evaluations, got eval_strategy: no"),
        (
            ONE,
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
            "got eval_strategy: epoch and save_strategy: steps",
        ),
        (
            ONE,
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "no"},
            "got eval_strategy: steps and save_strategy: no",
        ),
        (
            ONE,
            {"load_best_model_at_end": True, "eval_strategy": "no"},
            "needs evaluations, got eval_strategy: no",
        ),
        (
            ONE,
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "eval_strategy": "epoch",
                "lr_scheduler_kwargs": {"mode": "max"},
            },
            "lr_scheduler_kwargs.mode contradicts",
        ),
        (
            ONE,
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3},
            "multiple of the evaluation steps",
        ),
    ],
)
def test_what_cannot_choose_a_best_model_is_refused(caches, training, message):
    with pytest.raises(ConfigError) as error:
        training_arguments(resolved(caches, **training), "o")
    assert message in str(error.value) and "\n" not in str(error.value)


def settings(model, cache, held, out, *overrides: str):
    flags = {"cache": str(cache), "model": str(model), "out": str(out)}
    return load_config(flags=flags, overrides=[*QUICK, f"eval_caches.held={held}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.eval_steps=0.4", "training.eval_strategy=steps", "training.save_steps=0.8"], None),
        (
            # Of 7 steps: evaluations at 3 and 6, checkpoints at 5 and 7, for 2/5 and 4/6 round up differently.
            [
                "training.eval_steps=0.3",
                "training.eval_strategy=steps",
                "training.save_steps=0.6",
                "training.max_steps=7",
            ],
            "got one every 3 and a checkpoint every 5 of 7 steps",
        ),
        (
            ["training.eval_strategy=steps", "training.eval_steps=1", "training.eval_delay=9"],
            "must leave an evaluation, got 9 in a run of 4",
        ),
    ],
)
def test_shares_of_steps_that_do_not_meet_are_refused(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, overrides, message
):
    out = tmp_path / "run"
    config = settings(
        tiny_llama_dir,
        pruned_cache,
        llama_eval_cache,
        out,
        "training.load_best_model_at_end=true",
        *overrides,
    )
    if message is None:
        assert train(config).num_steps == 4
        return
    with pytest.raises(ConfigError) as error:
        train(config)
    assert message in str(error.value) and not out.exists()


@pytest.mark.parametrize("metric", ["kl", "loss"])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_result_is_the_checkpoint_of_the_least_value(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, metric, adapters
):
    """KL to the initial model grows with every step: the first checkpoint must win, and is what is published."""
    overrides = [
        "training.load_best_model_at_end=true",
        "training.save_steps=1",
        f"training.metric_for_best_model={metric}",
    ]
    overrides += ["kl_coef=100", "training.learning_rate=3e-2"] + (["lora.r=4"] if adapters else [])
    report = train(settings(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path / "run", *overrides))
    values = [entry[f"eval_held_{metric}"] for entry in report.log_history if f"eval_held_{metric}" in entry]
    assert len(values) == 4
    found = report.evaluation["held"]
    result = found["kl"] if metric == "kl" else found["ce"] + 100 * found["kl"]
    assert result == pytest.approx(min(values), rel=1e-4)
    assert np.argmin(values) != 3  # otherwise the last would do as well


def test_the_loss_of_a_run_without_cross_entropy_has_none(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path
):
    """`loss: kl`: what is evaluated and chosen by is the KL; a mixed text that is learnt brings the other term."""
    overrides = ["loss=kl", "kl_coef=3", "training.eval_strategy=steps", "training.eval_steps=2"]
    mixed = f"caches=[{{path: {pruned_cache}, weight: 0.5, loss: ce}}]"
    for name, more, learns in (("kl", [], 0), ("both", [mixed], 1)):
        asked = [*overrides, *more, "verify_saved=false", "training.max_steps=2"]
        report = train(settings(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path / name, *asked))
        (entry,) = [entry for entry in report.log_history if "eval_held_loss" in entry]
        expected = 3 * entry["eval_held_kl"] + learns * entry["eval_held_ce"]
        assert entry["eval_held_loss"] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_loss_of_a_run_without_cross_entropy_needs_teachers_and_no_labels():
    require_metric("eval_held_loss", {"held": (0, 5)}, learns=False)
    with pytest.raises(ConfigError, match="needs teacher positions, got none in held; use held_ce"):
        require_metric("eval_held_loss", {"held": (5, 0)}, learns=False)
    with pytest.raises(ConfigError, match="needs tokens that carry loss, got none in held; use held_kl"):
        require_metric("eval_held_loss", {"held": (0, 5)})


def test_with_a_budget_the_loss_chooses_nothing(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path):
    """Its coefficient moves: what is logged is the loss of the moment, and two of them are not compared."""
    budget = [
        "kl_budget=0.02",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.logging_steps=1",
    ]
    report = train(settings(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path / "run", *budget))
    coefs = {entry["step"]: entry["kl_coef"] for entry in report.log_history if "kl_coef" in entry}
    found = [entry for entry in report.log_history if "eval_held_loss" in entry]
    for entry in found:
        expected = entry["eval_held_ce"] + coefs[entry["step"]] * entry["eval_held_kl"]
        assert entry["eval_held_loss"] == pytest.approx(expected, rel=1e-5)
    assert len({coefs[entry["step"]] for entry in found}) == len(found) > 1
    best = [*budget, "training.load_best_model_at_end=true"]
    with pytest.raises(ConfigError, match=r"got held_loss beside kl_budget, .* use held_ce"):
        train(settings(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path / "best", *best))
    assert not (tmp_path / "best").exists()


def test_the_best_checkpoint_is_found_after_a_move(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path):
    """A run is interrupted, its directory moved, and continued: the best so far is still the best."""
    from trainer.loop.step_control import StepControl

    overrides = [
        "training.load_best_model_at_end=true",
        "training.save_steps=1",
        "training.metric_for_best_model=kl",
    ]
    overrides += ["training.save_total_limit=1", "training.learning_rate=3e-2"]
    first = settings(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path / "one", *overrides)
    original = StepControl.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.trainer.stop_request.signal_name = "SIGTERM"
        return original(self, args, state, control, **kwargs)

    StepControl.on_step_end = stop
    try:
        assert train(first).interrupted_by == "SIGTERM"
    finally:
        StepControl.on_step_end = original
    (tmp_path / "one").rename(tmp_path / "two")
    state = json.loads((tmp_path / "two" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1 and "/one/" in state["best_model_checkpoint"]
    second = settings(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path / "two", *overrides)
    report = train(second)
    values = [entry["eval_held_kl"] for entry in report.log_history if "eval_held_kl" in entry]
    assert len(values) == 4 and report.evaluation["held"]["kl"] == pytest.approx(values[0], rel=1e-4)


def trainer_of(model_dir, cache, tmp_path, callbacks=(), eval_dataset=None, **arguments):
    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, **arguments
    )
    return LabelAnnealingTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir),
        args,
        train_dataset=CachedDataset(cache),
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def test_early_stopping_has_a_metric_that_exists(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path):
    held = CachedDataset(llama_eval_cache)
    evaluates = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "max_steps": 6,
        "learning_rate": 3e-2,
    }
    with pytest.raises(ConfigError, match="EarlyStoppingCallback needs evaluations"):
        trainer_of(tiny_llama_dir, pruned_cache, tmp_path, [EarlyStoppingCallback()], held)
    two = {"a": held, "b": held}
    with pytest.raises(ConfigError, match=r"must be one of a_loss, .* for EarlyStoppingCallback; got None"):
        trainer_of(tiny_llama_dir, pruned_cache, tmp_path, [EarlyStoppingCallback()], two, **evaluates)
    trainer = trainer_of(
        tiny_llama_dir,
        pruned_cache,
        tmp_path,
        [EarlyStoppingCallback(1)],
        held,
        metric_for_best_model="kl",
        **evaluates,
    )
    assert trainer.args.metric_for_best_model == "eval_kl" and trainer.args.greater_is_better is False
    trainer.train()
    values = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    assert trainer.state.global_step == len(values) < 6 and values[-1] > min(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub is not available here"),
        ({"label_smoothing_factor": 0.1}, "use label_smoothing, without `training.`"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last is not available here"),
        ({"bf16_full_eval": True}, "bf16_full_eval is not available here"),
    ],
)
def test_arguments_made_elsewhere_are_checked_too(tiny_llama_dir, pruned_cache, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(tiny_llama_dir, pruned_cache, tmp_path, **arguments)
