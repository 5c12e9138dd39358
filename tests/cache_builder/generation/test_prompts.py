"""What rows begin with: every layout as a build of it has the part before the answer."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import ANSWER, USER, rows_of, write_jsonl
from corpus_tokenizers import CHATML, CHATML_MARKED, INST, TOOLS, byte_tokenizer, merging_tokenizer

from cache_builder.generation.prompts import PromptReader, Prompts
from cache_builder.generation.recipe import stop_tokens
from cache_builder.generation.settings import Start
from formats.errors import AnnealError, ConfigError, CorpusError

HEADER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def reader(tokenizer: Any, **options: Any) -> PromptReader:
    settings = {"arguments": {}, "instant": None, "max_length": 96, "num_outputs": None, **options}
    return PromptReader(tokenizer, **settings)


def read(path: Path, records: list[dict], tokenizer: Any, limit: int = 9, **options: Any) -> Prompts:
    return reader(tokenizer, **options).read(str(write_jsonl(path / "prompts.jsonl", records)), limit)


def texts(prompts: Prompts, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(tokens.tolist()) for tokens in prompts.tokens]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, INST])
def test_a_chat_model_may_start_from_the_empty_user_turn(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    prompts = reader(tokenizer).default("empty-turn")
    empty = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert texts(prompts, tokenizer) == ["<s>[INST]  [/INST]" if template == INST else empty]
    assert prompts.uses_template and prompts.turn is None


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_a_chat_model_writes_what_a_user_asks(template: str) -> None:
    tokenizer = byte_tokenizer(template)
    prompts = reader(tokenizer).default()
    assert texts(prompts, tokenizer) == ["<|im_start|>user\n"] and prompts.uses_template
    turn = prompts.turn
    assert turn is not None and turn.stop_tokens == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    empty = len(reader(tokenizer).default("empty-turn").tokens[0])
    assert turn.max_new_tokens == (96 - empty) // 2
    written = np.array(tokenizer("  Hi<|im_end|>")["input_ids"], np.int32)
    assert tokenizer.decode(turn.prompt(written).tolist()) == HEADER
    nothing = np.array(turn.stop_tokens, np.int32)
    assert len(turn.prompt(nothing)) == empty


def test_a_turn_without_a_special_end_ends_where_the_template_goes_on() -> None:
    """Llama 2's manner: `[INST] text [/INST]`. The space belongs to the first word."""
    tokenizer = byte_tokenizer(INST)
    prompts = reader(tokenizer).default("dialogue")
    assert texts(prompts, tokenizer) == ["<s>[INST]"] and prompts.turn is not None
    assert prompts.turn.stop_tokens == ()
    written = np.array(
        tokenizer(" Hi there [/INST] Hello! [/INST]", add_special_tokens=False)["input_ids"], np.int32
    )
    assert tokenizer.decode(prompts.turn.prompt(written).tolist()) == "<s>[INST] Hi there [/INST]"


def test_a_turn_that_reads_longer_than_it_was_written_leaves_room_for_an_answer() -> None:
    tokenizer = byte_tokenizer(CHATML)
    turn = reader(tokenizer, max_length=60).default().turn
    assert turn is not None
    broken = np.array(
        tokenizer("\u00e9" * 30, add_special_tokens=False)["input_ids"][::2], np.int32
    )  # first halves
    prompt = turn.prompt(broken)
    assert len(broken) == 30 and len(turn.decode(broken).encode()) > 60 > len(prompt)
    assert tokenizer.decode(prompt.tolist()).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_must_show_a_turn_once() -> None:
    for text, count in (
        ("{{ messages[0]['content'] * 2 }}", 2),
        ("Hello.", 0),
        ("{{ messages[0]['content'] | upper }}", 0),
    ):
        with pytest.raises(
            ConfigError, match=f"show a user's text once, got it {count} times; use --generate-from"
        ):
            reader(byte_tokenizer(text)).default()


@pytest.mark.parametrize("start", ["dialogue", "empty-turn"])
def test_a_conversation_needs_a_template(start: Start) -> None:
    with pytest.raises(ConfigError, match=f"--generate-from {start} needs a chat template"):
        reader(byte_tokenizer()).default(start)


