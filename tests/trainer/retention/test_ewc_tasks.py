"""EWC over several earlier tasks: the sum of their penalties, each around its own weights with its own F, against a
dense loop in float64."""

import json
from pathlib import Path

import pytest
import torch
from caches import write_cache
from dense_retention import dense_fisher, dense_training, distinct_parameters
from distributed_worker import relative_difference, run, run_all
from processes import run_ranks
from runs import copy_model, noise, settings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from formats.cache import TeacherCache
from formats.errors import AnnealError, ConfigError
from trainer import train
from trainer.config import TrainConfig
from trainer.data.dataset import CachedDataset
from trainer.data.sampler import EpochBatches, Source, sample_rows
from trainer.evaluation.recorded_method import method_of
from trainer.retention.settings import EwcSettings

STEPS, RATE, SEED, ROWS = 3, 0.2, 3, 5
COEFS = (20.0, 7.0)


@pytest.fixture(scope="module")
def chain(tiny_llama_dir, llama_cache, llama_eval_cache, tmp_path_factory) -> dict:
    """A run from one model, held to it and to an earlier one, which knew another text."""
    folder = tmp_path_factory.mktemp("chain")
    earlier = copy_model(tiny_llama_dir, folder / "earlier", noise(5, 0.1))
    other_text = write_cache(folder / "text", tiny_llama_dir, num_rows=9, seed=8)
    tasks = [
        {"coef": COEFS[0], "cache": str(llama_eval_cache), "num_rows": ROWS, "labels": "data"},
        {
            "coef": COEFS[1], "cache": str(other_text), "num_rows": ROWS, "labels": "data",
            "model": str(earlier),
        },
    ]  # fmt: skip
    spec = {"model": str(tiny_llama_dir), "cache": str(llama_cache), "out": str(folder / "out")}
    spec |= {"batch": 8, "accumulation": 1, "steps": STEPS, "learning_rate": RATE, "kl_coef": 0.0}
    return spec | {"ewc_tasks": tasks}


