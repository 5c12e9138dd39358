"""`train` from settings to a model directory: what is written, what loads it, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from caches import identity_of, write_cache
from recorded_progress import RecordedProgress
from runs import settings

from formats.errors import ConfigError, IdentityMismatchError
from trainer import evaluate, load_config, train


@pytest.fixture(scope="module")
def trained(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    report = train(settings(pruned_cache, tiny_llama_dir, out, f"eval_caches.held-out={llama_eval_cache}"))
    return out, report


def test_the_report_tells_what_happened(trained):
    out, report = trained
    assert report.num_steps == report.max_steps == 2 and report.interrupted_by is None
    assert report.step0["kl"] < 1e-6 and report.step0["num_rows"] == 4
    steps = [entry for entry in report.log_history if "ce" in entry]
    wanted = {"loss", "ce", "kl", "kept_mass", "student_kept_mass", "tokens_per_second", "memory_gib"}
    assert all(wanted <= entry.keys() for entry in steps)
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kl"], rel=1e-5)
    assert abs(steps[0]["kl"]) < 1e-6 < steps[1]["kl"]
    found = report.evaluation["held-out"]
    assert found["perplexity"] == pytest.approx(np.exp(found["ce"])) and found["kl"] > 1e-6
    assert report.line().startswith("2 steps in ") and str(out) in report.line()
    assert dataclasses.replace(report, num_steps=1).line().startswith("1 step in ")


def test_the_directory_holds_a_model_its_settings_and_a_card(trained, tiny_llama_dir, pruned_cache):
    out, report = trained
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "anneal.yaml"} <= names
    assert not [name for name in names if name.startswith((".", "checkpoint")) or "training_args" in name]
    record = json.loads((out / "anneal.json").read_text())
    assert record["status"] == "complete" and record["step0"] == report.step0
    assert record["identity"]["teacher"]["weights"] == identity_of(tiny_llama_dir)["teacher"]["weights"]
    card = (out / "README.md").read_text()
    for text in ("label annealing", record["cache"][:16], "| kl_coef | 1 |", "| held-out |"):
        assert text in card
    again = load_config(out / "anneal.yaml")
    assert again.cache == str(pruned_cache) and again.training["learning_rate"] == 1e-3
    assert again.training["lr_scheduler_type"] == "cosine"  # defaults are resolved


def test_transformers_loads_the_result_in_the_dtype_of_the_initial_model(
    trained, tiny_llama_dir, tiny_tokenizer
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = trained
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32 and model.config.use_cache
    initial = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), initial.parameters(), strict=True)]
    assert all(changed)
    ids = AutoTokenizer.from_pretrained(out)("def f(x):", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tiny_tokenizer("def f(x):", return_tensors="pt")["input_ids"])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


@pytest.mark.vllm
def test_vllm_loads_the_result(trained):
    """vLLM's greedy tokens are those of transformers, on the trained weights."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    out, _ = trained
    prompt = np.random.default_rng(0).integers(6, 1003, 12).tolist()
    engine = LLM(str(out), dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0, max_tokens=6, detokenize=False, ignore_eos=True)
    try:
        generated = list(engine.generate([{"prompt_token_ids": prompt}], sampling)[0].outputs[0].token_ids)
    finally:
        engine.llm_engine.engine_core.shutdown()
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generated == expected[0, 12:].tolist()


def test_a_finished_run_is_never_overwritten(trained, tiny_llama_dir, pruned_cache):
    out, _ = trained
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="finished run"):
        train(settings(pruned_cache, tiny_llama_dir, out))
    assert (out / "model.safetensors").read_bytes() == before


def test_evaluating_the_saved_model_gives_the_reported_numbers(trained, tiny_llama_dir, llama_eval_cache):
    from trainer.evaluation.evaluate import format_evaluation

    out, report = trained
    seen = RecordedProgress()
    found = evaluate(out, {"held-out": llama_eval_cache}, progress=seen)
    for key in ("ce", "perplexity", "kl", "num_tokens"):
        assert found["held-out"][key] == pytest.approx(report.evaluation["held-out"][key], rel=1e-4)
    assert seen.phases == [("held-out", 8, 8)]
    initial = evaluate(tiny_llama_dir, [llama_eval_cache], batch_tokens=64)
    assert abs(initial["held-out"]["kl"]) < 1e-6 < found["held-out"]["kl"]
    text = format_evaluation(found)
    assert "held-out" in text and f"{found['held-out']['perplexity']:.3f}" in text
    assert json.loads(json.dumps(found)) == found


