"""Lists of tasks that papers on forgetting report, with their shots, under the harness's own names.

A suite holds what lm-evaluation-harness can run; what the paper reports beyond that stands in `missing` and is
printed with every run, so that nobody takes the rest for the whole.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskRequest:
    """A task, group or tag, and how many examples its prompt shows; None leaves that to the task."""

    name: str
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Suite:
    """What one paper measures."""

    source: str
    """The paper."""
    tasks: tuple[TaskRequest, ...]
    missing: str = ""
    """What the paper reports beyond these tasks, and the shots that the harness fixes otherwise."""


def _tasks(text: str) -> tuple[TaskRequest, ...]:
    """`mmlu:5 triviaqa` as requests."""
    pairs = (word.partition(":") for word in text.split())
    return tuple(TaskRequest(name, int(shots) if colon else None) for name, colon, shots in pairs)


SUITES: dict[str, Suite] = {
    "label-annealing": Suite(
        "label annealing, Tables 1 to 3: base models on maths and code",
        _tasks("mmlu:5 triviaqa:0 minerva_math gsm8k:4 humaneval"),
    ),
    "label-annealing-chat": Suite(
        "label annealing, Figs. 2 and 3: chat models",
        _tasks("mmlu:5 triviaqa:0 ifeval"),
        "AlpacaEval needs a judge; QuALITY needs a task file of your own",
    ),
    "overtraining": Suite(
        "overtrained language models are harder to fine-tune, Fig. 2",
        _tasks("arc_easy:5 arc_challenge:5 piqa:5 hellaswag:5 winogrande:5 boolq:5 copa:5 sciq:5"),
        "AlpacaEval needs a judge",
    ),
    "sfa": Suite(
        "soup to go (SFA): GSM8K without examples, HumanEval",
        _tasks("gsm8k:0 humaneval"),
        "the harness runs HumanEval without examples, the paper with 5; CaseHOLD, ToS and Overruling need task "
        "files of your own",
    ),
    "restore": Suite("pseudo forgetting, Figs. 3 and 6", _tasks("mmlu:5 arc_easy arc_challenge")),
    "sdft": Suite(
        "self-distillation (2601.19897) and RL's razor (2509.04259): what must be kept",
        _tasks("hellaswag truthfulqa_mc2 mmlu ifeval winogrande humaneval"),
        "the new tasks (science questions, ToolAlpaca) need task files of your own",
    ),
    "retaining-by-doing": Suite(
        "retaining by doing (2510.18874)",
        _tasks("ifeval mmlu minerva_math"),
        "Countdown, WildJailbreak and WildGuard need task files of your own",
    ),
    "eaft": Suite(
        "entropy-adaptive fine-tuning (2601.02151)",
        _tasks("aime24 aime25 gsm8k medmcqa medqa_4options pubmedqa mmlu ifeval"),
        "BFCL v3 and CLUEWSC are not in the harness",
    ),
    "talr": Suite(
        "token-adaptive loss reweighting (2509.20758): what must be kept", _tasks("ifeval gsm8k humaneval")
    ),
    "self-replay": Suite(
        "self-replay (2605.26097): what must be kept", _tasks("mmlu arc_challenge commonsense_qa")
    ),
}
