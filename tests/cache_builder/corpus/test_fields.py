"""The table of known columns and fields: the same in code and docs, and every line of it does what it says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from corpora import ANSWER, IDS, USER, refusal, rows_of
from corpus_tokenizers import CHATML, TOOLS, byte_tokenizer, targets_of, text_of

from cache_builder.corpus.field import CALL, COLUMN, NOT_NEEDED, PART, TURN
from cache_builder.corpus.fields import FIELDS, names
from formats.errors import CorpusError

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "corpora.md").read_text(encoding="utf-8")
CHAT = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "ab", "completion": "cd"}


TEXT = {"text": "abc"}
REFUSED = [
    (field, name, base)
    for field in FIELDS
    if field.place == COLUMN and field.rule
    for base in (CHAT, PAIR, IDS, TEXT)
    if {"messages": "chat", "prompt": "pair", "input_ids": "input_ids", "text": "text"}[next(iter(base))]
    in field.kinds
    for name in field.names
    if name != "label"
]


def rendered(tmp_path: Path, record: dict[str, Any], template: str = CHATML) -> tuple[str, list[str]]:
    tokenizer = byte_tokenizer(template)
    [row], _ = rows_of(tmp_path, [record], tokenizer)
    return text_of(row, tokenizer), targets_of(row, tokenizer)


def test_the_page_has_the_table_of_the_code() -> None:
    start = PAGE.index("| Name | Where | Here |")
    lines = PAGE[start : PAGE.index("\n\n", start)].splitlines()[2:]
    assert lines == [field.markdown() for field in FIELDS]


def test_no_name_stands_twice_in_one_place() -> None:
    for place in (COLUMN, TURN, PART, CALL):
        found = [name for field in FIELDS if field.place == place for name in field.names]
        assert sorted(found) == sorted(set(found)), place


@pytest.mark.parametrize(
    ("field", "name", "base"), REFUSED, ids=[f"{name}-{next(iter(base))}" for _, name, base in REFUSED]
)
def test_a_column_that_asks_for_something_else_is_refused_with_its_place(
    tmp_path: Path, field: Any, name: str, base: dict[str, Any]
) -> None:
    value: Any = 0.5 if "weight" in field.key else ["x"]
    message = refusal(tmp_path, base, {**base, name: value})
    assert message == f"{field.rule}, got a column {name} in data.jsonl, line 2; {field.remedy}"


@pytest.mark.parametrize("name", sorted({name for _, name, _ in REFUSED}))
@pytest.mark.parametrize("nothing", [None, "", []])
def test_an_empty_column_says_nothing(tmp_path: Path, name: str, nothing: Any) -> None:
    assert rendered(tmp_path, {**CHAT, name: nothing})[1] == ["Yo<|im_end|>"]


def test_feedback_is_told_from_other_labels(tmp_path: Path) -> None:
    expected = (
        "a record holds an answer to train on, not feedback on one, got a column label in data.jsonl, line 2; "
        "keep the good answers and drop the column"
    )
    for value in (False, "False", "true"):
        assert refusal(tmp_path, PAIR, {**PAIR, "label": value}) == expected
    for value in (0, "false"):
        assert refusal(tmp_path, PAIR, {**PAIR, "kto_tag": value}) == expected.replace("label", "kto_tag")
    assert rendered(tmp_path, {**PAIR, "label": 3})[1] == ["cd</s>"]
    assert rendered(tmp_path, {**TEXT, "label": True})[1] == ["bc</s>"]


def test_weights_of_one_are_accepted(tmp_path: Path) -> None:
    for name in names("record weight", "weight"):
        assert rendered(tmp_path, {**PAIR, name: 1.0})[1] == ["cd</s>"]
    assert rendered(tmp_path, {**TEXT, "weight": 82.5})[1] == ["bc</s>"]  # somebody's kilograms


def test_text_column_overrules_every_refusal(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    record = {"text": "abc", "image": "x.png", "chosen": "y", "loss_mask": [1]}
    [row], _ = rows_of(tmp_path, [record], tokenizer, text_column="text")
    assert targets_of(row, tokenizer) == ["bc</s>"]


@pytest.mark.parametrize("name", [n for field in FIELDS if field.verdict == NOT_NEEDED for n in field.names])
def test_what_says_nothing_about_training_is_named_and_left_alone(tmp_path: Path, name: str) -> None:
    tokenizer = byte_tokenizer(CHATML)
    [row], iterator = rows_of(tmp_path, [{**CHAT, name: 3, "id": 7}], tokenizer)
    assert targets_of(row, tokenizer) == ["Yo<|im_end|>"]
    assert f"columns not read: {name}, id" in iterator.describe()


def test_what_only_later_records_have_is_counted_and_named(tmp_path: Path) -> None:
    records = [
        {**TEXT, "id": 7},
        {**TEXT, **CHAT, "id": 8},
        {**TEXT, **CHAT, "source": "x"},
        {**TEXT, "url": None},
    ]
    rows, iterator = rows_of(tmp_path, records, byte_tokenizer(CHATML))
    assert len(rows) == 4
    assert iterator.stats.notes() == [
        "columns not read, of later records than the first: messages (2), source (1)"
    ]
    rows, iterator = rows_of(tmp_path, [CHAT, {**CHAT, "system": "Be brief."}], byte_tokenizer(CHATML))
    assert iterator.stats.notes() == []


# --- turns --------------------------------------------------------------------------------------------------

TWO_ANSWERS = [USER, ANSWER, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}]


def with_field(index: int, **fields: Any) -> dict[str, Any]:
    return {"messages": [{**m, **fields} if i == index else m for i, m in enumerate(TWO_ANSWERS)]}


@pytest.mark.parametrize("name", names("turn loss", "turn masked"))
@pytest.mark.parametrize("as_number", [False, True])
def test_a_flag_on_a_turn_decides_its_loss(tmp_path: Path, name: str, as_number: bool) -> None:
    """Without loss the turn stays in the conversation: the text is the same, the mask is not."""
    off, on = (True, False) if name == "masked" else (False, True)
    plain_text, both = rendered(tmp_path, {"messages": TWO_ANSWERS})
    assert both == ["Yo<|im_end|>", "See you<|im_end|>"]
    value = int(off) if as_number else off
    assert rendered(tmp_path, with_field(1, **{name: value})) == (plain_text, ["See you<|im_end|>"])
    assert rendered(tmp_path, with_field(3, **{name: float(off)})) == (plain_text, ["Yo<|im_end|>"])
    assert rendered(tmp_path, with_field(1, **{name: on})) == (plain_text, both)
    assert rendered(tmp_path, with_field(1, **{name: None})) == (plain_text, both)
    assert rendered(tmp_path, with_field(0, **{name: off})) == (plain_text, both)  # says what is so anyway
    message = refusal(tmp_path, CHAT, with_field(2, **{name: on}))
    assert message == (
        f"only the assistant's turns of an answer are trained, got {name} for role user in message 3 of data.jsonl, "
        "line 2; drop the field, or bring input_ids with a loss_mask"
    )


@pytest.mark.parametrize("value", [0.5, 2, "no", [1]])
def test_a_flag_is_yes_or_no(tmp_path: Path, value: Any) -> None:
    message = refusal(tmp_path, CHAT, with_field(1, weight=value))
    assert message.startswith(
        f"weight of a turn must be true, false, 1 or 0, got {value!r} in message 2 of data"
    )


def test_flags_must_agree_and_are_counted(tmp_path: Path) -> None:
    assert "got both from weight and train in message 2 of data.jsonl, line 2" in refusal(
        tmp_path, CHAT, with_field(1, weight=0, train=True)
    )
    tokenizer = byte_tokenizer(CHATML)
    records = [with_field(1, weight=0, loss=False), {"messages": [USER, {**ANSWER, "train": False}]}]
    rows, iterator = rows_of(tmp_path, records, tokenizer)
    assert [targets_of(row, tokenizer) for row in rows] == [["See you<|im_end|>"]]
    assert iterator.stats.notes() == [
        "1 record skipped: no token carries loss",
        "2 assistant turns without loss, as the data says",
    ]


def test_sharegpt_turns_keep_their_fields(tmp_path: Path) -> None:
    turns = [("human", "Hi", {}), ("gpt", "Yo", {"weight": 0}), ("human", "Bye", {}), ("gpt", "See you", {})]
    record = {"conversations": [{"from": s, "value": v, **f} for s, v, f in turns]}
    assert rendered(tmp_path, record)[1] == ["See you<|im_end|>"]


def test_a_turn_of_the_prompt_cannot_ask_for_loss(tmp_path: Path) -> None:
    good = {"prompt": [USER], "completion": [ANSWER]}
    bad = {"prompt": [USER, {**ANSWER, "weight": 1}, USER], "completion": [ANSWER]}
    assert "got weight for the prompt in message 2 of data.jsonl, line 2" in refusal(tmp_path, good, bad)
    quiet = {"prompt": [USER, {**ANSWER, "weight": 0}, USER], "completion": [ANSWER]}
    assert rendered(tmp_path, quiet)[1] == ["Yo<|im_end|>"]


REFUSED_FIELDS = [(f, name) for f in FIELDS if f.place in (TURN, PART) and f.rule for name in f.names]


@pytest.mark.parametrize(("field", "name"), REFUSED_FIELDS, ids=[f"{f.key}-{n}" for f, n in REFUSED_FIELDS])
def test_fields_that_ask_for_something_else_are_refused(tmp_path: Path, field: Any, name: str) -> None:
    value: Any = False if field.key in ("turn end", "part loss") else ["x"]
    bad = with_field(1, **{name: value})
    if field.place == PART:
        bad = with_field(1, content=[{"type": "text", "text": "Yo", name: value}])
    assert refusal(tmp_path, CHAT, bad) == (
        f"{field.rule}, got {name} in message 2 of data.jsonl, line 2; {field.remedy}"
    )
    harmless = True if field.key == "turn end" else None
    assert rendered(tmp_path, with_field(1, **{name: harmless}))[1] == ["Yo<|im_end|>", "See you<|im_end|>"]


@pytest.mark.parametrize(
    "kind", ["image", "image_url", "audio", "video", "tool_use", "tool_result", "thinking"]
)
def test_parts_of_another_type_are_refused_even_with_text(tmp_path: Path, kind: str) -> None:
    message = refusal(tmp_path, CHAT, with_field(1, content=[{"type": kind, "text": "Yo"}]))
    assert message == (
        f"content must be text, got a part of type {kind} in message 2 of data.jsonl, line 2; drop the record"
    )


@pytest.mark.parametrize(
    "role", ["human", "gpt", "model", "bot", "tool_call", "tool_response", "Chatbot", "Assistant", "USER"]
)
def test_an_assistant_by_another_name_is_refused(tmp_path: Path, role: str) -> None:
    assert f"got {role!r} in message 2 of data.jsonl, line 2" in refusal(
        tmp_path, CHAT, with_field(1, role=role)
    )


@pytest.mark.parametrize("name", names("call parameters"))
def test_arguments_of_a_call_by_another_name_are_refused(tmp_path: Path, name: str) -> None:
    """A template that asks whether there are `arguments` would write the call without them."""
    template = TOOLS.replace(
        "f.arguments | tojson", "(f.arguments | tojson if f.arguments is defined else '')"
    )
    for wrap in (lambda call: {"type": "function", "function": call}, lambda call: call):
        bad = with_field(1, tool_calls=[wrap({"name": "f", name: {"x": 1}})])
        assert refusal(tmp_path, CHAT, bad, template) == (
            f"the arguments of a tool call stand in arguments, got {name} in message 2 of data.jsonl, line 2; "
            "rename the field"
        )
    good = with_field(1, tool_calls=[{"name": "f", "arguments": {"x": 1}, name: None}])
    assert '"x": 1' in rendered(tmp_path, good, template)[1][0]


def test_fields_that_the_template_does_not_read_are_counted_by_name(tmp_path: Path) -> None:
    messages = [{**USER, "id": "a", "seconds": 3}, {**ANSWER, "id": "b"}]
    _, iterator = rows_of(tmp_path, [{"messages": messages}], byte_tokenizer(CHATML))
    assert iterator.stats.unread_fields == {"id": 2, "seconds": 1}
    assert iterator.stats.notes() == [
        "fields of messages that the chat template does not read: id (2), seconds (1)"
    ]


def test_fields_of_a_part_that_say_nothing_of_the_loss_are_counted(tmp_path: Path) -> None:
    part = {"type": "text", "text": "Yo", "cache_control": {"type": "ephemeral"}, "annotations": []}
    record = {"messages": [USER, {"role": "assistant", "content": [part]}]}
    rows, iterator = rows_of(tmp_path, [record, CHAT], byte_tokenizer(CHATML))
    assert rows[0].input_ids.tolist() == rows[1].input_ids.tolist()
    assert iterator.stats.unread_fields == {"content.cache_control": 1}


def test_the_name_of_a_tool_that_does_not_show_is_counted(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "12 S", "name": "find"}
    _, iterator = rows_of(tmp_path, [{"messages": [USER, tool, ANSWER]}], byte_tokenizer(CHATML))
    assert iterator.stats.unread_fields == {"name": 1}
    named = CHATML.replace("m['role'] +", "m['role'] + ' ' + (m.name or '') +")
    _, iterator = rows_of(tmp_path, [{"messages": [USER, tool, ANSWER]}], byte_tokenizer(named))
    assert iterator.stats.unread_fields == {}


def test_arguments_nested_without_end_are_refused(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(120):
        deep = {"x": deep}
    bad = with_field(1, tool_calls=[{"name": "f", "arguments": deep}])
    assert refusal(tmp_path, CHAT, bad, TOOLS) == (
        "a tool call must not be nested deeper than 100 levels, got more in message 2 of data.jsonl, line 2; mend it"
    )
    text = with_field(1, tool_calls="[" * 100_000)
    assert refusal(tmp_path, CHAT, text, TOOLS) == (
        "a record must be flat JSON, got deep nesting in message 2 of data.jsonl, line 2; mend or drop it"
    )


# --- what a conversation may have beside its turns --------------------------------------------------------------


@pytest.mark.parametrize("name", names("system"))
def test_a_system_prompt_per_record_is_the_first_message(tmp_path: Path, name: str) -> None:
    first = {"role": "system", "content": "Be brief."}
    expected = rendered(tmp_path, {"messages": [first, USER, ANSWER]})
    assert expected[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert rendered(tmp_path, {**CHAT, name: "Be brief."}) == expected
    assert rendered(tmp_path, {"messages": [first, USER, ANSWER], name: "Be brief."}) == expected
    assert rendered(tmp_path, {"prompt": [USER], "completion": [ANSWER], name: "Be brief."}) == expected
    assert rendered(tmp_path, {"instruction": "Hi", "output": "Yo", name: "Be brief."}) == expected
    assert "got one in a column and another as message 1 of data.jsonl, line 2" in refusal(
        tmp_path, CHAT, {"messages": [first, USER, ANSWER], name: "Be long."}
    )


def test_history_becomes_earlier_turns_that_are_trained_too(tmp_path: Path) -> None:
    record = {"instruction": "Bye", "output": "See you", "history": [["Hi", "Yo"]]}
    assert rendered(tmp_path, record) == rendered(tmp_path, {"messages": TWO_ANSWERS})
    with pytest.raises(
        CorpusError, match="earlier turns belong to an Alpaca record with a chat template, got a"
    ):
        rows_of(tmp_path, [record], byte_tokenizer())


def test_a_template_per_record_must_be_the_tokenizers(tmp_path: Path) -> None:
    assert rendered(tmp_path, {**CHAT, "chat_template": CHATML})[1] == ["Yo<|im_end|>"]
    assert refusal(tmp_path, CHAT, {**CHAT, "chat_template": "{{ messages }}"}) == (
        "one cache has one chat template, got a column chat_template with another in data.jsonl, line 2; put it into "
        "the model directory and drop the column"
    )


READS_THINKING = "{% if enable_thinking is defined and not enable_thinking %}{{ '!' }}{% endif %}" + CHATML


def test_template_arguments_per_record(tmp_path: Path) -> None:
    plain = rendered(tmp_path, CHAT, READS_THINKING)[0]
    for extra in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": '{"enable_thinking": false}'},
        {"enable_thinking": False},
        {"enable_thinking": "False"},
        {"enable_thinking": 0},
    ):
        assert rendered(tmp_path, {**CHAT, **extra}, READS_THINKING)[0] == "!" + plain
    for true in (True, "true", 1.0):
        assert rendered(tmp_path, {**CHAT, "enable_thinking": true}, READS_THINKING)[0] == plain
    assert refusal(tmp_path, CHAT, {**CHAT, "enable_thinking": "no"}, READS_THINKING) == (
        "enable_thinking must be true or false, got 'no' in data.jsonl, line 2"
    )
    assert refusal(tmp_path, CHAT, {**CHAT, "enable_thinking": False}) == (
        "a template argument must be one that the template reads, got enable_thinking in data.jsonl, line 2; drop it, "
        "or use a template that reads it"
    )
    for reserved in ("messages", "add_generation_prompt", "strftime_now"):
        assert f"chat_template_kwargs cannot set {reserved}, got it in data.jsonl, line 2" in refusal(
            tmp_path, CHAT, {**CHAT, "chat_template_kwargs": {reserved: "x"}}, READS_THINKING
        )


def test_documents_for_the_template_may_be_json_text(tmp_path: Path) -> None:
    template = "{% for d in documents or [] %}{{ d.title }}{% endfor %}" + CHATML
    documents = [{"title": "A", "text": "a"}, {"title": "B", "text": "b"}]
    as_list = rendered(tmp_path, {**CHAT, "documents": documents}, template)
    assert as_list[0].startswith("AB<|im_start|>")
    assert rendered(tmp_path, {**CHAT, "documents": json.dumps(documents)}, template) == as_list


def test_the_words_of_the_table_are_four() -> None:
    assert set(re.findall(r"\| (honoured or refused|honoured|refused|not needed) \|", PAGE)) == {
        "honoured",
        "refused",
        "honoured or refused",
        "not needed",
    }
