"""What cannot work is said before the first run: `plan_sweep`, which is all that --dry-run does."""

import shutil

import pytest
from caches import write_cache
from runs import copy_model, noise

from formats.errors import AnnealError
from trainer.sweep.sweep import plan_sweep


@pytest.fixture(scope="module")
def other(tiny_llama_dir, tmp_path_factory):
    """A text of another initial model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    model = copy_model(tiny_llama_dir, folder / "model", noise(1))
    shutil.copy(tiny_llama_dir / "chat_template.jinja", model)
    return str(write_cache(folder / "text", model, num_rows=3))


@pytest.mark.parametrize("side", ["source", "target"])
def test_texts_of_another_initial_model(ask, other, tmp_path, side):
    with pytest.raises(AnnealError, match=rf"^{side}.new must be of the initial model: {other}: "):
        plan_sweep(ask(tmp_path / "out", **{side: {"new": other}}))


def test_a_soup_may_go_by_text_of_another_model(ask, other, tmp_path):
    plan_sweep(ask(tmp_path / "out", also=["l2.coef=0.1"], merge=[f"soup:by={other}"], merge_of=["all"]))


@pytest.mark.parametrize(
    "asked", [{"grid": ["kl_coef=1", "kl_on=prompt"]}, {"every": ["kl_on=prompt"], "search": True}]
)
def test_a_cache_without_the_positions_that_the_kl_is_on(ask, tiny_llama_dir, tmp_path, asked):
    answers = write_cache(tmp_path / "answers", tiny_llama_dir, num_rows=3, positions="loss")
    with pytest.raises(
        AnnealError, match=r"^run kl_coef=1,kl_on=prompt: kl_on: prompt needs a cache of all pos"
    ):
        plan_sweep(ask(tmp_path / "out", place=answers, **asked))


def test_the_cache_that_a_search_would_hold_to(ask, other, tmp_path):
    plan_sweep(ask(tmp_path / "out", place=other))  # direct fine-tuning reads its tokens alone
    with pytest.raises(AnnealError, match=r"^run kl_coef=1: "):
        plan_sweep(ask(tmp_path / "out", place=other, search=True))