def test_evaluation_by_hand(tiny_llama_dir, llama_eval_cache):
    """Against the model's own log-softmax, summed row by row."""
    from caches import model_logprobs
    from transformers import AutoModelForCausalLM

    from formats.cache import TeacherCache

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)  # another model, so that KL is not zero
    changed = tiny_llama_dir.parent / "changed"
    model.save_pretrained(changed)
    for path in tiny_llama_dir.glob("tokenizer*"):
        shutil.copy(path, changed)
    ce = kl = num = 0.0
    for row in TeacherCache(llama_eval_cache):
        ours = model_logprobs(model, row.input_ids)
        targets = np.flatnonzero(row.loss_mask)
        ce -= ours[targets - 1, row.input_ids[targets]].sum()
        teacher = np.full((len(targets), 1003), -np.inf)
        for p in range(len(targets)):
            a, b = row.teacher.offsets[p : p + 2]
            teacher[p, row.teacher.token_ids[a:b]] = row.teacher.logprobs[a:b]
        kl += (np.exp(teacher) * (teacher - ours[targets - 1])).sum()
        num += len(targets)
    found = evaluate(changed, [llama_eval_cache])["held-out"]
    assert found["num_tokens"] == num
    assert found["ce"] == pytest.approx(ce / num, rel=1e-5)
    assert found["kl"] == pytest.approx(kl / num, rel=1e-4)


def test_no_kl_is_direct_fine_tuning(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, trained):
    overrides = ("kl_coef=0", f"eval_caches.held-out={llama_eval_cache}")
    report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "direct", *overrides))
    last = [entry for entry in report.log_history if "ce" in entry][-1]
    assert last["loss"] == pytest.approx(last["ce"]) and "kl" not in last
    assert report.evaluation["held-out"]["kl"] > 0
    assert "direct fine-tuning" in (tmp_path / "direct" / "README.md").read_text()


def test_more_kl_keeps_closer_to_the_initial_model(tiny_llama_dir, pruned_cache, tmp_path):
    """The whole point, in small: the KL after training falls as kl_coef grows."""
    kls = []
    for kl_coef in (0, 1, 10):
        overrides = (f"kl_coef={kl_coef}", "training.max_steps=8", f"eval_caches.same={pruned_cache}")
        report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / f"run-{kl_coef}", *overrides))
        kls.append(report.evaluation["same"]["kl"])
    assert kls[0] > 1.2 * kls[1] > 1.2 * 1.2 * kls[2] > 0


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_train_save_and_merge(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, merge):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    overrides = ("lora.r=4", f"lora.merge={merge}".lower(), f"eval_caches.held-out={llama_eval_cache}")
    report = train(settings(pruned_cache, tiny_llama_dir, out, *overrides))
    assert report.step0["kl"] < 1e-6  # fresh adapters change nothing
    adapter = out / "adapter" if merge else out
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (out / "model.safetensors").is_file() == merge
    found = evaluate(out, [llama_eval_cache])["held-out"]
    assert found["kl"] == pytest.approx(report.evaluation["held-out"]["kl"], rel=1e-3) and found["kl"] > 1e-6
    if merge:
        model = AutoModelForCausalLM.from_pretrained(out)
        assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_packing_and_grouping_train_on_the_same_tokens(tiny_llama_dir, pruned_cache, tmp_path):
    """One step over all 24 rows: packed or not, the loss is the same number."""
    losses = []
    for name, overrides in {
        "plain": ("training.per_device_train_batch_size=24",),
        "packed": ("packing=true", "training.per_device_train_batch_size=24"),
        "grouped": ("group_by_length=true", "training.per_device_train_batch_size=24"),
    }.items():
        report = train(
            settings(pruned_cache, tiny_llama_dir, tmp_path / name, "training.max_steps=1", *overrides)
        )
        losses.append(report.last["ce"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_other_caches_are_mixed_in(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path):
    """A step over 24 target rows and 6 retained ones, of which only KL counts."""
    overrides = (
        f"caches=[{{path: {llama_eval_cache}, weight: 0.25, loss: kl}}]",
        "training.per_device_train_batch_size=30",
        "training.max_steps=1",
        f"eval_caches.target={pruned_cache}",
    )
    report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *overrides))
    initial = evaluate(tiny_llama_dir, {"target": pruned_cache})["target"]
    assert report.last["ce"] == pytest.approx(initial["ce"], rel=1e-5)  # labels of the target rows only
    assert report.last["epoch"] == 1.0


