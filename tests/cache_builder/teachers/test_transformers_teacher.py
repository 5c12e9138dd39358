"""The reference teacher against the model it wraps, computed densely in float64."""

import dataclasses

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
)
from tiny_models import MAX_LENGTH, VOCAB_SIZE, save_tiny_model
from transformers import AutoModelForCausalLM

from cache_builder import TeacherConfig, TransformersTeacher, make_teacher
from cache_builder.teachers.fast_dtype import resolve_dtype
from cache_builder.teachers.protocol import TeacherError
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow
from formats.errors import ConfigError
from formats.logprobs.topk import TopKLogprobs

CAPTURE = {"positions": "all", "min_prob": 1e-3, "draw_rate": 0}


def config(model, **changes) -> TeacherConfig:
    names = [field.name for field in dataclasses.fields(CaptureSettings)]
    capture = CaptureSettings(**{**CAPTURE, **{n: changes.pop(n) for n in names if n in changes}})
    return TeacherConfig(**{"model": str(model), "capture": capture, "max_length": MAX_LENGTH, **changes})


@pytest.mark.parametrize("name", ["tiny_llama_dir", "tiny_qwen3_dir", "tiny_gemma2_dir"])
@pytest.mark.parametrize("positions", ["all", "loss"])
def test_equals_the_dense_computation(name, positions, request):
    model_dir = request.getfixturevalue(name)
    rows = random_rows([2, 37, 1, 150], VOCAB_SIZE)
    settings = config(model_dir, positions=positions, draw_rate=8)
    teacher = make_teacher("transformers", settings)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    assert teacher.vocab_size == VOCAB_SIZE
    for row, topk in zip(rows, teacher.prefill(rows), strict=True):
        at = row.positions(positions)
        assert len(topk) == len(at)
        dense = dense_logprobs(model, row, at)
        assert_head_is_right(topk, dense, min_prob=1e-3, max_k=128, atol=5e-5)
        assert_tail_is_right(topk, dense, atol=5e-5)
        assert_labels_are_right(topk, dense, row.label_ids(positions), atol=5e-5)
        assert_draws_are_right(topk, dense, atol=5e-5)


def test_draws_cost_nothing_else_and_follow_the_row_and_the_position(tiny_llama_dir):
    rows = random_rows([40, 1, 60], VOCAB_SIZE)
    plain = list(TransformersTeacher(config(tiny_llama_dir)).prefill(rows))
    every = list(TransformersTeacher(config(tiny_llama_dir, draw_rate=8)).prefill(rows))
    loss = TransformersTeacher(config(tiny_llama_dir, draw_rate=8, positions="loss")).prefill(rows)
    assert [topk.draws.rate for topk in plain] == [0] * 3
    assert [topk.draws.rate for topk in every] == [8] * 3, "also where there is no position"
    for row, one, other, selected in zip(rows, plain, every, loss, strict=True):
        assert one.token_ids.tobytes() == other.token_ids.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
        assert one.log_tail_nodes.tobytes() == other.log_tail_nodes.tobytes()
        expected = other.take(row.positions("loss")).draws if len(other) else other.draws
        assert selected.draws.counts.tolist() == expected.counts.tolist()
        assert selected.draws.token_ids.tolist() == expected.token_ids.tolist()
    # The same tokens with another mask, hence another content key.
    masked = TokenRow(rows[2].input_ids, np.roll(rows[2].loss_mask, 1) & (np.arange(60) > 0))
    (again,) = TransformersTeacher(config(tiny_llama_dir, draw_rate=8)).prefill([masked])
    assert again.draws.token_ids.tolist() != every[2].draws.token_ids.tolist()


def test_log_tail_at_any_temperature_from_the_dense_vocabulary(tiny_llama_dir):
    """The contract of the cache: 0.01 nats at the nodes, 0.05 between them."""
    rows = random_rows([200], VOCAB_SIZE)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    dense = dense_logprobs(model, rows[0], rows[0].positions("all"))
    (topk,) = TransformersTeacher(config(tiny_llama_dir, max_k=16)).prefill(rows)
    for temperature, atol in ((0.5, 0.01), (0.75, 0.05), (1, 0.01), (1.5, 0.05), (2, 0.01), (4, 0.01)):
        tails = topk.log_tail(temperature)
        for p in range(len(topk)):
            rest = np.delete(dense[p], topk.token_ids[topk.offsets[p] : topk.offsets[p + 1]]) / temperature
            assert abs(tails[p] - np.log(np.exp(rest).sum())) < atol


def test_rows_do_not_depend_on_their_neighbours(tiny_llama_dir):
    rows = random_rows([64, 5, 200], VOCAB_SIZE)
    teacher = TransformersTeacher(config(tiny_llama_dir))
    together = list(teacher.prefill(rows))
    for row, one in zip(rows[::-1], together[::-1], strict=True):
        (alone,) = teacher.prefill([row])
        assert alone.token_ids.tobytes() == one.token_ids.tobytes()
        assert alone.logprobs.tobytes() == one.logprobs.tobytes()


def test_everything_captured_is_the_whole_distribution(tiny_llama_dir):
    rows = random_rows([20], VOCAB_SIZE)
    (topk,) = TransformersTeacher(config(tiny_llama_dir, min_prob=0.0, max_k=VOCAB_SIZE)).prefill(rows)
    assert (topk.counts == VOCAB_SIZE).all() and np.isneginf(topk.log_tail_nodes).all()
    np.testing.assert_allclose(np.exp(topk.logprobs).reshape(19, -1).sum(-1), 1, atol=1e-5)


