"""A whole sweep of tiny runs, in this process: its directories are those of `train`, and it continues."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from caches import write_cache
from pool_here import InThisProcess
from recorded_progress import RecordedProgress
from runs import copy_model, noise, same_weights, settings

from formats.errors import AnnealError, ConfigError
from trainer import train
from trainer.comparison.compare import compare
from trainer.sweep.pools import ENDED
from trainer.sweep.runs import SweepStopped
from trainer.sweep.sweep import plan_sweep, run_sweep

OPTIONS = {"grid": ["kl_coef=1"], "also": ["l2.coef=0.1"], "merge": ["wise-ft:0.5"]}


@pytest.fixture(scope="module")
def done(ask, tmp_path_factory):
    """One finished sweep: (its directory, its report)."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, run_sweep(ask(out, **OPTIONS), pool=InThisProcess())


def test_a_run_is_the_same_as_train_typed_by_hand(done, llama_cache, tiny_llama_dir, tmp_path):
    out, report = done
    assert not report.failed
    assert sorted(p.name for p in (out / "runs").iterdir()) == ["direct", "kl_coef=1", "l2.coef=0.1"]
    for name, override in (("direct", "kl_coef=0"), ("kl_coef=1", "kl_coef=1.0")):
        train(settings(llama_cache, tiny_llama_dir, tmp_path / name, override))
        assert same_weights(out / "runs" / name, tmp_path / name)
        mine, typed = (
            yaml.safe_load((p / "anneal.yaml").read_text()) for p in (out / "runs" / name, tmp_path / name)
        )
        assert mine.pop("out") != typed.pop("out") and mine == typed
    assert not same_weights(out / "runs" / "direct", out / "runs" / "kl_coef=1")


def test_the_table_has_every_run_and_merge(done):
    out, report = done
    text = report.text()
    for word in ("direct fine-tuning", "label annealing kl_coef 1", "L2 coef 0.1", "WiSE-FT alpha 0.5"):
        assert word in text
    found = json.loads((out / "sweep.json").read_text())
    assert [run["name"] for run in found["runs"]] == ["direct", "kl_coef=1", "l2.coef=0.1"]
    assert found["runs"][0]["direct"] and found["runs"][1]["settings"] == {"kl_coef": 1, "training.seed": 0}
    assert [merge["name"] for merge in found["merges"]] == ["direct+wise-ft,alpha=0.5"]
    labels = [model["label"] for model in found["comparison"]["models"]]
    assert labels[1:] == ["direct", "kl_coef=1", "l2.coef=0.1", "direct+wise-ft,alpha=0.5"]


def test_the_cards_of_runs_and_merges_tell_what_the_sweep_measured(done):
    out, report = done
    places = [*(out / "runs").iterdir(), *(out / "merges").iterdir()]
    assert len(places) == 4
    for place in places:
        card = (place / "README.md").read_text()
        line = next(line for line in report.comparison.models if line.label == place.name)
        for metric in report.comparison.metrics:
            assert f"| {metric.name} ({metric.side}) |" in card
            assert f" {line.cells[metric.key].value:.3f} |" in card


def test_finished_runs_are_skipped_and_a_stopped_sweep_ends_with_the_same_file(done, ask, tmp_path):
    out, _ = done
    before = (out / "sweep.json").read_bytes()
    pool, seen = InThisProcess(), RecordedProgress()
    run_sweep(ask(out, **OPTIONS), pool=pool, progress=seen)
    assert pool.names == [] and (out / "sweep.json").read_bytes() == before
    other = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(ask(other, **OPTIONS), pool=InThisProcess(stop_after=1))
    assert [p.name for p in (other / "runs").iterdir()] == ["direct"] and not (other / "sweep.json").exists()
    pool = InThisProcess()
    run_sweep(ask(other, **OPTIONS), pool=pool)
    assert pool.names == ["kl_coef=1", "l2.coef=0.1"]
    assert (other / "sweep.json").read_bytes().replace(str(other).encode(), str(out).encode()) == before


