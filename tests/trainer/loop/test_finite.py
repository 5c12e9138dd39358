"""What is not finite stops the run in one line, is never saved or published, and leaves the last good checkpoint.

The numbers break for real: a rate that overflows, a row of NaN in a cache, a weight that is set to infinity between
two steps; nothing of the check itself is replaced.
"""

import math

import pytest
import torch
from caches import write_cache
from processes import run_ranks
from transformers import TrainerCallback

from formats.errors import DivergenceError
from trainer import load_config, train
from trainer.checkpoint import complete_checkpoints
from trainer.loop.finite import FiniteWatch, all_finite
from trainer.loop.label_annealing_trainer import LabelAnnealingTrainer

QUICK = [
    "training.per_device_train_batch_size=8",
    "training.gradient_accumulation_steps=1",
    "training.max_steps=4",
    "training.learning_rate=1e-3",
    "training.warmup_steps=0",
    "training.save_steps=1",
    "step0_rows=2",
]


def settings(model, cache, out, *overrides: str):
    flags = {"cache": str(cache), "model": str(model), "out": str(out)}
    return load_config(flags=flags, overrides=[*QUICK, *overrides])


class Breaks(TrainerCallback):
    """Sets one number of one weight after a step, as a fault of memory or of an optimiser would."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(iter(model.parameters())).view(-1)[7] = self.value


def break_weights(monkeypatch, step: int, value: float) -> None:
    original = LabelAnnealingTrainer.train

    def broken(self, *args, **kwargs):
        self.add_callback(Breaks(step, value))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LabelAnnealingTrainer, "train", broken)


def fails(config, *words: str) -> str:
    with pytest.raises(DivergenceError) as error:
        train(config)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_break_are_not_saved_and_the_last_good_checkpoint_stays(
    tiny_llama_dir, pruned_cache, tmp_path, monkeypatch, value
):
    break_weights(monkeypatch, 3, value)
    out = tmp_path / "run"
    fails(
        settings(tiny_llama_dir, pruned_cache, out),
        *("the weights must be finite", "after step 3", "checkpoint-2, the last good one, is kept", "0.001"),
    )
    assert [step for step, _ in complete_checkpoints(out)] == [1, 2]
    assert (
        not (out / "config.json").exists()
        and not list(out.glob("*.safetensors"))
        and not list(out.glob(".*"))
    )


def test_a_weight_that_breaks_after_the_last_step_is_not_published(
    tiny_llama_dir, pruned_cache, tmp_path, monkeypatch
):
    break_weights(monkeypatch, 4, math.nan)
    out = tmp_path / "run"
    fails(
        settings(tiny_llama_dir, pruned_cache, out, "training.save_strategy=no"),
        *("the weights must be finite", "after step 4", "no checkpoint was due"),
    )
    assert not out.exists()


def test_a_rate_that_overflows_stops_the_run(tiny_llama_dir, pruned_cache, tmp_path):
    """At 1e38 the second step's loss is NaN; without checkpoints nothing is left behind, and --out is free again."""
    out = tmp_path / "run"
    overrides = ("training.learning_rate=1e38", "training.save_strategy=no")
    fails(settings(tiny_llama_dir, pruned_cache, out, *overrides), "must be finite", "nothing is published")
    assert not out.exists()
    report = train(settings(tiny_llama_dir, pruned_cache, out, "training.save_strategy=no"))
    assert report.num_steps == 4


def test_the_very_step_is_named_though_it_is_read_later(tiny_llama_dir, pruned_cache, tmp_path, monkeypatch):
    """Weights break after step 2, the loss of step 3 shows it, and the next line of the log is step 4."""
    break_weights(monkeypatch, 2, math.nan)
    fails(
        settings(
            tiny_llama_dir,
            pruned_cache,
            tmp_path / "run",
            "training.save_strategy=no",
            "training.logging_steps=4",
        ),
        "the loss must be finite, got NaN or infinity in step 3",
    )


def test_targets_of_nan_stop_the_run(tiny_llama_dir, pruned_cache, tmp_path):
    """Evaluation text on which the model gives no number: here a model whose weights are infinite from the start."""
    from transformers import AutoModelForCausalLM

    from trainer.data.dataset import CachedDataset

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    from transformers import TrainingArguments

    trainer = LabelAnnealingTrainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=CachedDataset(pruned_cache),
        eval_dataset={"held": CachedDataset(pruned_cache)},
    )
    with pytest.raises(DivergenceError, match="the CE of eval_held must be finite"):
        trainer.evaluate()


def test_a_nan_in_evaluation_during_training_is_no_best_model(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, monkeypatch
):
    """Broken between the check of a step and the evaluation that follows the save."""
    original = LabelAnnealingTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        if self.state.global_step == 2:
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(math.nan)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LabelAnnealingTrainer, "evaluate", evaluate)
    out = tmp_path / "run"
    overrides = (f"eval_caches.held={llama_eval_cache}", "training.load_best_model_at_end=true")
    fails(settings(tiny_llama_dir, pruned_cache, out, *overrides), "of eval_held must be finite, got nan")
    assert [step for step, _ in complete_checkpoints(out)] == [1]


