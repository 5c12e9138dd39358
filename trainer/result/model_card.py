"""README.md of the result: what was trained from what, how strongly it was held, and what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.front_matter import HUB_NAME
from trainer.config import TrainConfig


def method_name(config: TrainConfig) -> str:
    """How the model was held to its initial weights, such as `label annealing with L2`."""
    used = [
        *(["L2 towards the weights at the start"] if config.l2 else []),
        *(["elastic weight consolidation"] if config.ewc else []),
        *(["averaging with the weights at the start (SFA)"] if config.sfa else []),
        *(["replay"] if any(cache.loss == "ce" and cache.used for cache in config.caches) else []),
    ]
    base = "direct fine-tuning" if config.kl_coef == 0 else "label annealing"
    if config.kl_coef:
        base = {
            "ce": "fine-tuning with KL to the initial model on mixed text",
            "kl": "distillation from the initial model",
        }.get(config.loss, base)
    return base + (" with " + " and ".join(used) if used else "")


def retention_lines(config: TrainConfig) -> dict[str, str]:
    """Setting -> one sentence of the card, for the methods that act on weights."""
    lines = {}
    if config.l2:
        lines["l2"] = (
            f"The loss also holds `{config.l2.coef:g} / 2 * ||theta - theta0||^2` (L2; theta0 are the weights at "
            "the start of this run)."
        )
    if config.ewc:
        tasks = [
            f"`{task.coef:g} / 2 * sum_i F_i (theta_i - theta0_i)^2`, theta0 being "
            + ("the weights at the start of this run" if task.model is None else f"those of `{task.model}`")
            + f" and F the diagonal Fisher information per token over {task.num_rows} rows with {task.labels} labels"
            for task in config.ewc_tasks
        ]
        lines["ewc"] = f"The loss also holds {', and '.join(tasks)} (elastic weight consolidation)."
    if config.sfa:
        lines["sfa"] = (
            f"After every {config.sfa.period:g} of all steps, and at the end, the weights became "
            f"`{1 - config.sfa.beta:g} * theta + {config.sfa.beta:g} * theta0` (sequential fine-tuning with "
            "averaging; theta0 are the weights at the start of this run: in a chain those of the last task's model)."
        )
    return lines


def kl_line(config: TrainConfig, kl_to: str | None) -> str:
    """What the loss was, and to which model KL holds."""
    if not config.kl_coef:
        return "`loss = CE` on the training tokens."
    where = "on every training token, where KL"
    if config.loss == "ce":
        where = "with CE on the training tokens and KL on those of caches with `loss: kl`, where KL"
    terms = f"CE + {config.kl_coef:g} * KL"
    if config.loss == "kl":
        terms = f"{config.kl_coef:g} * KL"
    loss = f"`loss = {terms}` {where} "
    if kl_to is None:
        return (
            loss + "compares the model with its own initial weights, read from a cache of teacher logprobs."
        )
    return (
        f"{loss}is KL({kl_to} || model), read from a cache of the logprobs of `{kl_to}`: another model than the one "
        "that this run started from."
    )


def rounding_line(config: TrainConfig) -> str:
    """What the card says of training under rounding, whose result is stored before it."""
    return (
        f"{config.fake_quantize}; the weights here are those before rounding, KL and CE in this table those of the "
        "rounded ones"
    )


def card_head(
    base: str, tag: str, made: str, *, relation: str = "finetune", library: str = "transformers"
) -> list[str]:
    """The front matter that model hubs read, and the title: `base`, and how it was `made` into this.

    Args:
        relation: of the result to its base model, as the Hugging Face Hub names it: finetune, adapter or merge.
    """
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    # A directory of that name is no model of the Hub.
    if HUB_NAME.fullmatch(base) and not Path(base).exists():
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    lines += ["tags:", "- anneal", f"- {tag}", "- continual-learning", "---", ""]
    return [*lines, f"# {base.rstrip('/').rsplit('/', 1)[-1]}, {made}", ""]


def model_card(
    config: TrainConfig,
    *,
    cache_id: str,
    identity: Mapping[str, Any],
    training: Mapping[str, Any],
    step0: Mapping[str, Any] | None,
    new_text: Mapping[str, Any] | None = None,
    num_steps: int,
    last: Mapping[str, float],
    kl_to: str | None = None,
) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        kl_to: the model that built the cache, where it is another one than the run starts from.
    """
    teacher, corpus = identity.get("teacher", {}), identity.get("corpus", {})
    base = str(
        config.model
        if kl_to is not None or not config.kl_coef or config.loss == "ce"
        else teacher.get("name") or config.model
    )
    adapters = config.lora is not None and not config.lora.merge
    kind = {"relation": "adapter", "library": "peft"} if adapters else {}
    lines = card_head(base, "label-annealing", f"fine-tuned by {method_name(config)}", **kind)
    lines += [
        f"Fine-tuned from `{base}` with {kl_line(config, kl_to)}",
        *retention_lines(config).values(),
        "",
        "| setting | value |",
        "|---|---|",
    ]
    settings: dict[str, Any] = {
        "cache": f"`{cache_id[:16]}`",
        "corpus": corpus.get("source") or "-",
        "kl_coef": f"{config.kl_coef:g}",
        "temperature": f"{config.temperature:g}",
        "kl_direction": config.kl_direction,
        **({} if config.kl_budget is None else {"kl_budget": f"{config.kl_budget:g} nats"}),
        **config.changed(),
        **({} if config.fake_quantize == "none" else {"fake_quantize": rounding_line(config)}),
        "steps": num_steps,
        "learning rate": training.get("learning_rate"),
        "sequences per step (per process)": int(training.get("per_device_train_batch_size", 1))
        * int(training.get("gradient_accumulation_steps", 1)),
        **({"frozen": ", ".join(f"`{pattern}`" for pattern in config.freeze)} if config.freeze else {}),
        "adapters": f"LoRA, rank {config.lora.r}{', merged' if config.lora.merge else ''}"
        if config.lora
        else "none",
    }
    if step0:
        limit = (
            f" from {step0['ancestor']}" if step0.get("ancestor") else f" (threshold {step0['threshold']:g})"
        )
        settings["KL before the first update"] = f"{step0['kl']:.2e} nats{limit}"
    if "ce" in last:
        settings["last logged CE"] = f"{last['ce']:.4f}"
    for name in retention_lines(config):
        if name in last:
            settings[f"last logged {name} penalty"] = f"{last[name]:.3g}"
    if "kl" in last:
        settings["last logged KL"] = f"{last['kl']:.5f}"
    if "kl_coef" in last:
        settings["last logged kl_coef"] = f"{last['kl_coef']:.4g}"
    if new_text and new_text["kl"] is not None:
        to = "initial" if kl_to is None else new_text["kl_to"]
        settings[f"KL({to} \\|\\| model) on the new text, at the end"] = f"{new_text['kl']:.5f} nats"
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    lines += [
        "",
        "The settings to repeat the run are in `anneal.yaml`, the measurements in `anneal.json`.",
        "",
    ]
    return "\n".join(lines)
