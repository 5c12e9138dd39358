"""Real vLLM on the CPU against transformers and against the dense computation.

Chunked prefill is exercised throughout: 200 tokens per step, rows of up to 801.  Gemma 2 runs in fp32 without
its attention softcap, which vLLM's CPU kernel applies in bf16 only.  Noise floors, in nats:
  fp32   2e-4 on every logprob and every tail node;
  bf16   the mean deviation from fp32 is at most 1.3 times that of transformers' own bf16.
Every engine draws from the tails; two of them draw nearly the same tokens in fp32, as far as noise leaves the
points of a position on the same tokens.
"""

import numpy as np
import pytest
import torch
from teacher_agreement import (
    assert_draws_are_right,
    assert_head_is_right,
    assert_labels_are_right,
    assert_tail_is_right,
    dense_logprobs,
    random_rows,
    shared_deviation,
    tail_deviation,
)
from tiny_models import MAX_LENGTH, VOCAB_SIZE

from cache_builder import TeacherConfig, TransformersTeacher, VLLMTeacher
from cache_builder.teachers.protocol import TeacherError
from cache_builder.tools.deviation import compare
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from formats.logprobs.tail_draws import starts
from formats.logprobs.topk import TopKLogprobs

pytestmark = pytest.mark.vllm

SLOW = pytest.mark.slow
FP32_MODELS = [
    "tiny_llama_dir",
    pytest.param("tiny_qwen3_dir", marks=SLOW),
    pytest.param("tiny_gemma2_uncapped_attention_dir", marks=SLOW),
]
BF16_MODELS = [
    pytest.param("tiny_llama_dir", marks=SLOW),
    pytest.param("tiny_qwen3_dir", marks=SLOW),
    "tiny_gemma2_dir",
]
"""An engine each: one in fp32 and one in bf16 are started in every run."""
LENGTHS = [2, 37, 1, 300, 5, 801, 199, 200, 201, 64, 1, 3]
BATCH = {"max_num_batched_tokens": "200", "max_num_seqs": "8"}
FP32_ATOL = 2e-4
DRAW_RATE = 8


def config(model, dtype: str = "float32", positions: str = "all", **changes) -> TeacherConfig:
    capture = CaptureSettings(positions=positions, min_prob=1e-3, draw_rate=DRAW_RATE)
    settings = {"model": str(model), "dtype": dtype, "capture": capture, "max_length": MAX_LENGTH}
    return TeacherConfig(**{**settings, **changes})


def reference_capture(model, dtype: str, rows: list[TokenRow]) -> list[TopKLogprobs]:
    return list(TransformersTeacher(config(model, dtype)).prefill(rows))


@pytest.fixture(scope="module", params=FP32_MODELS)
def fp32(request):
    """One engine per model: (teacher, model directory, rows, their capture)."""
    model = request.getfixturevalue(request.param)
    rows = random_rows(LENGTHS, VOCAB_SIZE)
    with VLLMTeacher(config(model, engine_args=BATCH)) as teacher:
        yield teacher, model, rows, list(teacher.prefill(rows))


def test_fp32_equals_the_dense_computation(fp32):
    from transformers import AutoModelForCausalLM

    _, model_dir, rows, captured = fp32
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for row, topk in zip(rows, captured, strict=True):
        positions = row.positions("all")
        assert len(topk) == len(positions)
        dense = dense_logprobs(model, row, positions)
        assert_head_is_right(topk.validate(), dense, min_prob=1e-3, max_k=128, atol=FP32_ATOL)
        assert_tail_is_right(topk, dense, atol=FP32_ATOL)
        assert_labels_are_right(topk, dense, row.label_ids("all"), atol=FP32_ATOL)
        assert_draws_are_right(topk, dense, atol=FP32_ATOL)


