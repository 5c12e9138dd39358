"""Chains: which caches a model of several stages takes, to which model KL holds, and what is recorded of it."""

import json
import shutil
import signal

import pytest
from caches import write_cache
from runs import begin, copy_model, finish, noise, same_weights, settings

from formats.cache import TeacherCache
from formats.errors import IdentityMismatchError
from formats.identity.fingerprint import ModelFingerprint
from trainer import MergeConfig, evaluate, merge, train
from trainer.evaluation.evaluate import format_evaluation
from trainer.result.lineage import ancestors_of, known_teachers


@pytest.fixture(scope="module")
def chain(tiny_llama_dir, tmp_path_factory):
    """base -> mA -> mAB, both trained on caches of the base; a cache of mA; and one of an unrelated model."""
    folder = tmp_path_factory.mktemp("chain")
    base = shutil.copytree(tiny_llama_dir, folder / "base")
    stranger = copy_model(base, folder / "stranger", noise(3, 0.05))
    shutil.copy(base / "chat_template.jinja", stranger)
    for name, teacher, seed in (("cacheA", base, 1), ("cacheB", base, 2), ("cacheS", stranger, 3)):
        write_cache(folder / name, teacher, num_rows=12, seed=seed)
    train(settings(folder / "cacheA", base, folder / "mA", "training.max_steps=4", "kl_coef=0.1"))
    write_cache(folder / "cache-of-mA", folder / "mA", num_rows=6, seed=4)
    return folder


@pytest.fixture(scope="module")
def second_stage(chain):
    """KL on the base's cache, L2 to mA; (report, what was said)."""
    import trainer.run

    said: list[str] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(trainer.run, "say", said.append)
    overrides = (
        "l2.coef=0.1",
        f"eval_caches.A={chain / 'cacheA'}",
        f"eval_caches.mA={chain / 'cache-of-mA'}",
    )
    report = train(settings(chain / "cacheB", chain / "mA", chain / "mAB", *overrides))
    patch.undo()
    return report, said


def record_of(directory):
    return json.loads((directory / "anneal.json").read_text())


def weights_of(directory) -> str:
    return ModelFingerprint.of(directory).weights


def test_the_lineage_is_recorded_oldest_first(chain, second_stage):
    assert record_of(chain / "mA")["lineage"] == [
        {"name": "base", "weights": weights_of(chain / "base"), "cache": None}
    ]
    trained_on = TeacherCache(chain / "cacheA").identity.digest()
    assert record_of(chain / "mAB")["lineage"] == [
        {"name": "base", "weights": weights_of(chain / "base"), "cache": None},
        {"name": "mA", "weights": weights_of(chain / "mA"), "cache": trained_on},
    ]
    assert record_of(chain / "mAB")["kl_to"] == {"name": "base", "weights": weights_of(chain / "base")}


def test_kl_holds_to_the_teacher_of_the_cache_and_the_run_says_so(chain, second_stage):
    report, said = second_stage
    assert said[0] == (
        f"KL holds to base, the teacher of {chain / 'cacheB'}; the run starts from mA (--model); l2 holds to it"
    )
    (line,) = [line for line in said if line.startswith("step 0")]
    assert "KL(base || model)" in line and "its ancestor" in line and "threshold" not in line
    expected = evaluate(chain / "mA", {"B": chain / "cacheB"})["B"]["kl"]
    assert expected > 0.02  # more than the threshold, and not refused
    assert report.step0["ancestor"] == "base" and report.step0["kl"] > 0.02
    card = (chain / "mAB" / "README.md").read_text()
    assert "Fine-tuned from" in card and "mA" in card and "KL(base || model)" in card


def test_a_run_from_the_teacher_itself_says_nothing_of_anchors(chain, tmp_path, monkeypatch):
    import trainer.run

    said: list[str] = []
    monkeypatch.setattr(trainer.run, "say", said.append)
    report = train(settings(chain / "cache-of-mA", chain / "mA", tmp_path / "run"))
    assert not any("KL holds" in line for line in said) and report.step0["ancestor"] is None
    assert abs(report.step0["kl"]) < 1e-6
    assert record_of(tmp_path / "run")["kl_to"]["name"] == "mA"


def test_caches_of_every_ancestor_evaluate_a_model_and_the_table_says_of_which(chain, second_stage):
    caches = {"A": chain / "cacheA", "mA": chain / "cache-of-mA"}
    found = evaluate(chain / "mAB", caches)
    assert found["A"]["kl_to"] == "base" and found["mA"]["kl_to"] == "mA"
    assert found["A"]["kl"] > 0 and found["mA"]["kl"] > 0
    one, two = format_evaluation({"A": found["A"]}), format_evaluation(found)
    assert "KL to base" in one.splitlines()[0]
    assert [line.split()[-1] for line in two.splitlines()[1:]] == ["base", "mA"]
    report, _ = second_stage
    assert report.evaluation["A"]["kl"] == pytest.approx(found["A"]["kl"], rel=1e-4)


