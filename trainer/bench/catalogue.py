"""From names to loaded tasks: the harness's own and those of a folder, with one line for whatever is wrong.

Task files are the harness's (YAML). Two things are ours: `data_files` are looked for beside the task file, and a
file that is no YAML is named instead of being passed over.
"""

import copy
import difflib
import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from formats.errors import ConfigError, one_line
from trainer.bench.harness import import_harness, quiet_harness
from trainer.bench.suites import TaskRequest
from trainer.bench.task_identity import data_hash, task_hash

FILE_BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `dataset_path` that read files; everything else is a name on the Hugging Face Hub."""


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data."""

    name: str
    task: Any
    """lm_eval.api.task.Task"""
    num_fewshot: int
    num_items: int
    """Items of the whole task."""
    runs_code: bool
    """It scores by running what the model wrote."""
    generates: bool
    """The model writes text; else the likelihood of given text is taken."""
    uses_template: bool
    """False for tasks that take the likelihood of a whole document."""
    identity: dict[str, str]
    """`task_version`, `task_hash` (file and code), `data_hash`."""


@dataclass(frozen=True)
class Catalogue:
    """What a command runs."""

    tasks: dict[str, LoadedTask]
    """Name -> task, in order of the request."""
    groups: dict[str, Any]
    """Name -> lm_eval.api.group.Group of those groups that have a number of their own."""


def load_catalogue(
    requests: Sequence[TaskRequest], task_dirs: Sequence[str], *, allow_code: bool
) -> Catalogue:
    """Find and load all tasks, with their data.

    Raises:
        ConfigError: an unknown name, a broken task file, missing data, a data set that needs the Hub and cannot
            be had, shots that the task does not allow, code without permission.
    """
    import_harness()
    with quiet_harness():
        manager = _manager([request.name for request in requests], task_dirs)
        tasks: dict[str, LoadedTask] = {}
        groups: dict[str, Any] = {}
        for request in requests:
            found = _load(manager, request.name)
            for name, task in found["tasks"].items():
                if name in tasks:
                    raise ConfigError(f"a task is run once, got {name} twice: {request.name} holds it too")
                tasks[name] = _prepared(name, task, request, allow_code=allow_code)
            groups |= {
                name: group for name, group in found.get("groups", {}).items() if group.has_aggregation
            }
    return Catalogue(tasks, groups)


def _manager(names: Sequence[str], task_dirs: Sequence[str]) -> Any:
    """A task manager that knows all names; the harness's 14,000 files are read only if they are needed."""
    from lm_eval.tasks import TaskManager

    for directory in task_dirs:
        _check_files(Path(directory))
    paths = [str(Path(directory).resolve()) for directory in task_dirs]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(name in manager.task_index for name in names):
        manager = TaskManager(include_path=paths, include_defaults=True)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "name its folder with --task-dir"
            raise ConfigError(f"a task must be known to lm-evaluation-harness, got {name!r}; {hint}")
    roots = [Path(path) for path in paths]
    for name, entry in list(manager.task_index.items()):
        if entry.yaml_path and any(root in Path(entry.yaml_path).parents for root in roots):
            _find_files_beside(manager.task_index, name, entry)
    return manager


def _check_files(directory: Path) -> None:
    """Raises ConfigError for a file that is no YAML mapping."""
    from lm_eval.tasks._yaml_loader import load_yaml

    files = sorted(directory.rglob("*.yaml"))
    if not files:
        raise ConfigError(f"--task-dir must hold task files, got no *.yaml in {directory}")
    for path in files:
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # whatever the YAML parser or the file system says
            problem = getattr(error, "problem", None) or one_line(error)
            mark = getattr(error, "problem_mark", None)
            where = f" line {mark.line + 1}" if mark is not None else ""
            raise ConfigError(f"a task file must be YAML, got {path}{where}: {problem}") from error