def test_other_settings_in_the_same_directory_are_refused_by_name(done, ask, llama_eval_cache):
    out, _ = done
    with pytest.raises(ConfigError, match=r"in .*runs/direct training.learning_rate was 0.001 and is 0.002"):
        plan_sweep(ask(out, **OPTIONS, overrides=["training.learning_rate=2e-3"]))
    with pytest.raises(ConfigError, match=r"in .*runs/direct the training cache was"):
        plan_sweep(ask(out, **OPTIONS, place=llama_eval_cache))
    plan_sweep(ask(out, **{**OPTIONS, "grid": ["kl_coef=1,2"]}))  # more of it is welcome


def test_a_run_that_diverges_is_recorded_and_the_sweep_goes_on(ask, tmp_path):
    asked = {
        "also": ["training.learning_rate=1e30", "l2.coef=0.1"],
        "merge": ["wise-ft:0.5"],
        "merge_of": ["all"],
    }
    pool = InThisProcess()
    report = run_sweep(ask(tmp_path / "out", **asked), pool=pool)
    bad = "direct,lr=1e30"
    assert pool.names == ["direct", bad, "l2.coef=0.1"]
    assert set(report.failed) == {bad, f"{bad}+wise-ft,alpha=0.5"} and "finite" in report.failed[bad]
    assert f"failed: {bad}: " in report.text()
    before = (tmp_path / "out" / "sweep.json").read_bytes()
    assert json.loads(before)["runs"][1]["error"] == report.failed[bad]
    pool = InThisProcess()
    again = run_sweep(ask(tmp_path / "out", **asked), pool=pool)
    assert pool.names == [] and again.failed == report.failed  # it would diverge again
    assert (tmp_path / "out" / "sweep.json").read_bytes() == before


def test_a_search_adds_ordinary_runs_and_finds_them_again(ask, tmp_path):
    asked = {"search": True, "search_runs": 3, "keep_gain": 0.5}
    pool = InThisProcess()
    report = run_sweep(ask(tmp_path / "out", **asked), pool=pool)
    (found,) = report.searches
    assert pool.names == ["direct", *(f"kl_coef={entry['kl_coef']:g}" for entry in found["tried"])]
    assert len(found["tried"]) == 3 and found["tried"][0]["kl_coef"] == 1 and found["line"] in report.text()
    assert {run.name for run in report.runs} == set(pool.names)
    before, pool = (tmp_path / "out" / "sweep.json").read_bytes(), InThisProcess()
    run_sweep(ask(tmp_path / "out", **asked), pool=pool)
    assert pool.names == [] and (tmp_path / "out" / "sweep.json").read_bytes() == before


def test_a_search_ends_at_a_run_whose_process_died_and_goes_on_from_there(ask, tmp_path):
    class Dies(InThisProcess):
        def run(self, jobs, started, ended):
            def died(job, outcome):
                ended(job, {"error": "out of memory", "kind": ENDED} if job.name == "kl_coef=1" else outcome)

            super().run(jobs, started, died)
            shutil.rmtree(tmp_path / "out" / "runs" / "kl_coef=1", ignore_errors=True)

    asked = {"search": True, "search_runs": 2, "keep_gain": 0.5}
    pool = Dies()
    report = run_sweep(ask(tmp_path / "out", **asked), pool=pool)
    assert pool.names == ["direct", "kl_coef=1"] and report.failed == {"kl_coef=1": "out of memory"}
    assert report.searches[0]["line"] == "search: kl_coef=1 has no result, the same command goes on"
    pool = InThisProcess()
    report = run_sweep(ask(tmp_path / "out", **asked), pool=pool)
    assert pool.names[0] == "kl_coef=1" and len(pool.names) == len(report.searches[0]["tried"]) == 2