def test_a_cache_of_an_unrelated_model_is_refused_unless_kl_is_left_out(chain, second_stage, tmp_path):
    with pytest.raises(IdentityMismatchError, match=r"or of another ancestor.*--no-kl"):
        evaluate(chain / "mAB", {"S": chain / "cacheS"})
    with pytest.raises(IdentityMismatchError, match="model weights"):
        train(settings(chain / "cacheS", chain / "mA", tmp_path / "run"))
    with pytest.raises(IdentityMismatchError, match="model weights"):
        train(settings(chain / "cache-of-mA", chain / "base", tmp_path / "run"))  # a child is no ancestor
    assert not (tmp_path / "run").exists()
    found = evaluate(chain / "mAB", {"S": chain / "cacheS"}, kl=False)["S"]
    assert found["kl"] is None and found["kl_to"] is None and found["kept"] is None
    foreign = shutil.copytree(
        chain / "mAB", tmp_path / "no-record", ignore=shutil.ignore_patterns("anneal.*")
    )
    assert found["ce"] == evaluate(foreign, {"S": chain / "cacheS"})["S"]["ce"]


def test_tokens_of_any_cache_train_as_those_of_an_allowed_one(chain, tmp_path, monkeypatch):
    """`kl_coef: 0`: the same bits as with --allow-different-student, from the base's cache and a stranger's."""
    import trainer.run

    said: list[str] = []
    monkeypatch.setattr(trainer.run, "say", said.append)
    for name in ("cacheB", "cacheS"):
        for out, more in ((f"plain-{name}", ()), (f"allowed-{name}", ("allow_different_student=true",))):
            train(settings(chain / name, chain / "mA", tmp_path / out, "kl_coef=0", *more))
        assert same_weights(tmp_path / f"plain-{name}", tmp_path / f"allowed-{name}")
        record = record_of(tmp_path / f"plain-{name}")
        assert record["kl_to"] is None and [entry["name"] for entry in record["lineage"]] == ["base", "mA"]
    line = f"step 0: no KL is measured: kl_coef is 0, so only the tokens of {chain / 'cacheB'} are used"
    assert sum(said_line.startswith(line) for said_line in said) == 2
    # What was trained on a stranger's tokens is no child of the stranger.
    assert set(known_teachers(tmp_path / "plain-cacheS").values()) == {"base", "mA"}
    with pytest.raises(IdentityMismatchError):
        evaluate(tmp_path / "plain-cacheS", {"S": chain / "cacheS"})


@pytest.mark.parametrize("weight", ["stm", "psft", "flow:1", "eaft0", "talr"])
def test_weights_that_are_read_from_the_cache_need_the_models_own(chain, tmp_path, weight):
    """Without KL too: p0 of a stranger is not what the initial model knew, and a bare tau is a median of it."""
    asked = ("kl_coef=0", f"ce_weight={weight}")
    with pytest.raises(IdentityMismatchError, match=r"cacheS.*model weights"):
        train(settings(chain / "cacheS", chain / "mA", tmp_path / "run", *asked))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_read_from_a_mixed_cache_need_the_models_own(chain, tmp_path):
    """`loss: ce` reads p0 as well. With a given tau nothing of `talr` is read, and EWC's text has no weight."""
    mixed = f"caches=[{{path: {chain / 'cacheS'}, weight: 0.5, loss: ce}}]"
    with pytest.raises(IdentityMismatchError, match=r"cacheS.*model weights"):
        train(settings(chain / "cacheB", chain / "base", tmp_path / "run", mixed, "ce_weight=stm"))
    fisher = f"ewc={{coef: 1, cache: {chain / 'cacheS'}, num_rows: 4}}"
    for name, *asked in (("talr", mixed, "ce_weight=talr"), ("stm", fisher, "ce_weight=stm:0.001")):
        train(settings(chain / "cacheB", chain / "base", tmp_path / name, *asked, "verify_saved=false"))


def test_weights_of_an_ancestor_are_checked_and_are_no_kl(chain, tmp_path):
    """The cache's numbers are read, so they are compared with the model before the first update, as for KL."""
    asked = ("kl_coef=0", "ce_weight=stm:0.001", "verify_saved=false")
    report = train(settings(chain / "cacheB", chain / "mA", tmp_path / "run", *asked))
    assert report.step0["ancestor"] == "base" and report.step0["kl"] > 0.02
    assert record_of(tmp_path / "run")["kl_to"] is None


