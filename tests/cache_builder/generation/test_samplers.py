"""The engines as samplers: tokens of the model's own distribution, rows that depend on their seeds alone."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cache_builder import Sampler, SampleRequest, TeacherConfig, make_sampler
from cache_builder.teachers.protocol import TeacherError

PROMPT = np.array([1, 70, 300, 12], np.int32)
MAX_LENGTH, STEP_TOKENS = 64, 96
STOPS = tuple(range(100, 160))


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def sampler(request, tiny_llama_dir) -> Iterator[tuple[str, Sampler]]:
    steps = {"max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": 64} if request.param == "vllm" else {}
    made = make_sampler(
        request.param, TeacherConfig(model=str(tiny_llama_dir), max_length=MAX_LENGTH, engine_args=steps)
    )
    yield request.param, made
    made.close()


def ask(seed: int, **changes) -> SampleRequest:
    settings = {
        "prompt": PROMPT, "max_new_tokens": 20, "stop_tokens": STOPS, "temperature": 1.0, "seed": seed, **changes,
    }  # fmt: skip
    return SampleRequest(**settings)


def written(sampler: Sampler, requests: list[SampleRequest]) -> list[list[int]]:
    found = dict(sampler.sample(requests))
    return [found[number].tolist() for number in range(len(requests))]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_whole_distribution(sampler, tiny_llama_dir, temperature):
    """The second of two tokens, so that the first one was read back: its frequencies against the dense softmax, by
    chi-square over the likeliest tokens and all others (the 0.999 quantile for 5 degrees of freedom is 20.5)."""
    from transformers import AutoModelForCausalLM

    name, engine = sampler
    count = 300 if name == "transformers" else 2000
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(PROMPT[None]).long()).logits[0, -1]
    probs = torch.softmax(logits / temperature, -1).numpy()
    requests = [ask(seed, max_new_tokens=1, temperature=temperature) for seed in range(count)]
    tokens = np.array([ids[0] for ids in written(engine, requests)])
    likeliest = np.argsort(-probs)[:5]
    seen = np.array([(tokens == token).sum() for token in likeliest])
    expected = probs[likeliest] * count
    seen, expected = np.append(seen, count - seen.sum()), np.append(expected, count - expected.sum())
    assert ((seen - expected) ** 2 / expected).sum() < 20.5, (seen, expected)
    assert len(set(tokens.tolist()) - set(likeliest.tolist())) > 5, "the tail is drawn from as well"


def test_a_row_depends_on_its_seed_alone(sampler):
    _, engine = sampler
    requests = [ask(seed, prompt=PROMPT[: 1 + seed % 4]) for seed in range(12)]
    whole = written(engine, requests)
    assert written(engine, requests) == whole
    assert written(engine, requests[::-1]) == whole[::-1]
    assert written(engine, requests[5:7]) == whole[5:7]
    assert len({tuple(ids) for ids in whole}) == 12


def test_prompts_of_more_tokens_than_a_step_takes(sampler):
    """The rows of each prompt alone: one that does not fit into a step waits, since on a CPU vLLM stops where it is
    split."""
    _, engine = sampler
    requests = [ask(seed, prompt=np.tile(PROMPT, 9 + seed % 3), max_new_tokens=6) for seed in range(9)]
    assert sum(len(request.prompt) for request in requests) > 3 * STEP_TOKENS
    assert written(engine, requests) == [written(engine, [request])[0] for request in requests]


def test_a_row_ends_with_a_stop_token_that_is_kept_or_at_its_length(sampler):
    _, engine = sampler
    rows = written(engine, [ask(seed, max_new_tokens=MAX_LENGTH - len(PROMPT)) for seed in range(16)])
    stopped = [ids for ids in rows if ids[-1] in STOPS]
    assert stopped and len(stopped[0]) > 0
    assert all(not set(ids[:-1]) & set(STOPS) for ids in rows)
    assert all(len(ids) == MAX_LENGTH - len(PROMPT) for ids in rows if ids not in stopped)
    endless = written(engine, [ask(seed, stop_tokens=()) for seed in range(4)])
    assert [len(ids) for ids in endless] == [20] * 4


def test_the_model_follows_what_it_wrote(sampler, tiny_llama_dir):
    """Greedy in effect: at a low temperature every token is the likeliest of the dense computation."""
    from transformers import AutoModelForCausalLM

    _, engine = sampler
    (ids,) = written(engine, [ask(0, temperature=0.01, stop_tokens=())])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    row = np.concatenate([PROMPT, ids])
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(row[None]).long()).logits[0].numpy()
    for at, token in enumerate(ids, len(PROMPT) - 1):
        assert logits[at, token] > logits[at].max() - 0.1


def test_describe_is_what_the_engine_runs(sampler):
    name, engine = sampler
    described = engine.describe()
    assert described["engine"] == name and described["dtype"] == described["head_dtype"] == "float32"
    assert engine.vocab_size == 1003 and "reduction" not in described


def test_a_caller_may_stop_early_and_go_on(sampler):
    _, engine = sampler
    requests = [ask(seed) for seed in range(6)]
    whole = written(engine, requests)
    rows = engine.sample(requests)
    next(rows)
    rows.close()
    assert written(engine, requests) == whole


@pytest.mark.vllm
def test_a_closed_sampler_says_so(tiny_llama_dir):
    from cache_builder.teachers.vllm_sampler import VLLMSampler

    engine = VLLMSampler.__new__(VLLMSampler)
    engine._engine = None
    with pytest.raises(TeacherError, match="a closed sampler cannot write"):
        next(engine.sample([ask(0)]))


@pytest.mark.vllm
@pytest.mark.slow
def test_a_build_writes_and_captures_with_vllm(tiny_llama_dir, tmp_path):
    """One engine after the other, in one process; the same command again leaves the cache alone."""
    from cache_builder import BuildConfig, GenerationConfig, build_cache
    from cache_builder.source import open_source
    from formats.cache import TeacherCache

    config = BuildConfig(
        model=str(tiny_llama_dir),
        out=str(tmp_path / "self"),
        generate=GenerationConfig(num_rows=20, seed=4),
        max_length=32,
    )
    assert build_cache(config).complete and build_cache(config).was_complete
    recipe = open_source(config).recipe
    engine = make_sampler("vllm", TeacherConfig(model=str(tiny_llama_dir), max_length=32))
    assert recipe.prompts.turn is not None
    turns = written(engine, [recipe.turn_request(number) for number in range(20)])
    prompts = [recipe.prompts.turn.prompt(np.array(ids)) for ids in turns]
    requests = [recipe.request(number, prompt) for number, prompt in enumerate(prompts)]
    rows = [
        recipe.row(request.prompt, np.array(ids))
        for request, ids in zip(requests, written(engine, requests), strict=True)
    ]
    engine.close()
    assert [row.key for row in TeacherCache(config.out).rows()] == [row.key for row in rows]