def test_shares_are_of_direct_fine_tuning_with_whatever_all_runs_have(ask, tmp_path):
    common = ["lora.r=2", "training.learning_rate=1e-2", "kl_on=target"]
    config = ask(tmp_path / "out", grid=["kl_coef=1"], also=["ce_weight=dft"], overrides=common)
    report = run_sweep(config, pool=InThisProcess())
    assert not report.failed and [run.name for run in report.runs] == ["direct", "kl_coef=1", "ce_weight=dft"]
    assert report.comparison is not None and report.comparison.direct == "direct"
    assert report.comparison.line("direct").method.name == "LoRA"
    alone = compare(
        {run.name: run.directory(report.out) for run in report.runs},
        source=config.source,
        target=config.target,
        initial={"initial": str(config.base["model"])},
        work=report.out / "evaluations",
    )
    assert alone.direct == "direct" and alone.notes == ("shares relate to direct: LoRA r 2",)


def test_the_dry_run_counts_and_touches_nothing(ask, tmp_path, llama_cache):
    text = plan_sweep(ask(tmp_path / "out", **OPTIONS)).text()
    assert "3 runs, 0 of them finished; 1 merge\n" in text and "l2.coef=0.1" in text
    plain = json.loads(json.dumps(plan_sweep(ask(tmp_path / "out", **OPTIONS)).to_dict()))
    assert [run["name"] for run in plain["runs"]] == ["direct", "kl_coef=1", "l2.coef=0.1"]
    assert plain["merges"] == ["direct+wise-ft,alpha=0.5"] and not plain["runs"][0]["finished"]
    assert not (tmp_path / "out").exists()


def test_bad_caches_are_refused_before_anything_runs(ask, tmp_path, tiny_qwen3_dir, llama_cache):
    out = tmp_path / "out"
    gone = {"source": {"news": str(tmp_path / "gone")}}
    with pytest.raises(AnnealError, match=r"source.news must be a cache: .*gone"):
        run_sweep(ask(out, **OPTIONS, **gone), pool=InThisProcess())
    with pytest.raises(AnnealError, match="gone"):
        run_sweep(ask(out, place=tmp_path / "gone"), pool=InThisProcess())
    foreign = write_cache(tmp_path / "foreign", tiny_qwen3_dir, num_rows=2)
    with pytest.raises(AnnealError, match=r"^run kl_coef=1,cache=foreign: "):
        run_sweep(ask(out, also=[f"cache={foreign} kl_coef=1"]), pool=InThisProcess())
    assert not out.exists()


def test_two_sweeps_in_one_directory_are_refused(ask, tmp_path):
    from trainer.sweep.sweep import held

    with held(tmp_path / "out"), pytest.raises(ConfigError, match="another one is under way"):
        run_sweep(ask(tmp_path / "out"), pool=InThisProcess())


def test_a_merge_of_another_run_is_made_again(done, ask, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    merged = out / "merges" / "direct+wise-ft,alpha=0.5"
    before = (merged / "model.safetensors").read_bytes()
    shutil.rmtree(merged)
    shutil.copytree(done[0] / "runs" / "kl_coef=1", merged)  # finished, but of other weights
    report = run_sweep(ask(out, **OPTIONS), pool=InThisProcess())
    assert not report.failed and (merged / "model.safetensors").read_bytes() == before


def test_a_damaged_merge_is_made_again(done, ask, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    weights = out / "merges" / "direct+wise-ft,alpha=0.5" / "model.safetensors"
    before = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(before[:-100]), weights.unlink):
        damage()
        report = run_sweep(ask(out, **OPTIONS), pool=InThisProcess())
        assert not report.failed and weights.read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "anneal.yaml"])
@pytest.mark.parametrize("left", [60, None])
def test_a_damaged_run_is_named_with_what_to_do(done, ask, tmp_path, name, left):
    out = shutil.copytree(done[0], tmp_path / "out")
    place = out / "runs" / "direct"
    merged = sorted((out / "merges").rglob("*"))
    if left is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes((place / name).read_bytes()[:left])
    with pytest.raises(ConfigError) as caught:
        run_sweep(ask(out, **OPTIONS), pool=InThisProcess())
    assert str(caught.value).startswith(f"{place} must be whole, as its run left it, got ")
    assert str(caught.value).endswith(
        f"; put it back, or remove {place}, and the same command trains it again"
    )
    assert sorted((out / "merges").rglob("*")) == merged


