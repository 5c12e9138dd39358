"""Responses as servers write them, made here from a model's own logprobs, come back as those logprobs."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache_builder.tools.convert_responses import convert_responses
from cache_builder.tools.topk_table import PADDING_LOGPROB
from formats.errors import ConfigError, FormatError

TURNS = [{"role": "user", "content": "def add(a, b): naïve"}]
TOP = 20


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()


@pytest.fixture(scope="module")
def contents(tiny_tokenizer) -> list[bytes]:
    """The bytes of every token, by way of what the tokenizers library makes of each character."""
    from tokenizers.pre_tokenizers import ByteLevel

    splitter, table = ByteLevel(add_prefix_space=False, use_regex=False), {}
    high = (0x20000, 0x4FFFF, 0x8FFFF, 0xFFFFF, 0x10FFFF, 0xE000, 0xF000)
    for point in (*range(0x800), *range(0x800, 0xD800, 0x400), *high):
        character = chr(point)
        written = "".join(piece for piece, _ in splitter.pre_tokenize_str(character))
        table |= dict(zip(written, character.encode(), strict=True))
    added = {str(token) for token in tiny_tokenizer.added_tokens_decoder.values()}
    pieces = tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer)))
    return [
        piece.encode()
        if piece in added
        else bytes(table.get(character, ord(character)) for character in piece)
        for piece in pieces
    ]


def logprobs_of(model, ids: list[int]) -> np.ndarray:
    """float64 [L, V]."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1).numpy()


def text_of(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def answer(model, prompt: list[int], length: int = 12) -> list[int]:
    """Tokens as a server would draw them, among them some that are no whole characters."""
    generator, ids = np.random.default_rng(3), list(prompt)
    for number in range(length):
        p = np.exp(logprobs_of(model, ids)[-1])
        ids.append(195 if number == 4 else int(generator.choice(len(p), p=p / p.sum())))
    return ids[len(prompt) :]


def named(token: int, logprob: float, contents: list[bytes]) -> dict:
    return {"token": text_of(contents[token]), "bytes": list(contents[token]), "logprob": logprob}


def chat_response(model, prompt: list[int], completion: list[int], contents, **changed) -> dict:
    logprobs = logprobs_of(model, prompt + completion)
    content = []
    for number, token in enumerate(completion):
        row = logprobs[len(prompt) + number - 1]
        best = np.argsort(-row)[:TOP]
        value = float(row[token]) if token in best else -9999.0
        content.append(
            named(token, value, contents)
            | {"top_logprobs": [named(int(t), float(row[t]), contents) for t in best]}
        )
    choice = {"index": 0, "logprobs": {"content": content}, "finish_reason": "stop"}
    return {"model": "tiny", "choices": [choice], "usage": {"prompt_tokens": len(prompt)}} | changed


def completions_response(
    model, prompt: list[int], completion: list[int], contents, *, echo: bool, by_id: bool
) -> dict:
    logprobs, ids = logprobs_of(model, prompt + completion), prompt + completion
    name = (lambda t: f"token_id:{t}") if by_id else (lambda t: text_of(contents[t]))
    start = 0 if echo else len(prompt)
    tokens, values, tops, offsets, offset = [], [], [], [], 0 if echo else 99
    for at in range(start, len(ids)):
        tokens.append(name(ids[at]))
        offsets.append(offset)
        offset += len(text_of(contents[ids[at]]))
        if at == 0:
            values.append(None)
            tops.append(None)
            continue
        row = logprobs[at - 1]
        best = {int(t) for t in np.argsort(-row)[:5]} | {ids[at]}  # the sampled token is always there
        values.append(float(row[ids[at]]))
        tops.append({name(t): float(row[t]) for t in best})
    logs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
    return {"model": "tiny", "choices": [{"index": 0, "logprobs": logs}]}


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [
        {name: np.asarray(value) for name, value in row.items()} for row in pq.read_table(path).to_pylist()
    ]


def chat_prompt(tokenizer) -> list[int]:
    return list(
        tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=True)["input_ids"]
    )


def assert_row(
    row: dict, logprobs: np.ndarray, prompt: list[int], completion: list[int], entries: int
) -> None:
    """Every position that predicts a token of the answer holds the model's best, and the exact rest."""
    assert row["input_ids"].tolist() == prompt + completion
    assert row["labels"].tolist() == [-100] * len(prompt) + completion
    expected = np.zeros(len(row["input_ids"]), bool)
    expected[len(prompt) - 1 : -1] = True
    assert row["teacher_mask"].tolist() == expected.tolist()
    for at in np.flatnonzero(expected):
        kept = row["teacher_logprobs"][at] > PADDING_LOGPROB
        ids = row["teacher_ids"][at][kept]
        assert len(set(ids.tolist())) == len(ids) >= entries
        np.testing.assert_allclose(row["teacher_logprobs"][at][kept], logprobs[at][ids], rtol=0, atol=1e-5)
        rest = math.log(np.delete(np.exp(logprobs[at]), ids).sum())
        assert row["teacher_tail"][at] == pytest.approx(rest, abs=1e-4)


