"""`anneal train` as a user types it, on examples/tiny-base and a cache of examples/own-data.jsonl: one line and exit
code 1 for what cannot work, nothing left behind, and the corrected command runs.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import warm_process
from typed_here import Run, one_line

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "examples" / "tiny-base"
QUICK = {
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "1",
    "learning_rate": "1e-4",
    "max_steps": "1",
    "save_strategy": "no",
}
Train = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the command itself."""
    path = tmp_path_factory.mktemp("built") / "cache"
    words = ("--model", BASE, "--out", path, "--engine", "transformers")
    done = warm_process.anneal("cache", "build", ROOT / "examples" / "own-data.jsonl", *words)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def train(cache: Path, tmp_path: Path, anneal: Run) -> Train:
    """Runs `anneal train` with `training` arguments by name; gives exit code and stderr."""

    def run(*words: str, **training: str) -> tuple[int, str]:
        sets = [
            word
            for key, value in {**QUICK, **training}.items()
            for word in ("--set", f"training.{key}={value}")
        ]
        given = ("--model", BASE, "--out", tmp_path / "o", "--set", "step0_rows=2")
        code, _, err = anneal("train", cache, *given, *sets, *words)
        return code, err

    return run


def test_a_mistake_leaves_nothing_and_the_corrected_command_runs(train: Train, tmp_path: Path) -> None:
    for training, expected in [
        ({"learning_rate": "fast"}, "training.learning_rate must be a number, got 'fast'"),
        ({"per_device_train_batch_size": "0"}, "must be at least 1, got 0"),
        ({"optim": "adamw_bnb_8bit"}, "You need to install `bitsandbytes`"),
        ({"report_to": "wandb"}, "wandb cannot be used here"),
        ({"lr_scheduler_kwargs": "{foo: 1}"}, "cosine takes num_cycles; got foo"),
        ({"fp16": "true"}, "training.fp16 needs a GPU"),
        ({"load_best_model_at_end": "true"}, "needs eval_caches"),
        ({"deepspeed": "zero.json"}, "use FSDP"),
    ]:
        code, err = train(**training)
        assert code == 1 and expected in one_line(err), err
        assert not (tmp_path / "o").exists(), training
    code, err = train()
    assert code == 0, err
    # The only step of a run of one trains, at the whole rate.
    from safetensors.torch import load_file

    before, after = (load_file(path / "model.safetensors") for path in (BASE, tmp_path / "o"))
    assert any((before[name] != after[name]).any() for name in before)
    assert "lr 1.00e-04" in err


def test_a_rate_that_overflows_publishes_nothing(train: Train, tmp_path: Path) -> None:
    code, err = train(learning_rate="1e38", max_steps="3")
    assert code == 1 and "must be finite, got NaN or infinity" in one_line(err)
    assert not (tmp_path / "o").exists()
    code, err = train(
        learning_rate="1e38", max_steps="3", save_strategy="steps", save_steps="1", warmup_steps="0"
    )
    kept = [path.name for path in (tmp_path / "o").glob("*")] if (tmp_path / "o").exists() else []
    assert code == 1 and not [name for name in kept if name.endswith((".safetensors", "config.json"))]


def test_the_best_model_needs_no_more_than_its_name(train: Train, cache: Path, tmp_path: Path) -> None:
    held = ("--set", f"eval_caches.held={cache}")
    code, err = train(
        *held, load_best_model_at_end="true", metric_for_best_model="bleu", save_strategy="steps"
    )
    assert code == 1 and "held_loss, held_ce, held_perplexity, held_kl; got 'bleu'" in one_line(err)
    code, err = train(
        *held, load_best_model_at_end="true", save_strategy="steps", max_steps="3", learning_rate="3e-3"
    )
    assert code == 0, err
    assert json.loads((tmp_path / "o" / "anneal.json").read_text())["status"] == "complete"
