"""From a look to a settings file: every line says why it is there, and the whole is one that `anneal train` reads."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cache_builder.rows.tokenizer_files import DEFAULT_MAX_LENGTH
from formats.disk.durable import atomic_write_bytes
from formats.disk.output_file import misplaced, refuse_address
from formats.errors import ConfigError
from formats.progress import counted
from onboarding.init.look import Look
from trainer.config import TrainConfig
from trainer.recipe import DEFAULTS

BYTES_PER_PARAMETER = 16
"""Of full fine-tuning in float32 with AdamW: weight, gradient, two moments."""
ROOM = 0.7
"""Share of the memory that weights and optimiser may take; the rest is for activations."""
ROWS_PER_STEP = 32
STEPS_PER_EPOCH = 8
"""At least, where the corpus is known to be small."""
DIALOGUES = "--generate 256 --max-length 160"
"""What a chat model writes to be held to: short ones hold more than as many tokens of long ones (docs/results.md)."""
PLAIN_TEXT = 0.9
"""More of the tokens carry loss where there are no questions; the first one of a row never does."""
TOKENS_PER_BATCH = 8192
"""Of a micro-batch, padding included, that most machines hold."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was chosen."""

    max_length: int
    packing: bool
    lora: bool
    batch: int
    accumulation: int


