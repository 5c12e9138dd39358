"""The whole path with `examples/tiny-base`: build a cache on the device, train in every way, evaluate; and the same
training on the CPU, whose losses must be those of the GPU.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.report import Place, Report

SECONDS: int = 150
ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "tiny-base"
STEP0 = 1e-3
"""Nats between the initial model and its own cache."""
SAME_LOSS = 1e-3
"""Nats between losses of a GPU and of a CPU in fp32, in every step."""
HALF_LOSS = 2e-2
"""Nats between the last losses of bf16 and of fp32."""
PLAIN: dict[str, Any] = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": 12,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
}


def run(report: Report, place: Place) -> None:
    on_gpu = place.device.type == "cuda"
    folder = place.out / "end-to-end"
    if folder.exists():
        import shutil

        shutil.rmtree(folder)
    folder.mkdir()
    training = PLAIN | ({"max_steps": 2, "per_device_train_batch_size": 1} if place.tiny else {})
    texts = write_texts(folder, 1_500 if place.tiny else 120_000)
    caches = {
        name: build(report, place, name, path, folder / f"{name}-cache") for name, path in texts.items()
    }
    cpu = train_on_cpu(folder, caches["train"], training)
    try:
        plain = train(report, folder, "fp32", caches, training, on_gpu, loss_kernel="torch")
        halves = training | {"bf16": True}
        train(report, folder, "bf16, torch", caches, halves, on_gpu, near=plain, loss_kernel="torch")
        train(
            report,
            folder,
            "bf16, packed",
            caches,
            training | {"bf16": True},
            on_gpu,
            packing=True,
            pack_length=300 if place.tiny else 1024,
        )
        if on_gpu:
            kernel: dict[str, Any] = {"loss_kernel": "triton"}
            train(report, folder, "fp32, triton", caches, training, on_gpu, near=plain, same=True, **kernel)
            train(
                report,
                folder,
                "bf16, triton",
                caches,
                training | {"bf16": True},
                on_gpu,
                near=plain,
                **kernel,
            )
        evaluate(report, place, caches["heldout"], {"initial": BASE, "trained": folder / "fp32"})
        printed, errors = cpu.communicate(timeout=60)
    finally:
        cpu.kill()
    if cpu.returncode:
        report.failed("training on the CPU", errors[-400:])
        return
    theirs = json.loads(printed.splitlines()[-1])
    report.check("losses compared with a CPU's", len(theirs), at_least=training["max_steps"])
    difference = max(abs(a - b) for a, b in zip(plain, theirs, strict=True))
    report.check("largest difference to a CPU's losses", difference, "nats", at_most=SAME_LOSS)


def write_texts(folder: Path, num_bytes: int) -> dict[str, Path]:
    """Code of the standard library to learn, other code to evaluate on."""
    sys.path.append(str(ROOT / "examples"))
    from stdlib_text import documents

    paths = {}
    for name, split, size in (
        ("train", "target-train", num_bytes),
        ("heldout", "target-heldout", num_bytes // 4),
    ):
        paths[name] = folder / f"{name}.jsonl"
        found = documents("code", split, max_bytes=size)
        paths[name].write_text("".join(json.dumps({"text": document.text}) + "\n" for document in found))
    return paths


def build(report: Report, place: Place, name: str, corpus: Path, out: Path) -> Path:
    from cache_builder import BuildConfig, build_cache

    found = build_cache(
        BuildConfig(
            corpus=str(corpus),
            model=str(BASE),
            out=str(out),
            engine="transformers",
            dtype="float32",
            max_length=256,
            engine_args={"device": place.device.type},
        )
    )
    report.info(f"positions of the cache {name}", found.num_positions)
    return out


def config_of(cache: Path, out: Path, training: dict[str, Any], **settings: Any) -> Any:
    from trainer import TrainConfig

    return TrainConfig(cache=str(cache), model=str(BASE), out=str(out), training=training, **settings)


def train_on_cpu(folder: Path, cache: Path, training: dict[str, Any]) -> "subprocess.Popen[str]":
    """The fp32 run where no GPU is to be seen, beside the others."""
    paths = [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        [sys.executable, __file__, str(cache), str(folder / "cpu"), json.dumps(training)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_and_print(cache: str, out: str, training: str) -> None:
    """What that process does: its losses are the last line on stdout."""
    from trainer import train as train_model

    found = train_model(config_of(Path(cache), Path(out), json.loads(training)))
    print(json.dumps(losses_of(found.log_history)))


def losses_of(log_history: list[dict[str, Any]]) -> list[float]:
    """The loss of every step that was logged."""
    return [entry["loss"] for entry in log_history if "loss" in entry]


def train(
    report: Report,
    folder: Path,
    name: str,
    caches: dict[str, Path],
    training: dict[str, Any],
    on_gpu: bool,
    *,
    near: list[float] | None = None,
    same: bool = False,
    **settings: Any,
) -> list[float]:
    """One run; its step-0 KL, and its losses beside those of another."""
    from trainer import train as train_model

    arguments = dict(training) | ({} if on_gpu else {"use_cpu": True})
    out = folder / name.replace(", ", "-")
    config = config_of(caches["train"], out, arguments, **settings)
    with contextlib.redirect_stdout(sys.stderr):
        found = train_model(config)
    assert found.step0 is not None
    report.check(f"{name}: KL before the first step", found.step0["kl"], "nats", at_most=STEP0)
    losses = losses_of(found.log_history)
    report.info(f"{name}: loss of the first and last step", f"{losses[0]:.4f}, {losses[-1]:.4f}", "nats")
    if near is not None:
        difference = max(abs(a - b) for a, b in zip(losses, near, strict=True))
        bound = SAME_LOSS if same else HALF_LOSS
        report.check(f"{name}: largest difference to fp32's losses", difference, "nats", at_most=bound)
    return losses


def evaluate(report: Report, place: Place, cache: Path, models: dict[str, Path]) -> None:
    from trainer import evaluate as evaluate_model

    for name, model in models.items():
        found = evaluate_model(model, {"heldout": cache}, device=place.device.type)["heldout"]
        report.info(f"{name}: held-out cross-entropy", found["ce"], "nats")
        if name == "initial":
            report.check("initial: KL to its own cache", abs(found["kl"]), "nats", at_most=STEP0)
        else:
            report.info(f"{name}: KL to the initial model", found["kl"], "nats")


if __name__ == "__main__":
    train_and_print(*sys.argv[1:])