def _find_files_beside(index: dict[str, Any], name: str, entry: Any) -> None:
    """Make the relative `data_files` of a task of one's own relative to its task file."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = entry.cfg or {}
    if config.get("dataset_path") not in FILE_BUILDERS or not isinstance(config.get("dataset_kwargs"), dict):
        return
    given = config["dataset_kwargs"].get("data_files")
    if given is None:
        return
    folder = Path(entry.yaml_path).parent

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(part) for key, part in value.items()}
        if isinstance(value, list):
            return [resolved(part) for part in value]
        return value if "://" in str(value) else str(folder / str(value))

    try:
        config = copy.deepcopy(load_yaml(entry.yaml_path, resolve_func=True))
    except Exception as error:  # a Python file of the user's that does not import
        raise ConfigError(
            f"the functions of a task must import, got {entry.yaml_path}: {one_line(error)}"
        ) from error
    files = resolved(given)
    for path in _paths(files):
        if "://" not in path and not glob.glob(path, recursive=True):
            raise ConfigError(f"task {name} needs its data, got no file {path}")
    config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": files}
    index[name] = replace(entry, yaml_path=None, cfg=config)


def _paths(files: Any) -> list[str]:
    if isinstance(files, dict):
        return [path for part in files.values() for path in _paths(part)]
    if isinstance(files, list):
        return [path for part in files for path in _paths(part)]
    return [str(files)]


def _load(manager: Any, name: str) -> Any:
    """Load a task, a group or a tag.

    Raises:
        ConfigError: naming the task and what its data, its file or its packages lack.
    """
    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"task {name} needs a package that is not installed: {error.name}; run pip install {error.name} or "
            "pip install 'lm-eval[tasks]'"
        ) from error
    except Exception as error:  # task files run other people's functions: anything can come
        if _needs_hub(error):
            raise ConfigError(
                f"task {name} needs a data set from the Hugging Face Hub, which could not be had "
                f"({one_line(error, 160)}); connect, or use a task file of your own with --task-dir"
            ) from error
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"task {name} must load, got {type(error).__name__}: {one_line(error)}") from error


def _needs_hub(error: BaseException | None) -> bool:
    """Whether some error of the chain says that the Hub was not reached, or has no such data set."""
    names = {
        "ConnectionError",
        "ConnectError",
        "OfflineModeIsEnabled",
        "LocalEntryNotFoundError",
        "DatasetNotFoundError",
        "HfHubHTTPError",
        "RepositoryNotFoundError",
        "GatedRepoError",
        "ConnectTimeout",
        "MaxRetryError",
    }
    while error is not None:
        if names & {cls.__name__ for cls in type(error).__mro__}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _prepared(name: str, task: Any, request: TaskRequest, *, allow_code: bool) -> LoadedTask:
    """Set the shots and take down what identifies the task.

    Raises:
        ConfigError: see `load_catalogue`.
    """
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"anneal bench runs text tasks, got {name}, which shows pictures or plays sound")
    scored_by_itself = task.get_config("process_results") is not None
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None and not scored_by_itself:  # the harness would leave it out without a word
            raise ConfigError(f"the metrics of a task must be known to the harness, got {metric} in {name}")
    runs_code = bool(getattr(task, "UNSAFE_CODE", False))
    if runs_code and not allow_code:
        raise ConfigError(
            f"task {name} runs the code that the model writes; pass --allow-code if this machine may, "
            "best in a container"
        )
    fixed = task.get_config("num_fewshot")
    shots = fixed if request.num_fewshot is None else request.num_fewshot
    shots = int(shots or 0)
    if fixed == 0 and shots:
        raise ConfigError(f"task {name} shows no examples by its own rule, got {shots} shots; leave them out")
    output = str(task.OUTPUT_TYPE)
    if shots and output == "loglikelihood_rolling":
        raise ConfigError(f"task {name} takes whole documents, got {shots} shots; leave them out")
    if shots and _examples_hold_the_answer(task):
        raise ConfigError(
            f"task {name} has no split for its examples, got {shots} shots, which could be the question itself; "
            "name one in its file as fewshot_split, or leave the shots out"
        )
    if shots and shots > (most := _most_shots(task)):
        raise ConfigError(f"task {name} has examples for at most {most} shots, got {shots}; ask for fewer")
    task.set_config("num_fewshot", shots)
    num_items = len(task.eval_docs)
    if not num_items:
        raise ConfigError(f"task {name} must have items, got none")
    return LoadedTask(
        name=name,
        task=task,
        num_fewshot=shots,
        num_items=num_items,
        runs_code=runs_code,
        generates=output == "generate_until",
        uses_template=output != "loglikelihood_rolling",
        identity={
            "task_version": str(task.VERSION),
            "task_hash": task_hash(task),
            "data_hash": data_hash(task, with_examples=shots > 0),
        },
    )


def _most_shots(task: Any) -> int:
    """The documents that examples are drawn from, less the asked one where it is among them."""
    examples = getattr(task, "fewshot_cfg", None)
    split = None if examples is None else examples.split
    asked = int(split is not None and split == task.get_config("test_split"))
    return max(len(list(task.fewshot_docs() or [])) - asked, 0)


def _examples_hold_the_answer(task: Any) -> bool:
    """Whether the asked item may stand among its own examples.

    Without a split for examples the harness may fall back to the evaluated one, and it leaves the asked item out
    only where that is named as both `fewshot_split` and `test_split`.
    """
    examples = getattr(task, "fewshot_cfg", None)
    if examples is None:
        return False
    if examples.split is not None:
        return not task.has_test_docs() and examples.split == task.get_config("validation_split")
    if examples.samples is not None:
        return False
    return not task.has_training_docs() and not (task.has_validation_docs() and task.has_test_docs())
