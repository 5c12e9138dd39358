"""What a user sees of the data before a build."""

from pathlib import Path
from typing import Any

from corpora import write_jsonl
from corpus_tokenizers import CHATML, byte_tokenizer, merging_tokenizer

from cache_builder.corpus.corpus import Corpus, CorpusConfig, open_corpus
from cache_builder.rows.preview import preview, render_row
from formats.disk.token_row import TokenRow


def corpus_of(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> Corpus:
    path = write_jsonl(tmp_path / "data.jsonl", records)
    return open_corpus(CorpusConfig(source=str(path), **options))


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo 漢"}]}


def test_format_and_sample_are_announced(tmp_path: Path) -> None:
    assert preview(corpus_of(tmp_path, [CHAT], max_length=64), byte_tokenizer(CHATML)) == (
        f"corpus: {tmp_path}/data.jsonl\n"
        "format: messages (columns messages), loss on assistant turns\n"
        "chat template: assistant turns found by incremental rendering\n"
        "longer than 64 tokens: truncated\n"
        "sample: 29 tokens, 7 with loss, between ⟦ and ⟧\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo 漢<|im_end|>⟧\n"
    )


def test_color_dims_the_rest_and_keeps_the_brackets(tmp_path: Path) -> None:
    text = preview(corpus_of(tmp_path, [{"prompt": "ab", "completion": "cd"}]), byte_tokenizer(), color=True)
    assert text.splitlines()[-1] == "\x1b[2mab\x1b[0m⟦cd</s>⟧"


def test_leading_spaces_survive_a_tokenizer_that_marks_them_on_words() -> None:
    """A SentencePiece decoder drops the space of a stretch that is decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"▁two": 0, "▁three": 1, "▁one": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = tokenizer("one two three")["input_ids"]
    assert tokenizer.decode(ids[1:]) == "two three"
    assert render_row(TokenRow(ids, [False, True, True]), tokenizer) == "one⟦ two three⟧"


def test_a_long_row_is_shortened_but_keeps_both_ends_of_its_target(tmp_path: Path) -> None:
    record = {"prompt": "Q" * 3000, "completion": "start " + "x" * 3000 + " finish"}
    text = preview(corpus_of(tmp_path, [record], max_length=8000), byte_tokenizer(), max_chars=400)
    assert len(text) < 1000
    assert "⟦start xxx" in text
    assert text.endswith("x finish</s>⟧")
    assert " … 2800 characters … " in text


def test_a_row_of_many_stretches_is_cut() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab" * 500)["input_ids"]
    text = render_row(TokenRow(ids, [False, True] * 500), tokenizer, max_chars=200)
    assert text.startswith("a⟦b⟧a⟦b⟧")
    assert text.endswith(" more stretches")
    assert len(text) < 700


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    text = preview(corpus_of(tmp_path, [{"text": "a\x1b[31m\r\tb\n"}]), byte_tokenizer())
    assert text.splitlines()[-2:] == ["a⟦\\x1b[31m\\r\tb", "</s>⟧"]


def test_the_first_row_with_a_target_is_shown(tmp_path: Path) -> None:
    records = [{"text": ""}] * 40 + [{"text": "ab"}]
    assert preview(corpus_of(tmp_path, records), byte_tokenizer()).endswith("a⟦b</s>⟧")


def test_a_seeded_sample_does_not_make_the_preview_read_everything(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [{"text": "ab"}] * 600, limit=2, seed=1)
    with corpus.files[0].open("a") as file:
        file.write("{broken\n")
    text = preview(corpus, byte_tokenizer())
    assert text.endswith("a⟦b</s>⟧")
    assert text.startswith(f"corpus: {corpus.files[0]}, a sample of 2 records\n")


def test_half_a_character_on_either_side_of_the_mask() -> None:
    tokenizer = merging_tokenizer([])
    ids = tokenizer("aé")["input_ids"]
    assert len(ids) == 3
    assert render_row(TokenRow(ids, [False, False, True]), tokenizer).count("⟦") == 1