def plan_for(look: Look) -> Plan:
    """Settings that fit what was seen."""
    room = min(look.context or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    longest = int(look.lengths[-1])
    max_length = min(room, longest) if look.whole else min(room, _rounded(2 * look.quantile(0.99)))
    typical = min(look.quantile(0.5), max_length)
    memory = (look.gpu_gib or look.memory_gib) * ROOM * 2**30
    lora = look.num_parameters is not None and look.num_parameters * BYTES_PER_PARAMETER > memory
    batch = 1
    while batch < 8 and 2 * batch * max_length <= TOKENS_PER_BATCH:
        batch *= 2
    rows = ROWS_PER_STEP
    if look.whole:
        rows = max(min(rows, len(look.lengths) // STEPS_PER_EPOCH), 1)
        batch = min(batch, rows)
    return Plan(
        max_length=max(max_length, 2),
        packing=4 * typical <= max_length,
        lora=lora,
        batch=batch,
        accumulation=max(rows // batch, 1),
    )


def _rounded(tokens: int) -> int:
    """Up to a multiple of 64."""
    return -(-tokens // 64) * 64


def text_of(look: Look, plan: Plan, *, cache: str, out: str, path: str) -> str:
    """The file."""
    asked = (("--text-column", look.text_column), ("--split", look.split))
    reading = "".join(f" {option} {_word(value)}" for option, value in asked if value is not None)
    build = (
        f"anneal cache build {_word(look.corpus)}{reading} --model {_word(look.model)} --out {_word(cache)}"
    )
    engine = "" if find_spec("vllm") else " --engine transformers"
    sample = "the whole corpus" if look.whole else f"the first {look.num_records} records"
    lines = [
        f"# Settings for {look.corpus} and {look.model}, after a look at both; every line may be changed.",
        "#",
        f"#   {build} --max-length {plan.max_length}{engine}",
        f"#   anneal train --config {_word(path)}",
        "#",
        f"# Seen in {sample}: rows of {look.quantile(0.5)} tokens (half are shorter), "
        f"{look.quantile(0.95)} (95 %), {int(look.lengths[-1])} (the longest);",
        f"# {look.loss_share:.0%} of the tokens carry loss.",
        *(f"#   {line}" for line in look.described),
        "",
        f"cache: {_value(cache)}  # made by the first command",
        f"model: {_value(look.model)}  # {_parameters(look)}",
        f"out: {_value(out)}  # new, or an interrupted run of these settings, which then continues",
        "",
        f"kl_coef: {TrainConfig.kl_coef:g}  # 0 learns fastest and forgets; higher holds on to the initial model",
        f"temperature: {TrainConfig.temperature:g}  # 2 weighs the tail more",
        f"packing: {'true' if plan.packing else 'false'}  # {_packing(look, plan)}",
    ]
    if plan.lora:
        lines += [
            f"lora:  # {BYTES_PER_PARAMETER} bytes a weight for full fine-tuning are more than this machine has",
            "  r: 16",
            "  alpha: 32",
        ]
    rows = plan.batch * plan.accumulation
    step = counted(rows, "pack" if plan.packing else "row")
    smaller = "  # halve it, and double the next, where memory runs out" if plan.batch > 1 else ""
    rate = float(DEFAULTS["learning_rate"]) * (10 if plan.lora else 1)
    lines += [
        "training:",
        f"  learning_rate: {rate:g}  # adapters take some 10 times that of all weights; higher learns and forgets more",
        f"  num_train_epochs: {DEFAULTS['num_train_epochs']}",
        f"  per_device_train_batch_size: {plan.batch}{smaller}",
        f"  gradient_accumulation_steps: {plan.accumulation}  # {step} a step",
    ]
    if look.whole:
        steps = -(-len(look.lengths) // rows) * int(DEFAULTS["num_train_epochs"])
        if not plan.packing:
            lines.append(f"  # about {steps} steps on one process")
    lines += [
        "# eval_caches:  # held-out text, built by the same model; then training.eval_strategy: epoch",
        "#   held-out: CACHE",
    ]
    if look.has_template:
        model, tuned = _word(look.model), _word(out)
        lines += [
            "#",
            "# A chat model keeps more of what it does when told to if it holds to dialogues that it writes itself; a",
            "# step takes twice the time. Averaged with the initial model it keeps more yet, and has learnt a little",
            "# less (docs/generate.md):",
            "#",
            f"#     anneal cache build {DIALOGUES} --model {model} --out self{engine}",
            f"#     anneal train --config {_word(path)} --retain self:1 --set loss=ce --kl-coef {_hold(look)} "
            f"--set training.gradient_accumulation_steps={2 * plan.accumulation}",
            f"#     anneal merge {tuned} --initial {model} --method wise-ft --alpha 0.5 --out {_word(out + '-half')}",
        ]
    return "\n".join([*lines, ""])


def _hold(look: Look) -> int:
    """The coefficient of KL to dialogues: 10 costs nothing of what answers in chat teach, and a fifth of what plain
    text does (docs/results.md)."""
    return 3 if look.loss_share > PLAIN_TEXT else 10


def _packing(look: Look, plan: Plan) -> str:
    if plan.packing:
        return f"half of the rows have at most {look.quantile(0.5)} of {plan.max_length} tokens"
    return "true puts several rows into one sequence; for rows of very uneven length"


def _parameters(look: Look) -> str:
    if look.num_parameters is None:
        return "the model that builds the cache"
    place = (
        f"{look.gpu_gib:.0f} GiB on the GPU"
        if look.gpu_gib
        else f"no GPU, {look.memory_gib:.0f} GiB of memory"
    )
    return f"{look.num_parameters / 1e6:,.1f} million parameters; {place}"


def _value(text: str) -> str:
    """A YAML text."""
    return json.dumps(text, ensure_ascii=False)


def _word(text: str) -> str:
    """A word for a shell."""
    import shlex

    return shlex.quote(text)


def write(look: Look, path: Path, *, cache: str, out: str) -> Plan:
    """Choose settings and write them to a new file.

    Raises:
        ConfigError: the file is there already, or cannot be written; or cache and model would share a directory.
    """
    if path.exists():
        raise ConfigError(
            f"--file must name a new file, got {path}, which exists; remove it or choose another"
        )
    for name, place in (("--cache", cache), ("--out", out)):
        refuse_address(name, place)
    if Path(cache).resolve() == Path(out).resolve():
        raise ConfigError(
            f"--cache and --out must be two directories, got {cache} for both; name another one"
        )
    if reason := misplaced(path):
        raise ConfigError(f"--file must name a file that can be written, got {path}: {reason}")
    plan = plan_for(look)
    text = text_of(look, plan, cache=cache, out=out, path=str(path))
    try:
        atomic_write_bytes(path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"--file must name a file that can be written, got {path}: {error.strerror or error}"
        ) from None
    return plan