def test_replay_and_fisher_text_may_be_of_any_model(chain, tmp_path):
    replay = f"caches=[{{path: {chain / 'cacheS'}, weight: 0.5, loss: ce}}]"
    fisher = f"ewc={{coef: 1, cache: {chain / 'cacheS'}, num_rows: 4}}"
    train(settings(chain / "cacheB", chain / "base", tmp_path / "run", replay, fisher))
    for loss in ("both", "kl"):
        mixed = f"caches=[{{path: {chain / 'cacheS'}, weight: 0.5, loss: {loss}}}]"
        with pytest.raises(IdentityMismatchError, match=r"cacheS.*model weights"):
            train(settings(chain / "cacheB", chain / "base", tmp_path / "refused", mixed))


def test_tokens_of_another_template_are_refused(chain, tmp_path):
    other = shutil.copytree(chain / "base", tmp_path / "model")
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(IdentityMismatchError, match="chat template"):
        train(settings(chain / "cacheS", other, tmp_path / "run", "kl_coef=0"))


def test_merges_carry_the_lineage(chain, second_stage, tmp_path):
    for initial in ("base", "mA"):
        out = tmp_path / f"half-{initial}"
        config = MergeConfig(
            tuned=[str(chain / "mAB")],
            initial=str(chain / initial),
            out=str(out),
            method="wise-ft",
            alpha=0.5,
        )
        merge(config)
        assert [entry.name for entry in ancestors_of(out)] == ["base", "mA", "mAB"]
        found = evaluate(out, {"A": chain / "cacheA", "mA": chain / "cache-of-mA"})
        assert {name: result["kl_to"] for name, result in found.items()} == {"A": "base", "mA": "mA"}
        with pytest.raises(IdentityMismatchError):
            evaluate(out, {"S": chain / "cacheS"})
    stranger = MergeConfig(
        tuned=[str(chain / "mAB")],
        initial=str(chain / "stranger"),
        out=str(tmp_path / "no"),
        method="wise-ft",
    )
    with pytest.raises(IdentityMismatchError, match="must come from --initial"):
        merge(stranger)


def test_a_record_of_an_earlier_version_names_its_initial_model(chain, tmp_path):
    old = shutil.copytree(chain / "mA", tmp_path / "old")
    record = record_of(old)
    del record["lineage"], record["kl_to"]
    (old / "anneal.json").write_text(json.dumps(record))
    assert [entry.weights for entry in ancestors_of(old)] == [weights_of(chain / "base")]
    assert evaluate(old, {"A": chain / "cacheA"})["A"]["kl"] > 0
    with pytest.raises(IdentityMismatchError):
        evaluate(old, {"S": chain / "cacheS"})


def test_a_checkpoint_comes_from_where_its_run_comes_from(chain, tmp_path):
    """It has no record of its own; so what is trained from it, or measured, knows the initial model too."""
    steps = ("training.save_strategy=steps", "training.save_steps=1", "keep_checkpoints=true")
    train(settings(chain / "cacheA", chain / "base", tmp_path / "run", "kl_coef=0.1", *steps))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    base = ModelFingerprint.of(chain / "base").weights
    assert [entry.weights for entry in ancestors_of(checkpoint)] == [base] and base in known_teachers(
        checkpoint
    )
    assert evaluate(checkpoint, {"b": chain / "cacheB"})["b"]["kl"] > 0
    with pytest.raises(IdentityMismatchError, match="another ancestor"):
        evaluate(checkpoint, {"s": chain / "cacheS"})
    train(settings(chain / "cacheA", checkpoint, tmp_path / "next", "kl_coef=0", "training.max_steps=1"))
    weights = [base, ModelFingerprint.of(checkpoint).weights]
    assert [entry.weights for entry in ancestors_of(tmp_path / "next")] == weights


def test_a_checkpoint_of_a_run_under_way_comes_from_its_model(chain, tmp_path):
    """And not from whoever built the cache, of which direct fine-tuning reads the tokens alone."""
    run = begin(chain / "base", chain / "cacheS", tmp_path / "run", "kl_coef=0", KILL_AT="step:3")
    assert run.wait() == -signal.SIGKILL, run.text("stderr")[-2000:]
    known = known_teachers(tmp_path / "run" / "checkpoint-2")
    assert known == {weights_of(chain / "base"): "base"}
    finish(chain / "base", chain / "cacheS", tmp_path / "run", "kl_coef=0")
    assert [entry["name"] for entry in record_of(tmp_path / "run")["lineage"]] == ["base"]
