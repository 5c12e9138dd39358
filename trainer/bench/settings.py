"""What a benchmark run is told, checked once, and which tasks that means."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formats.errors import ConfigError
from trainer.bench.suites import SUITES, TaskRequest
from trainer.checks import check_at_least, check_one_of, check_output, check_texts

BACKENDS = ("auto", "vllm", "transformers")
BENCH_DTYPES = ("auto", "float32", "bfloat16", "float16")
TEMPLATE_CHOICES = ("auto", "yes", "no")
OWN_OPTIONS = {"pretrained": "MODEL", "dtype": "--dtype", "seed": "--seed", "batch_size": "--batch-size"}
"""Engine argument -> what says it here."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of `anneal bench`.

    Raises:
        ConfigError: a setting is out of range or contradicts another one.
    """

    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags; `NAME:SHOTS` sets the number of examples in the prompt."""
    suite: str | None = None
    """A list of tasks that a paper reports (`suites.SUITES`); `tasks` are added to it."""
    task_dirs: tuple[str, ...] = ()
    """Folders with task files (YAML) of one's own."""
    num_fewshot: int | None = None
    """Examples in the prompt, where neither the task's name nor its suite sets them."""
    limit: int | None = None
    """So many items per task, drawn with `seed`; all if None."""
    batch_size: int | None = None
    """Prompts per forward pass; None lets the backend choose. Not a part of what makes results comparable."""
    dtype: str = "auto"
    """Of the weights and the computation; auto is bfloat16 on a GPU and float32 on a CPU, for every model."""
    backend: str = "auto"
    """vllm or transformers; auto is vLLM where it is installed and every model fits on the GPU."""
    apply_chat_template: str = "auto"
    """yes, no, or auto: yes if every model has a template."""
    seed: int = 0
    """Of the items that `limit` draws, of the examples in the prompt, and of sampled answers."""
    allow_code: bool = False
    """Run the code that a model writes, which some tasks do to score it."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """Settings passed to vLLM's engine."""
    out: str | None = None
    """Directory for the results, one folder per model; None puts them into the models' own directories."""

    def __post_init__(self) -> None:
        for option, name in (("--tasks", "tasks"), ("--task-dir", "task_dirs")):
            if value := getattr(self, name):
                check_texts(option, value)
            object.__setattr__(
                self, name, (value,) if isinstance(value, str) and value else tuple(value or ())
            )
        check_one_of("--backend", self.backend, BACKENDS)
        check_one_of("--dtype", self.dtype, BENCH_DTYPES)
        check_one_of("--apply-chat-template", self.apply_chat_template, TEMPLATE_CHOICES)
        for name, value, low in (
            ("--num-fewshot", self.num_fewshot, 0),
            ("--limit", self.limit, 1),
            ("--batch-size", self.batch_size, 1),
        ):
            if value is not None:
                check_at_least(name, value, low, "leave it out for the default", integer=True)
        if self.out is not None:
            check_output("--out", self.out, "a directory")
        if self.suite is not None:
            check_one_of("--suite", self.suite, sorted(SUITES))
        if not self.tasks and self.suite is None:
            raise ConfigError("a benchmark needs tasks, got none; name them with --tasks or --suite")
        if self.engine_args and self.backend == "transformers":
            raise ConfigError(
                f"--engine-arg is for the vllm backend, got {sorted(self.engine_args)[0]} with transformers; "
                "leave it out"
            )
        for name in OWN_OPTIONS.keys() & self.engine_args.keys():
            raise ConfigError(
                f"--engine-arg must not set {name}, got {self.engine_args[name]}; use {OWN_OPTIONS[name]}"
            )
        for directory in self.task_dirs:
            if not Path(directory).is_dir():
                raise ConfigError(f"--task-dir must be a directory of task files, got {directory}")
        self.requests()

    def requests(self) -> list[TaskRequest]:
        """The tasks asked for, in order, each once.

        Raises:
            ConfigError: a name is empty, its shots are no number, or one task is asked for in two ways.
        """
        asked = list(SUITES[self.suite].tasks) if self.suite else []
        for word in self.tasks:
            name, colon, shots = word.partition(":") if word.count(":") == 1 else (word, "", "")
            if not name or (colon and not shots.isdecimal()):
                raise ConfigError(f"--tasks takes NAME or NAME:SHOTS, got {word!r}; for example mmlu:5")
            asked.append(TaskRequest(name, int(shots) if colon else None))
        if self.num_fewshot is not None and all(request.num_fewshot is not None for request in asked):
            raise ConfigError(
                f"--num-fewshot is for tasks whose shots are not named otherwise, got {self.num_fewshot} and no such "
                "task; leave it out"
            )
        found: dict[str, TaskRequest] = {}
        for request in asked:
            if request.num_fewshot is None:
                request = TaskRequest(request.name, self.num_fewshot)
            if found.setdefault(request.name, request) != request:
                raise ConfigError(
                    f"a task is run in one way per command, got {request.name} with "
                    f"{found[request.name].num_fewshot} and {request.num_fewshot} shots; run it twice"
                )
        return list(found.values())
