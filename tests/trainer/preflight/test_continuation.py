"""A run that continues is the same run: another split of the same rows goes on and gives the same numbers, anything
that would change a step is refused by name with both values, and a directory without a checkpoint is no run yet.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import resume_worker
from caches import identity_of, write_cache
from processes import run_ranks

from formats.errors import ConfigError
from trainer import train
from trainer.checkpoint import complete_checkpoints
from trainer.loop.step_control import StepControl
from trainer.result.run_directory import RunDirectory

STOP = 4


def settings(model, cache, out, *overrides: str):
    """9 steps of 8 rows (4 x 2), a checkpoint after every second; see resume_worker."""
    return resume_worker.settings(str(model), str(cache), str(out), list(overrides))


def stopped(config, monkeypatch, step: int = STOP) -> Path:
    """A run that a signal stopped after a step."""
    original = StepControl.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            self.trainer.stop_request.signal_name = "SIGTERM"
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StepControl, "on_step_end", on_step_end)
        report = train(config)
    assert report.interrupted_by == "SIGTERM" and report.num_steps == step
    return Path(config.out)


@pytest.fixture(scope="module")
def interrupted(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path_factory):
    """An interrupted run, and the log of the same run without a break."""
    patch = pytest.MonkeyPatch()
    directory = tmp_path_factory.mktemp("interrupted")
    out = stopped(settings(tiny_llama_dir, pruned_cache, directory / "run"), patch)
    whole = train(settings(tiny_llama_dir, pruned_cache, directory / "whole"))
    return out, [entry for entry in whole.log_history if "ce" in entry]


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (8, 1), (2, 4), (1, 8)])
def test_another_split_of_the_same_rows_continues_equal(
    tiny_llama_dir, pruned_cache, interrupted, tmp_path, batch, accumulation
):
    before, whole = interrupted
    out = shutil.copytree(before, tmp_path / "run")
    split = (
        f"training.per_device_train_batch_size={batch}",
        f"training.gradient_accumulation_steps={accumulation}",
    )
    report = train(settings(tiny_llama_dir, pruned_cache, out, *split))
    assert report.resumed_from == STOP and report.num_steps == 9
    found = [entry for entry in report.log_history if "ce" in entry]
    for name in ("loss", "ce", "kl", "grad_norm", "learning_rate"):
        for ours, theirs in zip(found, whole, strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_one_process_continues_as_two(tiny_llama_dir, pruned_cache, interrupted, tmp_path):
    """4 x 2 rows on one process are 4 x 1 on each of two; 4 x 2 on each of two are other steps."""
    before, whole = interrupted
    out = shutil.copytree(before, tmp_path / "run")
    places = (str(tiny_llama_dir), str(pruned_cache), str(out))
    with pytest.raises(AssertionError, match="rows per step was 8 and is 16"):
        run_ranks(tmp_path / "wrong", 2, resume_worker.run, *places, [])
    ranks = run_ranks(
        tmp_path / "ranks", 2, resume_worker.run, *places, ["training.gradient_accumulation_steps=1"]
    )
    history = json.loads(ranks[0].text("stdout").splitlines()[-1])["log_history"]
    found = [entry for entry in history if "ce" in entry]
    for name in ("loss", "ce", "kl", "grad_norm", "learning_rate"):
        for ours, theirs in zip(found, whole, strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_the_same_number_of_steps_may_be_said_in_another_way(
    tiny_llama_dir, pruned_cache, interrupted, tmp_path
):
    """Three epochs of three steps are nine steps; what is free may change as well."""
    out = shutil.copytree(interrupted[0], tmp_path / "moved")
    free = (
        "training.max_steps=9",
        "training.num_train_epochs=1",
        "training.data_seed=0",
        "training.logging_steps=2",
    )
    free += ("step0_rows=1", "step0_threshold=1", "save_dtype=bfloat16", "keep_checkpoints=true")
    free += ("training.dataloader_num_workers=1", "training.save_steps=3", "training.optim=adamw_torch_fused")
    report = train(settings(tiny_llama_dir, pruned_cache, out, *free))
    assert report.num_steps == 9 and report.resumed_from == STOP


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["training.per_device_train_batch_size=8"],
            ("rows per step was 8 and is 16", "batch x accumulation x processes"),
        ),
        (["training.gradient_accumulation_steps=3"], ("rows per step was 8 and is 12",)),
        (["training.max_steps=10"], ("steps was 9 and is 10",)),
        (["training.num_train_epochs=4"], ("steps was 9 and is 12",)),
        (["training.bf16=true"], ("precision was 'no' and is 'bf16'",)),
        (["training.seed=1"], ("data seed was 0 and is 1",)),
        (["training.data_seed=1"], ("data seed was 0 and is 1",)),
        (["training.learning_rate=2e-3"], ("training.learning_rate was 0.001 and is 0.002",)),
        (["training.lr_scheduler_type=linear"], ("lr_scheduler_type was 'cosine' and is 'linear'",)),
        (["training.warmup_steps=2"], ("training.warmup_steps was 0.05 and is 2",)),
        (["training.weight_decay=0.1"], ("training.weight_decay was 0.0 and is 0.1",)),
        (["training.optim=adamw_torch"], ("training.optim was 'adamw_torch_fused' and is 'adamw_torch'",)),
        (["training.adam_beta2=0.95"], ("training.adam_beta2 was 0.999 and is 0.95",)),
        (["training.max_grad_norm=0"], ("training.max_grad_norm was 1.0 and is 0",)),
        (["training.neftune_noise_alpha=5"], ("training.neftune_noise_alpha was None and is 5",)),
        (["training.train_sampling_strategy=sequential"], ("'random' and is 'sequential'",)),
        (["kl_coef=2"], ("kl_coef was 1.0 and is 2",)),
        (["temperature=2"], ("temperature was 1.0 and is 2",)),
        (["kl_direction=reverse"], ("kl_direction was 'forward' and is 'reverse'",)),
        (["tail_draws=false"], ("tail_draws was True and is False",)),
        (["packing=true"], ("packing was False and is True",)),
        (["group_by_length=true"], ("group_by_length was False and is True",)),
        (["lora.r=4"], ("lora was None and is {",)),
        (["l2.coef=0.1"], ("l2 was None and is {",)),
        (["sfa.beta=0.1"], ("sfa was None and is {",)),
        (["dtype=bfloat16"], ("dtype was 'auto' and is 'bfloat16'",)),
    ],
)
def test_what_would_change_a_step_is_refused_with_both_values(
    tiny_llama_dir, pruned_cache, interrupted, overrides, words
):
    out = interrupted[0]
    before = sorted(path.name for path in out.iterdir())
    # sfa and packing change the number of steps of an epoch or nothing; the first difference is named.
    with pytest.raises(ConfigError) as error:
        train(settings(tiny_llama_dir, pruned_cache, out, *overrides))
    message = str(error.value)
    named = all(word in message for word in words) or (
        overrides == ["packing=true"] and "was 9 and is" in message
    )
    assert named and "use the same settings or another --out" in message and "\n" not in message, message
    assert sorted(path.name for path in out.iterdir()) == before  # nothing is lost


def test_other_contents_under_the_same_identity_are_refused(
    tiny_llama_dir, pruned_cache, interrupted, tmp_path
):
    """A cache rebuilt with smaller heads: same teacher, same corpus, other numbers."""
    out = interrupted[0]
    other = write_cache(tmp_path / "other", tiny_llama_dir, num_rows=24, min_prob=1e-2, max_k=16)
    with pytest.raises(ConfigError, match=r"the training cache was '.*' and is '"):
        train(settings(tiny_llama_dir, other, out))
    moved = shutil.copytree(pruned_cache, tmp_path / "moved")
    report = train(settings(tiny_llama_dir, moved, shutil.copytree(out, tmp_path / "run")))
    assert report.resumed_from == STOP


def test_a_cache_that_is_mixed_in_is_part_of_the_run(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, monkeypatch
):
    def config(path):
        return settings(
            tiny_llama_dir,
            pruned_cache,
            tmp_path / "run",
            f"caches=[{{path: {path}, weight: 0.5, loss: kl}}]",
        )

    stopped(config(llama_eval_cache), monkeypatch, 3)
    other = write_cache(tmp_path / "other", tiny_llama_dir, num_rows=8, seed=78)
    with pytest.raises(ConfigError, match="the mixed cache was"):
        train(config(other))


def test_where_a_metric_chooses_evaluation_is_part_of_the_run(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, monkeypatch
):
    base = (f"eval_caches.held={llama_eval_cache}", "training.load_best_model_at_end=true")
    stopped(settings(tiny_llama_dir, pruned_cache, tmp_path / "run", *base), monkeypatch, 3)
    with pytest.raises(
        ConfigError, match=r"training.metric_for_best_model was 'eval_held_loss' and is 'eval_held_kl'"
    ):
        train(
            settings(
                tiny_llama_dir, pruned_cache, tmp_path / "run", *base, "training.metric_for_best_model=kl"
            )
        )
    with pytest.raises(ConfigError, match=r"training.eval_steps was 2 and is 1"):
        train(
            settings(
                tiny_llama_dir,
                pruned_cache,
                tmp_path / "run",
                *base,
                "training.eval_strategy=steps",
                "training.eval_steps=1",
            )
        )
    other = write_cache(tmp_path / "other", tiny_llama_dir, num_rows=4, seed=5)
    with pytest.raises(ConfigError, match="the evaluation cache was"):
        train(settings(tiny_llama_dir, pruned_cache, tmp_path / "run", *base, f"eval_caches.held={other}"))


def test_another_student_of_the_same_shape_is_refused(
    tiny_llama_dir, tiny_qwen3_dir, pruned_cache, tmp_path, monkeypatch
):
    """The identity of the cache says nothing about a student that is not its teacher."""
    import torch
    from transformers import AutoModelForCausalLM

    stopped(
        settings(tiny_qwen3_dir, pruned_cache, tmp_path / "run", "allow_different_student=true"),
        monkeypatch,
        2,
    )
    other = shutil.copytree(tiny_qwen3_dir, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir)
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    model.save_pretrained(other)
    with pytest.raises(ConfigError, match="weights of the model was"):
        train(settings(other, pruned_cache, tmp_path / "run", "allow_different_student=true"))


# --- from when on a directory holds a run ---------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    ["training.lr_scheduler_kwargs={foo: 1}", "training.optim=adamw_8bit", "kl_coef=-1", "step0_threshold=0"],
)
def test_a_command_that_fails_leaves_nothing_and_the_corrected_one_starts(
    tiny_llama_dir, pruned_cache, tmp_path, wrong
):
    out = tmp_path / "deep" / "run"
    with pytest.raises(ValueError):
        train(settings(tiny_llama_dir, pruned_cache, out, wrong))
    assert not out.exists()
    out.mkdir(parents=True)
    with pytest.raises(ValueError):
        train(settings(tiny_llama_dir, pruned_cache, out, wrong))
    assert list(out.iterdir()) == []
    assert train(settings(tiny_llama_dir, pruned_cache, out, "training.max_steps=1")).num_steps == 1


def test_a_run_killed_before_its_first_checkpoint_is_started_over_by_any_settings(
    tiny_llama_dir, pruned_cache, tmp_path
):
    out = tmp_path / "run"
    first = settings(tiny_llama_dir, pruned_cache, out)
    directory = RunDirectory.open(out, first.to_dict(), {"cache": "another"})
    (out / ".checkpoint-2.staging").mkdir()
    (out / ".result.staging").mkdir()
    (out / "runs").mkdir()  # a reporter's
    directory.release()  # as the kernel does for a process that is killed
    report = train(settings(tiny_llama_dir, pruned_cache, out, "training.max_steps=1", "kl_coef=3"))
    assert report.num_steps == 1 and (out / "runs").is_dir() and not list(out.glob(".*"))
    assert "kl_coef: 3" in (out / "anneal.yaml").read_text()


def test_reporters_logs_are_kept_and_do_not_stand_in_the_way(
    tiny_llama_dir, pruned_cache, tmp_path, monkeypatch
):
    out = tmp_path / "run"

    def fail(self, *args, **kwargs):
        (out / "runs").mkdir()
        raise ConfigError("a fault of the test")

    with monkeypatch.context() as patch:
        patch.setattr(StepControl, "on_train_begin", fail)
        with pytest.raises(ConfigError, match="a fault"):
            train(settings(tiny_llama_dir, pruned_cache, out))
    assert sorted(path.name for path in out.iterdir()) == ["anneal.json", "runs"]
    assert train(settings(tiny_llama_dir, pruned_cache, out, "training.max_steps=1")).num_steps == 1


def test_one_directory_belongs_to_one_process(tiny_llama_dir, pruned_cache, tmp_path):
    out = tmp_path / "run"
    held = RunDirectory.open(out, {}, identity_of(tiny_llama_dir))
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(ConfigError, match="in which another process trains"):
        train(settings(tiny_llama_dir, pruned_cache, out))
    assert sorted(path.name for path in out.iterdir()) == before
    held.release()
    assert train(settings(tiny_llama_dir, pruned_cache, out, "training.max_steps=1")).num_steps == 1


def test_a_directory_of_something_else_is_left_alone(tiny_llama_dir, pruned_cache, tmp_path):
    """A merged model has an anneal.json too."""
    out = tmp_path / "merged"
    out.mkdir()
    (out / "anneal.json").write_text(json.dumps({"method": "ties"}))
    (out / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ConfigError, match="must be new, empty or an interrupted run"):
        train(settings(tiny_llama_dir, pruned_cache, out))
    (out / "anneal.json").write_text('{"status": "runn')
    with pytest.raises(ConfigError, match=r"got .*merged whose anneal\.json is damaged; choose another"):
        train(settings(tiny_llama_dir, pruned_cache, out))
    assert sorted(path.name for path in out.iterdir()) == ["anneal.json", "model.safetensors"]


def test_the_record_says_what_decides_the_steps(interrupted):
    out = interrupted[0]
    run = json.loads((out / "anneal.json").read_text())["run"]
    assert (run["rows per step"], run["steps"], run["steps per epoch"], run["precision"]) == (8, 9, 3, "no")
    assert run["training.optim"] == "adamw_torch_fused"  # resolved, although nobody typed it
    assert [step for step, _ in complete_checkpoints(out)][-1] == STOP
    assert dataclasses.is_dataclass(RunDirectory)
