"""The house rules that keep the parts apart, read from the source's imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABOVE = {"integrations", "onboarding", "commands", "cli"}
HEAVY = {"torch", "vllm", "transformers", "datasets", "ray"}
IN_AND_OUT = re.compile(r"\bin\b[,;.].*\bout\b", re.DOTALL)

FLOORS = {
    "formats": [
        *(
            "errors",
            "install",
            "progress",
            "front_matter",
            "capture_settings",
            "logprobs",
            "codec",
            "disk",
            "picture_file",
            "ray_cluster",
            "engine",
            "table",
            "identity",
        ),
        *("cache_row", "validate", "inspect.summary", "cache", "writer", "inspect"),
    ],
    "cache_builder": [
        *(
            "teachers.engine_args",
            "teachers.protocol",
            "generation.settings",
            "config",
            "report",
            "pace",
            "corpus",
            "rows",
            "reduction",
            "teachers",
            "commit",
            "generation",
        ),
        *("source", "foresee", "start", "build", "build_on_ray", "tools"),
    ],
    "trainer": [
        *(
            "checks",
            "plain_yaml",
            "objective",
            "quantization",
            "checkpoint",
            "multimodal",
            "loading",
            "retention.settings",
        ),
        *("preflight.values", "preflight.arguments"),
        *("config", "config_file", "schedule", "preflight", "recipe", "data", "loss"),
        *("loop.signals", "loop.output_head", "loop.measure", "running", "retention", "loop"),
        *("preflight.continuation", "preflight.memory", "preflight.disk", "preflight.before_start", "result"),
        *(
            "merging.settings",
            "merging.weights",
            "evaluation",
            "merging",
            "bench",
            "comparison",
            "selection",
            "inputs",
            "notes",
            "outcome",
            "run",
            "dry_run",
            "sweep",
            "chain",
            "restore",
            "probe",
        ),
    ],
    "onboarding": ["doctor.facts", "doctor", "init.look", "init", "commands"],
    "integrations": [
        *("settings", "joined_rows", "collator", "teacher", "row_file", "annealed", "trl", "axolotl"),
    ],
    "commands": [
        *("completion", "terminal", "options", "parsing", "cache_process", "cache_build", "cache_tools"),
        *("train", "merge", "evaluate", "compare", "bench", "sweep", "chain", "restore", "probe"),
    ],
}
"""The rooms of each package from the ground up: a room imports from rooms on its left, and from nothing on its right.

A room is a sub-package or a module beside it. A module of a room may have a floor of its own, below its room: settings
that a person writes for a step, and the parts of the loop that know no Trainer.
"""


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Root names of all modules that the file imports; function bodies are left out on request."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        pending.extend(ast.iter_child_nodes(node))
    return found


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert len(found) > 3, f"{package} has moved; the rules below would pass on nothing"
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("formats", {"cache_builder", "trainer", *ABOVE, "torch", "vllm", "transformers"}),
        ("cache_builder", {"trainer", *ABOVE}),
        ("trainer", {"cache_builder", *ABOVE, "vllm"}),
        ("integrations", {"cache_builder", "onboarding", "commands", "cli", "vllm"}),
        ("onboarding", {"integrations", "commands", "cli", "vllm"}),
        ("commands", {"integrations", "onboarding", "cli"}),
    ],
)
def test_packages_keep_their_distance(package: str, forbidden: set[str]) -> None:
    broken = {
        str(path.relative_to(ROOT)): sorted(hit)
        for path in sources(package)
        if (hit := imports_of(path) & forbidden)
    }
    assert not broken


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name; a sub-package's own name stands for its `__init__`."""
    found = {}
    for path in sources(package):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(package: str) -> dict[str, set[str]]:
    """Which modules of its own package each one imports, wherever the import stands: at the top, in a function,
    behind `TYPE_CHECKING`, and as a name to be looked up later (`importlib` with a literal)."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} must import by full names"
                targets = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {target if target in known else str(node.module) for target in targets}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
        graph[name] = (found & set(known)) - {name}
    return graph


def floor(package: str, module: str) -> int:
    """The place of a module's room in `FLOORS`; the package's own face is above everything."""
    if module == package:
        return len(FLOORS[package])
    parts = module.split(".")[1:]
    for room in (".".join(parts[:2]), parts[0]):
        if room in FLOORS[package]:
            return FLOORS[package].index(room)
    raise AssertionError(f"{module} is in no room of FLOORS[{package!r}]: say on which floor it stands")


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The sets of modules that reach each other (strongly connected components of more than one)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            for following in graph[pending.pop()] - seen:
                seen.add(following)
                pending.append(following)
        return seen

    reach = {module: reached(module) for module in graph}
    return {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_point_down(package: str) -> None:
    upward = {
        (module, target)
        for module, targets in arrows(package).items()
        for target in targets
        if floor(package, target) > floor(package, module)
    }
    assert sorted(upward) == [], "a room imports from one above it"


@pytest.mark.parametrize("package", FLOORS)
def test_floors_name_what_is_there(package: str) -> None:
    names = {name.removeprefix(f"{package}.") for name in modules(package)}
    assert [room for room in FLOORS[package] if room not in names] == []


@pytest.mark.parametrize("package", FLOORS)
def test_no_circles(package: str) -> None:
    found = [sorted(circle) for circle in circles(arrows(package))]
    assert not found, "modules import each other in a circle"


def test_circles_are_found() -> None:
    """The search itself, on a graph whose circles are known."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f", "e"}}
    assert circles(graph) == {frozenset("abc"), frozenset("fg")}


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_say_what_comes_in_and_what_goes_out(package: str) -> None:
    rooms = [
        path
        for path in sources(package)
        if path.name == "__init__.py"
        and (path.parent != ROOT / package or package in ("integrations", "commands"))
    ]
    assert rooms
    silent = [
        str(path.relative_to(ROOT))
        for path in rooms
        if not IN_AND_OUT.search(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    ]
    assert silent == [], "the docstring of a room says `... in, ... out`"


def test_cli_imports_heavy_packages_only_inside_commands() -> None:
    for path in [ROOT / "cli.py", *sources("commands")]:
        assert not imports_of(path, top_level_only=True) & (HEAVY | {"trainer", "cache_builder"}), path


@pytest.mark.parametrize(
    "statement",
    [
        "import formats",
        "import cache_builder",
        "import trainer",
        "import integrations",
        "import onboarding",
        "import cli",
    ],
)
def test_importing_the_packages_loads_nothing_heavy(statement: str) -> None:
    probe = f"import sys; {statement}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    ("package", "homes"), [("formats", "_HOME"), ("trainer", "_HOME"), ("cache_builder", "_MODULES")]
)
def test_a_type_checker_sees_the_names_that_are_looked_up_later(package: str, homes: str) -> None:
    """Else every public name is `Any` to whoever checks their code against ours, which says that it is typed."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    (later,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == homes
    )
    seen = {
        alias.asname: str(node.module)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {name: f"{package}.{module}" for name, module in later.items()}


def test_no_pickle_and_no_remote_code_by_default() -> None:
    """A cache or a checkpoint from a stranger must not be able to run code."""
    for package in FLOORS:
        for path in sources(package):
            assert "pickle" not in imports_of(path), f"{path} imports pickle"
            assert "trust_remote_code=True" not in path.read_text(encoding="utf-8"), path


def test_files_hold_one_idea() -> None:
    too_long = {
        str(path.relative_to(ROOT)): length
        for package in (*FLOORS, "tests")
        for path in sources(package)
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not too_long
