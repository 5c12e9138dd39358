"""Every name of `transformers.TrainingArguments`, and what becomes of it here: passed on, set by us, or refused.

docs/training-arguments.md is written from this table, and a test holds the table to the installed version of
transformers: a name that it does not list is refused, never passed on unseen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.errors import ConfigError
from trainer.preflight.values import (
    Check,
    either,
    flag,
    flags,
    integer,
    log_level,
    mapping,
    member_of,
    number,
    one_of,
    optional,
    text,
    texts,
)

PASSED, SET, REFUSED = "passed", "set", "refused"
LARGEST_SEED = 2**32
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One name of TrainingArguments."""

    handling: str
    """`passed`: means here what it means in transformers; `set`: settled by us; `refused`: cannot be honoured."""
    note: str = ""
    """What it is set to, or why it is refused and what to do instead; for `passed` what is particular here."""
    check: Check | None = None
    """Refuses a value that is none; only of what is passed."""
    decides: bool = False
    """Whether it decides what the steps compute, so that an interrupted run must keep it."""
    allowed: tuple[Any, ...] = ()
    """Values that may be typed although it is set or refused: they say what happens anyway. null always may."""


def _passed(check: Check, note: str = "", *, decides: bool = False) -> Argument:
    return Argument(handling=PASSED, check=check, note=note, decides=decides)


def _steers(check: Check, note: str = "") -> Argument:
    return _passed(check, note, decides=True)


def _set(note: str, *allowed: Any) -> Argument:
    return Argument(handling=SET, note=note, allowed=allowed)


def _refused(note: str, *allowed: Any) -> Argument:
    return Argument(handling=REFUSED, note=note, allowed=allowed)


_steps_or_share = number(0, above=True, whole_from=1)
_HUB = "upload the finished directory with the tools of the hub"
_PREDICTIONS = "evaluation gives means over tokens; no predictions are kept"
_STRATEGY = member_of("IntervalStrategy")
_TRACKIO = "needs trackio in report_to"

