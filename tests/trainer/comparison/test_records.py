"""Which models are one recipe at several seeds."""

import json
from pathlib import Path

import yaml

from trainer.comparison.records import groups_of


def run(folder: Path, name: str, seed: int | None = None, data_seed: int | None = None, **settings) -> Path:
    path = folder / name
    path.mkdir()
    training = {"learning_rate": 1e-4}
    training |= {} if seed is None else {"seed": seed}
    training |= {} if data_seed is None else {"data_seed": data_seed}
    plain = {"cache": "c", "model": "m", "out": str(path), "training": training, **settings}
    (path / "anneal.yaml").write_text(yaml.safe_dump(plain))
    (path / "anneal.json").write_text("{}")
    return path


def merge(folder: Path, name: str, tuned: str, alpha: float, initial: str = "w0") -> Path:
    path = folder / name
    path.mkdir()
    record = {"merge": {"method": "wise-ft", "alpha": alpha, "tuned": [{"name": tuned, "weights": tuned}]}}
    record |= {"identity": {"teacher": {"weights": initial}}}
    (path / "anneal.json").write_text(json.dumps(record))
    return path


def test_runs_and_merges_of_them(tmp_path):
    (tmp_path / "bare").mkdir()
    found = {
        "base": tmp_path / "bare",
        "kl-1-s0": run(tmp_path, "a", 0),
        "kl-1-s1": run(tmp_path, "b", 1, 7),
        "kl-4-s0": run(tmp_path, "c", 0, kl_coef=4),
        "wise-0": merge(tmp_path, "d", "kl-1-s0", 0.5),
        "wise-1": merge(tmp_path, "e", "kl-1-s1", 0.5),
        "wise-half": merge(tmp_path, "f", "kl-1-s0", 0.25),
        "stranger": merge(tmp_path, "g", "unknown", 0.5),
        "nothing": tmp_path / "bare",
    }
    weights = {label: label for label in found}
    assert groups_of(found, weights, alone="base") == {
        "base": ["base"],
        "kl-1": ["kl-1-s0", "kl-1-s1"],
        "kl-4-s0": ["kl-4-s0"],
        "wise": ["wise-0", "wise-1"],
        "wise-half": ["wise-half"],
        "stranger": ["stranger"],
        "nothing": ["nothing"],
    }


def test_names_of_a_sweep_lose_their_seed(tmp_path):
    runs = [f"kl_coef=1{seed}" for seed in ("", ",seed=3", ",seed=4")]
    found = {label: run(tmp_path, label, seed) for seed, label in enumerate(runs)}
    found |= {f"{label}+wise-ft,alpha=0.5": merge(tmp_path, f"of {label}", label, 0.5) for label in runs[1:]}
    assert {
        name: len(labels) for name, labels in groups_of(found, {label: label for label in found}).items()
    } == {
        "kl_coef=1": 3,
        "kl_coef=1+wise-ft,alpha=0.5": 2,
    }


def test_orders_of_rows_of_a_sweep_are_one_line_under_the_name_that_they_share(tmp_path):
    labels = [f"direct,data_seed={seed}" for seed in (10, 11)]
    labels += [f"kl_coef=1,data_seed={seed}" for seed in (10, 11)]
    found = {
        label: run(tmp_path, label, 0, int(label[-2:]), kl_coef=float("kl" in label)) for label in labels
    }
    assert groups_of(found, {label: label for label in found}) == {
        "direct": labels[:2],
        "kl_coef=1": labels[2:],
    }


def test_the_same_weights_twice_are_not_two_seeds(tmp_path):
    found = {"a": run(tmp_path, "a", 0), "b": run(tmp_path, "b", 1)}
    assert groups_of(found, {"a": "w", "b": "w"}) == {"a": ["a"], "b": ["b"]}
    assert groups_of(found, {"a": "v", "b": "w"}) == {
        "a": ["a", "b"]
    }  # nothing in common: the first one's label


def test_other_texts_weights_or_the_same_seed_are_not_a_second_seed(tmp_path):
    cache, weights, ewc = "the training cache", "weights of the model", "the cache of ewc"
    facts = [
        {"run": {cache: "c1", weights: "w0"}},
        {"run": {cache: "c2", weights: "w0"}},
        {"run": {cache: "c1", weights: "w1"}},
        {"run": {cache: "c1", weights: None}, "identity": {"teacher": {"weights": "w2"}}},
        {"run": {cache: "c1", weights: "w0"}, "ewc": {ewc: "c3"}},
    ]
    found = {}
    for number, fact in enumerate(facts):
        found[f"r{number}"] = run(tmp_path, f"r{number}", number)
        (found[f"r{number}"] / "anneal.json").write_text(json.dumps(fact))
    found["again"] = run(tmp_path, "again", 0)
    (found["again"] / "anneal.json").write_text(json.dumps(facts[0]))
    found["seed"] = run(tmp_path, "seed", 7)
    (found["seed"] / "anneal.json").write_text(json.dumps(facts[0]))
    found["m-r0"] = merge(tmp_path, "m-r0", "r0", 0.5)
    found["m-seed"] = merge(tmp_path, "m-seed", "seed", 0.5)
    found["m-other"] = merge(tmp_path, "m-other", "r0", 0.5, initial="w1")
    groups = groups_of(found, {label: label for label in found})
    assert sorted(map(tuple, groups.values())) == [
        ("again",), ("m-other",), ("m-r0", "m-seed"), ("r0", "seed"), ("r1",), ("r2",), ("r3",), ("r4",),
    ]  # fmt: skip


def test_a_name_that_is_taken_is_not_given_twice(tmp_path):
    found = {
        "kl": run(tmp_path, "x", kl_coef=3),
        "kl-s0": run(tmp_path, "y", 0),
        "kl-s1": run(tmp_path, "z", 1),
    }
    assert groups_of(found, {label: label for label in found}) == {
        "kl": ["kl"],
        "kl-s0 kl-s1": ["kl-s0", "kl-s1"],
    }
