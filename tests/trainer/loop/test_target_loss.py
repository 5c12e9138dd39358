"""`loss` of the target cache: learnt alone with KL on mixed text (arXiv 2605.26097), or retained alone.

test_objective_runs.py compares the gradient with its definition.
"""

import pytest
from caches import write_cache
from runs import settings

from formats.errors import ConfigError
from trainer.preflight.combinations import check_objective
from trainer.run import train


@pytest.fixture(scope="module")
def other_cache(tiny_llama_dir, tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("other") / "cache", tiny_llama_dir, num_rows=12, seed=7)


def test_a_target_that_is_only_retained_stays_where_it_is(tiny_llama_dir, llama_cache, tmp_path, capsys):
    report = train(settings(llama_cache, tiny_llama_dir, tmp_path / "out", "loss=kl", "training.optim=sgd"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step 2/2: ")]
    assert line.startswith("step 2/2: KL ")
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
        (["loss=ce", "caches=[{path: a, loss: kl, weight: 0}]"], "got none with loss kl or both"),
        (
            ["loss=ce", "caches=[{path: a, loss: kl}]", "kl_gate=unsure"],
            "kl_gate is about text that is learnt",
        ),
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


@pytest.mark.parametrize("much", ["share: 0.1", "weight: 0.1"])
def test_a_cache_by_its_share_is_one_as_by_its_weight(much):
    """What a cache is for counts for the other settings, however it is said how much of it there is."""
    for overrides in (
        ["loss=ce", f"caches=[{{path: a, loss: kl, {much}}}]"],
        ["loss=ce", "kl_gate=unsure", f"caches=[{{path: a, {much}}}]"],
        ["loss=kl", "ce_weight=dft", f"caches=[{{path: a, loss: ce, {much}}}]"],
    ):
        check_objective(settings("a", "m", "o", *overrides))