def test_a_chat_model_may_start_from_bos() -> None:
    tokenizer = byte_tokenizer(CHATML)
    prompts = reader(tokenizer).default("bos")
    assert texts(prompts, tokenizer) == ["<s>"] and not prompts.uses_template and prompts.turn is None


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (byte_tokenizer(adds_bos=True), ["<s>"]),
        (byte_tokenizer(), ["<s>"]),  # has a BOS, though it puts none before a text
        (merging_tokenizer([], adds_eos=True), ["<s>"]),
    ],
)
def test_a_base_model_starts_from_bos(tokenizer: Any, start: list[str]) -> None:
    prompts = reader(tokenizer).default()
    assert texts(prompts, tokenizer) == start and not prompts.uses_template


def test_without_bos_a_text_starts_behind_the_end_of_another() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert texts(reader(tokenizer).default(), tokenizer) == ["</s>"]
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="without BOS and EOS; bring --prompts FILE"):
        reader(tokenizer).default()


def test_a_prompt_leaves_room_for_a_token() -> None:
    tokenizer = byte_tokenizer(CHATML)
    length = len(reader(tokenizer).default("empty-turn").tokens[0])
    reader(tokenizer, max_length=length + 1).default("empty-turn")
    with pytest.raises(ConfigError, match=f"max_length must be at least {length + 1} .* got {length}"):
        reader(tokenizer, max_length=length).default("empty-turn")
    turn = reader(tokenizer, max_length=length + 2).default().turn
    assert turn is not None and turn.max_new_tokens == 1
    with pytest.raises(ConfigError, match=f"max_length must be at least {length + 2} .* got {length + 1}"):
        reader(tokenizer, max_length=length + 1).default()


def test_a_line_is_what_a_person_types(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"Hi\r\n\n  \nHi\n")
    chat, base = byte_tokenizer(CHATML), byte_tokenizer(adds_bos=True)
    assert texts(reader(base).read(str(path), 9), base) == ["<s>Hi", "<s>Hi"]
    found = reader(chat).read(str(path), 9)
    assert texts(found, chat) == [HEADER, HEADER]
    assert reader(base).read(str(path), 9).notes() == ["2 prompts skipped: empty"]
    assert len(reader(base).read(str(path), 1).tokens) == 1


CASES: list[tuple[dict, str]] = [
    ({"prompt": "Hi"}, "Hi"),
    ({"prompt": "Hi", "completion": "Yo"}, "Hi"),
    ({"text": "Hi"}, "Hi"),
    ({"prompt": [USER]}, HEADER),
    ({"prompt": [USER], "completion": [ANSWER]}, HEADER),
    ({"prompt": json.dumps([USER])}, HEADER),
    ({"messages": [USER]}, HEADER),
    ({"messages": [USER, ANSWER]}, HEADER),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, HEADER),
    ({"instruction": "Hi"}, HEADER),
    ({"instruction": "Hi", "input": "", "output": "Yo"}, HEADER),
    (
        {"messages": [USER, ANSWER, USER, ANSWER]},
        HEADER + "Yo<|im_end|>\n" + HEADER,
    ),
    ({"system": "Be brief.", "messages": [USER]}, "<|im_start|>system\nBe brief.<|im_end|>\n" + HEADER),
]


@pytest.mark.parametrize(("record", "expected"), CASES)
def test_every_layout_ends_where_its_answer_begins(tmp_path: Path, record: dict, expected: str) -> None:
    tokenizer = byte_tokenizer(CHATML)
    assert texts(read(tmp_path, [record], tokenizer), tokenizer) == [expected]


