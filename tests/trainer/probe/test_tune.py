"""Fine-tuning at fixed rates over models: ordinary runs, the best rate, which regime, and KL by each model itself."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from caches import write_cache
from corpora import write_jsonl
from pool_here import InThisProcess
from runs import copy_model, noise, same_weights, settings

from formats.errors import ConfigError
from trainer import evaluate, train
from trainer.evaluation.weight_distance import weight_distance
from trainer.probe.models import named_models
from trainer.probe.tune import TuneConfig, Tuned, TuneReport, probe_tune, regime_of

TRAINING = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def texts(tiny_llama_dir, llama_eval_cache, tmp_path_factory) -> dict[str, dict[str, str]]:
    target = write_cache(tmp_path_factory.mktemp("tune") / "target", tiny_llama_dir, num_rows=3, seed=4)
    return {"source": {"s": str(llama_eval_cache)}, "target": {"t": str(target)}}


@pytest.fixture(scope="module")
def done(tiny_llama_dir, llama_cache, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    other = copy_model(tiny_llama_dir, folder / "later", noise(1, 0.02))
    shutil.copy(tiny_llama_dir / "chat_template.jinja", other)
    config = TuneConfig(
        models=named_models([f"early={tiny_llama_dir}", str(other)]), text=str(llama_cache), out=str(folder / "out"),
        learning_rates=[1e-4, 1e-3], training=TRAINING, **texts,
    )  # fmt: skip
    pool = InThisProcess()
    return config, probe_tune(config, pool=pool), pool


def test_every_model_at_every_rate(done, tiny_llama_dir, llama_cache, texts, tmp_path) -> None:
    config, report, pool = done
    names = [f"runs/{label}/kl_coef=0,lr={lr}" for label in ("early", "later") for lr in ("1e-4", "0.001")]
    assert pool.names == names and not report.failed
    words = ["kl_coef=0", "training.learning_rate=1e-4"]
    train(settings(llama_cache, tiny_llama_dir, tmp_path / "typed", *words))
    run = Path(config.out) / names[0]
    assert same_weights(run, tmp_path / "typed")
    after = evaluate(run, {**texts["source"], **texts["target"]}, kl=False)
    before = evaluate(tiny_llama_dir, texts["source"], kl=False)["s"]["ce"]
    first = report.runs[0]
    assert first.lost == after["s"]["ce"] - before and first.target_ce == after["t"]["ce"]
    assert first.distance == weight_distance(run, tiny_llama_dir).absolute > 0
    again = InThisProcess()
    assert probe_tune(config, pool=again).to_dict() == report.to_dict() and again.names == []
    for word in ("nats lost", "<- best target", "one seed", "the best rate"):
        assert word in report.text()


def run_of(label: str, rate: float, target: float, lost: float = 0.0) -> Tuned:
    return Tuned(
        label=label, kl_coef=0.0, learning_rate=rate, lost=lost, source_ce=3.0, target_ce=target, distance=1.0
    )  # fmt: skip


def test_the_best_rate_and_whether_forgetting_rises(texts) -> None:
    config = TuneConfig(
        models={"a": ("a", None), "b": ("b", None)},
        text="t",
        out="o",
        learning_rates=[1.0, 2.0, 4.0],
        **texts,
    )
    runs = [run_of("a", 1.0, 3), run_of("a", 2.0, 2.5, 0.1), run_of("a", 4.0, 2.4, 0.3)]
    runs += [run_of("b", 1.0, 2.0), run_of("b", 2.0, 2.5, 0.2), run_of("b", 4.0, 2.6, 0.2)]
    report = TuneReport(config=config, before={}, runs=runs, failed={})
    assert {label: run.learning_rate for label, run in report.best(0.0).items()} == {"a": 4.0, "b": 1.0}
    assert report.regime(0.0) == "quickly decreasing"
    assert report.text().count("<- best target") == 2
    single = TuneReport(
        config=replace(config, learning_rates=[2.0]), before={}, runs=[runs[1], runs[4]], failed={}
    )
    assert single.regime(0.0) is None and "best" not in single.text()
    assert report.forgets_more(0.0, 2.0) is True and report.forgets_more(0.0, 4.0) is False


@pytest.mark.parametrize(
    ("places", "regime"),
    [
        ([2, 2, 2], "constant"),
        ([2, 2, 1], "slowly decreasing"),
        ([2, 1, 0], "quickly decreasing"),
        ([0, 1], "rising"),
        ([2, 1, 2], "back and forth"),
        ([1], None),
    ],
)
def test_regimes(places, regime) -> None:
    assert regime_of(places) == regime


def test_kl_is_to_each_model_itself(tiny_llama_dir, texts, tmp_path) -> None:
    from cache_builder import BuildConfig, build_cache

    other = copy_model(tiny_llama_dir, tmp_path / "later", noise(1, 0.02))
    corpus = write_jsonl(
        tmp_path / "t.jsonl", [{"text": f"{n} the cat sat on the mat " * 4} for n in range(8)]
    )

    def build(corpus, model, out, options):
        build_cache(BuildConfig(corpus=corpus, model=model, out=out, **options))

    config = TuneConfig(
        models=named_models([f"early={tiny_llama_dir}", str(other)]), text=str(corpus), out=str(tmp_path / "out"),
        learning_rates=[1e-3], kl_coefs=[1.0], training=TRAINING, build={"engine": "transformers"}, **texts,
    )  # fmt: skip
    report = probe_tune(config, build=build, pool=InThisProcess())
    assert not report.failed and [run.label for run in report.runs] == ["early", "later"]
    with pytest.raises(ConfigError, match="--text must be a corpus, got the finished cache"):
        probe_tune(replace(config, text=texts["target"]["t"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": []}, "--lr must be numbers"),
        ({"learning_rates": [0.0]}, "--lr must be numbers"),
        ({"kl_coefs": [-1.0]}, "--kl-coef must be numbers of at least 0"),
        ({"training": {"learning_rate": 1.0}}, "--lr gives the learning rates"),
        ({"learning_rates": [1e-3, 1e-3]}, "each number once"),
        ({"source": {}}, "--source needs held-out text"),
        (
            {"out": "s3://bucket/o"},
            "--out must be a directory on this machine, got the address s3://bucket/o",
        ),
    ],
)
def test_bad_settings(texts, changes, message) -> None:
    given = {"models": {"a": ("b", None)}, "text": "t", "out": "o", "learning_rates": [1e-3], **texts}
    with pytest.raises(ConfigError, match=message):
        TuneConfig(**{**given, **changes})


def test_the_command_refuses_bad_words(anneal, tiny_llama_dir, llama_cache, tmp_path) -> None:
    words = ["probe", "tune", tiny_llama_dir, "--text", llama_cache, "--source", f"s={llama_cache}"]
    words += ["--target", f"t={llama_cache}", "--out", tmp_path / "out"]
    for more, message in (
        (["--lr", "x"], "--lr takes numbers"),
        (["--lr", "1e-3", "--set", "a=1"], "takes training.KEY"),
        (["--lr", "1e-3", "--build", "max_length=8"], "--build settings need a corpus"),
    ):
        code, out, err = anneal(*words, *more)
        assert (code, out) == (1, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
