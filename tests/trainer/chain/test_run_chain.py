"""Whole chains of tiny runs: stages are those of `train`, SFA follows its paper, the matrix is that of `eval`."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from caches import write_cache
from pool_here import InThisProcess
from recorded_progress import RecordedProgress
from runs import same_weights, settings
from safetensors.numpy import load_file

from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from trainer import evaluate, train
from trainer.chain.chain import plan_chain, run_chain
from trainer.evaluation.weight_distance import weight_distance

FLOAT32 = "save_dtype=float32"
SFA_ONE = {"two": {"sfa": {"beta": 0.5, "period": 1}}, "three": {"sfa": {"beta": 1.0, "period": 1}}}


@pytest.fixture(scope="module")
def averaged(ask_chain, tmp_path_factory):
    """Plain, then SFA with one average at the end, then SFA that goes back all the way; and the control."""
    out = tmp_path_factory.mktemp("chain") / "averaged"
    config = ask_chain(out, "one", "two", "three", methods=SFA_ONE, compare=["direct"])
    pool = InThisProcess()
    return out, run_chain(config, pool=pool), pool


@pytest.fixture(scope="module")
def annealed(ask_chain, llama_eval_cache, tmp_path_factory):
    """Label annealing to the initial model with replay, and both single controls."""
    out = tmp_path_factory.mktemp("chain") / "annealed"
    options = {
        "method": ["kl_coef=1"],
        "anchor": "initial",
        "replay": 0.25,
        "general": [f"rest={llama_eval_cache}"],
    }
    config = ask_chain(out, "one", "two", compare=["multitask", "never-seen"], **options)
    return out, run_chain(config, pool=InThisProcess()), config


def weights(directory) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


def test_a_control_shares_the_stages_that_are_the_same_runs(averaged) -> None:
    _, report, pool = averaged
    assert not report.failed
    expected = [
        "stages/1-one",
        "stages/2-two",
        "stages/3-three",
        "controls/direct/2-two",
        "controls/direct/3-three",
    ]
    assert pool.names == expected
    labels = [line.split()[0] for line in report.table().splitlines()[2:]]
    assert labels == [name.removeprefix("stages/").removeprefix("controls/") for name in expected]


def test_arguments_of_a_method_are_over_those_of_all_runs(ask_chain, tmp_path) -> None:
    asked = {"method": ["training.learning_rate=0.25", "l2.coef=1"], "compare": ["direct"]}
    plan = plan_chain(ask_chain(tmp_path, "one", "two", methods={"two": {"training": None}}, **asked))
    own, shared = (plan.stages[n].settings["training"] for n in (0, 1))
    assert own == shared | {"learning_rate": 0.25} and shared["max_steps"] == 2
    assert [stage.settings["training"] for stage in plan.direct] == [shared, shared]


def test_sfa_holds_to_the_stage_before(averaged) -> None:
    """p = 1: theta = (1 - beta) direct + beta theta_o, theta_o being the last task's model and not the initial one."""
    out, _, _ = averaged
    before, direct, after = (
        weights(out / p) for p in ("stages/1-one", "controls/direct/2-two", "stages/2-two")
    )
    for name, value in after.items():
        expected = np.float32(0.5) * direct[name] + np.float32(0.5) * before[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-7, err_msg=name)
    whole = weight_distance(out / "controls/direct/2-two", out / "stages/1-one").absolute
    half = weight_distance(out / "stages/2-two", out / "stages/1-one").absolute
    assert half / whole == pytest.approx(0.5, abs=1e-5), "90.99 -> 45.50 in the paper's Table 2"


def test_beta_1_gives_the_stage_before_bit_for_bit(averaged, tiny_llama_dir) -> None:
    out, _, _ = averaged
    assert same_weights(out / "stages/3-three", out / "stages/2-two")
    assert not same_weights(out / "stages/3-three", tiny_llama_dir)


def test_beta_0_is_the_direct_chain_bit_for_bit(ask_chain, tmp_path) -> None:
    config = ask_chain(
        tmp_path / "out", "one", "two", method=["sfa.beta=0", "sfa.period=0.5"], compare=["direct"]
    )
    pool = InThisProcess()
    run_chain(config, pool=pool)
    assert len(pool.names) == 4
    for stage in ("1-one", "2-two"):
        assert same_weights(tmp_path / "out/stages" / stage, tmp_path / "out/controls/direct" / stage)


def test_a_stage_is_the_run_that_a_person_types(annealed, task_caches, tiny_llama_dir, tmp_path) -> None:
    out, report, _ = annealed
    assert not report.failed
    (one, _), (two, _) = task_caches["one"], task_caches["two"]
    train(settings(one, tiny_llama_dir, tmp_path / "1", "kl_coef=1", FLOAT32))
    replay = f"caches=[{{path: {one}, share: 0.25, loss: ce}}]"
    train(settings(two, tmp_path / "1", tmp_path / "2", "kl_coef=1", FLOAT32, replay))
    for stage, typed in (("1-one", "1"), ("2-two", "2")):
        assert same_weights(out / "stages" / stage, tmp_path / typed)
        left, right = (
            yaml.safe_load((p / "anneal.yaml").read_text())
            for p in (out / "stages" / stage, tmp_path / typed)
        )
        for place in ("out", "model"):
            left.pop(place), right.pop(place)
        assert left == right


