"""The benchmark of the other objectives: its definitions are theirs, and its figures say bias and noise apart."""

from pathlib import Path

import pytest
import torch
from fidelity_objectives import CASES, measure

from formats.capture_settings import CaptureSettings

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def texts(teacher):
    """What the model says itself, so that some labels are probable enough for stm; the first is trained on."""
    torch.manual_seed(2)
    ids_BL = torch.randint(0, VOCAB_SIZE, (2, 4))
    mask = torch.ones_like(ids_BL)
    found = (
        teacher.generate(ids_BL, attention_mask=mask, max_length=24, do_sample=True, top_k=0, pad_token_id=0)
        for _ in range(4)
    )
    return [text.clone() for text in found]


def measured(teacher, texts, folder: Path, settings: CaptureSettings, stops: list[int]):
    return measure(
        teacher,
        texts[:1],
        texts[1:],
        stops=stops,
        temperatures=[1.0],
        learning_rate=3e-3,
        settings=settings,
        folder=folder,
    )


def test_from_a_cache_that_keeps_everything_each_objective_is_its_definition(teacher, texts, tmp_path):
    results = measured(
        teacher, texts, tmp_path, CaptureSettings(min_prob=1e-9, max_k=VOCAB_SIZE, draw_rate=0), [4]
    )
    assert {name for name, _, _ in results} == set(CASES)
    for (name, _, _), result in results.items():
        # What the codec rounds off; the reverse direction lives where q is large and p is least exact.
        angle, norm = (10.0, 0.05) if name == "kl_direction: reverse" else (0.5, 0.01)
        assert result.step.angle < angle, name
        assert result.step.norm_ratio == pytest.approx(1.0, abs=norm), name


def test_draws_make_noise_of_what_a_bucket_alone_gets_wrong(teacher, texts, tmp_path):
    lossy = {"min_prob": 2e-2, "max_k": VOCAB_SIZE}
    drawn = measured(teacher, texts, tmp_path / "drawn", CaptureSettings(**lossy, draw_rate=16), [0, 4])
    bucket = measured(teacher, texts, tmp_path / "bucket", CaptureSettings(**lossy, draw_rate=0), [4])
    for name in ("kl_target: full", "kl_target: masked", "kl_target: masked-weighted", "kl_gate: unsure"):
        assert drawn[name, 0, 1.0].step.relative_to_ce < 0.01
        assert drawn[name, 4, 1.0].step.angle < bucket[name, 4, 1.0].step.angle
        assert bucket[name, 4, 1.0].step.norm_ratio < 0.97
    # The reverse direction leaves the shape of the tail to the student: draws change nothing.
    name = "kl_direction: reverse"
    assert drawn[name, 4, 1.0].step.angle == pytest.approx(bucket[name, 4, 1.0].step.angle, rel=1e-3)
    assert drawn["ce_weight: stm", 4, 1.0].step.angle < 0.1  # p0 of a kept label decides
