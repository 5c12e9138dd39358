"""`loss` of the target cache: learnt alone, retained alone, and KL on mixed text only (arXiv 2605.26097)."""

import numpy as np
import pytest
import torch
from caches import write_cache
from distributed_worker import Record, relative_difference, run
from runs import settings

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer.preflight.combinations import check_objective
from trainer.run import train


def dense_step(model_dir: str, learnt, retained, kl_coef: float) -> dict:
    """Mean CE over the labels of `learnt` plus kl_coef * mean KL over the positions of `retained`, with the whole
    distribution of a second model, row by row, in float64; nudged first, so that the KL has a gradient.
    """
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model, initial = (load(model_dir, dtype=torch.float64) for _ in range(2))
    record, steps = Record(), 2
    for _ in range(steps):
        ce = kl = 0.0
        for row in learnt:
            ids = torch.as_tensor(row.input_ids.astype(np.int64))[None]
            at = torch.as_tensor(np.flatnonzero(row.loss_mask))
            logits = model(input_ids=ids).logits[0, at - 1]
            ce = ce + torch.nn.functional.cross_entropy(logits, ids[0, at], reduction="sum")
        for row in retained:
            ids = torch.as_tensor(row.input_ids.astype(np.int64))[None]
            at = torch.as_tensor(np.flatnonzero(row.loss_mask)) - 1
            with torch.no_grad():
                log_p = initial(input_ids=ids).logits[0, at].log_softmax(-1)
            log_q = model(input_ids=ids).logits[0, at].log_softmax(-1)
            kl = kl + (log_p.exp() * (log_p - log_q)).sum()
        num_ce, num_kl = (sum(int(row.loss_mask.sum()) for row in rows) for rows in (learnt, retained))
        model.zero_grad()
        (ce / max(num_ce, 1) + kl_coef * kl / num_kl).backward()
        record.on_pre_optimizer_step(None, None, None, model=model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    return {"gradients": record.gradients}


@pytest.fixture(scope="module")
def other_cache(tiny_llama_dir, tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("other") / "cache", tiny_llama_dir, num_rows=12, seed=7)


def test_kl_on_mixed_text_only_is_its_definition(tiny_llama_dir, llama_cache, other_cache, tmp_path):
    spec = {
        "model": str(tiny_llama_dir), "cache": str(llama_cache), "out": str(tmp_path / "run"), "kl_coef": 3.0,
        "loss": "ce", "mixed": [(str(other_cache), "kl", 0.5)], "learning_rate": 0.5, "steps": 2,
        "batch": 36, "accumulation": 1,
    }  # fmt: skip
    found = run(spec)
    expected = dense_step(
        str(tiny_llama_dir), [*TeacherCache(llama_cache)], [*TeacherCache(other_cache)], 3.0
    )
    assert relative_difference(expected, found) < 1e-4  # the cache was captured from a float32 model
    both = run(spec | {"loss": "both"})
    assert relative_difference(expected, both) > 1e-2


def test_a_target_that_is_only_retained_stays_where_it_is(tiny_llama_dir, llama_cache, tmp_path):
    report = train(settings(llama_cache, tiny_llama_dir, tmp_path / "out", "loss=kl", "training.optim=sgd"))
    assert report.new_text["kl"] < 1e-3
    assert "\nloss: kl\n" in (tmp_path / "out" / "anneal.yaml").read_text()


def test_a_learnt_target_without_its_teacher_is_checked_on_the_mixed_text(
    tiny_llama_dir, llama_cache, other_cache, tmp_path, capsys
):
    mixed = f"caches=[{{path: {other_cache}, loss: kl, weight: 0.5}}]"
    report = train(settings(llama_cache, tiny_llama_dir, tmp_path / "out", "loss=ce", mixed))
    assert "the model is the cache's teacher" in capsys.readouterr().err
    assert report.step0["kl"] < 1e-3 and report.last["kl"] > 0 and report.last["ce"] > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=ce"], "loss: ce leaves the KL to the mixed caches, got none with loss kl or both"),
        (["loss=kl", "kl_coef=0"], "loss: kl would train nothing with kl_coef: 0"),
        (
            ["loss=kl", "ce_weight=dft"],
            "ce_weight would have no effect: it needs a cross-entropy, got loss: kl",
        ),
        (
            ["loss=kl", "kl_on=target"],
            "kl_on is about text that is learnt and retained, got no cache with loss: both",
        ),
        (["loss=ce", "kl_budget=0.1", "caches=[{path: c}]"], "kl_budget is about the target's KL"),
        (["loss=some"], "loss must be one of both, ce, kl"),
    ],
)
def test_settings_that_contradict_it_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(settings("a", "m", "o", *overrides))
