"""What the cache says of the tokens that carry loss: weights, and labels taken out of tails."""

import math

import numpy as np
import pytest
import torch
from caches import model_logprobs, write_cache
from runs import settings

from formats.cache import TeacherCache
from formats.disk.token_row import IGNORED
from formats.errors import ConfigError
from trainer.data.collator import LabelAnnealingCollator, count_targets, shifted_terms, split_batch
from trainer.data.dataset import CachedDataset
from trainer.data.label_terms import resolved
from trainer.inputs import open_inputs, rows_of
from trainer.notes import stm_note
from trainer.objective import Objective
from trainer.recipe import resolve_training

ROWS = (0, 1, 2, 3, 10)


@pytest.fixture(scope="module")
def everywhere(tiny_llama_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("terms") / "all"
    return write_cache(path, tiny_llama_dir, num_rows=12, positions="all", min_prob=5e-3)


@pytest.fixture(scope="module")
def exact(everywhere, tiny_llama_dir) -> dict[int, np.ndarray]:
    """Row -> float64 [L - 1, V]: the whole distributions."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    cache = TeacherCache(everywhere)
    return {row: model_logprobs(model, cache[row].input_ids)[:-1] for row in range(len(cache))}


def label_logprobs(cache, exact, row) -> np.ndarray:
    return exact[row][np.arange(len(exact[row])), cache[row].input_ids[1:]]


@pytest.mark.parametrize("loss", ("both", "ce"))
def test_weights_and_labels_are_what_the_whole_distributions_say(everywhere, exact, loss):
    cache = TeacherCache(everywhere)
    all_logprobs = np.concatenate([label_logprobs(cache, exact, row) for row in ROWS])
    ranked = np.sort(all_logprobs)
    limit = math.exp(ranked[len(ranked) // 2 : len(ranked) // 2 + 2].mean())

    def items(name):
        return CachedDataset(everywhere, loss=loss, objective=Objective(ce_weight=name))

    stm, flow, psft, eaft0 = (items(name) for name in (f"stm:{limit:.12g}", "flow:3.5", "psft", "eaft0:2"))
    for row in ROWS:
        mask, logprobs = cache[row].loss_mask[1:], label_logprobs(cache, exact, row)
        kept = stm[row]["labels"][1:] != IGNORED
        assert np.array_equal(kept, mask & (logprobs >= math.log(limit)))
        np.testing.assert_allclose(psft[row]["label_logprobs"][1:], logprobs, atol=1e-5)
        weight = math.exp(logprobs[mask].mean() / 3.5)
        np.testing.assert_allclose(flow[row]["label_weights"], weight, rtol=1e-5)
        kept_mass = [np.sort(line[line >= math.log(5e-3)])[::-1][:20] for line in exact[row]]
        shares = [np.exp(line) / np.exp(line).sum() for line in kept_mass]
        entropies = np.array([-(share * np.log(share)).sum() / math.log(20) for share in shares])
        np.testing.assert_allclose(eaft0[row]["label_weights"][1:], entropies**2, atol=1e-5)
        assert all(np.array_equal(data[row]["labels"], flow[row]["labels"]) for data in (psft, eaft0))
        assert len(stm[row]["teacher_positions"]) == (0 if loss == "ce" else len(mask))


@pytest.mark.parametrize("packing", (False, True))
def test_columns_land_on_the_labels_and_are_counted(everywhere, packing):
    cache = TeacherCache(everywhere)
    learnt = CachedDataset(everywhere, objective=Objective(ce_weight="psft"))
    kept = CachedDataset(everywhere, loss="kl", objective=Objective(ce_weight="psft"))
    items = [learnt[1], kept[2], learnt[3]]
    batch = LabelAnnealingCollator(packing=packing)([items] if packing else items)
    _, labels_N, _ = split_batch(batch)
    terms = shifted_terms(batch)
    expected = [
        logprob
        for row in (1, 3)
        for logprob, carries in zip(cache[row].teacher.label_logprobs, cache[row].loss_mask[1:], strict=True)
        if carries
    ]
    assert terms.keys() == {"label_logprobs"}
    assert terms["label_logprobs"][labels_N != IGNORED].tolist() == expected
    limit = math.exp(np.median(expected) + 1e-3)
    stm = CachedDataset(everywhere, objective=Objective(ce_weight=f"stm:{limit:.12g}"))
    batch = LabelAnnealingCollator()([stm[1], stm[3]])
    assert count_targets(batch)[0] == sum(logprob >= math.log(limit) for logprob in expected) > 0
    only_kl = LabelAnnealingCollator()([kept[1], kept[2]])
    assert "label_logprobs" in shifted_terms(only_kl)  # a batch without labels is no other batch


def test_the_share_that_stm_leaves_is_told_before_the_run(everywhere, exact, tiny_llama_dir, tmp_path):
    cache = TeacherCache(everywhere)
    known = np.concatenate([label_logprobs(cache, exact, row)[cache[row].loss_mask[1:]] for row in exact])
    ranked = np.sort(known)
    for quantile, advice in ((0.9, True), (0.2, False)):
        at = int(quantile * len(ranked))
        limit = math.exp(ranked[at : at + 2].mean())
        config = settings(everywhere, tiny_llama_dir, tmp_path / "out", f"ce_weight=stm:{limit:.9g}")
        line = stm_note(rows_of(config, open_inputs(config)))
        assert line is not None
        assert f"stm: {100 * np.mean(known >= math.log(limit)):.1f} % of the tokens" in line
        assert line.endswith("lower the number") == advice
    config = settings(everywhere, tiny_llama_dir, tmp_path / "out", "ce_weight=dft")
    assert stm_note(rows_of(config, open_inputs(config))) is None


def test_tau_is_the_median_over_rows(everywhere, tiny_llama_dir, tmp_path):
    cache = TeacherCache(everywhere)
    losses = [-np.mean(row.teacher.label_logprobs[row.loss_mask[1:]], dtype=np.float64) for row in cache]
    for name in ("flow", "talr"):
        assert resolved(Objective(ce_weight=name), cache).weighting.value == pytest.approx(
            np.median(losses), rel=1e-5
        )
        given = Objective(ce_weight=f"{name}:2")
        assert resolved(given, cache) is given
        config = settings(everywhere, tiny_llama_dir, tmp_path / name, f"ce_weight={name}")
        rows = rows_of(config, open_inputs(config))
        assert rows.objective.weighting.value == pytest.approx(np.median(losses), rel=1e-5)
        assert rows.training.objective == rows.objective
    with pytest.raises(ConfigError, match="flow needs its tau, got none; write flow:NATS"):
        CachedDataset(everywhere, objective=Objective(ce_weight="flow"))


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0))
def test_labels_are_taken_out_of_tails(everywhere, exact, temperature):
    """Every label that carries loss is a kept token, the tail is that of all others, and no draw is a label."""
    cache = TeacherCache(everywhere)
    masked = CachedDataset(everywhere, temperature=temperature, objective=Objective(kl_target="masked"))
    plain, moved = CachedDataset(everywhere, temperature=temperature), 0
    for row in ROWS:
        item, before, ids, mask = masked[row], plain[row], cache[row].input_ids, cache[row].loss_mask[1:]
        offsets = np.concatenate([[0], np.cumsum(item["teacher_counts"])])
        draws = np.concatenate([[0], np.cumsum(item["teacher_draw_counts"])])
        moved += int((item["teacher_counts"] - before["teacher_counts"]).sum())
        for p in range(len(mask)):
            span, drawn = slice(*offsets[p : p + 2]), slice(*draws[p : p + 2])
            flagged = item["teacher_masked"][span]
            assert flagged.sum() == mask[p]
            tokens = item["teacher_token_ids"][span]
            if mask[p]:
                assert tokens[flagged] == ids[p + 1]
                assert not (item["teacher_draw_ids"][drawn] == ids[p + 1]).any()
            rest = np.delete(exact[row][p], tokens) / temperature
            dense = np.log(np.exp(rest).sum())
            assert item["teacher_log_tail"][p] == pytest.approx(dense, abs=2e-4)
            np.testing.assert_allclose(item["teacher_logprobs"][span], exact[row][p][tokens], atol=2e-5)
    assert moved > 20  # labels of random text are rarely among the kept tokens
    _, labels_N, teacher = split_batch(LabelAnnealingCollator()([masked[1], plain[2]]))
    teacher.validate(num_rows=len(labels_N), vocab_size=cache.manifest.vocab_size)
    flagged = torch.repeat_interleave(teacher.rows, teacher.counts)[teacher.masked]
    assert torch.equal(flagged, (labels_N[: len(masked[1]["labels"])] != IGNORED).nonzero().squeeze(1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ce_weight=sft", "ce_weight must be one of none, stm:P0, flow:NATS"),
        ("ce_weight=stm:1.5", "ce_weight stm takes a probability, got 1.5"),
        ("ce_weight=dft:-1", "ce_weight dft must be above 0, got -1"),
        ("ce_weight=none:1", "ce_weight none takes no number"),
        ("kl_target=label", "kl_target must be one of full, masked, masked-weighted, got 'label'"),
        ("label_smoothing=1", "label_smoothing must be below 1, got 1"),
        ("label_smoothing=-0.1", "label_smoothing must be at least 0, got -0.1"),
        ("kl_budget=0", "kl_budget must be above 0 nats, got 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(override, message):
    with pytest.raises(ConfigError) as error:
        settings("c", "m", "o", override)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["kl_coef=0", "caches=[{path: c, loss: kl}]"],
            "caches.0.loss: kl would have no effect: it needs a KL term",
        ),
        (["kl_coef=0", "kl_target=masked"], "kl_target would have no effect: it needs a KL term"),
        (["kl_coef=0", "kl_budget=0.1"], "kl_budget would have no effect: it needs a KL term"),
        (["kl_budget=0.1", "temperature=2"], "at temperature 1, so it needs temperature: 1.0, got 2"),
        (["kl_budget=0.1", "kl_direction=reverse"], "needs kl_direction: forward, got reverse"),
        (["kl_budget=0.1", "kl_gate=unsure"], "needs kl_gate: none, got unsure"),
        (["kl_budget=0.1", "kl_target=masked"], "needs kl_target: full, got masked"),
        (["kl_budget=0.1", "caches=[{path: c, loss: kl}]"], "got a cache with loss: kl: c"),
        (
            ["loss_kernel=triton", "ce_weight=eaft"],
            "ce_weight: eaft is not available with loss_kernel: triton",
        ),
        (["loss_kernel=triton", "label_smoothing=0.1"], "label_smoothing is not available with loss_kernel"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        resolve_training(settings("c", "m", "o", *overrides))
    assert message in str(error.value) and "\n" not in str(error.value)
