"""`train` with l2, ewc and sfa: interrupted runs, what is written and removed, what is refused."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import resume_worker
import torch
from caches import identity_of, write_cache
from processes import run_ranks
from runs import begin, finish, same_weights, settings
from safetensors.torch import load_file

from formats.errors import ConfigError, IdentityMismatchError
from trainer import train
from trainer.retention.fisher_file import load_fisher, remove_fisher, save_fisher


def overrides(name: str, known_text: Path) -> list[str]:
    """A method by its name, strong enough that the losses show it."""
    return {
        "l2": ["l2.coef=0.5"],
        "ewc": ["ewc.coef=300", f"ewc.cache={known_text}", "ewc.num_rows=5"],
        "sfa": ["sfa.beta=0.3", "sfa.period=0.3"],
    }[name]


def numbers(entries: list[dict], name: str) -> list[tuple]:
    """What must be equal to the last bit."""
    keys = ("step", "ce", "kl", "loss", "grad_norm", "learning_rate", *([name] if name != "sfa" else []))
    return [tuple(entry[key] for key in keys) for entry in entries]


@pytest.mark.parametrize("name", ["l2", "ewc", "sfa"])
def test_a_killed_run_continues_bit_for_bit(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, name):
    """Killed after step 5 of 9, continued from the checkpoint of step 4: still held to the initial weights,
    with the same Fisher information. A torn one is estimated again, at the initial weights."""
    chosen = overrides(name, llama_eval_cache)
    whole, out = tmp_path / "whole", tmp_path / "run"
    expected, _ = finish(tiny_llama_dir, pruned_cache, whole, *chosen)
    plain, _ = finish(tiny_llama_dir, pruned_cache, tmp_path / "plain")
    assert [e["ce"] for e in plain[5:]] != [e["ce"] for e in expected[5:]]
    first = begin(tiny_llama_dir, pruned_cache, out, *chosen, KILL_AT="step:5")
    assert first.wait() == -signal.SIGKILL, first.text("stderr")[-2000:]
    kept = out / "ewc-fisher" / "fisher.safetensors"
    if name == "ewc":
        kept.write_bytes(kept.read_bytes()[:-100])
    entries, done = finish(tiny_llama_dir, pruned_cache, out, *chosen)
    assert "continuing from checkpoint-4" in done.text("stderr")
    assert ("ewc: Fisher" in done.text("stderr")) == (name == "ewc")
    assert numbers(entries, name) == numbers(expected, name)
    assert same_weights(out, whole)
    assert not [p.name for p in out.iterdir() if p.name.startswith(".") or "fisher" in p.name]


def test_the_kept_fisher_is_read_and_belongs_to_its_cache(
    tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path
):
    chosen, out = overrides("ewc", llama_eval_cache), tmp_path / "run"
    first = begin(tiny_llama_dir, pruned_cache, out, *chosen, KILL_AT="step:5")
    assert first.wait() == -signal.SIGKILL
    before = (out / "ewc-fisher" / "fisher.safetensors").read_bytes()
    other = write_cache(
        tmp_path / "other", tiny_llama_dir, num_rows=8, seed=5, identity=another_corpus(tiny_llama_dir)
    )
    again = begin(tiny_llama_dir, pruned_cache, out, *chosen, f"ewc.cache={other}")
    assert again.wait() == 1 and "its own Fisher information, but its cache was" in again.text("stderr")
    changed = begin(tiny_llama_dir, pruned_cache, out, *chosen, "ewc.coef=301")
    assert changed.wait() == 1 and "but ewc was" in changed.text("stderr")
    assert (out / "ewc-fisher" / "fisher.safetensors").read_bytes() == before
    _, done = finish(tiny_llama_dir, pruned_cache, out, *chosen)
    assert "ewc: Fisher" not in done.text("stderr")


@pytest.mark.parametrize("fsdp", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_stop_and_continue_with_every_method(
    fsdp, tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path
):
    """DDP and FSDP2, stopped after step 4 and continued: theta0 and the kept Fisher are placed again, and the
    result is that of one process which was never stopped."""
    methods = [word for name in ("l2", "ewc", "sfa") for word in overrides(name, llama_eval_cache)]

    def arguments(out: Path, accumulation: int, *more: str) -> tuple:
        split = [
            "training.per_device_train_batch_size=4",
            f"training.gradient_accumulation_steps={accumulation}",
        ]
        return str(tiny_llama_dir), str(pruned_cache), str(out), [*methods, *split, *more]

    resume_worker.run(*arguments(tmp_path / "one", 2))
    two = arguments(tmp_path / "two", 1, *(["training.fsdp=true"] if fsdp else []))
    run_ranks(tmp_path / "logs", 2, resume_worker.run_and_stop, 4, *two)
    assert (tmp_path / "two" / "ewc-fisher" / "complete.json").exists()
    ranks = run_ranks(tmp_path / "logs", 2, resume_worker.run, *two)
    told = ranks[0].text("stderr")
    assert "continuing from checkpoint-4" in told and "ewc: Fisher" not in told
    one, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def another_corpus(model_dir: Path) -> dict:
    from caches import identity_of

    identity = identity_of(model_dir)
    return identity | {"corpus": {"fingerprint": "another"}}


def test_a_fisher_is_complete_or_absent(tmp_path):
    fisher, key = {"w": torch.arange(6.0).reshape(2, 3)}, {"cache": "c", "num_rows": 3}
    assert load_fisher(tmp_path, key) is None
    save_fisher(tmp_path, fisher, key)
    assert torch.equal(load_fisher(tmp_path, key)["w"], fisher["w"])
    with pytest.raises(ConfigError, match="its num_rows was 3 and is 4"):
        load_fisher(tmp_path, key | {"num_rows": 4})
    path = tmp_path / "ewc-fisher" / "fisher.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert load_fisher(tmp_path, key) is None
    save_fisher(tmp_path, fisher, key)  # in place of the torn one
    assert load_fisher(tmp_path, key) is not None
    (tmp_path / ".ewc-fisher.staging").mkdir()
    remove_fisher(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_methods_in_one_run(tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path, capsys):
    """With label annealing and replay beside: card, record, log; SFA with beta 1 ends where it began."""
    out = tmp_path / "run"
    chosen = [word for name in ("l2", "ewc") for word in overrides(name, llama_eval_cache)]
    chosen += ["sfa.beta=1", "sfa.period=1", f"caches=[{{path: {llama_eval_cache}, weight: 0.5, loss: ce}}]"]
    report = train(settings(pruned_cache, tiny_llama_dir, out, *chosen))
    second = report.log_history[1]
    assert second["l2"] > 0 and second["ewc"] > 0
    assert second["loss"] == pytest.approx(
        second["ce"] + second["kl"] + second["l2"] + second["ewc"], rel=1e-5
    )
    told = capsys.readouterr().err
    assert "ewc: Fisher information of 5 rows" in told and "L2 " in told and "EWC " in told
    card = (out / "README.md").read_text()
    assert (
        "label annealing with L2 towards the weights at the start and elastic weight consolidation and"
        in card
    )
    assert "300 / 2 * sum_i F_i" in card and "| last logged l2 penalty |" in card and "replay" in card
    initial, trained = load_file(tiny_llama_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(initial[name], trained[name]) for name in initial)
    assert json.loads((out / "anneal.json").read_text())["status"] == "complete"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["l2={}"], "l2.coef is required"),
        (["l2.coeff=1"], "unknown setting l2.coeff; did you mean l2.coef?"),
        (["ewc.coef=1"], "ewc.cache is required"),
        (["ewc.coef=1", "ewc.cache=c", "ewc.rows=3"], "unknown setting ewc.rows; did you mean ewc.num_rows?"),
        (["sfa.beta=0.2", "sfa.perod=1"], "unknown setting sfa.perod; did you mean sfa.period?"),
        (["sfa=0.2"], "sfa must be a mapping, got 0.2"),
        (["l2.coef=1", "lora.r=2"], "l2 needs full fine-tuning, got lora"),
        (["sfa.beta=0.2", "lora.r=2"], "sfa needs full fine-tuning, got lora"),
        (["sfa.beta=0.2", "training.load_best_model_at_end=true"], "sfa ends with an average"),
        (["l2.coef=many"], "l2.coef must be a number, got 'many'"),
    ],
)
def test_bad_settings_leave_nothing_behind(tiny_llama_dir, pruned_cache, tmp_path, words, message):
    with pytest.raises(ConfigError) as error:
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *words))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_fisher_cache_of_another_vocabulary_is_refused(tiny_llama_dir, pruned_cache, tmp_path):
    """Its tokens are all that is read: another model's cache will do, another tokenizer's will not."""
    identity = identity_of(tiny_llama_dir)
    identity["tokenizer"] = dict(identity["tokenizer"]) | {"vocabulary": "0" * 64}
    other = write_cache(tmp_path / "other", tiny_llama_dir, num_rows=4, identity=identity)
    with pytest.raises(IdentityMismatchError, match="tokenizer vocabulary: 000000000000 in the cache"):
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", "ewc.coef=1", f"ewc.cache={other}"))
    assert not (tmp_path / "run").exists()


def test_a_fisher_cache_without_loss_is_refused(tiny_llama_dir, pruned_cache, tmp_path):
    from formats.disk.token_row import TokenRow

    ids = np.arange(6, 16)
    silent = write_cache(tmp_path / "silent", tiny_llama_dir, rows=[TokenRow(ids, np.zeros(10, bool))])
    with pytest.raises(ConfigError, match="must have tokens that carry loss"):
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", "ewc.coef=1", f"ewc.cache={silent}"))
    assert not (tmp_path / "run").exists()
