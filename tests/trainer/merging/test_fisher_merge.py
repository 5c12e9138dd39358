"""Fisher merging: F against a dense loop, the average against hand computations, and what is refused."""

import json
import resource
from pathlib import Path

import pytest
import torch
from caches import write_cache
from dense_retention import dense_fisher
from recorded_progress import RecordedProgress
from runs import copy_model, noise, same_weights, settings
from safetensors.torch import load_file, save_file

from formats.cache import TeacherCache
from formats.errors import AnnealError
from formats.identity.fingerprint import ModelFingerprint
from trainer import MergeConfig, merge, train
from trainer.data.dataset import CachedDataset
from trainer.data.sampler import sample_rows
from trainer.evaluation.recorded_method import method_of
from trainer.merging.fisher import SEED
from trainer.merging.methods import weighted_mean
from trainer.retention.fisher import draw_labels
from trainer.retention.fisher_file import save_fisher

ROWS = 6


@pytest.fixture(scope="module")
def models(tiny_llama_dir, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"initial": tiny_llama_dir} | {
        name: copy_model(tiny_llama_dir, folder / name, noise(seed, 0.1))
        for name, seed in (("a", 1), ("b", 2))
    }


@pytest.fixture(scope="module")
def texts(tiny_llama_dir, tmp_path_factory) -> list[Path]:
    """A text that each of both models knows."""
    folder = tmp_path_factory.mktemp("texts")
    return [write_cache(folder / f"t{seed}", tiny_llama_dir, num_rows=8, seed=seed) for seed in (3, 4)]


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def merged(models: dict, out: Path, fisher: list, names: str = "a b", **options) -> Path:
    progress = options.pop("progress", None)
    config = MergeConfig(
        tuned=[str(models[name]) for name in names.split()],
        initial=str(models["initial"]),
        out=str(out),
        method="fisher",
        fisher=[str(source) for source in fisher],
        **options,
    )
    return merge(config, progress).out