def test_chat_responses(tmp_path, model, contents, tiny_tokenizer):
    prompt = chat_prompt(tiny_tokenizer)
    completion = answer(model, prompt)
    assert any("\ufffd" in text_of(contents[token]) for token in completion), (
        "no token is part of a character"
    )
    response = chat_response(model, prompt, completion, contents)
    wrapped = {"request": {"body": {"messages": TURNS}}, "response": {"status_code": 200, "body": response}}
    path = write(tmp_path / "chat.jsonl", {"messages": TURNS, "response": response}, wrapped)
    report = convert_responses([path], tiny_tokenizer, tmp_path / "chat.parquet")
    assert (report.models, report.table.num_rows, report.table.k, report.num_unnamed) == (["tiny"], 2, 20, 0)
    assert "identity unverified" in report.text()
    marks = pq.read_schema(tmp_path / "chat.parquet").metadata
    assert json.loads(marks[b"anneal_marks"]) == ["T = 1 unverified", "identity unverified", "one tail"]
    for row in read(tmp_path / "chat.parquet"):
        assert_row(row, logprobs_of(model, prompt + completion), prompt, completion, 20)


@pytest.mark.parametrize("by_id", [True, False])
def test_completions_responses(by_id, tmp_path, model, contents, tiny_tokenizer):
    """By id every token is known; by text those that are no whole characters are in the tail."""
    prompt = list(tiny_tokenizer("def add(a, b):")["input_ids"])
    completion = [
        token for token in answer(model, prompt) if by_id or "\ufffd" not in text_of(contents[token])
    ]
    response = completions_response(model, prompt, completion, contents, echo=False, by_id=by_id)
    path = write(tmp_path / "text.jsonl", {"prompt": "def add(a, b):", "response": response})
    report = convert_responses([path], tiny_tokenizer, tmp_path / "text.parquet", k=6)
    (row,) = read(tmp_path / "text.parquet")
    logprobs = logprobs_of(model, prompt + completion)
    assert_row(row, logprobs, prompt, completion, 5 if by_id else 1)
    texts = [
        {text_of(contents[t]) for t in np.argsort(-logprobs[at])[:5]}
        for at in range(len(prompt) - 1, len(logprobs) - 1)
    ]
    unnamed = sum("\ufffd" in text for position in texts for text in position)
    assert report.num_unnamed == (0 if by_id else unnamed)


def test_an_echoed_prompt_has_a_teacher_and_no_loss(tmp_path, model, contents, tiny_tokenizer):
    prompt = list(tiny_tokenizer("def add(a, b):")["input_ids"])
    completion = answer(model, prompt, 4)
    response = completions_response(model, prompt, completion, contents, echo=True, by_id=True)
    text = "".join(text_of(contents[token]) for token in prompt)
    path = write(tmp_path / "echo.jsonl", {"prompt": text, "response": response})
    convert_responses([path], tiny_tokenizer, tmp_path / "echo.parquet", k=6)
    (row,) = read(tmp_path / "echo.parquet")
    assert row["input_ids"].tolist() == prompt + completion
    assert row["labels"].tolist() == [-100] * len(prompt) + completion
    assert row["teacher_mask"].tolist() == [True] * (len(prompt) + len(completion) - 1) + [False]


def test_entries_above_k_join_the_tail(tmp_path, model, contents, tiny_tokenizer):
    prompt = chat_prompt(tiny_tokenizer)
    completion = answer(model, prompt, 4)
    path = write(
        tmp_path / "chat.jsonl",
        {"messages": TURNS, "response": chat_response(model, prompt, completion, contents)},
    )
    convert_responses([path], tiny_tokenizer, tmp_path / "three.parquet", k=3)
    (row,) = read(tmp_path / "three.parquet")
    assert row["teacher_ids"].shape[1] == 3
    assert_row(row, logprobs_of(model, prompt + completion), prompt, completion, 3)


def kl(row: dict, logprobs: np.ndarray) -> float:
    """KL(file || model) over the entries and one tail, the check before a first step."""
    total, count = 0.0, 0
    for at in np.flatnonzero(row["teacher_mask"]):
        kept = row["teacher_logprobs"][at] > PADDING_LOGPROB
        ids = row["teacher_ids"][at][kept]
        ours = np.append(logprobs[at][ids], math.log(np.delete(np.exp(logprobs[at]), ids).sum()))
        theirs = np.append(row["teacher_logprobs"][at][kept], row["teacher_tail"][at])
        total, count = total + float((np.exp(theirs) * (theirs - ours)).sum()), count + 1
    return total / count


