"""`cache build --generate` as it is typed, with the model of the examples: written, captured, looked at, retained."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from typed_here import Run

from cache_builder import BuildConfig, GenerationConfig
from cache_builder.source import open_source
from cache_builder.teachers.protocol import TeacherConfig
from cache_builder.teachers.transformers_sampler import TransformersSampler
from formats.cache import TeacherCache

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES / "tiny-base"
NUM_ROWS, MAX_LENGTH = 6, 24
BUILD = ("cache", "build", "--model", MODEL, "--engine", "transformers", "--max-length", MAX_LENGTH)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generate")


def test_the_cache_holds_the_rows_that_the_model_wrote(anneal: Run, place: Path) -> None:
    words = (*BUILD, "--generate", NUM_ROWS, "--seed", 3, "--out", place / "self")
    code, out, err = anneal(*words, "--dry-run")
    assert code == 0 and not (place / "self").exists()
    assert f"tokens     at most {NUM_ROWS * MAX_LENGTH}" in out
    assert "a user's turn that the model writes too, of up to 7 tokens" in out
    code, out, err = anneal(*words)
    assert code == 0, err
    assert "6 rows that the model writes itself, temperature 1, seed 3" in err
    assert "rows end with <|endoftext|> or <|im_end|>, or 24 tokens" in err
    assert "rows end by themselves" in out
    config = BuildConfig(
        model=str(MODEL),
        out="unused",
        engine="transformers",
        max_length=MAX_LENGTH,
        generate=GenerationConfig(num_rows=NUM_ROWS, seed=3),
    )
    recipe = open_source(config).recipe
    assert recipe is not None
    sampler = TransformersSampler(TeacherConfig(model=str(MODEL), max_length=MAX_LENGTH))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    turns = dict(sampler.sample([recipe.turn_request(number) for number in range(NUM_ROWS)]))
    asked = [tokenizer.decode(turns[number], skip_special_tokens=True).strip() for number in range(NUM_ROWS)]
    assert len(set(asked)) > 1
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        for text in asked
    ]
    requests = [recipe.request(number, np.array(prompt, np.int32)) for number, prompt in enumerate(prompts)]
    written = dict(sampler.sample(requests))
    cache = TeacherCache(place / "self")
    for number, row in enumerate(cache.rows()):
        start = len(row.input_ids) - len(written[number])
        assert row.input_ids[:start].tolist() == prompts[number]
        assert row.input_ids[start:].tolist() == written[number].tolist()
        assert np.flatnonzero(row.loss_mask).tolist() == list(range(start, len(row.input_ids)))
        assert np.array_equal(row.positions, np.arange(len(row.input_ids) - 1))  # prompts too
    corpus = cache.identity.corpus
    assert (corpus["generate"], corpus["generate_temperature"], corpus["seed"]) == (NUM_ROWS, 1.0, 3)
    assert (
        corpus["generate_from"] == "dialogue"
        and corpus["stop_tokens"] == [0, 2]
        and corpus["counts"]["num_rows"] == NUM_ROWS
    )
    _, shown, _ = anneal("cache", "inspect", place / "self")
    assert "rows that the model wrote itself: 6 (temperature 1, seed 3)" in shown
    code, out, _ = anneal(*words)
    assert code == 0 and "nothing to do" in out
    code, _, err = anneal(*words, "--generate-from", "empty-turn")
    assert code == 1 and "--generate-from: dialogue there, none now" in err
    code, out, _ = anneal(*words[:-1], place / "other", "--generate-from", "empty-turn", "--dry-run")
    assert code == 0 and "prompts: the chat template's empty user turn; loss on every new token" in out
    code, _, err = anneal(*words[:-1], place / "other", "--generate-from", "turn")
    assert code == 1 and "generate_from must be one of dialogue, empty-turn, bos, got 'turn'" in err


def test_prompts_come_in_turn_and_positions_may_be_all(anneal: Run, place: Path) -> None:
    (place / "prompts.txt").write_text("What is a list?\n\nWhat is a tuple?\n")
    out = place / "asked"
    words = ("--generate", 3, "--prompts", place / "prompts.txt", "--positions", "all", "--out", out)
    code, _, err = anneal(*BUILD, *words, "--generate-temperature", 0.7)
    assert code == 0, err
    assert f"2 of {place / 'prompts.txt'} (lines), in turn" in err and "1 prompt skipped: empty" in err
    first, second, third = TeacherCache(out).rows()
    start = int(first.loss_mask.argmax())
    assert np.array_equal(first.input_ids[:start], third.input_ids[:start])
    assert not np.array_equal(first.input_ids[:start], second.input_ids[:start])
    assert not np.array_equal(first.input_ids, third.input_ids)
    assert len(first.positions) == len(first.input_ids) - 1
    code, _, err = anneal(*BUILD, *words)
    assert code == 1 and "--generate-temperature: 0.7 there, 1.0 now" in err


def test_a_merged_cache_says_which_rows_the_model_wrote(anneal: Run, place: Path) -> None:
    for seed in (5, 6):
        words = (*BUILD, "--generate", 2 + seed, "--seed", seed, "--positions", "all", "--out")
        assert anneal(*words, place / f"own-{seed}")[0] == 0
    (place / "lines.jsonl").write_text('{"text": "def f():"}\n{"text": "a = 1"}\n')
    assert anneal(*BUILD, "--positions", "all", place / "lines.jsonl", "--out", place / "lines")[0] == 0
    code, _, err = anneal("cache", "merge", place / "own-5", place / "own-6", "--out", place / "both")
    assert code == 0, err
    code, _, err = anneal("cache", "merge", place / "both", place / "lines", "--out", place / "three")
    assert code == 0, err
    for name in ("both", "three"):
        shown = anneal("cache", "inspect", place / name)[1]
        for seed in (5, 6):
            assert f"rows that the model wrote itself: {2 + seed} (temperature 1, seed {seed})" in shown
        assert ("records of the corpus: 2" in shown) == (name == "three")
        assert shown.count("rows end by themselves") == 2


def test_training_retains_it(anneal: Run, place: Path) -> None:
    """Cross-entropy on the target, KL on what the model wrote: the whole method in three commands."""
    target = place / "target"
    code, _, err = anneal(
        "cache", "build", EXAMPLES / "own-data.jsonl", "--model", MODEL, "--engine", "transformers",
        "--max-length", 64, "--limit", 4, "--out", target,
    )  # fmt: skip
    assert code == 0, err
    config = place / "run.yaml"
    config.write_text(
        f"loss: ce\nkl_coef: 2\ncaches: [{{path: {place / 'self'}, loss: kl, weight: 0.5}}]\nstep0_rows: 2\n"
        "verify_saved: false\n"
        "training: {max_steps: 2, per_device_train_batch_size: 3, gradient_accumulation_steps: 2, logging_steps: 1}\n"
    )
    code, _, err = anneal("train", target, "--model", MODEL, "--out", place / "model", "--config", config)
    assert code == 0, err
    assert "KL(initial || model)" in err
    record = json.loads((place / "model/anneal.json").read_text())
    assert record["new_text"]["num_positions"] > 0
    card = (place / "model/README.md").read_text()
    assert "KL to the initial model on mixed text" in card
    assert (
        "`loss = CE + 2 * KL` with CE on the training tokens and KL on those of caches with `loss: kl`"
        in card
    )
    from trainer.evaluation.recorded_method import method_of

    method = method_of(place / "model")
    assert method is not None and method.name == "KL on mixed text + mixed text (kl)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "a build needs a CORPUS or --generate N, got neither"),
        (("text.txt", "--prompts", "a.txt"), "--prompts needs --generate N, got a.txt without it"),
        (("text.txt", "--generate-temperature", 0.5), "--generate-temperature needs --generate N, got 0.5"),
        (("text.txt", "--generate", 2), "generate makes its own text and takes no corpus, got text.txt"),
        (("--generate", 2, "--limit", 3), "generate makes its own text and takes no limit, got 3"),
        (("--generate", 2, "--split", "test"), "takes no split, got test"),
        (("--generate", 2, "--text-column", "c"), "takes no text_column, got c"),
        (("--generate", 2, "--generate-temperature", 0), "generate_temperature must be a number of at least"),
        (("--generate", 2, "--ray", "local"), "--ray captures a corpus, got --generate"),
        (("--generate", 2, "--ray", "local", "--dry-run"), "--ray captures a corpus, got --generate"),
        (("--generate", 2, "--prompts", "none.txt"), "prompts must be an existing file"),
        (("--generate", 2, "--template-arg", "tools_in_user=1"), "a template argument must be one that"),
        (
            ("--generate", 2, "--template-time", "2026-11-25"),
            "template_time needs a chat template that reads",
        ),
        (("--generate", 2, "--max-length", 8), "max_length must be at least"),
        (("--generate", 2, "--max-length", 600), "max_length must be at most 512"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    anneal: Run, tmp_path: Path, words: tuple, message: str
) -> None:
    code, out, err = anneal("cache", "build", *words, "--model", MODEL, "--out", tmp_path / "out")
    assert code == 1 and not out and not (tmp_path / "out").exists()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in err