def test_fp32_equals_transformers(fp32):
    _, model_dir, rows, captured = fp32
    reference = reference_capture(model_dir, "float32", rows)
    for mine, theirs in zip(captured, reference, strict=True):
        if len(mine) == 0:
            assert len(theirs) == 0
            continue
        _, largest, shared = shared_deviation(mine, theirs)
        assert largest < FP32_ATOL and shared > 0.99
        assert tail_deviation(mine, theirs).max() < FP32_ATOL
        np.testing.assert_allclose(mine.label_logprobs, theirs.label_logprobs, atol=FP32_ATOL)
        same = [p for p in range(len(mine)) if ids_of(mine, p) == ids_of(theirs, p)]
        assert len(same) > 0.9 * len(mine)


def test_fp32_draws_are_those_of_transformers(fp32):
    _, model_dir, rows, captured = fp32
    reference = reference_capture(model_dir, "float32", rows)
    found = compare(TopKLogprobs.concatenate(captured), TopKLogprobs.concatenate(reference))
    assert found.num_draws > 1000 and found.draws.max() < FP32_ATOL
    assert len(found.draws) > 0.9 * found.num_draws, len(found.draws) / found.num_draws


def test_as_many_draws_as_key_and_position_say(fp32):
    """Starts are of the row and the position in it, whatever step of a chunked prefill a position was in."""
    _, _, rows, captured = fp32
    for row, topk in zip(rows, captured, strict=True):
        lengths = DRAW_RATE * np.exp(topk.log_tail(4 / 3).astype(np.float64))
        points = np.maximum(np.ceil(lengths - starts(row.key, row.positions("all"))), 0)
        sure = np.abs(lengths - starts(row.key, row.positions("all")) - np.rint(lengths)) > 1e-3
        assert (topk.draws.counts == points)[sure].all() and (len(row) < 9 or sure.mean() > 0.9)


def ids_of(topk: TopKLogprobs, p: int) -> set[int]:
    return set(topk.token_ids[topk.offsets[p] : topk.offsets[p + 1]].tolist())


def test_the_same_rows_give_the_same_bits_again(fp32):
    teacher, _, rows, captured = fp32
    for one, other in zip(captured, teacher.prefill(iter(rows)), strict=True):
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
        assert one.log_tail_nodes.tobytes() == other.log_tail_nodes.tobytes()
        assert one.label_logprobs.tobytes() == other.label_logprobs.tobytes()
        assert one.draws.offsets.tobytes() == other.draws.offsets.tobytes()
        assert one.draws.token_ids.tobytes() == other.draws.token_ids.tobytes()
        assert one.draws.logprobs.tobytes() == other.draws.logprobs.tobytes()


def test_a_prefill_in_chunks_draws_what_a_whole_one_draws(fp32, monkeypatch):
    """Rows of 300, 801 and 201 tokens take two to five steps of 200 alone, and are cut elsewhere together."""
    teacher, _, rows, captured = fp32
    alone = [topk for row in rows for topk in teacher.prefill([row])]
    found = compare(TopKLogprobs.concatenate(captured), TopKLogprobs.concatenate(alone))
    assert len(found.draws) > 0.98 * found.num_draws > 1000
    assert found.draws.max() < FP32_ATOL and found.labels.max() < FP32_ATOL


def test_waves_change_nothing_but_rounding(fp32, monkeypatch):
    teacher, _, rows, captured = fp32
    monkeypatch.setattr(teacher, "_wave_tokens", 300)
    for one, other in zip(captured, teacher.prefill(rows), strict=True):
        assert one.counts.tolist() == other.counts.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=FP32_ATOL)
        np.testing.assert_allclose(one.label_logprobs, other.label_logprobs, atol=FP32_ATOL)


def test_a_wave_that_was_sent_ahead_gives_the_bits_of_one_alone(fp32, monkeypatch):
    """It waits in the engine until the wave before has ended: nothing of the two shares a step."""
    teacher, _, rows, _ = fp32
    monkeypatch.setattr(teacher, "_wave_tokens", 300)
    waves = [[member.row for member in wave] for wave in teacher._waves(rows)]
    assert len(waves) > 4
    alone = [topk for wave in waves for topk in teacher.prefill(wave)]
    for one, other in zip(alone, teacher.prefill(rows), strict=True):
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
        assert one.log_tail_nodes.tobytes() == other.log_tail_nodes.tobytes()
        assert one.draws.logprobs.tobytes() == other.draws.logprobs.tobytes()


