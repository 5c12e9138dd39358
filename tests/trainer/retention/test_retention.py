"""L2, EWC and SFA against dense loops in float64: gradients, weights and Fisher information, however a step
is split over micro-batches and processes.

Every comparison trains a few steps of SGD at a rate that moves the weights, so that the penalty is a sizeable
part of the gradient from the second step on. Masks are uneven.
"""

import numpy as np
import pytest
import torch
from caches import write_cache
from dense_retention import dense_fisher, dense_training, distinct_parameters
from distributed_worker import relative_difference, run, run_all
from processes import run_ranks
from transformers import AutoModelForCausalLM

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer.data.dataset import CachedDataset
from trainer.data.sampler import EpochBatches, Source, sample_rows
from trainer.retention.fisher import draw_labels
from trainer.retention.settings import EwcSettings, L2Settings, SfaSettings
from trainer.retention.sfa import averaging_steps

STEPS, RATE, SEED, FISHER_ROWS = 3, 0.2, 3, 7
L2_COEF, EWC_COEF = 0.5, 20.0


@pytest.fixture(scope="module")
def base(tiny_llama_dir, llama_cache, llama_eval_cache, tmp_path_factory) -> dict:
    return {
        "model": str(tiny_llama_dir),
        "cache": str(llama_cache),
        "out": str(tmp_path_factory.mktemp("retention")),
        "batch": 8,
        "accumulation": 1,
        "steps": STEPS,
        "learning_rate": RATE,
        "kl_coef": 0.0,
    }


@pytest.fixture(scope="module")
def methods(llama_eval_cache) -> dict[str, dict]:
    """The settings under test."""
    ewc = {"coef": EWC_COEF, "cache": str(llama_eval_cache), "num_rows": FISHER_ROWS, "labels": "data"}
    return {"l2": {"coef": L2_COEF}, "ewc": ewc, "sfa": {"beta": 0.3, "period": 0.5}}


def rows_of_steps(cache_path) -> list[list]:
    """The cached rows of every optimizer step of `base`."""
    cache = TeacherCache(cache_path)
    order = EpochBatches([Source(units=[[i] for i in range(len(cache))])], 8, seed=SEED)
    return [[cache[unit[0]] for unit in batch] for batch in order][:STEPS]


