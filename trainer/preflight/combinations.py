"""Settings that mean something only beside others: refused where they would be ignored.

Of `training`, only what was typed is judged; defaults that do not apply are dropped by the recipe.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from formats.errors import ConfigError, one_line
from trainer.config import TrainConfig

NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules without a warm-up."""
NO_KWARGS = ("constant", "constant_with_warmup")
"""Schedules that transformers calls without `lr_scheduler_kwargs`."""
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow an evaluation."""
NOT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor", "lomo", "galore", "grokadamw")
"""Parts of names of optimisers that read no adam_beta1, adam_beta2 and adam_epsilon."""
ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
OPTIM_ARGS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "rmsprop_bnb": ("alpha", "eps", "weight_decay", "momentum", "centered"),
    "ademamix": ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    "adamw_anyprecision": (
        *("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
    ),
    "galore": ("rank", "update_proj_gap", "scale", "proj_type"),
    "apollo": ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "adamw_torch_4bit": ("block_size", "bf16_stochastic_round"),
    "adamw_torch_8bit": ("block_size", "bf16_stochastic_round"),
    "schedule_free": ("weight_lr_power", "r"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
}
"""Beginning of an optimiser's name -> what it reads from `optim_args`; the others read nothing."""
OPTIM_FLAGS = ("nesterov", "centered")
"""Those of them that transformers takes for false whatever they say, unless it is a word for true."""


KL_SETTINGS = ("kl_on", "kl_gate", "kl_target", "kl_budget")
"""Settings that mean nothing without a KL term on text that is learnt."""
OF_THE_LABELS = ("ce_weight", "label_smoothing")
OF_THE_PLAIN_KL = {"temperature": 1.0, "kl_direction": "forward", "kl_gate": "none", "kl_target": "full"}
"""What `kl_budget` needs: nats of KL(initial || model), as they are measured everywhere else."""


def check_objective(config: TrainConfig) -> None:
    """Refuse settings of the objective that would have no effect beside the others, or mean something else.

    Raises:
        ConfigError: names the setting and what it needs.
    """
    defaults = {entry.name: entry.default for entry in fields(config)}
    losses = [config.loss, *(cache.loss for cache in config.caches if cache.used)]
    if config.loss == "ce" and config.kl_coef and set(losses) == {"ce"}:
        raise ConfigError(
            "loss: ce leaves the KL to the mixed caches, got none with loss kl or both; add one to caches, or set "
            "kl_coef: 0"
        )
    if config.loss == "kl" and config.kl_coef == 0:
        raise ConfigError("loss: kl would train nothing with kl_coef: 0; raise kl_coef, or use loss: ce")
    for name in KL_SETTINGS:
        if "both" not in losses and getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"{name} is about text that is learnt and retained, got no cache with loss: both; remove it"
            )
    for name in OF_THE_LABELS:
        if set(losses) == {"kl"} and getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"{name} would have no effect: it needs a cross-entropy, got loss: kl; remove it"
            )
    for name in KL_SETTINGS:
        if config.kl_coef == 0 and getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"{name} would have no effect: it needs a KL term, got kl_coef: 0; remove it or raise kl_coef"
            )
    for number, cache in enumerate(config.caches):
        if config.kl_coef == 0 and cache.loss == "kl" and cache.used:
            raise ConfigError(
                f"caches.{number}.loss: kl would have no effect: it needs a KL term, got kl_coef: 0; use loss: ce to "
                "replay the text, or raise kl_coef"
            )
    config.require_kernel(config.loss_kernel)
    if config.kl_budget is None:
        return
    for name, needed in OF_THE_PLAIN_KL.items():
        if getattr(config, name) != needed:
            raise ConfigError(
                f"kl_budget is in nats of KL(initial || model) at temperature 1, so it needs {name}: {needed}, got "
                f"{getattr(config, name)}; remove one of them"
            )
    if config.loss != "both":
        raise ConfigError(
            f"kl_budget is about the target's KL beside its cross-entropy, got loss: {config.loss}; remove one of them"
        )
    for cache in config.caches:
        if cache.loss == "kl" and cache.used:
            raise ConfigError(
                f"kl_budget is about text that is learnt, got a cache with loss: kl: {cache.path}, whose KL would be "
                "counted with it; remove one of them"
            )