def test_controls_are_trained_on_what_they_say(annealed, task_caches, tiny_llama_dir) -> None:
    """All tasks from the initial model, every row once per epoch, as many steps as the chain takes."""
    out, report, _ = annealed
    found = yaml.safe_load((out / "controls/multitask/anneal.yaml").read_text())
    assert (
        found["model"] == str(tiny_llama_dir)
        and found["kl_coef"] == 0
        and found["cache"] == task_caches["one"][0]
    )
    assert [(c["path"], c["weight"], c["loss"]) for c in found["caches"]] == [
        (task_caches["two"][0], 12 / 8, "ce")
    ]
    assert found["training"]["max_steps"] == 4
    without = yaml.safe_load((out / "controls/without-one/anneal.yaml").read_text())
    assert without["cache"] == task_caches["two"][0] and without["caches"] == []
    labels = [row.label for row in report.rows[1:]]
    assert labels == ["1-one", "2-two", "multitask", "without-one", "without-two"]


def test_a_packed_control_sees_every_row_once(ask_chain, tiny_llama_dir, llama_cache, tmp_path) -> None:
    """Under packing a weight is in packs, and packs of short rows hold more of them than packs of long ones."""
    rows = {"one": 4, "two": 45}  # task -> tokens of each of its 16 rows
    made = {
        name: [TokenRow(np.full(length, 7), np.arange(length) > 0) for _ in range(16)]
        for name, length in rows.items()
    }
    places = {
        name: str(write_cache(tmp_path / name, tiny_llama_dir, rows=texts)) for name, texts in made.items()
    }
    asked = ["packing=true", "training.max_steps=-1", "training.num_train_epochs=1", "verify_saved=false"]
    asked += ["training.per_device_train_batch_size=2", f"caches=[{{path: {llama_cache}, weight: 0}}]"]
    config = ask_chain(tmp_path / "out", "one", "two", compare=["multitask"], overrides=asked)
    tasks = {name: replace(task, train=places[name]) for name, task in config.tasks.items()}
    report = run_chain(replace(config, tasks=tasks), pool=InThisProcess())
    assert not report.failed
    found = yaml.safe_load((tmp_path / "out/controls/multitask/anneal.yaml").read_text())
    assert [cache["weight"] for cache in found["caches"]] == [0.0, 8.0]  # 2 packs of 11 and 5 rows, 16 of one
    record = json.loads((tmp_path / "out/controls/multitask/anneal.json").read_text())
    assert record["num_steps"] == 9


