"""Which positions carry the KL and what they weigh: from the cache to the counts of a step."""

import numpy as np
import pytest
import torch
from caches import model_logprobs, random_rows, write_cache
from runs import settings

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer.data.collator import LabelAnnealingCollator, count_targets, split_batch
from trainer.data.dataset import CachedDataset, Filler, UnitDataset
from trainer.inputs import open_inputs, rows_of
from trainer.notes import draws_note
from trainer.objective import Objective
from trainer.recipe import resolve_training


@pytest.fixture(scope="module")
def everywhere(tiny_llama_dir, tmp_path_factory):
    """A pruned cache of all positions; the masks of its rows are uneven."""
    path = tmp_path_factory.mktemp("kl") / "all"
    return write_cache(path, tiny_llama_dir, num_rows=12, positions="all", min_prob=1e-3)


def exact(cache, model_dir, index) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return model_logprobs(model, cache[index].input_ids)


@pytest.mark.parametrize("kl_on", ("captured", "target", "prompt", "all"))
@pytest.mark.parametrize("packing", (False, True))
def test_the_positions_and_their_targets_are_those_of_the_mask(everywhere, kl_on, packing):
    cache = TeacherCache(everywhere)
    dataset = CachedDataset(everywhere, temperature=2.0, objective=Objective(kl_on=kl_on))
    plain = CachedDataset(everywhere, temperature=2.0)
    for index in range(len(cache)):
        mask = cache[index].loss_mask[1:]
        wanted = {"target": mask, "prompt": ~mask}.get(kl_on, np.ones_like(mask))
        item, whole = dataset[index], plain[index]
        assert np.array_equal(item["teacher_positions"], np.flatnonzero(wanted))
        assert np.array_equal(item["labels"], whole["labels"])  # cross-entropy is not touched
        assert np.array_equal(item["teacher_log_tail"], whole["teacher_log_tail"][wanted])
        for counts, columns in (
            ("teacher_counts", ("teacher_token_ids", "teacher_logprobs")),
            ("teacher_draw_counts", ("teacher_draw_ids", "teacher_draw_logprobs", "teacher_draw_weights")),
        ):
            kept = np.repeat(wanted, whole[counts])
            assert np.array_equal(item[counts], whole[counts][wanted])
            assert all(np.array_equal(item[name], whole[name][kept]) for name in columns)
    items = [dataset[index] for index in (1, 2, 3)]
    batch = LabelAnnealingCollator(packing=packing)([items] if packing else items)
    masks = [cache[index].loss_mask[1:] for index in (1, 2, 3)]
    num_target, num_prompt = sum(int(mask.sum()) for mask in masks), sum(int((~mask).sum()) for mask in masks)
    expected = {"target": num_target, "prompt": num_prompt}.get(kl_on, num_target + num_prompt)
    assert count_targets(batch) == (num_target, expected)
    _, labels_N, teacher = split_batch(batch)
    teacher.validate(num_rows=len(labels_N), vocab_size=cache.manifest.vocab_size)
    if kl_on in ("target", "prompt"):
        assert ((labels_N[teacher.rows] != -100) == (kl_on == "target")).all()