# --- fp16: the scaler's infinities are normal -----------------------------------------------------------


class AsFp16(TrainerCallback):
    """From the first step on accelerate unscales gradients as it does for fp16; the model itself stays in float32."""

    def __init__(self, accelerator) -> None:
        self.accelerator = accelerator

    def on_train_begin(self, *args, **kwargs):
        self.accelerator.native_amp = True


@pytest.fixture
def as_fp16(monkeypatch):
    """accelerate calls the precision fp16, which it refuses to do on a CPU by itself."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))


def scaled_run(model_dir, cache, tmp_path, scale: float, max_steps: int, optim: str = "adamw_torch"):
    from transformers import AutoModelForCausalLM, TrainingArguments

    from trainer.data.dataset import CachedDataset

    args = TrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=max_steps, save_strategy="no",
        logging_steps=1, learning_rate=1e-3, per_device_train_batch_size=8, disable_tqdm=True, optim=optim,
    )  # fmt: skip
    trainer = LabelAnnealingTrainer(
        AutoModelForCausalLM.from_pretrained(model_dir), args, train_dataset=CachedDataset(cache)
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.add_callback(AsFp16(trainer.accelerator))
    next(iter(trainer.model.parameters())).register_hook(lambda gradient: gradient * 256)  # overflows sooner
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_steps_that_the_loss_scaler_skips_are_normal(tiny_llama_dir, pruned_cache, tmp_path, as_fp16, optim):
    """2^127 overflows float32 a few times, is halved each time, and then the run goes on."""
    trainer = scaled_run(tiny_llama_dir, pruned_cache, tmp_path, 2.0**127, 16, optim)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    taken, skipped = trainer.finite.scaled_steps
    assert 0 < skipped < 16 and taken == 16 - skipped
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.named_parameters())
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (127 - skipped)


def test_a_run_whose_every_step_was_skipped_trained_nothing(tiny_llama_dir, pruned_cache, tmp_path, as_fp16):
    trainer = scaled_run(tiny_llama_dir, pruned_cache, tmp_path, 2.0**127, 1)
    with pytest.raises(DivergenceError, match="got 1 skipped and 0 taken steps"):
        trainer.train()


def test_a_gradient_that_no_scale_cures_stops_the_run(tiny_llama_dir, pruned_cache, tmp_path, as_fp16):
    """A gradient of NaN while the loss is finite: the scale would be halved for ever."""
    trainer = scaled_run(tiny_llama_dir, pruned_cache, tmp_path, 2.0**-12, 100)
    parameter = next(iter(trainer.model.parameters()))
    parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    with pytest.raises(DivergenceError, match="got 3 skipped and 0 taken steps"):
        trainer.train()
    assert torch.isfinite(parameter).all()


# --- the parts --------------------------------------------------------------------------------------------


def test_the_first_step_is_remembered_on_the_device():
    watch = FiniteWatch(torch.device("cpu"))
    watch.require(lambda values: values, str)
    for step, value in enumerate([1.0, 2.0, math.inf, math.nan, 3.0], start=1):
        watch.see("loss", torch.tensor(value), step)
        watch.see("gradient", value if step > 3 else 0.5, step)
    with pytest.raises(DivergenceError, match="the loss must be finite, got NaN or infinity in step 3;"):
        watch.require(lambda values: values, lambda: "; advice")


def test_all_parameters_are_looked_at():
    parts = [torch.zeros(3), torch.ones(2, 2, dtype=torch.bfloat16)]
    assert all_finite(parts, torch.device("cpu"))
    parts[1][1, 0] = math.nan
    assert not all_finite(parts, torch.device("cpu"))


def _rank(model_dir: str, cache: str, out: str) -> None:
    """Only rank 1 sees a loss that is no number; every rank must stop with the same line."""
    import os

    original = FiniteWatch.see

    def see(self, kind, value, step):
        bad = kind == "loss" and step == 2 and os.environ["RANK"] == "1"
        original(self, kind, value * math.nan if bad else value, step)

    FiniteWatch.see = see
    try:
        train(settings(model_dir, cache, out, "training.per_device_train_batch_size=4"))
    except DivergenceError as error:
        print(error)
        return
    raise AssertionError("the run went on")


def test_all_ranks_stop_together(tiny_llama_dir, pruned_cache, tmp_path):
    ranks = run_ranks(
        tmp_path / "ranks", 2, _rank, str(tiny_llama_dir), str(pruned_cache), str(tmp_path / "run")
    )
    for rank in ranks:
        assert "the loss must be finite, got NaN or infinity in step 2" in rank.text("stdout")
    assert [step for step, _ in complete_checkpoints(tmp_path / "run")] == [1]


def test_a_cache_of_another_seed_is_fine(tiny_llama_dir, tmp_path):
    """The checks let an ordinary run pass, accumulation and all."""
    cache = write_cache(tmp_path / "c", tiny_llama_dir, num_rows=9, seed=5, min_prob=1e-3, max_k=64)
    overrides = ("training.gradient_accumulation_steps=2", "training.per_device_train_batch_size=2")
    assert train(settings(tiny_llama_dir, cache, tmp_path / "run", *overrides)).num_steps == 4