ARGUMENTS: Mapping[str, Argument] = {
    # --- output ---
    "output_dir": _set("use --out"),
    # --- how much ---
    "per_device_train_batch_size": _passed(integer(1), "rows per step = this x accumulation x processes"),
    "gradient_accumulation_steps": _passed(integer(1), "rows per step = batch x this x processes"),
    "num_train_epochs": _passed(number(0, above=True)),
    "max_steps": _passed(integer(1, or_else=-1), "wins over num_train_epochs; -1 leaves it to the epochs"),
    # --- rate ---
    "learning_rate": _steers(number(0, above=True)),
    "lr_scheduler_type": _steers(member_of("SchedulerType"), "the first step always trains"),
    "lr_scheduler_kwargs": _steers(optional(mapping), "checked against the schedule's own names"),
    "warmup_steps": _steers(
        number(0, whole_from=1), "below 1 a share of all steps; step 1 has learning_rate / steps"
    ),
    # --- optimiser ---
    "optim": _steers(member_of("OptimizerNames"), "its package must be installed"),
    "optim_args": _steers(
        optional(text),
        "name=value,...; names that the optimiser reads; weight_decay is an argument of its own",
    ),
    "optim_target_modules": _steers(optional(texts), "GaLore and APOLLO only"),
    "weight_decay": _steers(number(0)),
    "adam_beta1": _steers(number(0, below=1), "Adam's kin only"),
    "adam_beta2": _steers(number(0, below=1), "Adam's kin only"),
    "adam_epsilon": _steers(number(0), "Adam's kin only"),
    "max_grad_norm": _steers(number(0), "0 turns clipping off"),
    # --- the loss ---
    "average_tokens_across_devices": _set("true: a step's denominators count the tokens of all ranks", True),
    "label_smoothing_factor": _refused("use label_smoothing, without `training.`", 0),
    "neftune_noise_alpha": _steers(
        optional(number(0)), "noise on the embeddings while training; step 0 is without"
    ),
    # --- arithmetic ---
    "bf16": _steers(flag, "default: where the GPU has it"),
    "fp16": _steers(flag, "GPUs only"),
    "tf32": _steers(optional(flag), "GPUs only"),
    "bf16_full_eval": _refused("evaluation computes in the precision of training", False),
    "fp16_full_eval": _refused("evaluation computes in the precision of training", False),
    "gradient_checkpointing": _passed(flag),
    "gradient_checkpointing_kwargs": _passed(optional(mapping), "needs gradient_checkpointing"),
    "torch_compile": _steers(flag),
    "torch_compile_backend": _steers(optional(text), "turns torch_compile on"),
    "torch_compile_mode": _steers(optional(one_of(*COMPILE_MODES)), "turns torch_compile on"),
    "use_liger_kernel": _steers(
        flag, "its kernels for norms, rotary positions and MLPs; the loss stays ours"
    ),
    "liger_kernel_config": _steers(optional(flags), "the loss kernels are off"),
    "use_cache": _set("false: with a KV cache, packed rows would see each other", False),
    "torch_empty_cache_steps": _passed(optional(integer(1))),
    "auto_find_batch_size": _refused(
        "it would change the batch that the loss is averaged over; choose a size", False
    ),
    # --- logs ---
    "logging_strategy": _passed(_STRATEGY),
    "logging_steps": _passed(_steps_or_share, "needs logging_strategy: steps"),
    "logging_first_step": _passed(flag),
    "log_on_each_node": _passed(flag),
    "logging_nan_inf_filter": _set("false: a number that is not finite stops the run", False),
    "include_num_input_tokens_seen": _passed(
        either(flag, one_of("all", "non_padding", "no"), what="true, false, all, non_padding or no")
    ),
    "log_level": _passed(log_level),
    "log_level_replica": _passed(log_level),
    "disable_tqdm": _passed(optional(flag), "default: a bar on a terminal"),
    "report_to": _passed(texts, "default none; the reporter's package must be installed"),
    "run_name": _passed(optional(text), "a label for reporters"),
    "project": _passed(text, "a label for reporters"),
    "trackio_space_id": _passed(optional(text), _TRACKIO),
    "trackio_bucket_id": _passed(optional(text), _TRACKIO),
    "trackio_static_space_id": _passed(optional(either(flag, text, what="a text or false")), _TRACKIO),
    # --- evaluation ---
    "eval_strategy": _passed(_STRATEGY, "needs eval_caches"),
    "eval_steps": _passed(optional(_steps_or_share), "needs eval_strategy: steps"),
    "eval_delay": _passed(number(0), "needs an eval_strategy"),
    "eval_on_start": _passed(flag, "needs eval_caches"),
    "per_device_eval_batch_size": _passed(integer(1)),
    "prediction_loss_only": _set(_PREDICTIONS, True, False),
    "eval_do_concat_batches": _refused(_PREDICTIONS, True),
    "eval_use_gather_object": _refused(_PREDICTIONS, False),
    "eval_accumulation_steps": _refused(_PREDICTIONS),
    "include_for_metrics": _refused(_PREDICTIONS, []),
    "batch_eval_metrics": _refused(_PREDICTIONS, False),
    # --- checkpoints ---
    "save_strategy": _passed(member_of("SaveStrategy")),
    "save_steps": _passed(_steps_or_share, "needs save_strategy: steps"),
    "save_total_limit": _passed(optional(integer(1)), "the best checkpoint is kept beside"),
    "save_only_model": _refused(
        "without the optimiser a run cannot continue; save_total_limit bounds the disk", False
    ),
    "save_on_each_node": _refused("every node must see --out", False),
    "enable_jit_checkpoint": _refused("SIGTERM saves and stops without it", False),
    "load_best_model_at_end": _passed(flag, "the best checkpoint becomes the result"),
    "metric_for_best_model": _passed(
        optional(text), "one of ours; default: the loss of the only evaluation cache"
    ),
    "greater_is_better": _passed(optional(flag), "settled by the metric; a contradiction is refused"),
    "resume_from_checkpoint": _refused("run the same command again: an interrupted run continues by itself"),
    "ignore_data_skip": _refused("a run that continues reads on where it stopped", False),
    "restore_callback_states_from_checkpoint": _refused("a run that was stopped would stop again", False),
    # --- the hub ---
    "push_to_hub": _refused(_HUB, False),
    "hub_token": _refused(_HUB),
    "hub_private_repo": _refused(_HUB, False),
    "hub_model_id": _refused(_HUB),
    "hub_strategy": _refused(_HUB, "every_save"),
    "hub_always_push": _refused(_HUB, False),
    "hub_revision": _refused(_HUB),
    # --- chance ---
    "seed": _steers(integer(0, below=LARGEST_SEED)),
    "data_seed": _steers(
        optional(integer(0, below=LARGEST_SEED)), "of the order of rows, not with sequential; default: seed"
    ),
    "full_determinism": _steers(flag),
    # --- data ---
    "train_sampling_strategy": _steers(
        one_of(
            "random",
            "sequential",
            advice="use group_by_length: true, without `training.`, for batches of similar length",
        )
    ),
    "length_column_name": _refused(
        "a cache knows the lengths of its rows; use group_by_length: true", "length"
    ),
    "dataloader_drop_last": _refused("the last rows of an epoch are trained on as well", False),
    "dataloader_num_workers": _passed(integer(0), "default: 2 with a GPU, else 0"),
    "dataloader_pin_memory": _passed(flag),
    "dataloader_persistent_workers": _passed(flag, "needs dataloader_num_workers"),
    "dataloader_prefetch_factor": _passed(optional(integer(1)), "needs dataloader_num_workers"),
    "dataloader_multiprocessing_context": _passed(
        optional(one_of("fork", "spawn", "forkserver")), "needs dataloader_num_workers"
    ),
    "dataloader_in_order": _set("true: the order of rows is part of the run", True),
    "remove_unused_columns": _set("false: true would drop the teacher's columns", False),
    "label_names": _refused("the columns of a batch are fixed"),
    # --- machines ---
    "use_cpu": _passed(flag, "default: true where there is no GPU"),
    "ddp_find_unused_parameters": _passed(optional(flag)),
    "ddp_bucket_cap_mb": _passed(optional(integer(1))),
    "ddp_broadcast_buffers": _passed(optional(flag)),
    "ddp_static_graph": _passed(optional(flag)),
    "ddp_backend": _passed(optional(text), "needs several processes"),
    "ddp_timeout": _passed(integer(1)),
    "fsdp": _steers(optional(either(flag, texts, what="true or false")), "needs several processes"),
    "fsdp_config": _steers(optional(either(mapping, text, what="a mapping or a file")), "needs fsdp"),
    "deepspeed": _refused(
        "its engine owns the gradients and steps that this trainer counts and checks; use FSDP, which shards as "
        "ZeRO-3 does: training.fsdp: true",
        False,
    ),
    "parallelism_config": _refused(
        "tensor and context parallel training split what the loss needs whole; use FSDP"
    ),
    "accelerator_config": _refused(
        "batches and their split over ranks are made here; use the names of `training`"
    ),
    "local_rank": _refused("start with torchrun or accelerate launch, which set it", -1),
    # --- for scripts ---
    "do_train": _set("true", True),
    "do_eval": _refused("eval_caches and eval_strategy say what is evaluated, and when", False),
    "do_predict": _refused("use the finished directory with any engine", False),
    "debug": _refused("a number that is not finite stops the run without it", "", []),
    "skip_memory_metrics": _passed(flag),
}