def kept(folder: Path, model_dir: Path, value) -> Path:
    """A directory as a run keeps it: F of a model's parameters, each made by value(name, tensor)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    fisher = {name: value(name, p.detach()).contiguous() for name, p in model.named_parameters()}
    save_fisher(folder, fisher, {"cache": "c", "weights": ModelFingerprint.of(model_dir).weights})
    return folder / "ewc-fisher"


def random_fisher(seed: int):
    """Positive numbers over many orders of magnitude, as F is."""
    generator = torch.Generator().manual_seed(seed)
    return lambda name, tensor: torch.exp(6 * torch.randn(tensor.shape, generator=generator) - 10)


# --- the average, one tensor --------------------------------------------------------------------------------


def test_entries_by_hand():
    """Weights 2 and 1. Entry 0: F 1 and 3, so (2*1*5 + 1*3*10) / 5 = 8. Entry 1: F 0 and 7: the second. Entry 2: no F:
    (2*5 + 10) / 3. Entry 3: F far below what float32 can multiply."""
    tiny = 1e-38
    a, b = torch.full((4,), 5.0), torch.full((4,), 10.0)
    fishers = [torch.tensor([1.0, 0.0, 0.0, tiny]), torch.tensor([3.0, 7.0, 0.0, 2 * tiny])]
    found = weighted_mean(a, [a, b], [2.0, 1.0], fishers)
    torch.testing.assert_close(found, torch.tensor([8.0, 10.0, 20 / 3, 7.5]).double(), rtol=1e-6, atol=0)


# --- whole models -------------------------------------------------------------------------------------------


def test_equal_fishers_give_the_uniform_average(models, tmp_path):
    """Also where F is zero, and for any number of models that share it."""
    sources = []
    for name in ("a", "b"):
        equal = random_fisher(9)
        sources.append(
            kept(
                tmp_path / name,
                models[name],
                lambda _, tensor, equal=equal: torch.where(equal(_, tensor) < 1e-6, 0.0, equal(_, tensor)),
            )
        )
    ones = [kept(tmp_path / f"1{n}", models[n], lambda name, t: torch.ones_like(t)) for n in ("a", "b")]
    uniform = MergeConfig(
        tuned=[str(models["a"]), str(models["b"])],
        initial=str(models["initial"]),
        out=str(tmp_path / "u"),
        method="soup",
    )
    wanted = merge(uniform).out
    assert same_weights(merged(models, tmp_path / "ones", ones), wanted)
    assert same_weights(merged(models, tmp_path / "equal", sources), wanted)


def test_a_model_without_fisher_leaves_the_other_as_it_is(models, tmp_path):
    """F_t = 0 gives theta_o, bit for bit, whatever F_o is."""
    some = kept(tmp_path / "some", models["a"], random_fisher(5))
    none = kept(tmp_path / "none", models["b"], lambda name, tensor: torch.zeros_like(tensor))
    assert same_weights(merged(models, tmp_path / "out", [some, none]), models["a"])
    assert same_weights(merged(models, tmp_path / "back", [none, some], "b a"), models["a"])


def test_every_tensor_equals_the_formula(models, tmp_path):
    """Eq. 15 of SFA's paper, which is Matena and Raffel's, with weights that are not 1."""
    values = {name: random_fisher(seed) for name, seed in (("a", 1), ("b", 2))}
    sources = [kept(tmp_path / name, models[name], value) for name, value in values.items()]
    out = merged(models, tmp_path / "out", sources, weights=[0.25, 3.0])
    fishers = [load_file(source / "fisher.safetensors") for source in sources]
    a, b, found = (stored(path) for path in (models["a"], models["b"], out))
    for name, tensor in found.items():
        f, g = 0.25 * fishers[0][name].double(), 3.0 * fishers[1][name].double()
        wanted = (f * a[name].double() + g * b[name].double()) / (f + g)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
    record = json.loads((out / "anneal.json").read_text())["merge"]
    assert record["weights"] == [0.25, 3] and record["fisher"] == [str(source) for source in sources]
    assert [entry["fisher"]["weights"] for entry in record["tuned"]] == [
        ModelFingerprint.of(models[name]).weights for name in ("a", "b")
    ]
    method = method_of(out)
    assert method is not None and method.name == "Fisher merging weights 0.25,3 fisher ewc-fisher,ewc-fisher"
    assert not list(out.glob(".*"))


def test_fisher_of_a_cache_equals_a_dense_loop(models, texts, tmp_path):
    """Rows and labels as they are drawn; F by autograd over full float64 logits; then the formula."""
    from transformers import AutoModelForCausalLM

    progress = RecordedProgress()
    out = merged(models, tmp_path / "out", texts, fisher_rows=ROWS, progress=progress)
    assert [line.split(":")[0] for line in progress.notes] == [
        "Fisher information of a",
        "Fisher information of b",
    ]
    fishers = []
    for name, text in zip(("a", "b"), texts, strict=True):
        # labels from the float32 model that the merge draws them with
        single = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
        dataset = CachedDataset(TeacherCache(text), loss="ce")
        rows = sample_rows(dataset, ROWS, SEED).tolist()
        drawn = []
        for row in rows:
            item = dataset[row]
            inputs = {"input_ids": torch.tensor(item["input_ids"]).long()[None]}
            labels = torch.tensor(item["labels"])[None]
            drawn.append(draw_labels(single, inputs, labels, None, [SEED, row])[0].numpy())
        wide = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float64)
        fishers.append(dense_fisher(wide, [dataset.cache[row] for row in rows], drawn))
    a, b, found = (stored(path) for path in (models["a"], models["b"], out))
    for name, tensor in found.items():
        f, g = (fisher[name].double() for fisher in fishers)
        mean = (a[name].double() + b[name].double()) / 2
        wanted = torch.where(f + g > 0, (f * a[name].double() + g * b[name].double()) / (f + g), mean)
        # F of single precision: a ratio of two of them is good to some 1e-3 where both are tiny
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-3, atol=1e-3)
        assert float((tensor.double() - wanted).abs().mean()) < 1e-6
    key = json.loads((out / "anneal.json").read_text())["merge"]["tuned"][0]["fisher"]
    assert key["cache"] == TeacherCache(texts[0]).identity.digest() and key["num_rows"] == ROWS


def test_tied_weights_and_the_initial_model_as_one_of_the_models(tiny_gemma2_dir, tmp_path):
    """Eq. 15 with theta_o the initial model; a head that is stored under both names keeps both equal."""
    text = write_cache(tmp_path / "text", tiny_gemma2_dir, num_rows=6)
    tuned = copy_model(tiny_gemma2_dir, tmp_path / "tuned", noise(3))
    content = stored(tuned)
    assert "lm_head.weight" not in content
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content, tuned / "model.safetensors", metadata={"format": "pt"})
    models = {"initial": tiny_gemma2_dir, "t": tuned}
    out = merged(models, tmp_path / "out", [text, text], "initial t", fisher_rows=4)
    found, initial = stored(out), stored(tiny_gemma2_dir)
    assert found.keys() == initial.keys()
    for name, tensor in found.items():
        low, high = torch.minimum(initial[name], content[name]), torch.maximum(initial[name], content[name])
        assert bool(((tensor >= low) & (tensor <= high)).all())  # a mean, entry by entry
    assert not torch.equal(found["model.embed_tokens.weight"], initial["model.embed_tokens.weight"])
    twice = {"initial": tuned, "t": tuned}
    head = stored(merged(twice, tmp_path / "twice", [text], "t", fisher_rows=2))
    assert torch.equal(head["lm_head.weight"], head["model.embed_tokens.weight"])


def test_what_a_run_keeps_is_taken_for_its_model(tiny_llama_dir, pruned_cache, models, texts, tmp_path):
    """`ewc.keep_fisher` leaves F at the weights from which the run started; for another model it is refused."""
    words = [f"ewc={{coef: 1, cache: {texts[0]}, num_rows: 4, keep_fisher: true}}", "kl_coef=0"]
    train(settings(pruned_cache, tiny_llama_dir, tmp_path / "run", *words))
    source = tmp_path / "run" / "ewc-fisher"
    run = {**models, "run": tmp_path / "run"}
    out = merged(run, tmp_path / "out", [source, texts[1]], "initial run", fisher_rows=4)
    assert not same_weights(out, tiny_llama_dir) and not same_weights(out, tmp_path / "run")
    with pytest.raises(AnnealError, match="--fisher must be of its model, got that of other weights"):
        merged(run, tmp_path / "no", [texts[1], source], "initial run")
    with pytest.raises(AnnealError, match="--fisher-rows is of texts, got 7 beside F that runs kept"):
        merged(run, tmp_path / "no", [source], "initial", fisher_rows=7)
    assert not (tmp_path / "no").exists()
    record = json.loads((merged(run, tmp_path / "kept", [source], "initial") / "anneal.json").read_text())
    assert "fisher_rows" not in record["merge"] and record["merge"]["tuned"][0]["fisher"]["num_rows"] == 4


def partial(folder: Path, model_dir: Path) -> Path:
    source = kept(folder, model_dir, lambda name, tensor: torch.ones_like(tensor))
    content = load_file(source / "fisher.safetensors")
    del content["model.norm.weight"]
    key = json.loads((source / "key.json").read_text())
    save_fisher(folder, content, key)
    return source


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("none", "fisher needs --fisher once per tuned model, got 0 for 2"),
        ("one", "fisher needs --fisher once per tuned model, got 1 for 2"),
        ("nowhere", "nowhere"),
        ("partial", "--fisher must hold every weight of its model, got none for model.norm.weight"),
        ("other", "tokenizer, got another vocabulary"),
        ("silent", "--fisher must have tokens that carry loss"),
        ("rows", "--fisher-rows must be at least 1"),
        ("soup", "soup has no --fisher"),
    ],
)
def test_bad_sources_are_refused_in_one_line(models, texts, tiny_llama_dir, tmp_path, case, message):
    import numpy as np
    from caches import identity_of

    from formats.disk.token_row import TokenRow

    sources, options = [str(text) for text in texts], {}
    if case == "none":
        sources = []
    elif case == "one":
        sources = sources[:1]
    elif case == "nowhere":
        sources[1] = str(tmp_path / "nowhere")
    elif case == "partial":
        sources[0] = str(partial(tmp_path / "k", models["a"]))
    elif case == "other":
        identity = identity_of(tiny_llama_dir)
        identity["tokenizer"] = dict(identity["tokenizer"]) | {"vocabulary": "0" * 64}
        sources[0] = str(write_cache(tmp_path / "other", tiny_llama_dir, num_rows=2, identity=identity))
    elif case == "silent":
        rows = [TokenRow(np.arange(6, 16), np.zeros(10, bool))]
        sources[0] = str(write_cache(tmp_path / "silent", tiny_llama_dir, rows=rows))
    elif case == "rows":
        options["fisher_rows"] = 0
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(AnnealError) as error:
        if case == "soup":
            MergeConfig(tuned=["a"], initial="i", out="o", method="soup", fisher=["x"])
        merged(models, tmp_path / "new" / "out", sources, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_is_what_the_file_system_says(tmp_path):
    """Not an error of safetensors that nobody knows: a command says it in a line, a sweep records it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_fisher(tmp_path, {"weight": torch.zeros(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
