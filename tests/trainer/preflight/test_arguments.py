"""Every name of TrainingArguments has a place, and no value reaches transformers that is none."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from formats.errors import ConfigError
from trainer.config_file import config_from_dict
from trainer.preflight.arguments import (
    ARGUMENTS,
    FORMER,
    PASSED,
    REFUSED,
    SET,
    refuse_argument,
    require_one_device,
)
from trainer.preflight.combinations import OPTIM_ARGS, optim_args_of
from trainer.recipe import DEFAULTS, resolve_training, training_arguments

ROOT = Path(__file__).resolve().parents[3]
BASE = {"cache": "c", "model": "m", "out": "o"}


def resolved(training: dict, **more) -> dict:
    return resolve_training(config_from_dict({**BASE, **more, "training": training}))


def test_the_table_lists_every_name_of_the_installed_version_and_no_other():
    import transformers

    names = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments) if entry.init}
    assert set(ARGUMENTS) == names
    assert {argument.handling for argument in ARGUMENTS.values()} == {PASSED, SET, REFUSED}
    for name, argument in ARGUMENTS.items():
        assert (argument.check is not None) == (argument.handling == PASSED), name
        assert argument.note or argument.handling == PASSED, name
    assert not set(FORMER) & names


def test_the_page_is_written_from_the_table():
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "make_training_arguments.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "training-arguments.md").read_text(encoding="utf-8") == module.page()


def test_a_name_that_only_a_newer_transformers_has_is_refused(monkeypatch):
    from trainer import recipe

    monkeypatch.setattr(recipe, "ARGUMENTS", {k: v for k, v in ARGUMENTS.items() if k != "weight_decay"})
    with pytest.raises(
        ConfigError, match=r"training.weight_decay is new in transformers .* and not known here"
    ):
        recipe.check_names({"weight_decay": 0.1})


NONSENSE = ["fast", "", float("nan"), float("inf"), -1, {"a": 1}, [1], True, None, "1e-5"]


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_no_nonsense_reaches_transformers(name):
    """Whatever is not refused in one line is a value that TrainingArguments keeps as it is."""
    for value in NONSENSE:
        try:
            refuse_argument(name, value)
        except ConfigError as error:
            assert "\n" not in str(error) and str(error).startswith(f"training.{name}")
            continue
        allowed = ARGUMENTS[name].allowed
        if ARGUMENTS[name].handling != PASSED:
            assert value is None or value in allowed, value
        elif isinstance(value, float):
            raise AssertionError(f"{name} takes {value}")


@pytest.mark.parametrize(
    "name",
    [name for name, argument in ARGUMENTS.items() if argument.handling != PASSED and name != "output_dir"],
)
def test_what_is_set_or_refused_may_be_said_and_not_contradicted(name):
    """The value that holds anyway is accepted (a configuration from elsewhere may spell it out), any other is not."""
    argument = ARGUMENTS[name]
    for value in (None, *argument.allowed):
        resolved({name: value})
    for value in (True, False, "some", 3):
        if not any(type(value) is type(entry) and value == entry for entry in argument.allowed):
            with pytest.raises(ConfigError, match=f"training.{name} is not available here"):
                resolved({name: value})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"eval_steps": 5}, "it needs eval_strategy: steps, got no"),
        ({"eval_delay": 2}, "it needs an eval_strategy"),
        ({"eval_on_start": True}, "it needs eval_caches"),
        ({"save_strategy": "epoch", "save_steps": 5}, "it needs save_strategy: steps, got epoch"),
        ({"logging_strategy": "epoch", "logging_steps": 5}, "it needs logging_strategy: steps, got epoch"),
        ({"liger_kernel_config": {"rope": False}}, "it needs use_liger_kernel"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "it needs gradient_checkpointing"),
        ({"torch_compile": False, "torch_compile_backend": "eager"}, "it needs torch_compile: true"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "use constant_with_warmup"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "constant takes none"),
        ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"a": 1}}, "takes none"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers of at least 1"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers of at least 1"),
        ({"dataloader_multiprocessing_context": "spawn"}, "dataloader_num_workers of at least 1"),
        ({"fsdp_config": {"fsdp_version": 2}}, "it needs fsdp"),
        ({"optim_target_modules": ["mlp"]}, "GaLore and APOLLO do"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "optim sgd does not read it"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "optim adafactor does not read it"),
        ({"optim_args": "momentum=0.9"}, "takes none, got momentum"),
        ({"optim": "sgd", "optim_args": "momentum"}, "must be name=value"),
        ({"optim": "sgd", "optim_args": "speed=3"}, "takes momentum, dampening, nesterov, got speed"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "no effect, got 0.1; use training.weight_decay"),
        ({"optim": "adagrad", "optim_args": "eps=1e-9,weight_decay=0"}, "use training.weight_decay"),
        ({"optim": "rmsprop", "optim_args": "weight_decay=0.1"}, "use training.weight_decay"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=on"},
            "nesterov must be true or false, got on",
        ),
        ({"optim": "rmsprop", "optim_args": "centered=ture"}, "centered must be true or false, got ture"),
        ({"trackio_space_id": "a/b"}, "it needs trackio in report_to"),
        ({"metric_for_best_model": "kl"}, "it needs load_best_model_at_end"),
        ({"greater_is_better": True}, "it needs load_best_model_at_end"),
        ({"fsdp": True}, "needs several processes"),
        ({"ddp_backend": "gloo"}, "needs several processes"),
        ({"warmup_ratio": 0.1}, "use training.warmup_steps"),
        ({"group_by_length": True}, "use group_by_length: true, without"),
        ({"evaluation_strategy": "steps"}, "use training.eval_strategy"),
        ({"tp_size": 2}, "tensor parallel training is not supported; use FSDP"),
        ({"deepspeed": "zero3.json"}, "use FSDP"),
        ({"parallelism_config": {"tp_size": 2}}, "use FSDP"),
        ({"report_to": "tensorbored"}, "must be of none, all,"),
        ({"report_to": ["none", "wandb"]}, "must be of none, all,"),
        ({"report_to": "dvclive"}, "dvclive cannot be used here"),
        ({"warmup_steps": 2.5}, "a whole number of steps, or below 1"),
        ({"save_steps": 1.5}, "a whole number of steps, or below 1"),
        ({"max_steps": 0}, "must be at least 1 or -1, got 0"),
        ({"torch_compile_backend": "outductor"}, "must be one of aot_eager"),
        ({"torch_compile_mode": "fast"}, "must be one of default, reduce-overhead"),
    ],
)
def test_settings_without_effect_are_refused(training, message):
    with pytest.raises(ConfigError) as error:
        resolved(training)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"save_strategy": "no", "save_steps": 5},
        {"save_strategy": "epoch"},
        {"logging_strategy": "epoch"},
        {"lr_scheduler_type": "constant"},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"optim": "adafactor"},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True},
        {"remove_unused_columns": False, "average_tokens_across_devices": True, "push_to_hub": False},
        {"neftune_noise_alpha": 5, "include_num_input_tokens_seen": "non_padding"},
        {"torch_compile_backend": "eager", "gradient_checkpointing": True},
        {"learning_rate": None, "weight_decay": 1},
    ],
)
def test_resolved_settings_can_be_given_again(training):
    """anneal.yaml holds them, and is a --config file."""
    once = resolved(training)
    assert resolved(once) == once
    training_arguments(once, Path("o"))
    assert set(once) >= set(DEFAULTS) - {"save_steps", "logging_steps"}


@pytest.mark.parametrize(
    ("training", "more", "message"),
    [
        ({"fp16": True}, {}, "training.fp16 needs a GPU"),
        ({"tf32": True}, {}, "training.tf32 needs a GPU"),
        ({"fp16": True, "bf16": True}, {}, "exclude each other"),
        ({"use_cpu": False}, {}, "needs a GPU, got a machine without one"),
        ({}, {"dtype": "float16"}, "dtype float16 cannot be trained"),
        ({"bf16": True}, {"dtype": "float16", "lora": {}}, "does not go with dtype float16"),
        ({"bf16_full_eval": True}, {}, "evaluation computes in the precision of training"),
    ],
)
def test_arithmetic_that_cannot_work_here_is_refused(training, more, message):
    import torch

    if torch.cuda.is_available():
        training = {"use_cpu": True, **training}
        if training["use_cpu"] is False:
            pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError) as error:
        resolved(training, **more)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "deepspeed is not available here"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism_config is not available here"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM is not available here"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "training.fp16 needs a GPU"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed precision must be no, fp16 or bf16"),
    ],
)
def test_what_a_launcher_asks_for_is_checked_as_well(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        resolved({"use_cpu": True})


def test_the_names_that_optimisers_read_are_those_of_transformers():
    """Every name in our table occurs in transformers' code for that optimiser, and the other way round."""
    import inspect
    import re

    from transformers import trainer_optimizer

    source = inspect.getsource(trainer_optimizer)
    read = set(re.findall(r'optim_args\.(?:get|pop)\("(\w+)"', source)) | set(
        re.findall(r'"(\w+)" in ctx.optim_args', source)
    )
    for group in re.findall(r"for key in \(([^)]*)\):", source):
        read |= set(re.findall(r'"(\w+)"', group))
    ours = {name for names in OPTIM_ARGS.values() for name in names}
    assert ours - read <= {"centered"} and read <= ours
    assert (
        optim_args_of("paged_ademamix_8bit") == OPTIM_ARGS["ademamix"] and optim_args_of("adamw_torch") == ()
    )