def word(value: Any) -> str:
    """The plain word of a value that may be a member of an enumeration."""
    return str(getattr(value, "value", value))


def optim_args_of(optim: str) -> tuple[str, ...]:
    """Names that this optimiser reads from `optim_args`."""
    name = optim.removeprefix("paged_")
    found = [start for start in OPTIM_ARGS if name.startswith(start)]
    return OPTIM_ARGS[max(found, key=len)] if found else ()


def refuse_idle(given: Mapping[str, Any], resolved: Mapping[str, Any], *, has_evaluation: bool) -> None:
    """Refuse what was typed and would have no effect.

    Args:
        given: `training` as typed.
        resolved: the same over the defaults.
        has_evaluation: whether there are eval_caches.

    Raises:
        ConfigError: names the setting and what it needs.
    """
    for name, needs in _idle(resolved, has_evaluation=has_evaluation):
        value = given.get(name)
        if word(given.get(f"{name.split('_')[0]}_strategy")) == "no":
            continue  # switched off by name: its steps are moot, not forgotten
        if value is not None and value is not False and value != ADAM_DEFAULTS.get(name, 0):
            raise ConfigError(f"training.{name} would have no effect: {needs}; got {name}: {value!r}")
    _check_optim_args(given, resolved)


def _idle(resolved: Mapping[str, Any], *, has_evaluation: bool) -> Iterator[tuple[str, str]]:
    """(name, what it needs) of everything that has no effect beside these settings."""
    get = resolved.get
    schedule, optim = word(get("lr_scheduler_type")), word(get("optim", "adamw_torch_fused"))
    evaluates = word(get("eval_strategy", "no"))
    if evaluates != "steps":
        yield "eval_steps", f"it needs eval_strategy: steps, got {evaluates}"
    if evaluates == "no":
        yield "eval_delay", "it needs an eval_strategy, got no"
    if not has_evaluation:
        yield "eval_on_start", "it needs eval_caches, got none"
    if word(get("save_strategy")) != "steps":
        yield "save_steps", f"it needs save_strategy: steps, got {word(get('save_strategy'))}"
    if word(get("logging_strategy", "steps")) != "steps":
        yield "logging_steps", f"it needs logging_strategy: steps, got {word(get('logging_strategy'))}"
    if not get("use_liger_kernel"):
        yield "liger_kernel_config", "it needs use_liger_kernel: true"
    if not get("gradient_checkpointing"):
        yield "gradient_checkpointing_kwargs", "it needs gradient_checkpointing: true"
    if get("torch_compile") is False:
        for name in ("torch_compile_backend", "torch_compile_mode"):
            yield name, "it needs torch_compile: true"
    if schedule in NO_KWARGS:
        yield "lr_scheduler_kwargs", f"lr_scheduler_type {schedule} takes none"
    if schedule in NO_WARMUP:
        more = ", use constant_with_warmup" if schedule == "constant" else ""
        yield "warmup_steps", f"lr_scheduler_type {schedule} has no warm-up{more}"
    if not get("dataloader_num_workers"):
        for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
            yield f"dataloader_{name}", "it needs dataloader_num_workers of at least 1"
    if not get("fsdp"):
        yield "fsdp_config", "it needs fsdp: true"
    if not optim.startswith(("galore", "apollo")):
        yield "optim_target_modules", f"optim {optim} takes none, GaLore and APOLLO do"
    if any(part in optim for part in NOT_ADAM):
        for name in ADAM_DEFAULTS:
            yield name, f"optim {optim} does not read it"
    reporters = get("report_to", "none")
    if not {"trackio", "all"} & set([reporters] if isinstance(reporters, str) else reporters):
        for name in ("space_id", "bucket_id", "static_space_id"):
            yield f"trackio_{name}", "it needs trackio in report_to"
    if (
        not get("load_best_model_at_end")
        and word(get("save_strategy")) != "best"
        and schedule not in BY_METRIC
    ):
        for name in ("metric_for_best_model", "greater_is_better"):
            yield (
                name,
                "it needs load_best_model_at_end: true, save_strategy: best or a schedule that follows a metric",
            )