def test_the_first_kl_proves_the_teacher_or_refuses_it(
    tmp_path, model, contents, tiny_tokenizer, tiny_qwen3_dir
):
    from transformers import AutoModelForCausalLM

    prompt = chat_prompt(tiny_tokenizer)
    completion = answer(model, prompt)
    path = write(
        tmp_path / "chat.jsonl",
        {"messages": TURNS, "response": chat_response(model, prompt, completion, contents)},
    )
    convert_responses([path], tiny_tokenizer, tmp_path / "chat.parquet")
    (row,) = read(tmp_path / "chat.parquet")
    assert abs(kl(row, logprobs_of(model, prompt + completion))) < 1e-6
    other = AutoModelForCausalLM.from_pretrained(tiny_qwen3_dir).eval()
    assert kl(row, logprobs_of(other, prompt + completion)) > 0.5


def without(record: dict, *path) -> dict:
    copy = json.loads(json.dumps(record))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return copy


def test_bad_responses(tmp_path, model, contents, tiny_tokenizer):
    """One line each: where, the rule, what was got; and no file."""
    prompt = chat_prompt(tiny_tokenizer)
    completion = answer(model, prompt, 3)
    good = {"messages": TURNS, "response": chat_response(model, prompt, completion, contents)}
    positive = json.loads(json.dumps(good))
    positive["response"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = 0.5
    stranger = json.loads(json.dumps(good))
    stranger["response"]["choices"][0]["logprobs"]["content"][1] |= {"token": "日本語です", "bytes": None}
    bad = {
        "must hold a response with choices": {"messages": TURNS},
        "must have logprobs, got none": without(good, "response", "choices", 0, "logprobs"),
        "must hold messages, a prompt": without(good, "messages"),
        "where it counted 99": good | {"response": good["response"] | {"usage": {"prompt_tokens": 99}}},
        "logprobs of at most 0": positive,
        "must name tokens of the tokenizer, got '日本語です'": stranger,
        "must be a chat or completions response": without(
            good, "response", "choices", 0, "logprobs", "content", 0, "token"
        ),
        "must have top_logprobs": json.loads(json.dumps(good).replace("top_logprobs", "best")),
    }
    for message, record in bad.items():
        path = write(tmp_path / "bad.jsonl", good, record)
        with pytest.raises(FormatError, match=rf"bad\.jsonl, line 2 .*{message}"):
            convert_responses([path], tiny_tokenizer, tmp_path / "bad.parquet")
        assert not (tmp_path / "bad.parquet").exists()
    (tmp_path / "bad.jsonl").write_text("{nothing")
    with pytest.raises(FormatError, match="line 1 must be JSON"):
        convert_responses([tmp_path / "bad.jsonl"], tiny_tokenizer, tmp_path / "bad.parquet")
    with pytest.raises(ConfigError, match="k must be from 1"):
        convert_responses([path], tiny_tokenizer, tmp_path / "bad.parquet", k=5000)


def test_the_command(tmp_path, model, contents, tiny_tokenizer, tiny_llama_dir, anneal):
    prompt = chat_prompt(tiny_tokenizer)
    record = {"messages": TURNS, "response": chat_response(model, prompt, answer(model, prompt, 3), contents)}
    path = write(tmp_path / "chat.jsonl", record)
    code, out, err = anneal(
        "cache", "convert", path, "--tokenizer", tiny_llama_dir, "--parquet", tmp_path / "a.parquet"
    )
    assert (
        (code, err.count("error")) == (0, 0)
        and "1 row of" in out
        and "teacher: tiny, by the server's word" in out
    )
    path.write_text(path.read_text() + json.dumps({"error": "expired"}) + "\n")
    words = ["cache", "convert", path, "--tokenizer", tiny_llama_dir, "--parquet", tmp_path / "c.parquet"]
    code, _, err = anneal(*words)
    assert code == 1 and "1 of 2 lines hold a request that failed" in err and err.count("\n") == 1
    code, out, _ = anneal(*words, "--skip-refused")
    assert code == 0 and "1 row of" in out and "lines left out: 1;" in out
    code, _, err = anneal(
        "cache", "convert", path, "--compression", "y", "--skip-refused", "--parquet", tmp_path / "b.parquet"
    )
    assert code == 1 and "--skip-refused is for responses" in err
    for words in ([], ["--tokenizer", "x", "--compression", "y"]):
        code, _, err = anneal("cache", "convert", path, *words, "--parquet", tmp_path / "b.parquet")
        assert code == 1 and "convert takes --compression" in err and err.count("\n") == 1


def test_tokens_of_other_vocabularies(tiny_tokenizer):
    """Byte fallback and spaces as sentencepiece writes them; several ids of one text are none."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from cache_builder.tools.response_tokens import TokenIds

    pieces = ["<s>", "\u2581the", "the", "<0xC3>", "<0xA9>", "é", "\u2581", " "]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    ids = TokenIds(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"))
    assert [ids.of(text) for text in (" the", "the", "é", "<s>", "none", "\ufffd")] == [
        1,
        2,
        5,
        0,
        None,
        None,
    ]
    assert ids.of("\ufffd", [0xC3]) == 3 and ids.of("bytes:\\xa9") == 4 and ids.of("token_id:2") == 2
    assert ids.of(" ") is None and ids.of("token_id:99") is None