@pytest.mark.parametrize(
    ("training", "more", "message"),
    [
        ({}, {"group_by_length": True}, "group_by_length would have no effect: it needs shuffled rows"),
        ({"data_seed": 7}, {}, "training.data_seed would have no effect: .* got data_seed: 7"),
        ({"data_seed": 0}, {}, "training.data_seed would have no effect: .* got data_seed: 0"),
    ],
)
def test_what_is_about_shuffling_is_refused_without_it(training, more, message):
    resolved(training, **more)
    with pytest.raises(ConfigError, match=message):
        resolved(training | {"train_sampling_strategy": "sequential"}, **more)


def test_null_is_a_value_where_it_is_one_and_else_the_default():
    found = resolved({"save_total_limit": None, "learning_rate": None, "eval_steps": None})
    assert found["save_total_limit"] is None and found["learning_rate"] == DEFAULTS["learning_rate"]
    with pytest.raises(ConfigError, match=r"unknown setting training\.learning_rat"):
        resolved({"learning_rat": None})


def test_inductor_needs_a_compiler_on_a_cpu(tmp_path):
    from torch._inductor import config

    # its own patch: monkeypatch takes the setting for a class attribute and deletes it when done
    with (
        config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}),
        pytest.raises(ConfigError, match="torch_compile needs a C\\+\\+ compiler on a CPU"),
    ):
        resolved({"torch_compile": True, "use_cpu": True})


@pytest.mark.parametrize(
    ("n_gpu", "device_map", "got"),
    [
        (2, None, "one process for 2; start with torchrun"),
        (1, {"model.embed_tokens": 0, "lm_head": 1}, r"parts on 0, 1 \(device_map\); start with torchrun"),
        (1, {"model": 0, "lm_head": "cpu"}, "parts on 0, cpu"),
        (1, {"": 0}, None),
        (1, {"model": 0, "lm_head": 0}, None),
        (0, None, None),
    ],
)
def test_a_process_computes_on_one_device(n_gpu, device_map, got):
    args, model = SimpleNamespace(n_gpu=n_gpu), SimpleNamespace(hf_device_map=device_map)
    if got is None:
        require_one_device(args, model)
    else:
        with pytest.raises(ConfigError, match=got):
            require_one_device(args, model)
