"""Responses as vLLM 0.32 and others were seen to write them: prompts, parts of answers, tokens without a name."""

import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_tokenizers import CHATML, TOOLS, merging_tokenizer

from cache_builder.tools.convert_responses import convert_responses
from cache_builder.tools.topk_table import PADDING_LOGPROB
from formats.errors import AnnealError

CHATML_PROMPT = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
PARTIAL = "\ufffd"
MERGES = [("Ã", "©"), ("ï", "¿"), ("ï¿", "½"), ("t", "h"), ("th", "e")]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and tokens of their own for é and for the replacement character."""
    return merging_tokenizer(MERGES, CHATML)


def ids_of(tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def by_id(token: int) -> str:
    return f"token_id:{token}"


def entry(token: str, logprob: float, content: list[int] | None = None) -> dict:
    said = list(token.encode("utf-8", "replace")) if content is None else content
    return {"token": token, "logprob": logprob, "bytes": said}


def chat_choice(tokens: list[str], index: int = 0, **more) -> dict:
    content = [entry(token, -0.5) | {"top_logprobs": [entry(token, -0.5)]} for token in tokens]
    return {"index": index, "finish_reason": "stop", "logprobs": {"content": content}, **more}


def completions_choice(tokens: list[str], index: int = 0, *, echo: bool = False, **more) -> dict:
    """As vLLM's `_create_completion_logprobs`: offsets count the characters of the names."""
    values: list[float | None] = [-0.5] * len(tokens)
    tops: list[dict | None] = [{token: -0.5, by_id(300): -2.0} for token in tokens]
    if echo:
        values[0], tops[0] = None, None
    offsets = np.cumsum([0, *(len(token) for token in tokens[:-1])]).tolist()
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
    return {"index": index, "finish_reason": "length", "logprobs": logprobs, **more}


