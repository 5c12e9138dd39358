"""The room that a run is said to take on the disk, beside what it takes."""

import shutil

import pytest
from runs import settings

from formats.errors import ConfigError
from trainer import checkpoint, train
from trainer.preflight import disk

BATCH = (
    "training.save_strategy=steps",
    "training.per_device_train_batch_size=4",
    "training.gradient_accumulation_steps=1",
)
STEPS = (*BATCH, "training.max_steps=5", "training.save_steps=1")


def size_of(directory) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("overrides", [(), ("lora.r=8",), ("training.optim=sgd",)], ids=str)
def test_the_room_asked_for_is_what_the_checkpoints_take(
    overrides, tmp_path, tiny_llama_dir, llama_cache, monkeypatch
):
    """All of them are there with the newest one, before the oldest goes; the result then comes beside the others."""
    before, after, asked = [], [], []
    rotate, require = checkpoint.rotate, disk.require_space

    def measuring(run_dir, *args):
        for sizes in (before, after):
            sizes.append(sum(size_of(path) for _, path in checkpoint.complete_checkpoints(run_dir)))
            rotate(run_dir, *args)

    def noting(out, num_bytes, what, remedy):
        asked.append(num_bytes)
        require(out, num_bytes, what, remedy)

    monkeypatch.setattr(checkpoint, "rotate", measuring)
    monkeypatch.setattr(disk, "require_space", noting)
    train(settings(llama_cache, tiny_llama_dir, tmp_path / "run", *STEPS, *overrides))
    small = 3 * 2**18  # tokenizer, configuration and the like of three checkpoints
    taken = max(*before, after[-1] + (tmp_path / "run/model.safetensors").stat().st_size)
    assert asked[-1] <= taken + 2**15 and taken <= asked[-1] + small
    assert len(before) == 5


def test_no_room_for_the_optimisers_state(tmp_path, tiny_llama_dir, llama_cache, monkeypatch):
    """Adam keeps two numbers a weight: what holds the weights of two checkpoints holds no checkpoint."""
    size = (tiny_llama_dir / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=2 * size + 2**16))
    one = (*BATCH, "training.max_steps=1")
    with pytest.raises(
        ConfigError, match=r"room for checkpoints of .* each, 1 more at a time.* free at"
    ) as said:
        train(settings(llama_cache, tiny_llama_dir, tmp_path / "run", *one))
    assert "\n" not in str(said.value) and not (tmp_path / "run").exists()
    train(settings(llama_cache, tiny_llama_dir, tmp_path / "run", *one, "training.save_strategy=no"))


@pytest.mark.parametrize(
    ("strategy", "steps", "epoch", "every", "first", "saves"),
    [
        ("steps", 10, 4, 3, 0, 4),
        ("steps", 9, 4, 3, 0, 3),
        ("steps", 10, 4, 0.5, 0, 2),
        ("steps", 10, 4, 500, 0, 1),
        ("steps", 25, 4, 10, 13, 2),  # a signal's checkpoint lies between
        ("steps", 25, 4, 10, 25, 0),
        ("epoch", 10, 4, 500, 0, 3),
        ("best", 10, 4, 1, 0, 1),
        ("no", 10, 4, 1, 0, 0),
    ],
)
def test_how_often_a_run_saves(strategy, steps, epoch, every, first, saves):
    found = disk.num_saves(strategy, max_steps=steps, per_epoch=epoch, save_steps=every, first=first)
    assert found == saves


@pytest.mark.parametrize(
    ("left", "there", "limit", "more"),
    [
        (0, 1, 2, (0, 0)),
        (1, 0, 2, (1, 1)),
        (9, 0, 2, (3, 2)),
        (9, 2, 2, (1, 0)),  # the oldest of three goes
        (9, 3, 1, (1, -2)),  # a limit that became lower
        (9, 0, None, (9, 9)),
    ],
)
def test_how_many_checkpoints_are_there_at_a_time(left, there, limit, more):
    assert disk.num_more(left, there, limit) == more
