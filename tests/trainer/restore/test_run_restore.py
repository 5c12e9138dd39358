"""Restoring tiny models: zeros where nothing was tuned or trained, the control shared, the runs those of `train`."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from caches import write_cache
from pool_here import InThisProcess
from runs import copy_model, noise, same_weights, settings

from formats.cache import TeacherCache
from formats.errors import ConfigError, IdentityMismatchError
from trainer import evaluate, train
from trainer.restore.config import RestoreConfig
from trainer.restore.restore import plan_run, require_room, run_restore, tuning_run
from trainer.restore.text import write_rows

TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def places(tiny_llama_dir, llama_cache, llama_eval_cache, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("restore")
    text = write_cache(folder / "general", tiny_llama_dir, num_rows=16, seed=5)
    tuned = folder / "tuned"
    train(settings(llama_cache, tiny_llama_dir, tuned, "kl_coef=0", "training.max_steps=4"))
    return {
        "text": str(text),
        "tuned": tuned,
        "base": tiny_llama_dir,
        "source": str(llama_eval_cache),
        "cache": llama_cache,
    }


def asked(places, out, tuned, **changes) -> RestoreConfig:
    given = {"tokens": 150, "learning_rate": 1e-3, "training": TRAINING}
    return RestoreConfig(
        tuned=tuned, initial=str(places["base"]), text=places["text"], source={"held": places["source"]},
        out=str(out), **{**given, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("restore") / "out"
    pool = InThisProcess()
    config = asked(places, out, {"tuned": str(places["tuned"]), "same": str(places["base"])})
    return out, run_restore(config, pool=pool), pool, config


def test_tuned_is_the_initial_model(done):
    """The same computation: exactly zero, not nearly."""
    out, report, _, _ = done
    shares = report.shares["same"]["held"]
    assert (shares.lost, shares.gone, shares.hidden) == (0.0, 0.0, 0.0)
    assert same_weights(out / "restored/same", out / "control/tuned")
    assert abs(report.shares["tuned"]["held"].lost) > 0.01


def test_one_control_serves_models_of_one_rate(done):
    assert done[2].names == ["control/tuned", "restored/tuned", "restored/same"]


def test_the_runs_are_those_of_train(done, places, tmp_path):
    out, report, _, _ = done
    rows = out / "text/rows"
    overrides = [f"training.{key}={json.dumps(value)}" for key, value in TRAINING.items()]
    fixed = ["kl_coef=0", "save_dtype=float32", "training.num_train_epochs=1", "training.learning_rate=1e-3"]
    config = settings(rows, places["tuned"], tmp_path / "typed", *overrides, *fixed, "training.max_steps=-1")
    train(config)
    assert same_weights(out / "restored/tuned", tmp_path / "typed")
    found = evaluate(out / "restored/tuned", {"held": places["source"]})["held"]
    assert report.models[0].restored["held"]["ce"] == found["ce"]


def test_the_text_is_the_easiest_rows(done, places):
    out, report, _, _ = done
    cache, chosen = TeacherCache(places["text"]), TeacherCache(out / "text/rows")
    result = evaluate(places["base"], {"t": places["text"]}, per_row=True)["t"]
    per_token = [ce / n for ce, n in zip(result["row_ce"], result["row_tokens"], strict=True)]
    ids = {cache[row].key for row in sorted(range(len(cache)), key=per_token.__getitem__)[: len(chosen)]}
    assert {row.key for row in chosen} == ids and report.num_tokens == sum(len(row) for row in chosen) >= 150
    assert len(chosen) < len(cache)


def test_memorisation_is_accuracy_on_the_tuning_text(done, places):
    """Known from the record of the tuned model; a model without a record has none."""
    _, report, _, _ = done
    found = {
        name: evaluate(places[name], {"t": places["cache"]})["t"]["accuracy"] for name in ("tuned", "base")
    }
    assert report.models[0].memorised == found["tuned"] > found["base"] == report.memorised_by_initial
    assert report.models[1].memorised is None


def test_the_report_and_its_file(done):
    out, report, _, config = done
    saved = json.loads((out / "restore.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    for word in ("comes back", "is gone", "(the control)", "tuned: ", "same: nothing to speak of was lost"):
        assert word in report.text()
    before, pool = (out / "restore.json").read_bytes(), InThisProcess()
    run_restore(config, pool=pool)
    assert pool.names == [] and (out / "restore.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"^a run keeps its settings.*learning_rate was .* and is 0\.125;"):
        run_restore(replace(config, learning_rate=0.125), pool=pool)
    assert pool.names == [] and (out / "restore.json").read_bytes() == before


def test_a_rate_of_nothing_brings_nothing_back(places, tmp_path):
    """So small that no float32 weight moves: every number is the same before and after."""
    config = asked(places, tmp_path / "out", {"tuned": str(places["tuned"])}, learning_rate=1e-30)
    report = run_restore(config, pool=InThisProcess())
    shares = report.shares["tuned"]["held"]
    assert shares.hidden == 0.0 and shares.gone == shares.lost != 0.0


def test_rate_and_batch_come_from_the_tuning_run(places, tmp_path):
    config = asked(
        places, tmp_path / "out", {"tuned": str(places["tuned"])}, learning_rate=None, tokens=60, training={}
    )
    report = run_restore(config, pool=InThisProcess())
    assert report.learning_rates == {"tuned": pytest.approx(1.5e-3)}
    typed = yaml.safe_load((tmp_path / "out/restored/tuned/anneal.yaml").read_text())["training"]
    assert typed["per_device_train_batch_size"] == 8 and typed["learning_rate"] == pytest.approx(1.5e-3)


def test_optimiser_schedule_and_packs_come_from_the_tuning_run(places, tmp_path):
    """Whatever they are: a schedule that cannot do without its arguments, an optimiser that has some, packed rows."""
    changed = ["packing=true", "pack_length=48", "training.optim=sgd", "training.optim_args='momentum=0.9'"]
    changed += ["training.lr_scheduler_type=cosine_with_min_lr"]
    changed += ["training.lr_scheduler_kwargs={min_lr_rate: 0.5}", "training.warmup_steps=1", "kl_coef=0"]
    tuned = tmp_path / "tuned"
    train(settings(places["cache"], places["base"], tuned, *changed))
    config = asked(places, tmp_path / "out", {"tuned": str(tuned)}, tokens=60, training={})
    assert not run_restore(config, pool=InThisProcess()).failed
    for name in ("restored/tuned", "control/tuned"):
        typed = yaml.safe_load((tmp_path / "out" / name / "anneal.yaml").read_text())
        assert (typed["packing"], typed["pack_length"]) == (True, 48)
        found = {key: typed["training"].get(key) for key in ("optim", "optim_args", "lr_scheduler_kwargs")}
        assert found == {
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.5},
        }
    other = {"optim": "adamw_torch", "lr_scheduler_type": "linear"}  # whose arguments they are not
    given = plan_run(config, "x", str(tuned), tmp_path, 1.0, tuning_run(tuned)).settings["training"]
    assert "optim_args" in given and "lr_scheduler_kwargs" in given
    changed = replace(config, training=other)
    given = plan_run(changed, "x", str(tuned), tmp_path, 1.0, tuning_run(tuned)).settings["training"]
    assert not {"optim_args", "lr_scheduler_kwargs"} & given.keys()
    tight = {"tuned": replace(tuning_run(tuned), pack_length=30)}
    with pytest.raises(ConfigError, match=r"must fit the packs of tuned's .*30\), got one of 31 tokens"):
        require_room(np.array([5, 31]), tight)


def test_half_precision_comes_from_the_tuning_run(places, tmp_path):
    """Which a CPU does not have: it is refused by name there, and not left out."""
    tuning = replace(tuning_run(places["tuned"]), training={"fp16": True, "use_cpu": True})
    config = asked(places, tmp_path / "out", {"tuned": str(places["tuned"])}, training={})
    with pytest.raises(ConfigError, match=r"x: training\.fp16 needs a GPU"):
        plan_run(config, "x", str(places["tuned"]), tmp_path, 1.0, tuning)


def test_precision_and_warm_up_of_another_kind_are_not_taken_over(places, tmp_path):
    """Of what was typed here nothing is refused for what was typed there."""

    def planned(tuning: dict, **typed) -> dict:
        config = asked(places, tmp_path / "out", {"tuned": "t"}, training=typed)
        run = replace(tuning_run(places["tuned"]), training=tuning)
        return plan_run(config, "x", "t", tmp_path, 1.0, run).settings["training"]

    cosine, constant = (
        {"lr_scheduler_type": n, "warmup_steps": w} for n, w in (("cosine", 9), ("constant", 0))
    )
    assert "warmup_steps" not in planned(cosine, lr_scheduler_type="constant")
    assert "warmup_steps" not in planned(constant, lr_scheduler_type="linear")
    assert planned(cosine, lr_scheduler_type="linear")["warmup_steps"] == 9
    assert planned(constant)["warmup_steps"] == 0
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU"):  # and not: exclude each other
        planned({"bf16": True}, fp16=True)


def test_a_model_of_another_family_is_refused(places, tmp_path):
    other = {**places, "base": copy_model(places["base"], tmp_path / "other", noise(1))}
    with pytest.raises(IdentityMismatchError, match=r"tuned models must come from --initial, got .*tuned"):
        run_restore(asked(other, tmp_path / "out", {"tuned": str(places["tuned"])}))
    assert not (tmp_path / "out").exists()


def test_adapters_alone_are_refused_before_anything_else(places, tmp_path):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text("{}")
    config = asked(
        {**places, "base": "./nowhere"}, tmp_path / "out", {"a": str(adapters)}, learning_rate=None
    )
    with pytest.raises(
        ConfigError, match=r"^TUNED must be a whole model, got adapters alone in .*lora\.merge"
    ):
        run_restore(config)


def test_what_is_missing_is_named(places, tmp_path):
    stranger = copy_model(places["base"], tmp_path / "stranger", noise(1))
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"stranger has no anneal\.yaml .* give --lr"):
        run_restore(asked(places, out, {"stranger": str(stranger)}, learning_rate=None))
    with pytest.raises(ConfigError, match="without --tokens it is one epoch of the tuning text"):
        run_restore(asked(places, out, {"stranger": str(stranger)}, tokens=None))
    with pytest.raises(ConfigError, match=r"--text must be a cache, got \./nothing"):
        run_restore(asked({**places, "text": "./nothing"}, out, {"stranger": str(stranger)}))
    assert not out.exists()


@pytest.mark.parametrize("name", ["max_steps", "num_train_epochs"])
def test_how_much_is_trained_is_said_by_tokens_alone(places, tmp_path, name):
    with pytest.raises(ConfigError, match=f"^--tokens says it, so training.{name} must be left out, got 3"):
        asked(places, tmp_path / "out", {"a": "b"}, training={name: 3})


def test_a_model_that_was_tuned_again_is_not_measured_by_its_old_run(places, tmp_path):
    tuned, out = shutil.copytree(places["tuned"], tmp_path / "tuned"), tmp_path / "out"
    config = asked(places, out, {"again": str(tuned)})
    assert not run_restore(config, pool=InThisProcess()).failed
    shutil.copy(places["base"] / "model.safetensors", tuned / "model.safetensors")
    with pytest.raises(ConfigError, match=r"in .*restored/again weights of the model was"):
        run_restore(config, pool=InThisProcess())


def lose_note(place) -> None:
    place.with_name("text.json").write_text("{")


def cut_shard(place) -> None:
    shard = next(place.glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-200])


@pytest.mark.parametrize("damage", [lose_note, cut_shard, shutil.rmtree], ids=lambda done: done.__name__)
def test_rows_that_are_damaged_are_written_again(damage, places, tmp_path):
    """They follow from the text, so the same rows with the same digest: runs on them go on."""
    cache, place = TeacherCache(places["text"]), tmp_path / "text/rows"
    write_rows(cache, [3, 1], place, {"seed": 0})
    digest = TeacherCache(place).digest
    damage(place)
    write_rows(cache, [3, 1], place, {"seed": 0})
    again = TeacherCache(place)
    again.validate(full=True)
    assert again.digest == digest and len(again) == 2
    with pytest.raises(ConfigError, match="another one was chosen"):
        write_rows(cache, [3, 2], place, {"seed": 0})