def usage(prompt: int, completion: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def converted(tmp_path: Path, tokenizer, *records: dict, **more) -> list[dict]:
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    out = tmp_path / "out.parquet"
    out.unlink(missing_ok=True)
    convert_responses([path], tokenizer, out, k=4, **more)
    return pq.read_table(out).to_pylist()


def refusal(tmp_path: Path, tokenizer, record: dict) -> str:
    with pytest.raises(AnnealError) as refused:
        converted(tmp_path, tokenizer, record)
    assert "\n" not in str(refused.value) and "responses.jsonl, line 1" in str(refused.value)
    assert not (tmp_path / "out.parquet").exists()
    return str(refused.value)


@pytest.mark.parametrize("more", [{}, {"usage": usage(3, 2)}])
@pytest.mark.parametrize("said", [False, True])
def test_an_echoed_prompt_ends_where_the_answer_begins(tmp_path, tokenizer, more, said):
    """Names are longer than texts, and so are offsets that count them; ids of the answer come without the prompt's."""
    prompt, answer = ids_of(tokenizer, "abc"), ids_of(tokenizer, "de")
    choice = completions_choice([by_id(token) for token in prompt + answer], echo=True)
    if said:
        choice |= {"prompt_token_ids": prompt, "token_ids": answer}
    (row,) = converted(
        tmp_path, tokenizer, {"request": {"prompt": "abc"}, "response": {"choices": [choice], **more}}
    )
    assert row["input_ids"] == prompt + answer and row["labels"] == [-100] * 3 + answer
    assert row["teacher_mask"] == [True] * 4 + [False]
    assert [ids[0] for ids in row["teacher_ids"][:4]] == [*prompt[1:], *answer]


def test_an_echo_alone_has_no_labels(tmp_path, tokenizer):
    """`max_tokens: 0` scores a text; vLLM draws a token all the same, which the logprobs do not have."""
    prompt = ids_of(tokenizer, "abc")
    choice = completions_choice([by_id(token) for token in prompt], echo=True)
    for more in ({}, {"prompt_token_ids": prompt, "token_ids": [7]}):
        record = {"prompt": "abc", "response": {"choices": [choice | more], "usage": usage(3, 1)}}
        (row,) = converted(tmp_path, tokenizer, record)
        assert row["input_ids"] == prompt and row["labels"] == [-100] * 3


def test_an_echo_of_another_prompt(tmp_path, tokenizer):
    choice = completions_choice([by_id(token) for token in ids_of(tokenizer, "abcde")], echo=True)
    message = refusal(tmp_path, tokenizer, {"prompt": "abx", "response": {"choices": [choice]}})
    assert "must echo its prompt" in message


def test_several_prompts_and_prompts_of_ids(tmp_path, tokenizer):
    texts = ["a", "bc"]
    prompts = [ids_of(tokenizer, text) for text in texts]
    choices = [completions_choice([by_id(60 + index)], index) for index in range(4)]
    response = {"choices": choices[::-1], "usage": usage(3, 4)}
    for prompt in (texts, prompts):
        rows = converted(tmp_path, tokenizer, {"prompt": prompt, "response": response})
        assert [row["input_ids"] for row in rows] == [
            [*prompts[index // 2], 60 + index] for index in (3, 2, 1, 0)
        ]
    rows = converted(tmp_path, tokenizer, {"prompt": prompts[1], "response": {"choices": choices}})
    assert [row["input_ids"][:2] for row in rows] == [prompts[1]] * 4
    for number, message in ((3, "as many choices for every prompt"), (0, "with choices, got none")):
        record = {"prompt": texts, "response": {"choices": choices[:number]}}
        assert message in refusal(tmp_path, tokenizer, record)
    record = {"prompt": texts, "response": {"choices": [choices[0]] * 2}}
    assert "index 0, 1, ..., got [0, 0]" in refusal(tmp_path, tokenizer, record)


def test_parts_of_an_answer(tmp_path, tokenizer):
    """Their tokens would stand right behind the prompt, where the server had others before them."""
    turns = [{"role": "user", "content": "a"}]
    prompt = len(ids_of(tokenizer, CHATML_PROMPT))
    whole = chat_choice(["d", "e", "f"])
    chunk = {"index": 0, "delta": {"content": "d"}, "logprobs": whole["logprobs"], "finish_reason": None}
    thinks = {"reasoning_content": whole["logprobs"]["content"], **whole["logprobs"]}
    for choice, message in (
        (chunk, "a part of a stream"),
        (completions_choice(["d"]) | {"finish_reason": None}, "a part of a stream"),
        (whole | {"logprobs": thinks}, "reasoning_content beside content"),
        (whole | {"logprobs": {"content": []}}, "an answer of at least a token"),
        (whole, "got 3 of 9 tokens"),
    ):
        response = {"choices": [choice], "usage": usage(prompt, 9)}
        assert message in refusal(tmp_path, tokenizer, {"messages": turns, "response": response})
    response = {
        "choices": [whole],
        "usage": usage(prompt, 4),
    }  # with the end of the answer, which has no entry
    (row,) = converted(tmp_path, tokenizer, {"messages": turns, "response": response})
    assert row["input_ids"][prompt:] == ids_of(tokenizer, "def")
    refuses = {"content": None, "refusal": whole["logprobs"]["content"]}
    response = {"choices": [whole | {"logprobs": refuses}]}
    assert converted(tmp_path, tokenizer, {"messages": turns, "response": response}) == [row]


def test_a_failed_request_is_named(tmp_path, tokenizer):
    body = {"error": {"message": "too long", "code": 400}}
    for record in (
        {"custom_id": "7", "response": {"status_code": 400, "body": body}, "error": None},
        {"custom_id": "7", "response": None, "error": "too long"},
        {"response": body},
    ):
        assert "too long" in refusal(tmp_path, tokenizer, record)


def test_a_replacement_character_names_no_token(tmp_path, tokenizer):
    """vLLM's bytes are those of the text, so they do not tell half a character from the character of that name."""
    (e_acute,), (replacement,) = ids_of(tokenizer, "é"), ids_of(tokenizer, PARTIAL)
    tops = [entry("a", -1.0), entry(PARTIAL, -1.5), entry("", -2.0), entry("é", -2.5)]
    content = [entry("a", -1.0) | {"top_logprobs": tops}]
    choice = {"index": 0, "logprobs": {"content": content}}
    (row,) = converted(tmp_path, tokenizer, {"prompt": "b", "response": {"choices": [choice]}})
    kept = [
        t
        for t, p in zip(row["teacher_ids"][0], row["teacher_logprobs"][0], strict=True)
        if p > PADDING_LOGPROB
    ]
    assert replacement not in kept and kept == [*ids_of(tokenizer, "a"), e_acute]
    assert math.exp(row["teacher_tail"][0]) == pytest.approx(1 - math.exp(-1.0) - math.exp(-2.5))
    # Bytes that say more than the text are believed.
    tops[1] = entry(PARTIAL, -1.5, [0xC3])
    (row,) = converted(tmp_path, tokenizer, {"prompt": "b", "response": {"choices": [choice]}})
    assert tokenizer.convert_ids_to_tokens(row["teacher_ids"][0][1]) == "Ã"


def test_what_completes_a_character_is_not_the_character(tmp_path, tokenizer):
    """Behind the first byte of é vLLM calls the second one é, as the token of the whole character is called."""
    first, second = (tokenizer.convert_tokens_to_ids(piece) for piece in ("Ã", "©"))
    tops = [entry("é", -0.1, []), entry("a", -3.0)]
    content = [
        entry("", -0.7, []) | {"top_logprobs": [entry("a", -1.0)]},
        entry("é", -0.1, []) | {"top_logprobs": tops},
        entry("é", -0.2, []) | {"top_logprobs": [entry("é", -0.2, [])]},
    ]
    (e_acute,) = ids_of(tokenizer, "é")
    choice = {"index": 0, "logprobs": {"content": content}, "token_ids": [first, second, e_acute]}
    (row,) = converted(tmp_path, tokenizer, {"prompt": "b", "response": {"choices": [choice]}})
    assert row["teacher_ids"][0][:2] == [first, *ids_of(tokenizer, "a")]
    assert row["teacher_ids"][1][:2] == [second, *ids_of(tokenizer, "a")]
    assert row["teacher_ids"][2][0] == e_acute
    # Another token of that name is neither, and without ids nobody knows what was drawn.
    content[1]["top_logprobs"] = [entry("é", -2.0, []), entry("a", -3.0)]
    (row,) = converted(tmp_path, tokenizer, {"prompt": "b", "response": {"choices": [choice]}})
    assert e_acute not in row["teacher_ids"][1]
    del choice["token_ids"]
    assert "got ''" in refusal(tmp_path, tokenizer, {"prompt": "b", "response": {"choices": [choice]}})


def test_words_whose_space_was_lost(tmp_path):
    """Llama 2's tokenizer decodes both tokens as `the`; vLLM 0.32 puts spaces back for some tokenizers."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "\u2581the", "the", "\u2581a", "er", "\u2581"]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    tops = [entry("er", -0.5), entry("the", -2.0), entry("a", -2.5)]
    content = [entry("er", -0.5) | {"top_logprobs": tops}]
    choice = {"index": 0, "logprobs": {"content": content}}
    record = {"prompt": [0], "response": {"choices": [choice]}}
    (row,) = converted(tmp_path, llama, record)
    assert row["teacher_ids"][0][:2] == [4, 3], "`the` is one of two, `a` is one only"
    spaced = completions_choice([" a"])
    rows = converted(tmp_path, llama, record, {"prompt": [0], "response": {"choices": [spaced]}})
    assert rows[0]["teacher_ids"][0][:2] == [4, 2] and rows[1]["input_ids"] == [0, 3]
    tops[1] = entry("the", -2.0, list(b" the"))
    (row,) = converted(tmp_path, llama, record)
    assert row["teacher_ids"][0][:2] == [4, 1]
    content[0] |= {"token": "the", "bytes": None}
    assert "got 'the', which is none of them or several" in refusal(tmp_path, llama, record)


def test_a_template_that_tells_the_time_tells_that_of_the_response(tmp_path):
    tokenizer = merging_tokenizer([], "{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    record = {"messages": [{"role": "user", "content": "a"}], "response": {"choices": [chat_choice(["d"])]}}
    created = datetime(2024, 2, 3, 12)
    (row,) = converted(
        tmp_path,
        tokenizer,
        record | {"response": record["response"] | {"created": int(created.timestamp())}},
    )
    assert tokenizer.decode(row["input_ids"]) == "2024-02-03" + CHATML_PROMPT + "d"
    assert "must say when it was created" in refusal(tmp_path, tokenizer, record)


def test_messages_reach_the_template_as_a_server_hands_them_over(tmp_path):
    """Arguments of calls are JSON in a request and an object in the template; what it does not read is left out."""
    tokenizer = merging_tokenizer([], TOOLS)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
    ]
    request = {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}}
    (row,) = converted(
        tmp_path, tokenizer, {"request": request, "response": {"choices": [chat_choice(["d"])]}}
    )
    assert '<call>{"name": "f", "arguments": {"x": 1}}<|im_end|>' in tokenizer.decode(row["input_ids"])
    for changes, message in (
        ({"continue_final_message": True}, "got one that continues them"),
        ({"add_generation_prompt": False}, "got one that continues them"),
        ({"messages": [{"role": "user", "content": turns[0]["content"] * 2}]}, "got 2 parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type image_url"),
        ({"chat_template": "{{ 'x' }}"}, "one cache has one chat template"),
        ({"messages": ["a"]}, "must be an object"),
    ):
        record = {"request": request | changes, "response": {"choices": [chat_choice(["d"])]}}
        assert message in refusal(tmp_path, tokenizer, record)
    known = {"prompt_token_ids": [10, 11], "choices": [chat_choice(["d"])]}
    (row,) = converted(tmp_path, tokenizer, known)  # a line of `vllm run-batch` has no request
    assert row["input_ids"] == [10, 11, *ids_of(tokenizer, "d")]


def test_malformed_values_are_refused_in_a_line(tmp_path, tokenizer):
    refusing = merging_tokenizer([], "{{ raise_exception('no') }}")
    good = completions_choice([by_id(60)])
    turns = {"messages": [{"role": "user", "content": "a"}]}
    beyond = len(tokenizer)
    for record, message, by in (
        ({"prompt": [1, beyond], "response": {"choices": [good]}}, f"got {beyond}", tokenizer),
        ({"prompt": "a", "response": {"choices": [good | {"token_ids": [-1]}]}}, "got -1", tokenizer),
        ({"prompt": "a", "response": {"choices": [good | {"token_ids": ["9"]}]}}, "got '9'", tokenizer),
        ({"prompt": "a", "response": {"choices": [good | {"token_ids": [5, 6]}]}}, "got 1 for 2", tokenizer),
        (turns | {"response": {"choices": [chat_choice(["\ud83d"])]}}, "must name tokens", tokenizer),
        (turns | {"response": {"choices": [chat_choice(["d"])]}}, "got 'no'", refusing),
    ):
        assert message in refusal(tmp_path, by, record)
    short = completions_choice([by_id(60)])
    short["logprobs"]["token_logprobs"] = []
    assert "must be a chat or completions response" in refusal(
        tmp_path, tokenizer, {"prompt": "a", "response": {"choices": [short]}}
    )
    wild = chat_choice(["d"])
    wild["logprobs"]["content"][0]["bytes"] = [999]
    assert "must be a chat or completions response" in refusal(
        tmp_path, tokenizer, turns | {"response": {"choices": [wild]}}
    )


def with_ids(tokenizer, name: str, tokens: list[int], *, others: list[int]) -> list[dict]:
    """Entries that say ids in a field of this name, and beside them texts that are none's."""

    def said(token: int, logprob: float) -> dict:
        content = list(tokenizer.decode([token]).encode("utf-8", "replace"))
        return {name: token, "token": tokenizer.decode([token]), "bytes": content, "logprob": logprob}

    return [
        said(token, -0.5) | {"top_logprobs": [said(token, -0.5), *(said(other, -2.0) for other in others)]}
        for token in tokens
    ]


@pytest.mark.parametrize("name", ["id", "token_id"])
def test_ids_beside_texts_are_taken(tmp_path, tokenizer, name):
    """llama.cpp's `id`, Fireworks' `token_id`: half a character has no text of its own, and no other name."""
    first, second = (tokenizer.convert_tokens_to_ids(piece) for piece in ("Ã", "©"))
    (letter,) = ids_of(tokenizer, "a")
    content = with_ids(tokenizer, name, [first, letter], others=[second, len(tokenizer) + 7])
    response = {"choices": [{"index": 0, "finish_reason": "stop", "logprobs": {"content": content}}]}
    record = {"prompt": "b", "response": response}
    (row,) = converted(tmp_path, tokenizer, record)
    assert row["input_ids"] == [*ids_of(tokenizer, "b"), first, letter]
    assert [ids[:2] for ids in row["teacher_ids"][:2]] == [[first, second], [letter, second]]
    rest = 1 - math.exp(-0.5) - math.exp(-2.0)  # an id beyond the tokenizer's is in the tail
    assert math.exp(row["teacher_tail"][0]) == pytest.approx(rest)
    content[1][name] = ids_of(tokenizer, "d")[0]
    assert "got 'a' for the id" in refusal(tmp_path, tokenizer, record), "another tokenizer's ids"
    content[1][name] = len(tokenizer)
    assert "must name tokens of the tokenizer, got 'a'" in refusal(tmp_path, tokenizer, record)


def test_fireworks_completions_have_a_list_of_ids(tmp_path, tokenizer):
    first = tokenizer.convert_tokens_to_ids("Ã")
    choice = completions_choice([PARTIAL])
    choice["logprobs"] |= {"token_ids": [first], "top_logprobs": [{PARTIAL: -0.5, "d": -2.0}]}
    (row,) = converted(tmp_path, tokenizer, {"prompt": "b", "response": {"choices": [choice]}})
    assert row["input_ids"][-1] == first and row["teacher_ids"][0][:2] == [first, *ids_of(tokenizer, "d")]


def test_llama_cpp_completions(tmp_path, tokenizer):
    """Its own /completion has neither `choices` nor `usage`; OpenAI's routes have both, with the same entries."""
    prompt, answer = ids_of(tokenizer, "ab"), ids_of(tokenizer, "de")
    entries = with_ids(tokenizer, "id", answer, others=[])
    counts = {"tokens_evaluated": 2, "tokens_predicted": 2, "stop": True, "truncated": False}
    own = {"content": "de", "completion_probabilities": entries, "model": "m", "prompt": "ab", **counts}
    routed = {"choices": [{"index": 0, "logprobs": {"content": entries}}], "usage": usage(2, 2)}
    rows = converted(
        tmp_path, tokenizer, {"prompt": "ab", "response": own}, own, {"prompt": "ab", "response": routed}
    )
    assert [row["input_ids"] for row in rows] == [prompt + answer] * 3 and rows[0] == rows[1] == rows[2]
    sampled = [
        {"id": entry["id"], "token": entry["token"], "prob": 1.0, "top_probs": []} for entry in entries
    ]
    # The token that ends a character has the bytes of the whole one; what began it has no entry.
    half = [entries[0], entries[1] | {"id": tokenizer.convert_tokens_to_ids("©"), "bytes": [0xC3, 0xA9]}]
    for changes, message in (
        ({"stop": False}, "a part of a stream"),
        ({"truncated": True}, "must have the whole prompt"),
        ({"tokens_evaluated": 3}, "where it counted 3"),
        ({"tokens_predicted": 9}, "got 2 of 9 tokens"),
        ({"completion_probabilities": sampled}, "ask without post_sampling_probs"),
        ({"completion_probabilities": half}, "a character of several tokens"),
        ({"completion_probabilities": []}, "an answer of at least a token"),
    ):
        assert message in refusal(tmp_path, tokenizer, own | changes), message


def test_a_few_failed_requests_among_many(tmp_path, tokenizer):
    """Without the option it says how many there are; with it, what was left out, why, and where it began."""
    good = {"prompt": "a", "response": {"choices": [completions_choice([by_id(60)])]}}
    failed = {"custom_id": "7", "response": {"status_code": 429, "body": {"error": {"message": "slow down"}}}}
    counted = {**good, "response": {**good["response"], "usage": usage(9, 1)}}
    records = [good, failed, good, counted, {"response": None, "error": "expired"}, good]
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "{torn", encoding="utf-8")
    out = tmp_path / "out.parquet"
    with pytest.raises(AnnealError) as refused:
        convert_responses([path], tokenizer, out)
    assert str(refused.value) == (
        'responses.jsonl, line 2 must hold a response with choices, got the error {"message": "slow down"}; '
        "2 of 7 lines hold a request that failed: ask for them again, or leave them out with --skip-refused"
    )
    assert not out.exists()
    report = convert_responses([path], tokenizer, out, skip_refused=True)
    assert report.table.num_rows == pq.read_table(out).num_rows == 3
    assert report.text().splitlines()[2] == (
        "lines left out: 4; must hold a response with choices: 2 (first responses.jsonl, line 2); must have the "
        "prompt that the server saw: 1 (first responses.jsonl, line 4); must be JSON: 1 (first responses.jsonl, line 7)"
    )
    with pytest.raises(
        AnnealError, match=r"got none; lines left out: 1; must hold a response with choices: 1"
    ):
        converted(tmp_path, tokenizer, failed, skip_refused=True)
    assert not out.exists()