def test_gates_are_what_the_whole_distribution_says(everywhere, tiny_llama_dir):
    cache = TeacherCache(everywhere)
    unsure = CachedDataset(everywhere, objective=Objective(kl_gate="unsure"))
    for index in (0, 5, 10):
        logprobs = exact(cache, tiny_llama_dir, index)[:-1]
        expected = 1 - np.exp(logprobs[np.arange(len(logprobs)), cache[index].input_ids[1:]])
        np.testing.assert_allclose(unsure[index]["teacher_weights"], expected, atol=1e-6)
        dense = -(np.exp(logprobs) * logprobs).sum(axis=1)
        ranked = np.sort(dense)[len(dense) // 4 : -len(dense) // 4]
        widest = int(np.diff(ranked).argmax())
        limit = float(ranked[widest : widest + 2].mean())
        assert np.abs(dense - limit).min() > 0.02  # the estimate's error on such rows
        gated = CachedDataset(everywhere, objective=Objective(kl_gate=f"entropy:{limit}"))
        assert np.array_equal(gated[index]["teacher_weights"], (dense < limit).astype(np.float32))


def test_gates_and_positions_meet(everywhere):
    both = CachedDataset(everywhere, objective=Objective(kl_on="prompt", kl_gate="unsure"))[1]
    gate = CachedDataset(everywhere, objective=Objective(kl_gate="unsure"))[1]
    prompt = ~TeacherCache(everywhere)[1].loss_mask[1:]
    assert np.array_equal(both["teacher_weights"], gate["teacher_weights"][prompt])


def test_text_that_is_only_retained_is_retained_everywhere(everywhere):
    objective = Objective(kl_on="prompt", kl_gate="unsure")
    learnt, kept = (CachedDataset(everywhere, loss=loss, objective=objective) for loss in ("both", "kl"))
    assert (
        "teacher_weights" not in kept[1] and len(kept[1]["teacher_positions"]) == len(kept[1]["labels"]) - 1
    )
    batch = LabelAnnealingCollator()([kept[1], learnt[1]])
    _, _, teacher = split_batch(batch)
    own = len(kept[1]["teacher_positions"])
    assert (teacher.weights[:own] == 1).all()
    assert torch.equal(teacher.weights[own:], torch.from_numpy(learnt[1]["teacher_weights"]))
    (filler,) = UnitDataset([learnt])[Filler((1,))]
    _, _, teacher = split_batch(LabelAnnealingCollator()([filler, learnt[1]]))
    assert len(teacher.weights) == len(learnt[1]["teacher_positions"])


def test_a_cache_without_what_a_choice_needs_is_refused(llama_cache, tiny_llama_dir, tmp_path):
    for kl_on in ("prompt", "all"):
        with pytest.raises(
            ConfigError, match=f"kl_on: {kl_on} needs .*`anneal cache build --positions all`$"
        ) as error:
            CachedDataset(llama_cache, objective=Objective(kl_on=kl_on))
        assert "\n" not in str(error.value)
    CachedDataset(llama_cache, objective=Objective(kl_on="target"))
    CachedDataset(
        llama_cache, loss="kl", objective=Objective(kl_on="prompt")
    )  # retained where it was captured
    full = [row for row in random_rows(12, 256) if row.loss_mask[1:].all()]
    cache = write_cache(tmp_path / "full", tiny_llama_dir, rows=full, positions="all")
    with pytest.raises(ConfigError, match="needs positions whose token carries none, got none in"):
        CachedDataset(cache, objective=Objective(kl_on="prompt"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kl_on=answer", "kl_on must be one of captured, target, prompt, all, got 'answer'"),
        ("kl_gate=entropy", "kl_gate entropy needs nats, got none; write entropy:NATS"),
        ("kl_gate=entropy:x", "kl_gate entropy must be a number, got 'x'"),
        ("kl_gate=entropy:0", "kl_gate entropy must be above 0, got 0"),
        ("kl_gate=unsure:1", "kl_gate unsure takes no number, got 'unsure:1'; write unsure"),
        ("kl_gate=3", "kl_gate must be one of none, unsure, entropy:NATS, got 3"),
    ],
)
def test_bad_choices_are_refused_in_one_line(override, message):
    with pytest.raises(ConfigError) as error:
        settings("c", "m", "o", override)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_choices_without_a_kl_term_are_refused():
    for override in ("kl_on=target", "kl_gate=unsure"):
        config = settings("c", "m", "o", "kl_coef=0", override)
        with pytest.raises(ConfigError, match="would have no effect: it needs a KL term, got kl_coef: 0"):
            resolve_training(config)


def test_learnt_text_without_kl(everywhere, tiny_llama_dir, tmp_path):
    """With `loss: ce` the target's payloads are not read; caches that are retained only keep all their KL."""
    overrides = (f"caches=[{{path: {everywhere}, loss: kl}}, {{path: {everywhere}, loss: ce}}]", "loss=ce")
    config = settings(everywhere, tiny_llama_dir, tmp_path / "out", *overrides)
    rows = rows_of(config, open_inputs(config))
    retained, learnt = (dataset for dataset, _ in rows.mixed)
    for dataset in (rows.training, learnt):
        assert "teacher_positions" not in dataset[1] or len(dataset[1]["teacher_positions"]) == 0
        assert (dataset[1]["labels"] != -100).any()
    assert not rows.training.has_draws and rows.first_check is not None
    assert len(retained[1]["teacher_positions"]) == len(retained[1]["labels"]) - 1
    assert (retained[1]["labels"] == -100).all()


@pytest.mark.parametrize("choice", ({"kl_on": "prompt"}, {"kl_on": "target", "kl_gate": "unsure"}))
def test_the_note_on_small_steps_counts_what_carries_the_kl(everywhere, tiny_llama_dir, tmp_path, choice):
    overrides = [f"{name}={value}" for name, value in choice.items()]
    config = settings(everywhere, tiny_llama_dir, tmp_path / "out", *overrides)
    rows = rows_of(config, open_inputs(config))
    items = [rows.training[index] for index in range(len(rows.training))]
    counts = [item.get("teacher_weights", np.ones(len(item["teacher_positions"]))).sum() for item in items]
    assert draws_note(config, rows, 1).startswith(
        f"about {np.mean(counts):.0f} tokens with KL in a step: below 150"
    )
    assert np.mean(counts) < 0.8 * np.mean([len(item["labels"]) - 1 for item in items])
    assert draws_note(config, rows, int(150 / np.mean(counts)) + 1) is None