def test_a_soup_is_made_of_all_runs_of_its_entry_once(ask, llama_eval_cache, tmp_path):
    out = tmp_path / "out"
    asked = {"also": ["l2.coef=0.1"], "merge": ["soup", f"soup:by={llama_eval_cache}"], "merge_of": ["all"]}
    report = run_sweep(ask(out, **asked), pool=InThisProcess())
    greedy = f"all+soup,by={llama_eval_cache.name}"
    assert not report.failed and [merge.name for merge in report.merges] == ["all+soup", greedy]
    found = json.loads((out / "sweep.json").read_text())["merges"]
    assert found[0]["runs"] == ["direct", "l2.coef=0.1"] and found[1]["strengths"]["by"] == str(
        llama_eval_cache
    )
    tuned = json.loads((out / "merges" / greedy / "anneal.json").read_text())["merge"]["tuned"]
    assert {Path(entry["name"]).name for entry in tuned} == {"direct", "l2.coef=0.1"}
    assert all(entry["loss"] > 0 for entry in tuned) and any(entry["entered"] for entry in tuned)
    assert "soup by" in report.text()
    before = (out / "merges" / greedy / "model.safetensors").stat().st_mtime_ns
    run_sweep(ask(out, **asked), pool=InThisProcess())
    assert (out / "merges" / greedy / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(AnnealError, match=r"merges.soup.by must be a cache"):
        plan_sweep(ask(out, also=["l2.coef=0.1"], merge=["soup:by=nowhere"], merge_of=["all"]))


def test_a_run_of_other_weights_than_are_there_now_is_refused(ask, tiny_llama_dir, tmp_path):
    """Without KL nothing else says that the weights under the same path were replaced."""
    model, out = shutil.copytree(tiny_llama_dir, tmp_path / "model"), tmp_path / "out"
    asked = replace(ask(out), base={**ask(out).base, "model": str(model)})
    run_sweep(asked, pool=InThisProcess())
    plan_sweep(asked)
    moved = shutil.copytree(model, tmp_path / "moved")
    plan_sweep(replace(asked, base={**asked.base, "model": str(moved)}))
    copy_model(tiny_llama_dir, model, noise(1))
    with pytest.raises(ConfigError, match=r"in .*runs/direct weights of the model was '.*' and is '"):
        run_sweep(asked, pool=InThisProcess())


def test_a_run_with_ewc_on_another_text_of_the_same_name_is_refused(ask, tiny_llama_dir, tmp_path):
    here, there, out = (tmp_path / name for name in ("a/old", "b/old", "out"))
    write_cache(here, tiny_llama_dir, num_rows=3, seed=3)
    write_cache(there, tiny_llama_dir, num_rows=3, seed=4)
    run_sweep(ask(out, also=[f"ewc.coef=1 ewc.cache={here}"]), pool=InThisProcess())
    moved = shutil.copytree(here, tmp_path / "c/old")
    plan_sweep(ask(out, also=[f"ewc.coef=1 ewc.cache={moved}"]))
    with pytest.raises(ConfigError, match="the cache of ewc was"):
        plan_sweep(ask(out, also=[f"ewc.coef=1 ewc.cache={there}"]))


def test_a_run_that_diverged_is_tried_again_on_another_text(ask, llama_cache, llama_eval_cache, tmp_path):
    cache, out = shutil.copytree(llama_cache, tmp_path / "cache"), tmp_path / "out"
    options = {"place": cache, "overrides": ["training.learning_rate=1e30"]}
    first, second, third = InThisProcess(), InThisProcess(), InThisProcess()
    assert "direct" in run_sweep(ask(out, **options), pool=first).failed
    run_sweep(ask(out, **options), pool=second)
    shutil.rmtree(cache)
    shutil.copytree(llama_eval_cache, cache)
    run_sweep(ask(out, **options), pool=third)
    assert (first.names, second.names, third.names) == (["direct"], [], ["direct"])


def test_direct_fine_tuning_that_ends_far_away_leaves_the_table(ask, tmp_path):
    """Its weights are finite, and its perplexity is not."""
    asked = {"overrides": ["training.learning_rate=10"], "also": ["l2.coef=0.1"], "search": True}
    report = run_sweep(ask(tmp_path / "out", **asked), pool=InThisProcess())
    assert not report.failed and report.comparison is not None and report.selection is None
    assert "direct has diverged" in report.text() and "gains nothing" in report.searches[0]["line"]
    assert (tmp_path / "out" / "sweep.json").is_file()


def test_a_merge_of_a_run_that_is_gone_is_not_in_the_table(ask, tmp_path):
    out, merged = tmp_path / "out", "direct+wise-ft,alpha=0.5"
    asked = {"merge": ["wise-ft:0.5"]}
    run_sweep(ask(out, **asked), pool=InThisProcess())
    shutil.rmtree(out / "runs" / "direct")
    (out / "runs" / "direct").write_text("in the way")
    asked["also"] = ["l2.coef=0.1"]
    report = run_sweep(ask(out, **asked), pool=InThisProcess())
    assert set(report.failed) == {"direct", merged} and report.comparison is not None
    assert [line.label for line in report.comparison.models][1:] == ["l2.coef=0.1"]


def test_a_soup_by_another_text_of_the_same_name_is_made_again(ask, tiny_llama_dir, tmp_path):
    here, there, out = (tmp_path / name for name in ("a/by", "b/by", "out"))
    for place, seed in ((here, 3), (there, 4)):
        write_cache(place, tiny_llama_dir, num_rows=3, seed=seed)
    asked = {"also": ["l2.coef=0.1"], "merge_of": ["all"]}

    def losses(place):
        run_sweep(ask(out, **asked, merge=[f"soup:by={place}"]), pool=InThisProcess())
        record = json.loads((out / "merges" / "all+soup,by=by" / "anneal.json").read_text())
        return [entry["loss"] for entry in record["merge"]["tuned"]]

    first = losses(here)
    assert losses(there) != first


def test_a_run_that_is_stopped_before_it_can_save_has_not_failed(ask, tmp_path):
    """Ctrl-C while its process still imports: SIGTERM ends it as it ends any other."""

    class Importing(InThisProcess):
        def run(self, jobs, started, ended) -> None:
            started(jobs[0])
            os.kill(os.getpid(), signal.SIGINT)
            ended(jobs[0], {"error": "the run's process ended with SIGTERM; see its log", "kind": "Process"})

    seen, out = RecordedProgress(), tmp_path / "out"
    with pytest.raises(SweepStopped, match="stopped by SIGINT with 0 of 1 runs finished"):
        run_sweep(ask(out), pool=Importing(), progress=seen)
    assert not any("failed" in line for line in seen.notes) and not (out / "failed").exists()


def test_a_search_is_made_at_every_setting_of_the_kl_term_that_is_crossed(ask, tmp_path):
    asked = {"search": True, "search_runs": 2, "keep_gain": 0.5, "every": ["temperature=1,2"]}
    report = run_sweep(ask(tmp_path / "out", **asked), pool=InThisProcess())
    assert [found["settings"] for found in report.searches] == [{"temperature": 1}, {"temperature": 2}]
    assert all(
        f"(temperature {t})" in found["line"] for t, found in zip((1, 2), report.searches, strict=True)
    )
    names = [run.name for run in report.runs]
    assert names[0] == "direct" and {"kl_coef=1", "kl_coef=1,temperature=2"} < set(names)
    for run in report.runs[1:]:
        assert run.config(tmp_path).temperature == (2 if "temperature=2" in run.name else 1)