def test_loss_positions_are_those_of_all_that_the_mask_selects(fp32, monkeypatch):
    teacher, _, rows, captured = fp32
    monkeypatch.setattr(teacher, "config", config(teacher.config.model, positions="loss"))
    empty = TokenRow(rows[0].input_ids, np.zeros(len(rows[0]), dtype=bool))
    results = list(teacher.prefill([*rows, empty]))
    assert len(results[-1]) == 0, "a row without loss has no positions"
    for row, every, selected in zip(rows, captured, results, strict=False):
        expected = every.take(row.positions("loss")) if len(every) else every
        assert selected.counts.tolist() == expected.counts.tolist()
        assert selected.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(selected.logprobs, expected.logprobs, atol=FP32_ATOL)
        np.testing.assert_allclose(selected.log_tail_nodes, expected.log_tail_nodes, atol=FP32_ATOL)
        np.testing.assert_allclose(selected.label_logprobs, expected.label_logprobs, atol=FP32_ATOL)
        if len(expected):
            found = compare(selected, expected)
            assert len(found.draws) >= 0.9 * found.num_draws - 1 and (found.draws < FP32_ATOL).all()


def test_rows_the_model_cannot_take_are_refused_and_the_engine_lives_on(fp32):
    teacher, _, rows, captured = fp32
    good = rows[1]
    too_long = random_rows([MAX_LENGTH + 1], VOCAB_SIZE)[0]
    with pytest.raises(TeacherError, match=rf"at most {MAX_LENGTH} tokens.*got {MAX_LENGTH + 1} in row 1"):
        list(teacher.prefill([good, too_long]))
    foreign = TokenRow(np.array([7, VOCAB_SIZE, 8]), np.array([False, True, True]))
    with pytest.raises(TeacherError, match=f"from 0 to {VOCAB_SIZE - 1}.*got {VOCAB_SIZE} in row 0"):
        list(teacher.prefill([foreign]))
    again = list(teacher.prefill([good]))
    np.testing.assert_allclose(again[0].logprobs, captured[1].logprobs, atol=FP32_ATOL)


def test_a_caller_may_stop_early(fp32, monkeypatch):
    teacher, _, rows, captured = fp32
    monkeypatch.setattr(teacher, "_wave_tokens", 300)
    stream = teacher.prefill(rows)
    assert len(next(stream)) == len(captured[0])
    stream.close()
    again = list(teacher.prefill(rows))
    assert [len(one) for one in again] == [len(one) for one in captured]


def test_nothing_to_do(fp32):
    teacher, *_ = fp32
    assert list(teacher.prefill([])) == []
    nothing = list(teacher.prefill(random_rows([1, 1], VOCAB_SIZE)))
    assert [(len(one.draws), one.draws.rate) for one in nothing] == [(0, DRAW_RATE)] * 2


def test_describe_is_what_the_engine_runs(fp32):
    teacher, *_ = fp32
    described = teacher.describe()
    assert described["engine"] == "vllm" and "0.32" in described["engine_version"]
    assert (described["dtype"], described["head_dtype"]) == ("float32", "float32")
    assert (described["max_num_batched_tokens"], described["max_num_seqs"]) == (200, 8)
    assert teacher.vocab_size == VOCAB_SIZE


@pytest.mark.slow
def test_two_tensor_parallel_workers_agree_with_the_dense_computation(tiny_llama_dir):
    """1003 tokens do not divide by two: every worker pads its part of the vocabulary."""
    from transformers import AutoModelForCausalLM

    rows = random_rows(LENGTHS[:6], VOCAB_SIZE)
    arguments = {**BATCH, "tensor_parallel_size": 2}
    with VLLMTeacher(config(tiny_llama_dir, engine_args=arguments)) as teacher:
        assert teacher.describe()["tensor_parallel_size"] == 2
        captured = list(teacher.prefill(rows))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    for row, topk in zip(rows, captured, strict=True):
        dense = dense_logprobs(model, row, row.positions("all"))
        assert_head_is_right(topk.validate(), dense, min_prob=1e-3, max_k=128, atol=FP32_ATOL)
        assert_tail_is_right(topk, dense, atol=FP32_ATOL)
        assert_labels_are_right(topk, dense, row.label_ids("all"), atol=FP32_ATOL)
        assert_draws_are_right(topk, dense, atol=FP32_ATOL)


