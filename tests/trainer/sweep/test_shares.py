"""Models merged and measured in shares: nothing is left to do for the steps that follow, and the result is the same."""

import shutil
from pathlib import Path

import pytest
from caches import write_cache
from pool_here import InThisProcess
from recorded_progress import RecordedProgress
from runs import QUICK

from formats.errors import ConfigError
from trainer.sweep.config import sweep_from_options
from trainer.sweep.shares import LARGEST_SHARE, ModelWork, divide
from trainer.sweep.sweep import run_sweep
from trainer.sweep.worker import WORKS


@pytest.fixture(scope="module")
def ask(llama_cache, tiny_llama_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    texts = {
        side: {side: str(write_cache(folder / side, tiny_llama_dir, num_rows=3, seed=seed))}
        for side, seed in (("source", 1), ("target", 2))
    }

    def asked(out: Path):
        return sweep_from_options(
            str(llama_cache), model=str(tiny_llama_dir), out=str(out), overrides=QUICK, grid=["kl_coef=1"],
            merge=["wise-ft:0.25,0.5"], merge_of=["all"], **texts,
        )  # fmt: skip

    return asked


def test_shares_leave_nothing_to_do_and_change_nothing(ask, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    run_sweep(ask(one), pool=InThisProcess())
    pool, seen = InThisProcess(parallel=2), RecordedProgress()
    run_sweep(ask(many), pool=pool, progress=seen)
    assert [job.work for job in pool.jobs] == ["train", "train", "measure", "measure"]
    assert seen.phases[:2] == [("sweep", 2, 2), ("measure", 7, 7)]
    # All four merges are there, and no text is read again.
    assert seen.phases[2:] == [("merges", 4, 4)]
    found, expected = ((place / "sweep.json").read_bytes() for place in (many, one))
    assert found.replace(str(many).encode(), str(one).encode()) == expected


def test_evaluations_are_made_in_the_dtype_that_is_asked_for(ask, tmp_path):
    import dataclasses
    import json

    out = tmp_path / "out"
    asked = dataclasses.replace(ask(out), eval_dtype="bfloat16")
    seen = RecordedProgress()
    run_sweep(asked, pool=InThisProcess(parallel=2), progress=seen)
    assert [name for name, _, _ in seen.phases] == ["sweep", "measure", "merges"]
    files = [json.loads(path.read_text()) for path in (out / "evaluations").iterdir()]
    assert {e["settings"]["dtype"] for file in files for e in file["evaluations"]} == {"bfloat16"}
    with pytest.raises(ConfigError, match="eval_dtype must be one of float32, bfloat16, float16, got 'int4'"):
        dataclasses.replace(asked, eval_dtype="int4")


def test_only_what_is_not_known_starts_processes(ask, tmp_path):
    out = tmp_path / "out"
    run_sweep(ask(out), pool=InThisProcess(parallel=2))
    again = InThisProcess(parallel=2)
    run_sweep(ask(out), pool=again)
    assert again.jobs == []
    next(path for path in (out / "evaluations").iterdir() if path.name.startswith("direct-")).unlink()
    shutil.rmtree(out / "merges" / "kl_coef=1+wise-ft,alpha=0.5")
    run_sweep(ask(out), pool=again)
    labels = [model["label"] for job in again.jobs for model in job.settings["models"]]
    assert labels == ["direct", "kl_coef=1+wise-ft,alpha=0.5"]


def test_what_a_share_could_not_do_is_done_or_said_later(ask, tmp_path):
    out = tmp_path / "out"

    class Fails(InThisProcess):
        def run(self, jobs, started, ended) -> None:
            if jobs[0].work == "train":
                return super().run(jobs, started, ended)
            for job in jobs:
                ended(job, {"error": "the run's process ended with SIGKILL", "kind": "Process"})

    seen = RecordedProgress()
    report = run_sweep(ask(out), pool=Fails(parallel=2), progress=seen)
    assert not report.failed and any("SIGKILL" in note for note in seen.notes)
    names = [phase for phase, _, _ in seen.phases]
    assert names.count("merges") == 1 and "direct: source" in names


def test_a_model_that_fails_leaves_the_others_of_its_share(ask, tmp_path):
    out = tmp_path / "out"
    pool = InThisProcess(parallel=2)
    run_sweep(ask(out), pool=pool)
    share = pool.jobs[-1].settings
    for path in (out / "evaluations").iterdir():
        path.unlink()
    broken, *others = share["models"]
    shutil.rmtree(out / "merges")
    settings = {**share, "models": [{**broken, "directory": str(tmp_path / "none"), "merge": None}, *others]}
    found = WORKS["measure"](settings)
    assert found["error"].startswith(f"{broken['label']}: ")
    assert len(list((out / "evaluations").iterdir())) == len(others)


@pytest.mark.parametrize(
    ("count", "parallel", "sizes"), [(3, 8, [1, 1, 1]), (9, 2, [5, 4]), (40, 2, [8] * 5)]
)
def test_shares_are_even_and_small(count, parallel, sizes):
    work = [ModelWork(label=str(i), directory=str(i)) for i in range(count)]
    found = divide(work, parallel)
    assert [len(share) for share in found] == sizes and max(sizes) <= LARGEST_SHARE
    assert sorted(model.label for share in found for model in share) == sorted(model.label for model in work)