def by_hand(model_dir: str, cache_path: str) -> tuple[dict, dict]:
    """theta_k, and F there."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    cache = TeacherCache(cache_path)
    rows = sample_rows(CachedDataset(cache, loss="ce"), ROWS, SEED)
    fisher = dense_fisher(model, [cache[int(row)] for row in rows], [None] * len(rows))
    return {name: p.detach().clone() for name, p in distinct_parameters(model).items()}, fisher


@pytest.fixture(scope="module")
def expected(chain) -> dict:
    cache = TeacherCache(chain["cache"])
    order = EpochBatches([Source(units=[[i] for i in range(len(cache))])], 8, seed=SEED)
    steps = [[cache[unit[0]] for unit in batch] for batch in order][:STEPS]
    found = [by_hand(task.get("model", chain["model"]), task["cache"]) for task in chain["ewc_tasks"]]

    def penalty(theta: dict, theta0: dict) -> torch.Tensor:
        parts = [
            coef / 2 * (fisher[name] * (theta[name] - theta_k[name]) ** 2).sum()
            for coef, (theta_k, fisher) in zip(COEFS, found, strict=True)
            for name in theta
        ]
        return torch.stack(parts).sum()

    dense = dense_training(chain["model"], steps, learning_rate=RATE, penalty=penalty)
    return dense | {"fisher": found[1][1]}


def assert_matches(expected: dict, found: dict) -> None:
    assert relative_difference(expected, found) < 1e-9
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=1e-9, atol=1e-9)
    logged = [entry["ewc"] for entry in found["log"] if "ewc" in entry]
    assert logged == pytest.approx(expected["penalties"], rel=1e-6)
    for key, value in expected["fisher"].items():  # of the second task, at its own weights
        torch.testing.assert_close(found["fisher"][key].to(value.dtype), value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_tasks_equal_the_dense_loop(chain, expected, accumulation):
    found = run(chain | {"batch": 8 // accumulation, "accumulation": accumulation})
    assert_matches(expected, found)
    # The comparison can fail: with one of the tasks alone the gradients are others by far.
    for task in chain["ewc_tasks"]:
        assert relative_difference(expected, run(chain | {"ewc_tasks": [task]})) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_tasks_on_two_processes_equal_the_dense_loop(chain, expected, tmp_path, fsdp):
    spec = chain | {"batch": 2, "accumulation": 2, "out": str(tmp_path / "out")}
    spec |= {"arguments": {"fsdp": True} if fsdp else {}, "result": str(tmp_path / "result.pt")}
    run_ranks(tmp_path, 2, run_all, [spec])
    assert_matches(expected, torch.load(spec["result"]))


def words_of(tasks: list[dict]) -> str:
    return f"ewc={json.dumps(tasks)}"


def test_a_run_over_two_tasks_keeps_what_is_asked_for(chain, pruned_cache, tiny_llama_dir, tmp_path, capsys):
    """The log, the card, the record, and F of the second task alone, which a run without the request removes."""
    tasks = [dict(task) for task in chain["ewc_tasks"]]
    tasks[1]["keep_fisher"] = True
    out = tmp_path / "run"
    report = train(settings(pruned_cache, tiny_llama_dir, out, words_of(tasks)))
    assert (
        report.log_history[0]["ewc"] > 0
    )  # the earlier model's weights are elsewhere from the first step on
    told = capsys.readouterr().err
    assert "ewc: Fisher information of 5 rows" in told and "ewc.1: Fisher information of 5 rows" in told
    card = (out / "README.md").read_text()
    assert "`20 / 2 * sum_i" in card and "`7 / 2 * sum_i" in card and tasks[1]["model"] in card
    method = method_of(out)
    assert method is not None and "EWC of 2 tasks" in method.name
    assert [path.name for path in out.glob("*fisher*")] == ["ewc-fisher-1"]
    fisher = load_file(out / "ewc-fisher-1" / "fisher.safetensors")
    _, wanted = by_hand(tasks[1]["model"], tasks[1]["cache"])
    # The run's own draw of rows depends on training.seed, 0 there: only that it is an F of this model is compared here.
    assert fisher.keys() == wanted.keys() and all(bool((value >= 0).all()) for value in fisher.values())
    key = json.loads((out / "ewc-fisher-1" / "key.json").read_text())
    from formats.identity.fingerprint import ModelFingerprint

    assert key["weights"] == ModelFingerprint.of(Path(tasks[1]["model"])).weights


def test_one_task_in_a_list_is_one_task(chain):
    one = chain["ewc_tasks"][0]
    options = {"cache": "c", "model": "m", "out": "o"}
    assert TrainConfig(**options, ewc=[EwcSettings(**one)]).ewc_tasks == (EwcSettings(**one),)
    assert TrainConfig(**options, ewc=EwcSettings(**one)).ewc_tasks == (EwcSettings(**one),)
    assert TrainConfig(**options).ewc_tasks == ()
    for wrong in (3, [], [one]):
        with pytest.raises(ConfigError, match="ewc must be a mapping of coef"):
            TrainConfig(**options, ewc=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "QWEN"}, "ewc.model must have the tensors of --model, got ["),
        ({"model": "nowhere/at/all"}, "ewc.model must be a model directory"),
        ({"model": 3}, "ewc.model must be the model that was trained on that task, got 3"),
        ({"keep_fisher": "yes"}, "ewc.keep_fisher must be true or false"),
        ({"strength": 1}, "unknown setting ewc.1.strength"),
        ({"cache": None}, "ewc.1.cache is required"),
        ("none", "ewc must be a mapping of coef, cache, ... or a list of them, got []"),
        ("number", "ewc.0 must be a mapping, got 3"),
    ],
)
def test_bad_tasks_are_refused_in_one_line(
    chain, pruned_cache, tiny_llama_dir, tiny_qwen3_dir, tmp_path, change, message
):
    tasks: list = [dict(task) for task in chain["ewc_tasks"]]
    if isinstance(change, str):
        tasks = [] if change == "none" else [3]
    else:
        tasks[1] |= {key: str(tiny_qwen3_dir) if value == "QWEN" else value for key, value in change.items()}
    with pytest.raises(AnnealError) as error:
        train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", words_of(tasks)))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
