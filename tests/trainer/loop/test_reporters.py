"""What reporters are told, under which names, and that the run does not depend on them."""

import importlib.util
import os
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from runs import same_weights, settings
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from trainer import train

PAGE = Path(__file__).resolve().parents[3] / "docs" / "training.md"
SAVED = ("training.save_strategy=steps", "training.save_steps=2", "training.max_steps=4")


class Recorder(TrainerCallback):
    """A reporter that keeps what it is told under the names that transformers gives it."""

    runs: ClassVar[list["Recorder"]] = []

    def __init__(self) -> None:
        self.told: list[tuple[int, dict]] = []
        self.runs.append(self)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, integration_utils.rewrite_logs(logs)))

    def on_train_end(self, args, state, control, **kwargs):
        self.told.append((state.global_step, {"end": 1}))

    def series(self, name: str) -> list[tuple[int, float]]:
        return [(step, figures[name]) for step, figures in self.told if name in figures]


@pytest.fixture(scope="module")
def recorder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
        yield "recorder"


@pytest.fixture(scope="module")
def reported(recorder, tiny_llama_dir, pruned_cache, llama_eval_cache, tmp_path_factory):
    """(where reporters write, what the run said, what the recorder was told) of a run with all that are installed."""
    place = tmp_path_factory.mktemp("reported")
    names = [name for name in ("tensorboard", "trackio") if importlib.util.find_spec(name)]
    words = (
        f"training.report_to=[{','.join([recorder, *names])}]",
        *(("training.project=annealed", "training.run_name=first") if "trackio" in names else ()),
        *("training.eval_strategy=steps", "training.eval_steps=2", "kl_budget=0.1", "l2.coef=1", *SAVED),
        f"eval_caches.held-out={llama_eval_cache}",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(place / "tensorboard"))
        patch.setenv("TRACKIO_DIR", str(place / "trackio"))
        report = train(settings(pruned_cache, tiny_llama_dir, place / "run", *words))
    return place, report, Recorder.runs[-1]


def test_kl_to_initial_is_told_from_the_first_step_to_the_result(reported):
    _, report, told = reported
    series = told.series("train/kl_to_initial")
    assert [step for step, _ in series] == [0, 2, 4]
    assert abs(series[0][1]) < 1e-6 < series[1][1] < series[2][1] == report.new_text["kl"]
    assert told.told[-1] == (4, {"end": 1}), "told everything before it hears of the end"
    for name in ("ce", "perplexity", "kl", "accuracy"):
        series = told.series(f"eval/held-out_{name}")
        assert [step for step, _ in series] == [2, 4, 4]
        assert series[1][1] == series[2][1] == report.evaluation["held-out"][name]
    logged = [entry["ce"] for entry in report.log_history if "ce" in entry]
    assert [value for _, value in told.series("train/ce")] == logged


def test_every_figure_has_a_documented_name(reported):
    _, _, told = reported
    names = {name for _, figures in told.told for name in figures} - {"end"}
    documented = set(re.findall(r"`((?:train|eval)/[\w/]+)`", PAGE.read_text(encoding="utf-8")))
    assert {name.replace("held-out", "NAME") for name in names} <= documented
    assert {"train/ce", "train/kl", "train/kl_to_initial", "train/kl_coef", "train/l2"} <= names


def test_tensorboard_files_hold_these_names(reported):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place, report, told = reported
    events = EventAccumulator(str(place / "tensorboard"))
    events.Reload()
    series = [(event.step, event.value) for event in events.Scalars("train/kl_to_initial")]
    single = [(step, float(np.float32(value))) for step, value in told.series("train/kl_to_initial")]
    assert series == single  # its files hold float32
    assert len(events.Scalars("train/ce")) == len(events.Scalars("train/kl")) == 4
    perplexity = events.Scalars("eval/held-out_perplexity")[-1].value
    assert perplexity == pytest.approx(report.evaluation["held-out"]["perplexity"], rel=1e-6)


def test_trackio_keeps_these_names(reported):
    place, report, _ = reported
    assert "TRACKIO_DIR" not in os.environ
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(place / "trackio"))
        pytest.importorskip("trackio")
        from trackio.sqlite_storage import SQLiteStorage

        assert SQLiteStorage.get_runs("annealed") == ["first"]
        lines = SQLiteStorage.get_logs("annealed", "first")
    series = [line["train/kl_to_initial"] for line in lines if "train/kl_to_initial" in line]
    assert len(series) == 3 and series[-1] == report.new_text["kl"]
    assert sum("train/kl" in line for line in lines) == 4
    assert [line for line in lines if "eval/held-out_ce" in line]


def test_a_run_does_not_depend_on_its_reporters(recorder, tiny_llama_dir, pruned_cache, tmp_path):
    # NEFTune draws noise in every forward pass of training: a measurement in between must not move it.
    noisy = (*SAVED, "training.neftune_noise_alpha=5", "kl_coef=0.5", "temperature=2")
    report_to = f"training.report_to={recorder}"
    with_it = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "a", report_to, *noisy))
    without = train(settings(pruned_cache, tiny_llama_dir, tmp_path / "b", *noisy))
    losses = [[entry["loss"] for entry in run.log_history if "ce" in entry] for run in (with_it, without)]
    assert losses[0] == losses[1] and same_weights(tmp_path / "a", tmp_path / "b")
    assert Recorder.runs[-1].series("train/kl_to_initial")[-1][1] == without.new_text["kl"]


def test_nothing_is_said_of_a_teacher_that_is_no_part_of_the_run(
    recorder, tiny_llama_dir, tiny_qwen3_dir, pruned_cache, tmp_path
):
    report_to = f"training.report_to={recorder}"
    report = train(settings(pruned_cache, tiny_qwen3_dir, tmp_path / "run", report_to, "kl_coef=0"))
    assert report.new_text["kl"] is None and report.new_text["kl_to"] is None
    assert not Recorder.runs[-1].series("train/kl_to_initial")
    assert "KL(" not in (tmp_path / "run" / "README.md").read_text()