def test_evaluation_during_training(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path):
    overrides = (
        f"eval_caches.held={llama_eval_cache}",
        "training.eval_strategy=steps",
        "training.eval_steps=1",
    )
    report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *overrides))
    entries = [entry for entry in report.log_history if "eval_held_ce" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]
    last = entries[-1]
    assert last["eval_held_perplexity"] == pytest.approx(np.exp(last["eval_held_ce"]))
    assert last["eval_held_loss"] == pytest.approx(last["eval_held_ce"] + last["eval_held_kl"])
    assert last["eval_held_ce"] == pytest.approx(report.evaluation["held"]["ce"])


def test_time_of_evaluations_is_left_out_of_the_throughput_once(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, monkeypatch
):
    """Two evaluation caches are evaluated by calls within a call, and only the outer one is a pause."""
    from trainer.loop.log_window import LogWindow

    pauses, original = [], LogWindow.pause
    monkeypatch.setattr(LogWindow, "pause", lambda self, s: (pauses.append(s), original(self, s))[1])
    overrides = (f"eval_caches.a={llama_eval_cache}", f"eval_caches.b={llama_eval_cache}")
    overrides += ("training.eval_strategy=steps", "training.eval_steps=1", "training.eval_on_start=true")
    report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *overrides))
    assert len(pauses) == 3  # before the first step, and after each of the two
    assert [entry["step"] for entry in report.log_history if "eval_b_ce" in entry] == [0, 1, 2]


def test_the_log_warns_of_small_steps_then_gives_the_step_0_kl(
    tiny_llama_dir, pruned_cache, tmp_path, capsys
):
    train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("about ") and "tokens with KL in a step: below 150" in lines[0]
    assert lines[1].startswith("step 0: KL(initial || model) = ")
    assert lines[2].startswith("step 1/2: CE ") and "KL" in lines[2] and "tok/s" in lines[2]


def test_the_best_checkpoint_can_be_the_result(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path):
    """`load_best_model_at_end`, as transformers has it, over staged checkpoints; KL is least after step 1."""
    overrides = [
        f"eval_caches.held={llama_eval_cache}",
        "training.max_steps=4",
    ]
    overrides += [f"training.{name}=steps" for name in ("eval_strategy", "save_strategy")]
    overrides += ["training.eval_steps=1", "training.save_steps=1", "training.load_best_model_at_end=true"]
    overrides += ["training.metric_for_best_model=held_kl"]
    report = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *overrides))
    kls = [entry["eval_held_kl"] for entry in report.log_history if "eval_held_kl" in entry]
    assert len(kls) == 4 and kls[0] < 0.5 * kls[-1]
    assert report.evaluation["held"]["kl"] == pytest.approx(kls[0], rel=1e-5)


def test_evaluation_refuses_what_it_cannot_compare(trained, tiny_qwen3_dir, llama_eval_cache, tmp_path):
    out, _ = trained
    foreign = write_cache(tmp_path / "foreign", tiny_qwen3_dir, num_rows=2)
    with pytest.raises(IdentityMismatchError, match="rebuild the cache with the initial model"):
        evaluate(out, [foreign])
    with pytest.raises(ConfigError, match="at least one cache"):
        evaluate(out, [])
    with pytest.raises(ConfigError, match="twice"):
        evaluate(out, [llama_eval_cache, llama_eval_cache])


def test_gradient_checkpoints_of_adapters_give_the_same_gradient(tiny_llama_dir, pruned_cache, tmp_path):
    """Both kinds of them: frozen weights below a reentrant checkpoint must not cut the adapters off."""
    found = {}
    for name, more in {
        "plain": [],
        "new": ["training.gradient_checkpointing=true"],
        "reentrant": [
            "training.gradient_checkpointing=true",
            "training.gradient_checkpointing_kwargs={use_reentrant: true}",
        ],
    }.items():
        torch.manual_seed(0)
        config = settings(pruned_cache, tiny_llama_dir, tmp_path / name, "lora.r=4", *more)
        found[name] = [e["grad_norm"] for e in train(config).log_history if "ce" in e]
    assert found["new"] == pytest.approx(found["plain"], rel=1e-5) and min(found["plain"]) > 0
    assert found["reentrant"] == pytest.approx(found["plain"], rel=1e-5)
    with pytest.raises(ConfigError, match=r"gradient_checkpointing_kwargs are .*; got reentrant"):
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "wrong", "training.gradient_checkpointing=true",
                       "training.gradient_checkpointing_kwargs={reentrant: true}"))  # fmt: skip
    named = r"gradient_checkpointing_kwargs.use_reentrant must be true or false, got 'no'"
    with pytest.raises(ConfigError, match=named):  # a word, which would count as true
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "word", "training.gradient_checkpointing=true",
                       "training.gradient_checkpointing_kwargs={use_reentrant: no}"))  # fmt: skip