@pytest.mark.parametrize("name", BF16_MODELS)
def test_bf16_is_within_the_noise_of_bf16(name, request):
    model = request.getfixturevalue(name)
    rows = random_rows([2, 37, 300, 201], VOCAB_SIZE)
    exact = TopKLogprobs.concatenate(reference_capture(model, "float32", rows))
    reference = TopKLogprobs.concatenate(reference_capture(model, "bfloat16", rows))
    with VLLMTeacher(config(model, "bfloat16", engine_args=BATCH)) as teacher:
        assert teacher.describe()["head_dtype"] == "float32"
        captured = TopKLogprobs.concatenate(list(teacher.prefill(rows))).validate()
    mine, _, shared = shared_deviation(captured, exact)
    theirs, _, reference_shared = shared_deviation(reference, exact)
    assert mine < 1.3 * theirs + 1e-4, (mine, theirs)
    assert shared > reference_shared - 0.03
    # Tails, at T = 1: the logarithm of the mass outside the head, compared where the mass is comparable.
    one = captured.log_tail_nodes[:, 4]
    assert (
        np.abs(one - exact.log_tail_nodes[:, 4]).mean()
        < 1.3 * np.abs(reference.log_tail_nodes[:, 4] - exact.log_tail_nodes[:, 4]).mean() + 1e-3
    )
    labels = np.abs(captured.label_logprobs - exact.label_logprobs).mean()
    assert labels < 1.3 * np.abs(reference.label_logprobs - exact.label_logprobs).mean() + 1e-4
    drawn, reference_drawn = compare(captured, exact).draws, compare(reference, exact).draws
    assert drawn.mean() < 1.3 * reference_drawn.mean() + 1e-3
    assert len(drawn) > 0.7 * len(reference_drawn) > 70


def test_an_attention_softcap_that_would_be_left_out_is_refused(tiny_gemma2_dir):
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping \(4 in this model\) in bfloat16 only"):
        VLLMTeacher(config(tiny_gemma2_dir, "float32"))


def save_successor_model(directory, tokenizer_dir):
    """A Llama set by hand: after token t it predicts t + 1 modulo the vocabulary, whatever came before."""
    from tiny_models import save_tiny_model
    from transformers import AutoModelForCausalLM

    save_tiny_model(directory, "llama", tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        embedding = torch.randn(VOCAB_SIZE, 128, generator=torch.Generator().manual_seed(1))
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(torch.roll(embedding, 1, dims=0))  # row j looks for the embedding of j - 1
        for layer in model.model.layers:  # both layers add nothing to the residual stream
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("teacher_class", [TransformersTeacher, pytest.param(VLLMTeacher, marks=SLOW)])
def test_position_i_predicts_token_i_plus_1(teacher_class, tmp_path, tiny_tokenizer_dir):
    model = save_successor_model(tmp_path / "successor", tiny_tokenizer_dir)
    rows = random_rows([2, 50, 300, 450], VOCAB_SIZE, seed=3)
    args = BATCH if teacher_class is VLLMTeacher else {}
    for positions in ("all", "loss") if teacher_class is TransformersTeacher else ("loss",):
        teacher = teacher_class(config(model, positions=positions, engine_args=args))
        try:
            for row, topk in zip(rows, teacher.prefill(rows), strict=True):
                at = row.positions(positions)
                likeliest = topk.token_ids[topk.offsets[:-1]]
                assert likeliest.tolist() == ((row.input_ids[at] + 1) % VOCAB_SIZE).tolist()
                assert (topk.logprobs[topk.offsets[:-1]] > np.log(0.99)).all()
        finally:
            teacher.close()