def _check_optim_args(given: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    if not given.get("optim_args"):
        return
    optim = word(resolved.get("optim", "adamw_torch_fused"))
    # transformers reads it and then gives every group of parameters a weight decay of its own.
    known = tuple(name for name in optim_args_of(optim) if name != "weight_decay")
    takes = f"optim {optim} takes {', '.join(known) if known else 'none'}"
    for piece in str(given["optim_args"]).replace(" ", "").split(","):
        key, separator, value = piece.partition("=")
        if not key or not separator or not value or "=" in value:
            raise ConfigError(
                f"training.optim_args must be name=value,name=value, got {given['optim_args']!r}"
            )
        if key == "weight_decay":
            raise ConfigError(
                f"training.optim_args: weight_decay would have no effect, got {value}; use training.weight_decay"
            )
        if key not in known:
            raise ConfigError(f"training.optim_args: {takes}, got {key}")
        if key in OPTIM_FLAGS and value.lower() not in ("true", "false"):
            raise ConfigError(f"training.optim_args: {key} must be true or false, got {value}")


def check_arithmetic(
    resolved: Mapping[str, Any], *, dtype: str, full_fine_tuning: bool, on_gpu: bool
) -> None:
    """Refuse precisions that cannot work on this machine or with these weights.

    Args:
        resolved: `training` over the defaults.
        dtype: of the weights.
        full_fine_tuning: whether these weights are trained; adapters keep float32 ones of their own.
        on_gpu: whether the run will be on a GPU.

    Raises:
        ConfigError: says what to use instead.
    """
    import torch

    fp16, bf16 = bool(resolved.get("fp16")), bool(resolved.get("bf16"))
    by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if by_launcher not in ("no", "fp16", "bf16"):
        raise ConfigError(
            f"mixed precision must be no, fp16 or bf16, got {by_launcher} from the launcher; change it there"
        )
    fp16 = fp16 or (by_launcher == "fp16" and not bf16)
    if fp16 and bf16:
        raise ConfigError(
            "training.fp16 and training.bf16 exclude each other, got both true; bf16 needs no loss scaling"
        )
    if fp16 and not on_gpu:
        raise ConfigError(
            "training.fp16 needs a GPU, got a run on the CPU; remove it, or use training.bf16: true"
        )
    if resolved.get("tf32") and not (on_gpu and torch.cuda.get_device_capability()[0] >= 8):
        raise ConfigError("training.tf32 needs a GPU of compute capability 8.0, got none here; remove it")
    if bf16 and on_gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "training.bf16 needs a GPU that has bfloat16, got one without; use training.fp16: true"
        )
    if dtype == "float16" and full_fine_tuning:
        raise ConfigError(
            "dtype float16 cannot be trained: small gradients and Adam's epsilon become 0 in it; "
            "use dtype: float32 with training.fp16: true, or lora"
        )
    if dtype == "float16" and bf16:
        raise ConfigError("training.bf16 does not go with dtype float16: use dtype: bfloat16 or float32")
    if resolved.get("use_cpu") is False and not on_gpu:
        raise ConfigError("training.use_cpu: false needs a GPU, got a machine without one; remove it")