FORMER: Mapping[str, str] = {
    "warmup_ratio": "use training.warmup_steps: below 1 it is a share of all steps",
    "evaluation_strategy": "use training.eval_strategy",
    "group_by_length": "use group_by_length: true, without `training.`",
    "no_cuda": "use training.use_cpu: true",
    "past_index": "no model that this trainer takes has it",
    "logging_dir": "set the directory of the reporter by its own environment variable",
    "overwrite_output_dir": "a run never overwrites another; choose another --out",
    "save_safetensors": "weights are always saved as safetensors",
    "per_gpu_train_batch_size": "use training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use training.per_device_eval_batch_size",
    "fp16_backend": "use training.fp16",
    "half_precision_backend": "use training.fp16 or training.bf16",
    "torchdynamo": "use training.torch_compile_backend",
    "include_tokens_per_second": "tokens per second are always logged",
    "include_inputs_for_metrics": _PREDICTIONS,
    "tensor_parallel_size": "tensor parallel training is not supported; use FSDP: training.fsdp: true",
    "tp_size": "tensor parallel training is not supported; use FSDP: training.fsdp: true",
    "context_parallel_size": "context parallel training is not supported; use FSDP: training.fsdp: true",
}
"""Names that other versions of transformers and other trainers have, and what to write instead."""


def takes_null(name: str) -> bool:
    """Whether null is a value of this argument (no limit, no delay); for the others it means the default."""
    check = ARGUMENTS[name].check
    try:
        return check is not None and check(f"training.{name}", None) is None
    except ConfigError:
        return False


UNHONOURED = (
    *(
        "label_smoothing_factor",
        "push_to_hub",
        "auto_find_batch_size",
        "dataloader_drop_last",
        "save_on_each_node",
    ),
    *(
        "bf16_full_eval",
        "fp16_full_eval",
        "batch_eval_metrics",
        "include_for_metrics",
        "enable_jit_checkpoint",
    ),
    "deepspeed",
)
"""Names that `LabelAnnealingTrainer` would ignore or fail on, whoever made its TrainingArguments."""


def refuse_argument(name: str, value: Any) -> None:
    """Refuse a value that is none, or that this trainer cannot honour.

    Raises:
        ConfigError: says what to do instead.
    """
    argument = ARGUMENTS[name]
    key = f"training.{name}"
    if argument.handling != PASSED:
        same = [entry for entry in argument.allowed if type(entry) is type(value) and entry == value]
        zero = value == 0 and 0 in argument.allowed and not isinstance(value, bool)
        if value is not None and not same and not zero:
            raise ConfigError(f"{key} is not available here: {argument.note}; got {value!r}")
    elif argument.check is not None:
        argument.check(key, value)


def refuse_unhonoured(args: Any) -> None:
    """Refuse TrainingArguments made elsewhere whose refused names ask for something, as `LabelAnnealingTrainer` would
    ignore it.

    Raises:
        ConfigError: names the first one.
    """
    for name in UNHONOURED:
        refuse_argument(name, getattr(args, name, None))


def require_one_device(args: Any, model: Any) -> None:
    """Refuse a process that computes on several GPUs: transformers would copy the model onto each of them that it sees
    (`nn.DataParallel`), and a `device_map` splits it; the loss is taken on one.

    Raises:
        ConfigError: says how to start.
    """
    advice = "start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
    if args.n_gpu > 1:
        raise ConfigError(f"several GPUs need one process each, got one process for {args.n_gpu}; {advice}")
    places = sorted(set(map(str, (getattr(model, "hf_device_map", None) or {}).values())))
    if len(places) > 1:
        raise ConfigError(
            f"a process must have its model on one device, got parts on {', '.join(places)} (device_map); {advice}"
        )