def fisher_by_hand(model_dir, cache_path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    cache = TeacherCache(cache_path)
    rows = sample_rows(CachedDataset(cache, loss="ce"), FISHER_ROWS, SEED)
    return dense_fisher(model, [cache[int(row)] for row in rows], [None] * len(rows))


def squares(theta: dict, theta0: dict, weights: dict | None = None) -> torch.Tensor:
    """sum_i w_i (theta_i - theta0_i)^2, for autograd."""
    parts = [((theta[n] - theta0[n]) ** 2 * (1 if weights is None else weights[n])).sum() for n in theta]
    return torch.stack(parts).sum()


def average(beta: float, at: set[int]):
    """SFA by hand."""

    def after_step(step: int, theta: dict, theta0: dict) -> None:
        if step in at:
            for name, parameter in theta.items():
                parameter.data = (1 - beta) * parameter.data + beta * theta0[name]

    return after_step


@pytest.fixture(scope="module")
def expected(base, methods) -> dict[str, dict]:
    """What dense loops give, for every method and for none."""
    steps = rows_of_steps(base["cache"])
    fisher = fisher_by_hand(base["model"], methods["ewc"]["cache"])
    options = {"learning_rate": RATE}
    return {
        "none": dense_training(base["model"], steps, **options),
        "l2": dense_training(
            base["model"], steps, penalty=lambda a, b: L2_COEF / 2 * squares(a, b), **options
        ),
        "ewc": dense_training(
            base["model"], steps, penalty=lambda a, b: EWC_COEF / 2 * squares(a, b, fisher), **options
        )
        | {"fisher": fisher},
        "sfa": dense_training(base["model"], steps, after_step=average(0.3, {2, 3}), **options),
    }


def assert_matches(expected: dict, found: dict, name: str, tolerance: float = 1e-9) -> None:
    """Gradients of every step, final weights, and the logged penalty."""
    assert relative_difference(expected, found) < tolerance
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=tolerance, atol=tolerance)
    if name in ("l2", "ewc"):
        logged = [entry[name] for entry in found["log"] if name in entry]
        np.testing.assert_allclose(logged, expected["penalties"], rtol=1e-6, atol=1e-12)
        entry = found["log"][STEPS - 1]
        assert entry["loss"] == pytest.approx(entry["ce"] + entry[name], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", ["l2", "ewc", "sfa"])
def test_one_process_equals_the_dense_loop(base, methods, expected, name, accumulation):
    spec = base | {name: methods[name], "batch": 8 // accumulation, "accumulation": accumulation}
    assert_matches(expected[name], run(spec), name)
    # The comparison can fail: without the method the gradients are others by far.
    assert relative_difference(expected[name], expected["none"]) > 1e-2


@pytest.mark.slow
def test_two_processes_equal_the_dense_loop(base, methods, expected, tmp_path):
    """DDP with accumulation 1, 2 and 4, and FSDP2 with sharded theta0 and Fisher information."""
    specs, names = [], []
    for name in methods:
        for accumulation in (1, 2, 4):
            specs.append(
                base | {name: methods[name], "batch": 4 // accumulation, "accumulation": accumulation}
            )
            names.append(name)
        sharded = {"batch": 2, "accumulation": 2, "arguments": {"fsdp": True}}
        specs.append(base | {name: methods[name]} | sharded)
        names.append(name)
    for number, spec in enumerate(specs):
        spec["result"], spec["out"] = str(tmp_path / f"{number}.pt"), str(tmp_path / f"out-{number}")
    run_ranks(tmp_path, 2, run_all, specs)
    for name, spec in zip(names, specs, strict=True):
        found = torch.load(spec["result"])
        assert_matches(expected[name], found, name)
        if name == "ewc":
            assert_same_fisher(found["fisher"], expected["ewc"]["fisher"])


def assert_same_fisher(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].to(value.dtype), value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_fisher_equals_a_loop_over_rows(base, methods, labels):
    """Every entry, for labels of the text and for the very labels that were drawn."""
    spec = base | {"ewc": methods["ewc"] | {"labels": labels}, "steps": 1}
    found = run(spec)["fisher"]
    model = AutoModelForCausalLM.from_pretrained(base["model"], dtype=torch.float64)
    dataset = CachedDataset(methods["ewc"]["cache"], loss="ce")
    rows = sample_rows(dataset, FISHER_ROWS, SEED).tolist()
    drawn: list = [None] * len(rows)
    if labels == "sampled":
        drawn = [draw(model, dataset[row], row)[0].numpy() for row in rows]
        assert any((d != dataset[row]["labels"]).any() for d, row in zip(drawn, rows, strict=True))
    wanted = dense_fisher(model, [dataset.cache[row] for row in rows], drawn)
    assert_same_fisher(found, wanted)


def draw(model, item: dict, row: int, seed: int = SEED) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor(item["input_ids"])[None]}
    return draw_labels(model, inputs, torch.as_tensor(item["labels"])[None], None, [seed, row])


def test_labels_are_drawn_where_there_is_loss_and_depend_on_the_row_alone(base, methods):
    model = AutoModelForCausalLM.from_pretrained(base["model"], dtype=torch.float64)
    dataset = CachedDataset(methods["ewc"]["cache"], loss="ce")
    item = dataset[1]
    first = draw(model, item, 1)
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(first, draw(model, item, 1))
    assert not torch.equal(first, draw(model, item, 2))
    unscored = item["labels"] == -100
    assert (first[0].numpy()[unscored] == -100).all() and (first[0].numpy()[~unscored] >= 0).all()


def test_sampled_labels_estimate_the_true_fisher_of_the_head(base, methods):
    """For an untied head E[F] is known: mean over tokens of p_v (1 - p_v) h_d^2. The empirical Fisher is not
    near it."""
    model = AutoModelForCausalLM.from_pretrained(base["model"], dtype=torch.float64)
    cache = TeacherCache(methods["ewc"]["cache"])
    dataset = CachedDataset(cache, loss="ce")
    true, num, items, drawn = 0.0, 0, [], []
    for row in range(len(cache)):
        item = cache[row]
        ids = torch.as_tensor(item.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[0]
            p = model.lm_head(hidden).softmax(-1)
        at = torch.as_tensor(np.flatnonzero(item.loss_mask)) - 1
        true = true + torch.einsum("tv,td->vd", p[at] * (1 - p[at]), hidden[at] ** 2)
        num += len(at)
        for seed in range(12):
            items.append(item)
            drawn.append(draw(model, dataset[row], row, seed)[0].numpy())
    true = true / num
    sampled = dense_fisher(model, items, drawn)["lm_head.weight"]
    empirical = dense_fisher(model, items[::12], [None] * len(cache))["lm_head.weight"]
    assert float(sampled.sum() / true.sum()) == pytest.approx(1, abs=0.05)
    assert float(empirical.sum() / true.sum()) > 1.2


def test_tied_weights_count_once(tiny_gemma2_dir, methods, tmp_path):
    """Gemma 2 shares embedding and head; also sharded, where the tie is made anew. Its norms compute in
    float32."""
    write_cache(tmp_path / "c", tiny_gemma2_dir, num_rows=24)
    spec = {"model": str(tiny_gemma2_dir), "cache": str(tmp_path / "c"), "out": str(tmp_path / "o")}
    spec |= {"batch": 8, "accumulation": 1, "steps": STEPS, "learning_rate": 0.02, "kl_coef": 0.0}
    spec |= {"l2": {"coef": 5.0}, "ewc": methods["ewc"] | {"cache": str(tmp_path / "c")}}
    fisher = fisher_by_hand(tiny_gemma2_dir, tmp_path / "c")

    def penalty(theta, theta0):
        return 2.5 * squares(theta, theta0) + EWC_COEF / 2 * squares(theta, theta0, fisher)

    steps = rows_of_steps(tmp_path / "c")
    wanted = dense_training(str(tiny_gemma2_dir), steps, learning_rate=0.02, penalty=penalty)
    assert_matches(wanted, run(spec), "", 1e-6)
    sharded = spec | {"batch": 2, "accumulation": 2, "arguments": {"fsdp": True}}
    sharded["result"] = str(tmp_path / "sharded.pt")
    run_ranks(tmp_path, 2, run_all, [sharded])
    assert_matches(wanted, torch.load(sharded["result"]), "", 1e-6)


def test_the_penalty_joins_before_clipping(base):
    """With a penalty that dwarfs the loss, the clipped gradient still has the norm that was asked for."""
    spec = base | {"l2": {"coef": 50.0}, "learning_rate": 0.02, "arguments": {"max_grad_norm": 0.01}}
    for gradients in run(spec)["gradients"]:
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-4)


def test_a_loss_scaler_scales_the_penalty_as_well(base, methods):
    """As fp16 training does on a GPU: gradients carry a factor until the optimiser takes it out."""
    spec = base | {"dtype": "float32", "l2": methods["l2"], "ewc": methods["ewc"]}
    plain, scaled = run(spec), run(spec | {"loss_scale": 1024.0})
    for key, weight in plain["weights"].items():
        torch.testing.assert_close(scaled["weights"][key], weight, rtol=1e-5, atol=1e-6)
    ratio = float(
        scaled["gradients"][1]["lm_head.weight"].norm() / plain["gradients"][1]["lm_head.weight"].norm()
    )
    assert ratio == pytest.approx(1024, rel=1e-3)


def test_penalties_compose_with_the_kl_term_and_with_each_other(base, methods):
    """Step 2 has the gradient of the loss alone plus both pulls, at the weights that step 1 left."""
    alone = base | {"kl_coef": 0.7, "steps": 2}
    plain, both = run(alone), run(alone | {"l2": methods["l2"], "ewc": methods["ewc"]})
    assert (
        relative_difference({"gradients": plain["gradients"][:1]}, {"gradients": both["gradients"][:1]})
        < 1e-12
    )
    model = AutoModelForCausalLM.from_pretrained(base["model"], dtype=torch.float64)
    fisher = fisher_by_hand(base["model"], methods["ewc"]["cache"])
    for name in distinct_parameters(model):
        moved = -RATE * plain["gradients"][0][name]
        pull = (L2_COEF + EWC_COEF * fisher[name]) * moved
        torch.testing.assert_close(both["gradients"][1][name] - plain["gradients"][1][name], pull)


@pytest.mark.slow
def test_compiling_the_model_changes_nothing(base, methods):
    spec = base | {"dtype": "float32", "l2": methods["l2"], "ewc": methods["ewc"] | {"labels": "sampled"}}
    compiled = run(spec | {"arguments": {"torch_compile": True, "torch_compile_backend": "eager"}})
    plain = run(spec)
    for key, weight in plain["weights"].items():
        found = compiled["weights"].get(key, compiled["weights"].get(f"_orig_mod.{key}"))
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)


def test_when_sfa_averages():
    assert averaging_steps(0.25, 8) == {2, 4, 6, 8}
    assert averaging_steps(0.3, 10) == {3, 6, 9, 10}
    assert averaging_steps(1.0, 7) == {7}
    assert averaging_steps(0.1, 3) == {1, 2, 3}
    assert averaging_steps(1 / 3, 9) == {3, 6, 9}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2Settings(coef=-1), "l2.coef must be at least 0, got -1"),
        (lambda: EwcSettings(coef=1, cache=""), "ewc.cache must name a cache"),
        (lambda: EwcSettings(coef=1, cache="c", num_rows=0), "ewc.num_rows must be at least 1"),
        (lambda: EwcSettings(coef=1, cache="c", labels="drawn"), "ewc.labels must be one of sampled, data"),
        (lambda: SfaSettings(beta=1.5), "sfa.beta must lie in [0, 1], got 1.5"),
        (lambda: SfaSettings(beta=0.5, period=0), "sfa.period must be above 0 and at most 1, got 0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_adapters_and_fused_optimisers_are_refused_by_name(base):
    with pytest.raises(ConfigError, match="l2, ewc and sfa need full fine-tuning"):
        run(base | {"l2": {"coef": 1.0}, "lora": {"r": 2}})
    with pytest.raises(
        ConfigError, match="l2 needs an optimiser that updates after the backward pass, got lomo"
    ):
        run(base | {"l2": {"coef": 1.0}, "arguments": {"optim": "lomo"}})


def test_sfa_averages_four_times_by_a_quarter_unless_told_otherwise():
    """The board's beta (docs/results.md); one half in Algorithm 1 of arXiv 2501.05559."""
    assert (SfaSettings().beta, SfaSettings().period) == (0.25, 0.25)
    assert SfaSettings(period=1).beta == 0.25