def test_a_projection_in_fp32_removes_the_steps_of_bf16(tiny_llama_dir):
    rows = random_rows([100], VOCAB_SIZE)
    wide = TransformersTeacher(config(tiny_llama_dir, dtype="bfloat16"))
    narrow = TransformersTeacher(config(tiny_llama_dir, dtype="bfloat16", head_dtype="model"))
    assert (wide.describe()["head_dtype"], narrow.describe()["head_dtype"]) == ("float32", "bfloat16")
    assert wide.describe()["dtype"] == narrow.describe()["dtype"] == "bfloat16"
    distinct = [len(np.unique(next(t.prefill(rows)).logprobs)) for t in (wide, narrow)]
    total = next(wide.prefill(rows)).num_entries
    assert distinct[0] > 0.99 * total, "fp32 logits hardly ever coincide"
    # Within a position bf16 logits sit on a coarse grid: the differences between neighbours repeat.
    topk: TopKLogprobs = next(narrow.prefill(rows))
    steps = np.concatenate(
        [np.diff(topk.logprobs[a:b]) for a, b in zip(topk.offsets, topk.offsets[1:], strict=False)]
    )
    assert np.allclose(steps * 128, np.round(steps * 128), atol=1e-2), (
        "bf16 logits below 8 are multiples of 1/128"
    )


def test_tied_embeddings_keep_their_type(tiny_gemma2_dir):
    teacher = TransformersTeacher(config(tiny_gemma2_dir, dtype="bfloat16"))
    assert teacher._model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert teacher._model.get_output_embeddings().weight.dtype == torch.float32


def test_the_attention_softcap_is_honoured(tiny_gemma2_dir):
    """transformers' default kernel, sdpa, leaves it out: here the difference is large."""
    rows = random_rows([150], VOCAB_SIZE)
    (topk,) = TransformersTeacher(config(tiny_gemma2_dir)).prefill(rows)
    at = rows[0].positions("all")
    deviation = {}
    for kernel in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            tiny_gemma2_dir, dtype=torch.float32, attn_implementation=kernel
        )
        dense = dense_logprobs(model, rows[0], at)
        likeliest = topk.token_ids[topk.offsets[:-1]]
        deviation[kernel] = np.abs(
            dense[np.arange(len(at)), likeliest] - topk.logprobs[topk.offsets[:-1]]
        ).max()
    assert deviation["eager"] < 5e-5 < 0.05 < deviation["sdpa"], deviation
    with pytest.raises(
        ConfigError, match=r"attn_logit_softcapping \(4\), got sdpa, which ignores it; use eager"
    ):
        TransformersTeacher(config(tiny_gemma2_dir, engine_args={"attn_implementation": "sdpa"}))


def test_refusals(tiny_llama_dir, tmp_path):
    with pytest.raises(
        ConfigError, match=r"max_length must be at most 1024 .*got 2000; pass --max-length 1024"
    ):
        TransformersTeacher(config(tiny_llama_dir, max_length=2000))
    with pytest.raises(ConfigError, match=r"engine arguments of transformers are .*got devise"):
        TransformersTeacher(config(tiny_llama_dir, engine_args={"devise": "cpu"}))
    with pytest.raises(ConfigError, match=r"trust_remote_code must be true or false, got 'ture'"):
        TransformersTeacher(config(tiny_llama_dir, engine_args={"trust_remote_code": "ture"}))
    with pytest.raises(ConfigError, match=r"got revision; use --revision"):
        TransformersTeacher(config(tiny_llama_dir, engine_args={"revision": "main"}))
    with pytest.raises(ConfigError, match=r"must be a model directory, got no config\.json"):
        TransformersTeacher(config(tmp_path))
    teacher = TransformersTeacher(config(tiny_llama_dir, max_length=10))
    with pytest.raises(TeacherError, match=r"at most 10 tokens .*got 11 in row 1"):
        list(teacher.prefill(random_rows([10, 11], VOCAB_SIZE)))
    foreign = TokenRow(np.array([7, VOCAB_SIZE]), np.array([False, True]))
    with pytest.raises(TeacherError, match=f"got {VOCAB_SIZE} in row 0"):
        list(teacher.prefill([foreign]))


def test_a_model_that_overflows_is_reported(tmp_path):
    model_dir = save_tiny_model(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    model.save_pretrained(model_dir)
    teacher = TransformersTeacher(config(model_dir))
    with pytest.raises(TeacherError, match="logits must be finite, got NaN in row 0"):
        list(teacher.prefill(random_rows([8], VOCAB_SIZE)))


def test_auto_takes_the_type_of_the_checkpoint(tmp_path):
    model_dir = save_tiny_model(tmp_path, "llama", dtype="bfloat16")
    teacher = TransformersTeacher(config(model_dir))
    expected = resolve_dtype("auto", "bfloat16", on_cpu=not torch.cuda.is_available(), softcap=None)
    assert teacher.describe()["dtype"] == expected  # what that is on which processor: test_fast_dtype.py
    assert (
        TransformersTeacher(dataclasses.replace(config(model_dir), dtype="float32")).describe()["dtype"]
        == "float32"
    )
    teacher.close()
    teacher.close()