def test_the_matrix_is_that_of_eval(annealed, task_caches, llama_eval_cache) -> None:
    out, report, _ = annealed
    texts = {name: task_caches[name][1] for name in ("one", "two")} | {"rest": str(llama_eval_cache)}
    saved = json.loads((out / "matrix.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    assert saved["columns"] == ["one", "two", "rest"] and saved["failed"] == {}
    for number, directory in enumerate([None, out / "stages/1-one", out / "stages/2-two"]):
        row = saved["rows"][number]
        found = evaluate(directory or row["directory"], texts, kl=False)
        for name in texts:
            assert row["results"][name]["ce"] == found[name]["ce"]
            assert row["results"][name]["perplexity"] == pytest.approx(math.exp(found[name]["ce"]))
        assert saved["R"]["chain"][number] == [-found["one"]["ce"], -found["two"]["ce"]]
    R, values = np.array(saved["R"]["chain"]), saved["summary"]["chain"]
    assert values["forgetting"] == pytest.approx(R[1, 0] - R[2, 0])
    assert values["backward transfer"] == pytest.approx(R[2, 0] - R[1, 0])
    multitask = saved["rows"][3]["results"]
    expected = np.mean([-multitask[t]["ce"] - R[i, i - 1] for i, t in ((1, "one"), (2, "two"))])
    assert values["intransigence"] == pytest.approx(expected)
    unseen = saved["rows"][4]["results"]["one"]["ce"]
    assert values["above never seen"] == pytest.approx(R[2, 0] + unseen)


def test_the_text_has_every_model_and_formula(annealed) -> None:
    text = annealed[1].text()
    for word in (
        "perplexity after",
        "2-two",
        "multitask",
        "without-two",
        "forgetting",
        "mean over j < n",
        "one seed",
    ):
        assert word in text


def test_a_finished_chain_is_not_run_again(annealed) -> None:
    out, _, config = annealed
    before = (out / "matrix.json").read_bytes()
    pool = InThisProcess()
    run_chain(config, pool=pool)
    assert pool.names == [] and (out / "matrix.json").read_bytes() == before


def test_a_stopped_chain_goes_on(annealed, ask_chain, tmp_path) -> None:
    """The stages are those of the chain that was never stopped, and all its runs are counted as one."""
    out, _, config = annealed
    other = replace(config, out=str(tmp_path / "out"), compare=["multitask"])
    with pytest.raises(KeyboardInterrupt):
        run_chain(other, pool=InThisProcess(stop_after=1))
    assert not (tmp_path / "out/matrix.json").exists()
    pool, seen = InThisProcess(), RecordedProgress()
    run_chain(other, pool=pool, progress=seen)
    assert pool.names == ["stages/2-two", "controls/multitask"]
    assert same_weights(tmp_path / "out/stages/2-two", out / "stages/2-two")
    assert seen.phases[0] == ("chain", 3, 3)
    begun = [line.partition(" (log")[0] for line in seen.notes if line.startswith("run ")]
    assert begun == ["run 2 of 3: stages/2-two", "run 3 of 3: controls/multitask"]


def test_another_chain_in_its_directory_is_refused(annealed, ask_chain) -> None:
    _, _, config = annealed
    with pytest.raises(ConfigError, match=r"stages/1-one: .* kl_coef was 1(\.0)? and is 2"):
        plan_chain(replace(config, method={"kl_coef": 2}))
    with pytest.raises(ConfigError, match=r"stages/2-two: .*caches was"):
        plan_chain(replace(config, replay=0.5))


def test_a_stage_of_other_weights_is_refused(annealed, tmp_path) -> None:
    """Somebody trained stage 1 again by other means: stage 2 does not descend from it any more."""
    out, _, config = annealed
    shutil.copytree(out, tmp_path / "out")
    shutil.copy(out / "stages/2-two/model.safetensors", tmp_path / "out/stages/1-one/model.safetensors")
    with pytest.raises(
        ConfigError, match=r"stages/2-two must start from stages/1-one, but was trained from other"
    ):
        plan_chain(replace(config, out=str(tmp_path / "out")))


def test_a_run_that_fails_ends_the_chain_and_is_reported(ask_chain, tmp_path) -> None:
    methods = {"two": {"training": {}, "sfa": {"beta": 0.5}}}
    methods["two"].pop("training")
    config = ask_chain(tmp_path / "out", "one", "two", overrides=["training.learning_rate=1e30"])
    pool = InThisProcess()
    report = run_chain(config, pool=pool)
    assert pool.names == ["stages/1-one"] and "finite" in report.failed["stages/1-one"]
    assert "failed: stages/1-one" in report.text() and report.summaries == {}
    assert [row.label for row in report.rows][1:] == []


def test_ewc_without_a_text_holds_to_every_earlier_task(ask_chain, task_caches, tmp_path) -> None:
    config = ask_chain(tmp_path / "out", "one", "two", "three", method=["ewc.coef=100", "ewc.num_rows=4"])
    stages = plan_chain(config).stages
    assert stages[0].settings["ewc"] is None
    found = [(task["cache"], task["model"], task["coef"]) for task in stages[2].settings["ewc"]]
    out = tmp_path / "out/stages"
    assert found == [
        (task_caches["one"][0], str(out / "1-one"), 100),
        (task_caches["two"][0], str(out / "2-two"), 100),
    ]


def test_kl_to_the_stage_before_needs_a_corpus(ask_chain, tmp_path) -> None:
    with pytest.raises(
        ConfigError, match=r"tasks\.two\.train must be a corpus, got the finished cache .*initial"
    ):
        plan_chain(ask_chain(tmp_path / "out", "one", "two", method=["kl_coef=1"]))
    assert not (tmp_path / "out").exists()


def test_a_control_does_not_read_a_stage_out_of_a_cache(ask_chain, tmp_path) -> None:
    """Weights of the cross-entropy are the initial model's numbers; a stage's own cache holds another model's."""
    given = {"method": ["kl_coef=1"], "overrides": ["ce_weight=stm"]}
    places = {name: tmp_path / f"{name}.jsonl" for name in ("one", "two")}
    for place in places.values():
        place.write_text('{"text": "a"}\n')
    for compare, name in (("direct", "direct/2-two"), ("multitask", "multitask")):
        config = ask_chain(tmp_path / "out", "one", "two", compare=[compare], **given)
        corpora = {task: replace(config.tasks[task], train=str(place)) for task, place in places.items()}
        built = replace(config, tasks=corpora)
        with pytest.raises(
            ConfigError, match=f"controls/{name}: ce_weight stm reads .* which is stages/1-one"
        ):
            plan_chain(built, build=print, look=lambda *words: None)
        plan_chain(replace(built, anchor="initial"), build=print, look=lambda *words: None)


def test_mistakes_are_found_before_anything_runs(ask_chain, tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"stages/1-one: unknown setting training\.lerning_rate"):
        plan_chain(ask_chain(out, "one", overrides=["training.lerning_rate=1"]))
    with pytest.raises(ConfigError, match="a stage starts from a whole model"):
        plan_chain(ask_chain(out, "one", method=["lora.r=4", "lora.merge=false"]))
    config = ask_chain(out, "one")
    task = replace(config.tasks["one"], heldout="./nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"tasks\.one\.heldout must be a cache, got \./nowhere"):
        plan_chain(replace(config, tasks={"one": task}))
    assert not out.exists()
