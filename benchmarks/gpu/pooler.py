"""`TeacherPooler` on steps as vLLM makes them, beside the work of the model whose prefill it follows.

The model is an output head of its real size, and one layer of its real size standing for all: their products and
attention, without norms, rotary embeddings and the engine's own overhead, so the prefill here is a little faster than a
real one and the ratio a little lower.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from cache_builder.reduction import reduce
from formats.capture_settings import CaptureSettings

from . import engine_stand_ins
from .report import Place, Report
from .timing import device_milliseconds, milliseconds, peak_bytes, synchronisations

engine_stand_ins.install()

from cache_builder.teachers import vllm_pooler  # noqa: E402  (after what it imports)

SECONDS = 50
OTHER_ROWS = (256, 512, 1024, 2048)
"""Rows of logits at a time, beside what is set: whole tiles of a matrix product, and some of them less memory."""
LOGIT_SPREAD = 5.0
LEAST_RATIO = 0.9
"""Capture of an 8B model against its plain prefill: the aim."""


@dataclass(frozen=True)
class Sizes:
    """Of a decoder in the Llama layout."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 128_256

    @property
    def head_dim(self) -> int:
        """Of attention."""
        return self.hidden // self.heads


MODELS = {"8B": Sizes(4096, 14336, 32, 32, 8), "1B": Sizes(2048, 8192, 16, 32, 8)}
TINY = {"8B": Sizes(64, 128, 2, 4, 2, 1003), "1B": Sizes(32, 64, 2, 4, 2, 1003)}


class OutputHead:
    """All of a model that the pooler needs."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        weight_VD = torch.randn(sizes.vocab, sizes.hidden, device=device)
        self.weight_VD = weight_VD.mul_(LOGIT_SPREAD / sizes.hidden**0.5).bfloat16()

    def compute_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """float32 [N, V], as vLLM computes them with `head_dtype` float32."""
        if hidden_ND.device.type == "cuda":
            return torch.mm(hidden_ND, self.weight_VD.t(), out_dtype=torch.float32)
        return hidden_ND.float() @ self.weight_VD.float().t()


def trunk_layer(sizes: Sizes, lengths: list[int], device: torch.device) -> Callable[[], torch.Tensor]:
    """The products and the attention of one layer over a step of rows of equal length."""
    length, tokens = lengths[0], sum(lengths)
    kv_width = sizes.kv_heads * sizes.head_dim

    def weight(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).bfloat16()

    to_qkv, to_hidden = weight(sizes.hidden + 2 * kv_width, sizes.hidden), weight(sizes.hidden, sizes.hidden)
    to_mlp, from_mlp = weight(2 * sizes.intermediate, sizes.hidden), weight(sizes.hidden, sizes.intermediate)
    x_TD = torch.randn(tokens, sizes.hidden, device=device).bfloat16()

    def heads(x: torch.Tensor, number: int) -> torch.Tensor:
        return x.view(len(lengths), length, number, sizes.head_dim).transpose(1, 2)

    def layer() -> torch.Tensor:
        q, k, v = (x_TD @ to_qkv.t()).split([sizes.hidden, kv_width, kv_width], -1)
        grouped = (heads(q, sizes.heads), heads(k, sizes.kv_heads), heads(v, sizes.kv_heads))
        mixed = F.scaled_dot_product_attention(*grouped, is_causal=True, enable_gqa=True)
        y_TD = mixed.transpose(1, 2).reshape(tokens, sizes.hidden) @ to_hidden.t()
        gate, up = (y_TD @ to_mlp.t()).chunk(2, -1)
        return (F.silu(gate) * up) @ from_mlp.t()

    return layer


def step_of(lengths: list[int], vocab: int) -> engine_stand_ins.PoolingMetadata:
    """Rows of these lengths with random labels, every position asked for."""
    rng = np.random.default_rng(0)
    labels = [vllm_pooler.encode_labels(rng.integers(0, vocab, length - 1)) for length in lengths]
    keys = [rng.bytes(32) for _ in lengths]
    return engine_stand_ins.whole_step(lengths, keys, labels, (vllm_pooler.ROW_KEY, vllm_pooler.LABELS_KEY))


def answers(
    pooler: Callable[..., list], hidden_TD: torch.Tensor, step: engine_stand_ins.PoolingMetadata
) -> list:
    """A step to the CPU, as vLLM's runner brings it there."""
    found = [packed.to("cpu", non_blocking=True) for packed in pooler(hidden_TD, step)]
    if hidden_TD.device.type == "cuda":
        torch.cuda.synchronize()
    return found