def test_preferences_and_feedback_are_answers_that_nobody_looks_at(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    records = [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
        {"prompt": [USER], "completion": [ANSWER], "label": True},
        {"messages": [USER, ANSWER], "kto_tag": False},
    ]
    for record in records:
        assert texts(read(tmp_path, [record], tokenizer), tokenizer) == [HEADER]


def test_prompts_are_those_of_a_build_of_the_same_file(tmp_path: Path) -> None:
    """A cache of the file and generation from it have the same tokens before the answer."""
    tokenizer = byte_tokenizer(CHATML, adds_bos=True)
    for record in (
        {"prompt": "Hi", "completion": " you"},
        {"messages": [USER, ANSWER]},
        {"instruction": "Hi", "output": "x"},
    ):
        (row,), _ = rows_of(tmp_path, [record], tokenizer, max_length=96)
        (prompt,) = read(tmp_path, [record], tokenizer).tokens
        first = int(row.loss_mask.argmax())
        assert prompt.tolist() == row.input_ids[:first].tolist()


def test_without_a_template_instructions_have_headings(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    found = texts(read(tmp_path, [{"instruction": "Hi"}], tokenizer), tokenizer)
    assert found == ["<s>### Instruction:\nHi\n\n### Response:\n"]
    with pytest.raises(ConfigError, match="messages need a chat template"):
        read(tmp_path, [{"messages": [USER]}], tokenizer)


def test_ready_tokens_are_taken_up_to_the_first_target(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    records = [
        {"input_ids": [7, 8, 9], "labels": [-100, -100, 9]},
        {"input_ids": [7, 8], "labels": [-100, -100]},
    ]
    found = read(tmp_path, records, tokenizer)
    assert [tokens.tolist() for tokens in found.tokens] == [[7, 8], [7, 8]]
    with pytest.raises(CorpusError, match=r"from 0 to 8 .* got 9 in prompts.jsonl, line 1"):
        read(tmp_path, [{"input_ids": [9]}], tokenizer, num_outputs=9)


def test_tools_and_the_time_reach_the_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(TOOLS)
    tool = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {}}}
    (text,) = texts(
        read(tmp_path, [{"messages": [USER], "tools": [tool]}], tokenizer, max_length=999), tokenizer
    )
    assert text.startswith("<tools>") and "clock" in text
    told = byte_tokenizer("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    start = texts(reader(told, instant=datetime(2026, 2, 3)).default(), told)[0]
    assert start.startswith("2026-02-03<|im_start|>")
    greeted = byte_tokenizer("{{ greeting }}" + CHATML)
    assert texts(reader(greeted, arguments={"greeting": "x"}).default(), greeted)[0].startswith("x<|im")


def test_prompts_without_room_are_skipped_and_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    records = [{"prompt": "x" * 96}, {"prompt": "ab"}, {"prompt": ""}, {"prompt": "x" * 95}]
    found = read(tmp_path, records, tokenizer)
    assert [len(tokens) for tokens in found.tokens] == [2, 95]
    assert found.notes() == ["1 prompt skipped: empty", "1 prompt skipped: no room for a new token in a row"]
    with pytest.raises(CorpusError, match="at least one that can be used, got 1 prompt skipped: no room"):
        read(tmp_path, records[:1], tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "known layout"),
        ({"question": "Hi"}, "got columns: question; rename them"),
        ({"messages": [ANSWER]}, "a turn that is not the assistant's, got none in prompts.jsonl, line 1"),
        ({"messages": []}, "at least one message"),
        ({"prompt": 3}, "prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(tmp_path: Path, record: dict, message: str) -> None:
    with pytest.raises(AnnealError) as caught:
        read(tmp_path, [record], byte_tokenizer(CHATML))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "--text-column" not in str(caught.value)  # which prompts do not take


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"prompts must be an existing file .* got ./none.jsonl"):
        reader(byte_tokenizer()).read("./none.jsonl", 3)


def test_rows_end_with_every_token_that_ends_a_text_or_a_turn(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()  # </s> is token 2
    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": None, "text_config": {"eos_token_id": 7}})
    )
    assert stop_tokens(tmp_path, tokenizer, None) == (2, 7)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 2, 300]}))
    assert stop_tokens(tmp_path, tokenizer, 261) == (2, 4, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4')
    with pytest.raises(ConfigError, match=r"a model's generation_config\.json must be readable JSON, got "):
        stop_tokens(tmp_path, tokenizer, 261)
