"""Packed rows under flash attention, several sequences to a batch: nothing leaks from row to row.

transformers' own path runs; flash-attn's kernels, which need a GPU, are stood in for by plain attention row by row.
"""

import itertools

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash

from trainer.data.collator import LabelAnnealingCollator
from trainer.data.dataset import CachedDataset
from trainer.loading import load_model
from trainer.loop import output_head
from trainer.loop.output_head import OutputHead


def attend(q, k, v, scale):
    """Causal attention of one row, [L, heads, width]."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    k, v = (part.repeat_interleave(groups, 0) for part in (k, v))
    scores = (q @ k.transpose(1, 2)) * (scale or q.shape[-1] ** -0.5)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


class Kernels:
    """What flash-attn exports, and the rows that it was told of."""

    def __init__(self) -> None:
        self.starts: list[list[int] | None] = []

    def fixed(self, q, k, v, softmax_scale=None, causal=False):
        assert causal
        self.starts.append(None)
        return torch.stack([attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])

    def varlen(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
    ):
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        starts = cu_seqlens_q.tolist()
        assert starts[0] == 0 and starts[-1] == len(q)
        assert max(b - a for a, b in itertools.pairwise(starts)) == max_seqlen_q == max_seqlen_k
        self.starts.append(starts)
        rows = [slice(a, b) for a, b in itertools.pairwise(starts)]
        return torch.cat([attend(q[row], k[row], v[row], softmax_scale) for row in rows])


@pytest.fixture
def kernels(monkeypatch):
    found = Kernels()
    given = (found.fixed, found.varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: given)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    return found


def loss_and_gradient(model_dir, cache, attention: str, packs):
    dataset = CachedDataset(cache)
    model = load_model(model_dir, dtype="float32", attn_implementation="eager")
    model.config._attn_implementation = attention
    head = OutputHead.of(model).install()
    batch = LabelAnnealingCollator(packing=True)([[dataset[row] for row in pack] for pack in packs])
    output = head.loss(model, batch)
    output.loss.backward()
    return output.loss.item(), model.model.layers[0].self_attn.q_proj.weight.grad


@pytest.mark.parametrize("packs", ([[0, 1], [2]], [[0], [1], [2]], [[0, 1, 2]]), ids=str)
def test_rows_do_not_see_each_other(packs, kernels, tiny_llama_dir, llama_cache):
    expected, expected_gradient = loss_and_gradient(tiny_llama_dir, llama_cache, "eager", packs)
    loss, gradient = loss_and_gradient(tiny_llama_dir, llama_cache, "flash_attention_2", packs)
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
    lengths = CachedDataset(llama_cache).lengths()
    width = max(sum(lengths[row] for row in pack) for pack in packs)
    starts = []
    for number, pack in enumerate(packs):
        starts += [number * width + int(lengths[pack[:place]].sum()) for place in range(len(pack) + 1)]
        if starts[-1] == (number + 1) * width:
            starts.pop()
    assert kernels.starts == [[*starts, len(packs) * width]] * len(kernels.starts) and kernels.starts


def test_without_being_told_transformers_lets_rows_leak(kernels, monkeypatch, tiny_llama_dir, llama_cache):
    """What the collator's boundaries are for; when this fails, transformers finds them itself."""
    monkeypatch.setattr(output_head, "row_boundaries", lambda batch: {})
    packs = [[0, 1], [2, 3]]
    expected, _ = loss_and_gradient(tiny_llama_dir, llama_cache, "eager", packs)
    loss, _ = loss_and_gradient(tiny_llama_dir, llama_cache, "flash_attention_2", packs)
    assert kernels.starts == [None] * len(kernels.starts) and abs(loss - expected) > 1e-4


def test_other_attention_is_told_nothing(tiny_llama_dir, llama_cache):
    """A model whose forward takes no such arguments trains as before."""
    dataset = CachedDataset(llama_cache)
    model = load_model(tiny_llama_dir, dtype="float32")
    given = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    head = OutputHead.of(model).install()
    head.loss(model, LabelAnnealingCollator(packing=True)([[dataset[0], dataset[1]]]))
    assert set(given) == {"input_ids", "position_ids", "use_cache"}