def check_processes(resolved: Mapping[str, Any]) -> None:
    """Refuse what needs several processes, and launchers' plugins that this trainer has no loss for.

    Raises:
        ConfigError: says how to start, or what to use instead.
    """
    from trainer.preflight.arguments import ARGUMENTS

    for variable, name in (("DEEPSPEED", "deepspeed"), ("PARALLELISM_CONFIG", "parallelism_config")):
        if os.environ.get(f"ACCELERATE_USE_{variable}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"{name} is not available here, got it from the launcher's configuration: {ARGUMENTS[name].note}"
            )
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() in ("true", "1"):
        raise ConfigError(
            "Megatron-LM is not available here, got it from the launcher's configuration; use FSDP"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        for name in ("fsdp", "ddp_backend"):
            if resolved.get(name):
                raise ConfigError(
                    f"training.{name} needs several processes, got one; start with torchrun or accelerate launch"
                )


def check_order(config: TrainConfig, resolved: Mapping[str, Any]) -> None:
    """Refuse settings of the order of rows where they are taken as they stand in the cache.

    Raises:
        ConfigError: names the setting.
    """
    if word(resolved.get("train_sampling_strategy", "random")) != "sequential":
        return
    if config.group_by_length:
        raise ConfigError(
            "group_by_length would have no effect: it needs shuffled rows, got training.train_sampling_strategy: "
            "sequential; remove one of them"
        )
    if (seed := resolved.get("data_seed")) is not None:
        raise ConfigError(
            f"training.data_seed would have no effect: it needs shuffled rows, got data_seed: {seed} with "
            "training.train_sampling_strategy: sequential; remove one of them"
        )


def check_attention(config: TrainConfig, *, on_gpu: bool) -> None:
    """Refuse flex attention on a CPU, where PyTorch has no gradient of it.

    Raises:
        ConfigError: says what to use instead.
    """
    if config.attn_implementation == "flex_attention" and not on_gpu:
        raise ConfigError(
            "attn_implementation: flex_attention needs a GPU to train, got a run on the CPU; use sdpa, or leave it out"
        )


def check_fake_quantize(config: TrainConfig, resolved: Mapping[str, Any]) -> None:
    """Refuse sharded weights under fake quantisation: groups of a sharded row are not those of the whole one.

    Raises:
        ConfigError: says what to do instead.
    """
    if config.fake_quantize != "none" and resolved.get("fsdp"):
        raise ConfigError(
            "fake_quantize needs whole weights, got training.fsdp; use DDP, or remove one of them"
        )


def check_reporters(report_to: Any) -> None:
    """Refuse reporters that transformers does not know or that are not installed.

    Raises:
        ConfigError: names the reporter and, where it is one, the missing package.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_reporting_integration_callbacks,
    )

    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names in (["none"], ["all"]):
        return
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(["none", "all", *INTEGRATION_TO_CALLBACK])
            raise ConfigError(f"training.report_to must be of {known}, got {name!r}")
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()  # makes nothing but the check that its package is there
        except (ImportError, RuntimeError, ValueError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "its package is missing"
            raise ConfigError(f"training.report_to: {name} cannot be used here: {reason}") from None


def check_compile(resolved: Mapping[str, Any], *, on_gpu: bool) -> None:
    """Refuse backends of torch.compile that do not exist here, and inductor without a C++ compiler on a CPU.

    Raises:
        ConfigError: names the backend.
    """
    backend = resolved.get("torch_compile_backend")
    if backend is None and not resolved.get("torch_compile") and not resolved.get("torch_compile_mode"):
        return
    import torch
    from accelerate.utils import DynamoBackend

    name = str(backend or "inductor").lower()
    known = {entry.value.lower() for entry in DynamoBackend} & set(
        torch._dynamo.list_backends(exclude_tags=())
    )
    if name not in known:
        raise ConfigError(
            f"training.torch_compile_backend must be one of {', '.join(sorted(known))}, got {backend!r}"
        )
    if name == "inductor" and not on_gpu:
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:
            raise ConfigError(
                f"training.torch_compile needs a C++ compiler on a CPU, got none: {one_line(error)}; "
                "install one, or remove it"
            ) from None