def run(report: Report, place: Place) -> None:
    """See the module."""
    tokens, short = (128, 4) if place.tiny else (16_384, 160)
    for name, sizes in (TINY if place.tiny else MODELS).items():
        head = OutputHead(sizes, place.device)
        pooler = vllm_pooler.TeacherPooler(head, CaptureSettings(), sizes.vocab)
        if place.device.type == "cuda":
            most = peak_bytes(partial(pooler._rehearse, place.device), place.device)
            report.info(f"{name}: memory of the hardest rows", most / 2**30, "GiB")
        for lengths in ([tokens // 8] * 8, [tokens // short] * short):
            what = f"{name}, {len(lengths)} x {lengths[0]}"
            trunk = sizes.layers * device_milliseconds(
                trunk_layer(sizes, lengths, place.device), place.device, calls=5
            )
            report.info(f"{what}: layers of the model", trunk, "ms per step")
            hidden_TD = torch.randn(sum(lengths), sizes.hidden, device=place.device).bfloat16()
            step = step_of(lengths, sizes.vocab)
            measure(report, place, f"{what}, as set", pooler, hidden_TD, step, trunk)
            for rows in OTHER_ROWS:
                with other_budget(4 * sizes.vocab * rows):
                    measure(report, place, f"{what}, {rows} rows", pooler, hidden_TD, step, trunk)


@contextmanager
def other_budget(size: int) -> Iterator[None]:
    """Other bytes of logits at a time for a while."""
    before = reduce.chunk_bytes
    reduce.chunk_bytes = lambda device: size
    try:
        yield
    finally:
        reduce.chunk_bytes = before


def measure(
    report: Report,
    place: Place,
    what: str,
    pooler: vllm_pooler.TeacherPooler,
    hidden_TD: torch.Tensor,
    step: engine_stand_ins.PoolingMetadata,
    trunk: float,
) -> None:
    """One step: its time, beside the output head alone and the layers; its memory and waits."""
    device, on_gpu = place.device, place.device.type == "cuda"
    head: OutputHead = pooler._model[0]
    rows = reduce.rows_per_chunk(pooler.vocab_size, reduce.chunk_bytes(device))

    def product() -> None:
        for part in hidden_TD.split(rows):
            head.compute_logits(part)

    alone = device_milliseconds(product, device, calls=2)
    taken = milliseconds(lambda: answers(pooler, hidden_TD, step), device, repeats=3)
    report.info(f"{what}: output head alone", alone, "ms per step")
    report.info(f"{what}: pooler", taken, "ms per step")
    ratio = trunk / (trunk + taken)
    if what == "8B, 8 x 2048, as set" and on_gpu:
        report.check(f"{what}: capture over plain prefill", ratio, at_least=LEAST_RATIO)
    else:
        report.info(f"{what}: capture over plain prefill", ratio)
    report.info(f"{what}: beyond the output head", (taken - alone) / alone, "of it")
    if on_gpu:
        memory = peak_bytes(lambda: answers(pooler, hidden_TD, step), device)
        report.info(f"{what}: memory", memory / 2**30, "GiB")
        waits = synchronisations(lambda: pooler(hidden_TD, step), device)
        report.info(f"{what}: waits", waits / math.ceil(len(hidden_TD) / rows), "per chunk")
