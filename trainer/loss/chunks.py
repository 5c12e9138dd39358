"""The walk over chunks: which rows count, how many at a time, and what is added up on the way.

A row counts when it has a label or a teacher target; no other row is ever projected onto the vocabulary. For
each chunk of the rows that count: project, turn the logits into their own gradient in place, multiply back
into the gradients of hidden states and output head, reuse the buffer. Nothing of size [rows, V] exists; the
peak is one chunk, the gradient of the output head, and the gradient of the hidden states that count.

The host reads from the device once per call (`plan_rows`), and the loop itself never waits for it.

Precision: the projection runs in the compute dtype (the autocast dtype, else the dtype of the inputs), the
softmax arithmetic in fp32 (fp64 for fp64 inputs). The output head's gradient is accumulated over the chunks
in fp32 whatever the compute dtype (trainer/loss/accumulate.py); it costs 4 bytes per parameter of the output
head until the backward pass hands it over in the weight's dtype.

N: rows, M: rows that count, C: rows of a chunk, D: hidden size, V: vocabulary without padding, P: positions
with teacher targets.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from formats.disk.token_row import IGNORED
from formats.errors import ConfigError, one_line
from trainer.config import LOSS_KERNELS
from trainer.data.teacher_batch import TeacherBatch
from trainer.loss.accumulate import add_product
from trainer.loss.kl import RowWeights, process_chunk
from trainer.loss.logits import ChunkLogits, Projection, TorchLogits, arithmetic_dtype
from trainer.loss.targets import TeacherTargets, teacher_targets, value_rules
from trainer.loss.token_measures import TokenMeasures
from trainer.loss.token_weights import NO_EXTRAS, CrossEntropy, RowExtras

# Bytes of vocabulary-sized buffers per chunk. The output head's gradient is read and written once per chunk,
# which on a CPU costs little next to the multiplications from about 256 rows on (docs/derivations.md).
CPU_CHUNK_BYTES = 64 << 20
OTHER_CHUNK_BYTES = 256 << 20
MIN_CHUNK_ROWS = 256
# A GPU multiplies so much faster than it reads that it takes some 2,000 rows until the head's gradient costs a
# hundredth of a step; half of them where it has none. More rows gain next to nothing, and memory grows with them.
CUDA_CHUNK_ROWS = 2048
CUDA_LARGEST_SHARE = 8
"""The buffers never take more than one part in so many of the GPU's memory."""
CUDA_ROW_TILE = 256


def logits_type(
    kernel: str, compute: torch.dtype, device: torch.device | str, extras: RowExtras = NO_EXTRAS
) -> type[ChunkLogits]:
    """Who does the work on whole rows of logits: the `torch` or `triton` one, or by `auto` the latter where it can.
    fp64 is always PyTorch's.

    Args:
        extras: what the cross-entropy needs of the rows beside sums, which only PyTorch gives.

    Raises:
        ConfigError: there is no such kernel, or it cannot run here.
    """
    if kernel not in LOSS_KERNELS:
        raise ConfigError(f"the loss kernel must be one of {', '.join(LOSS_KERNELS)}, got {kernel!r}")
    device = torch.device(device)
    if kernel == "auto" and (device.type != "cuda" or extras != NO_EXTRAS or why_no_triton(device, compute)):
        kernel = "torch"
    if kernel == "torch":
        return TorchLogits
    try:
        from trainer.loss.triton_passes import INTERPRETED, TritonLogits
    except ImportError as error:
        raise ConfigError(
            f"the loss kernel triton needs the package triton, got: {error}; "
            "install it or use the loss kernel torch"
        ) from error
    if device.type != "cuda" and not INTERPRETED:
        raise ConfigError(
            f"the loss kernel triton needs a CUDA device, got {device.type}; use the loss kernel torch"
        )
    return TorchLogits if compute == torch.float64 else TritonLogits


@cache
def why_no_triton(device: torch.device, compute: torch.dtype) -> str | None:
    """Why the Triton kernels do not run on a device; None where they do. Tried once per process, on two rows: they need
    the package, a C compiler, and a GPU that Triton knows.
    """
    if compute == torch.float64:
        return None  # it is PyTorch's
    try:
        from trainer.loss.triton_passes import try_kernels

        return try_kernels(device, compute)
    except Exception as error:  # a missing package or compiler, a refused target: Triton has many of its own
        return f"{type(error).__name__}: {one_line(error)}"


