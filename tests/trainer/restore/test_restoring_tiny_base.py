"""What the paper on spurious forgetting says of checkpoints, on `examples/tiny-base`: the longer a model was tuned, the
less of its loss on old text comes back. The same experiment by another program is in golden_theory/probe_tiny.json."""

import json
import math
from pathlib import Path

import pytest
from pool_here import InThisProcess

from formats.cache import TeacherCache
from trainer import evaluate, train
from trainer.config_file import config_from_dict
from trainer.restore.config import RestoreConfig
from trainer.restore.report import RestoreReport
from trainer.restore.restore import run_restore
from trainer.restore.shares import Shares
from trainer.restore.text import write_rows
from trainer.result.lineage import ancestors_of, own_weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "examples" / "tiny-base"
GOLDEN = json.loads((ROOT / "tests/golden_theory/probe_tiny.json").read_text())
LENGTH, BATCH = 256, 8
EPOCHS = {1: 6, 4: 24, 10: 60}
"""Epochs over 48 rows -> steps of 8 rows."""
TUNING = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "save_strategy": "epoch",
    "save_total_limit": 10,
}


def cache_of(folder: Path, name: str, domain: str, split: str, num_rows: int) -> str:
    """The first rows of full length of a split of the standard library."""
    from stdlib_text import documents

    from cache_builder import BuildConfig, build_cache

    found = documents(domain, split, max_bytes=num_rows * LENGTH * 6)
    corpus = folder / f"{name}.jsonl"
    corpus.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in found), encoding="utf-8")
    build_cache(
        BuildConfig(
            corpus=str(corpus), model=str(BASE), out=str(folder / f"{name}-all"), engine="transformers",
            dtype="float32", max_length=LENGTH,
        )
    )  # fmt: skip
    cache = TeacherCache(folder / f"{name}-all")
    full = [row for row, length in enumerate(cache.lengths()) if length == LENGTH]
    assert len(full) >= num_rows
    write_rows(cache, full[:num_rows], folder / name / "rows", {})
    return str(folder / name / "rows")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tiny-base")
    found = {
        "code": cache_of(folder, "code", "code", "target-train", 48),
        "prose": cache_of(folder, "prose", "prose", "source-train", 96),
        "held": cache_of(folder, "held", "prose", "source-heldout", 12),
    }
    for name, kl_coef, epochs in (("direct", 0.0, 10), ("annealed", 4.0, 4)):
        found[name] = str(folder / name)
        train(
            config_from_dict(
                {
                    "cache": found["code"], "model": str(BASE), "out": found[name], "kl_coef": kl_coef,
                    "keep_checkpoints": True, "save_dtype": "float32",
                    "training": {**TUNING, "num_train_epochs": epochs},
                }
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def done(places, tmp_path_factory) -> tuple[Path, RestoreReport]:
    checkpoints = {f"epoch-{n}": f"{places['direct']}/checkpoint-{steps}" for n, steps in EPOCHS.items()}
    config = RestoreConfig(
        tuned={"untuned": str(BASE), **checkpoints}, initial=str(BASE), text=places["prose"],
        source={"prose": places["held"]}, out=str(tmp_path_factory.mktemp("restore") / "out"),
        tokens=96 * LENGTH, learning_rate=3e-4, memory=places["code"],
        training={
            "lr_scheduler_type": "constant", "warmup_steps": 0, "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
        },
    )  # fmt: skip
    found = run_restore(config, pool=InThisProcess())
    print(found.text())
    return Path(config.out), found


@pytest.fixture(scope="module")
def report(done) -> RestoreReport:
    return done[1]


def test_a_model_that_was_not_tuned_has_lost_nothing(report) -> None:
    """The same computation on both sides, so exactly, and not by a tolerance."""
    shares = report.shares["untuned"]["prose"]
    assert (shares.lost, shares.gone, shares.hidden, shares.back) == (0.0, 0.0, 0.0, None)


def test_less_comes_back_the_longer_it_was_tuned(report) -> None:
    shares = [report.shares[f"epoch-{n}"]["prose"] for n in EPOCHS]
    back, lost, gone = ([getattr(entry, what) for entry in shares] for what in ("back", "lost", "gone"))
    assert back[0] > back[1] > back[2] > 0
    assert lost == sorted(lost) and gone == sorted(gone) and lost[0] > 0
    verdicts = [entry.verdict() for entry in shares]
    assert "hidden" in verdicts[0] and "gone" in verdicts[-1]


def test_it_is_like_the_measurement_of_another_program(report) -> None:
    """Other rows of the same kinds of text, so within a sixth of the whole; its shares as in test_shares.py."""
    golden = [
        Shares.of(
            initial=-math.log(GOLDEN["base"]["source"]["ppl"]),
            tuned=-math.log(run["after"]["ppl"]),
            control=-math.log(GOLDEN["control"]["ppl"]),
            restored=-math.log(run["restored"]["ppl"]),
        ).back
        for run in GOLDEN["restore"]
    ]
    assert [run["epochs"] for run in GOLDEN["restore"]] == list(EPOCHS)
    assert [report.shares[f"epoch-{n}"]["prose"].back for n in EPOCHS] == pytest.approx(golden, abs=1 / 6)


def test_what_is_gone_was_replaced_by_what_was_memorised(report) -> None:
    known = [report.memorised_by_initial, *(model.memorised for model in report.models[1:])]
    assert known == sorted(known) and known[-1] > known[0] + 0.2
    last = report.models[-1]
    assert last.tuned["prose"]["calibration_error"] > report.initial["prose"]["calibration_error"]
    assert last.tuned["prose"]["kept"] < last.restored["prose"]["kept"] < 1


def test_label_annealing_loses_less(places, report) -> None:
    after = evaluate(places["annealed"], {"prose": places["held"]})["prose"]["ce"]
    lost = after - report.initial["prose"]["ce"]
    assert lost < 0.5 * report.shares["epoch-4"]["prose"].lost


def test_a_restored_model_is_an_ordinary_run(places, done) -> None:
    from transformers import AutoModelForCausalLM

    restored = done[0] / "restored" / "epoch-1"
    AutoModelForCausalLM.from_pretrained(restored)
    checkpoint = f"{places['direct']}/checkpoint-{EPOCHS[1]}"
    assert [entry.weights for entry in ancestors_of(restored)] == [
        own_weights(BASE),
        own_weights(Path(checkpoint)),
    ]