def rows_per_chunk(
    vocab_size: int,
    num_buffers: float,
    device_type: str,
    device_bytes: int | None = None,
    *,
    trained: bool = True,
) -> int:
    """How many rows to project at a time, from what their buffers take.

    Args:
        num_buffers: buffers of four bytes per logit, as `ChunkLogits.num_buffers` counts them.
        device_bytes: the whole memory of a CUDA device; None for any other device. The whole, not what is
            free: the same run has the same chunks, and so the same bits.
        trained: whether the output head wants a gradient, which every chunk reads and writes.
    """
    row_bytes = 4 * vocab_size * num_buffers
    if device_bytes is not None:
        wanted = CUDA_CHUNK_ROWS if trained else CUDA_CHUNK_ROWS // 2
        rows = min(wanted, int(device_bytes / CUDA_LARGEST_SHARE / row_bytes))
        return max(CUDA_ROW_TILE, rows // CUDA_ROW_TILE * CUDA_ROW_TILE)
    budget = CPU_CHUNK_BYTES if device_type == "cpu" else OTHER_CHUNK_BYTES
    return max(MIN_CHUNK_ROWS, int(budget // row_bytes))


def default_chunk_size(
    projection: Projection, beta: float, kind: type[ChunkLogits], *, trained: bool = True
) -> int:
    """Rows per chunk for this output head on the device where it is; `trained` as in `rows_per_chunk`."""
    device = projection.weight_VD.device
    device_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    num_buffers = kind.num_buffers(projection, beta)
    return rows_per_chunk(len(projection.weight_VD), num_buffers, device.type, device_bytes, trained=trained)


@dataclass(frozen=True)
class Chunk:
    """A run of the rows that count: start and stop of rows, positions, entries, draws; host integers."""

    rows: tuple[int, int]
    positions: tuple[int, int] = (0, 0)
    entries: tuple[int, int] = (0, 0)
    draws: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class RowPlan:
    """The rows that count and how they are walked."""

    rows_M: torch.Tensor
    """int64: indices into the N rows, ascending."""
    labels_M: torch.Tensor
    """int64: their labels, IGNORED where a row has only a teacher target."""
    chunks: tuple[Chunk, ...]
    targets: TeacherTargets | None

    @property
    def num_labelled(self) -> torch.Tensor:
        """Rows with cross-entropy, a 0-d tensor."""
        return (self.labels_M != IGNORED).sum()

    def targets_of(self, chunk: Chunk) -> TeacherTargets | None:
        """The chunk's share of the targets; None where it has no position."""
        if self.targets is None or chunk.positions[0] == chunk.positions[1]:
            return None
        return self.targets.slice(chunk.rows[0], chunk.positions, chunk.entries, chunk.draws)


def plan_rows(
    labels_N: torch.Tensor,
    teacher: TeacherBatch | None,
    *,
    vocab_size: int,
    chunk_size: int,
    dtype: torch.dtype,
    weigh_masked: bool = False,
) -> RowPlan:
    """Select the rows that count and cut them into chunks of nearly equal size, at most `chunk_size` rows.

    One transfer answers everything that the host has to know: whether all values keep the rules, how many
    rows count, and where the chunks cut positions, entries and draws. `weigh_masked` as in `teacher_targets`.

    Raises:
        ConfigError: a label is outside the vocabulary.
        FormatError: teacher rows are not ascending or not in the batch, or a token is not in the vocabulary.
    """
    num_rows, device = labels_N.numel(), labels_N.device
    if teacher is not None and len(teacher) == 0:
        teacher = None
    rules = value_rules(labels_N, teacher, vocab_size)
    # One row more than there are, for teacher rows that break the rule: nothing is known to keep it yet.
    counts_N1 = torch.zeros(num_rows + 1, dtype=torch.bool, device=device)
    counts_N1[:num_rows] = labels_N != IGNORED
    if teacher is not None:
        rows_P = teacher.rows.clamp(0, num_rows)
        counts_N1.index_fill_(0, rows_P, True)
    rank_N1 = counts_N1.cumsum(0)  # the m-th row that counts has rank m
    total = rank_N1[-1]
    to_host = [torch.stack([rule.broken.any() for rule in rules]).long(), total[None]]
    most_chunks = math.ceil(num_rows / chunk_size)
    if teacher is not None:
        place_P = rank_N1[rows_P] - 1
        num_chunks = (total + chunk_size - 1) // chunk_size
        cuts = torch.arange(most_chunks + 1, device=device).minimum(num_chunks)
        edges = torch.searchsorted(place_P, total * cuts // num_chunks.clamp_min(1))
        draws = torch.zeros_like(edges) if teacher.draw_offsets is None else teacher.draw_offsets[edges]
        to_host += [edges, teacher.offsets[edges], draws]
    numbers = torch.cat(to_host).tolist()
    for rule, broken in zip(rules, numbers, strict=False):
        if broken:
            rule.refuse()
    num_selected = numbers[len(rules)]
    num_chunks_known = math.ceil(num_selected / chunk_size)
    bounds = [num_selected * i // max(num_chunks_known, 1) for i in range(num_chunks_known + 1)]
    rows_M = torch.searchsorted(rank_N1, torch.arange(1, num_selected + 1, device=device))
    labels_M = labels_N[rows_M].long()
    if teacher is None:
        return RowPlan(rows_M, labels_M, tuple(Chunk(run) for run in pairwise(bounds)), None)
    at = [
        numbers[start : start + num_chunks_known + 1]
        for start in range(len(rules) + 1, len(numbers), most_chunks + 1)
    ]
    chunks = tuple(Chunk(*runs) for runs in zip(*map(pairwise, (bounds, *at)), strict=True))
    return RowPlan(
        rows_M, labels_M, chunks, teacher_targets(teacher, place_P, dtype, weigh_masked=weigh_masked)
    )


@dataclass(frozen=True)
class NeededGradients:
    """Which inputs want a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True)
class LossSetup:
    """All that a walk has to know besides the hidden states."""

    projection: Projection
    plan: RowPlan
    weights: RowWeights
    """Of the loss."""
    unit: torch.Tensor
    """0-d: gradients are those of `unit` times the loss."""
    beta: float
    """1 / T of the teacher's targets, 1 without any."""
    reverse: bool
    num_weight_rows: int
    """Rows of the output head with its padding, whose gradient is zero."""
    logits_type: type[ChunkLogits]
    cross_entropy: CrossEntropy
    tokens: TokenMeasures | None = None
    """What is measured of each token on the way."""


@dataclass
class LossSums:
    """Sums over all rows, and gradients of `unit * loss` (None where not needed)."""

    ce: torch.Tensor
    kl: torch.Tensor
    student_kept_mass: torch.Tensor
    grad_hidden_MD: torch.Tensor | None = None
    grad_weight_VD: torch.Tensor | None = None
    """With padding, in fp32 (fp64)."""
    grad_bias_V: torch.Tensor | None = None
    """With padding, in fp32 (fp64)."""


def walk_chunks(hidden_ND: torch.Tensor, setup: LossSetup, needed: NeededGradients) -> LossSums:
    """Walk the chunks of the plan; waits for nothing."""
    projection, plan = setup.projection, setup.plan
    weight_VD, scale = projection.weight_VD, projection.logit_scale
    compute, device = weight_VD.dtype, weight_VD.device
    arithmetic = arithmetic_dtype(compute)
    vocab_size, hidden_size = weight_VD.shape
    sums = LossSums(*(torch.zeros((), dtype=arithmetic, device=device) for _ in range(3)))
    if needed.hidden:
        sums.grad_hidden_MD = torch.empty(plan.rows_M.numel(), hidden_size, dtype=compute, device=device)
    if needed.weight:
        shape = setup.num_weight_rows, hidden_size
        sums.grad_weight_VD = torch.empty(shape, dtype=arithmetic, device=device)
        # The first chunk writes its product over the rest.
        sums.grad_weight_VD[vocab_size if plan.chunks else 0 :].zero_()
    if needed.bias:
        sums.grad_bias_V = torch.zeros(setup.num_weight_rows, dtype=arithmetic, device=device)
    if not plan.chunks:
        return sums

    weights = RowWeights(setup.weights.ce * setup.unit, setup.weights.kl * setup.unit)
    longest = max(chunk.rows[1] - chunk.rows[0] for chunk in plan.chunks)
    logits = setup.logits_type(projection, longest, setup.beta, setup.cross_entropy.extras)
    for number, chunk in enumerate(plan.chunks):
        rows = slice(*chunk.rows)
        if setup.tokens is not None:
            logits.read = setup.tokens.reader(plan.rows_M[rows], plan.labels_M[rows])
        hidden_CD = hidden_ND.index_select(0, plan.rows_M[rows]).to(compute)
        found = process_chunk(
            logits,
            hidden_CD,
            plan.labels_M[rows],
            plan.targets_of(chunk),
            weights=weights,
            cross_entropy=setup.cross_entropy,
            label_terms=setup.cross_entropy.terms.take(plan.rows_M[rows], arithmetic),
            beta=setup.beta,
            reverse=setup.reverse,
            want_gradient=needed.any,
        )
        sums.ce += found.ce
        sums.kl += found.kl
        sums.student_kept_mass += found.student_kept_mass
        gradient_CV = found.gradient_CV
        if gradient_CV is None:
            continue
        if sums.grad_hidden_MD is not None:
            out_CD = sums.grad_hidden_MD[rows]
            torch.mm(gradient_CV, weight_VD, out=out_CD)
            if scale != 1.0:
                out_CD.mul_(scale)
        if sums.grad_weight_VD is not None:
            total_VD = sums.grad_weight_VD[:vocab_size]
            add_product(total_VD, gradient_CV, hidden_CD, scale, first=number == 0)
        if sums.grad_bias_V is not None:
            sums.grad_bias_V[:vocab_size].add_(logits.bias_gradient(), alpha=scale)
    return sums
