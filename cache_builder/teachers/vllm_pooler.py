"""The part that runs inside vLLM: a pooler that projects, reduces and keeps only the packed result.

vLLM's pooling runner hands a model's pooler the hidden states of all tokens scheduled in a step, the
requests one after the other.  `TeacherPooler` picks the rows whose next token is selected, projects them
with the model's own `compute_logits` (which applies its logit scale and softcap and cuts vLLM's vocabulary
padding) and reduces them, a bounded number of rows at a time; no [tokens, vocabulary] array of a whole step
exists.  Under chunked prefill the reduced rows of a request wait in its pooling state until its last chunk;
hidden states are never kept.

Classes are built on demand: `AnnealLlamaForCausalLM` is vLLM's `LlamaForCausalLM` with this pooler.
"""

from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from cache_builder.reduction import kernels, reduce
from cache_builder.teachers import wire
from cache_builder.teachers.vllm_plugin import PREFIX
from formats.capture_settings import CaptureSettings
from formats.logprobs.tail_draws import starts

TASK: PoolingTask = "token_embed"
CONFIG_KEY = "anneal"
"""In `additional_config`: what `CaptureSettings` the engine's processes work by."""
POSITIONS_KEY = "anneal_positions"
LABELS_KEY = "anneal_labels"
"""int32 ids of the tokens that come next, one for each position asked for, as bytes.  They travel with the
request because a step of a chunked prefill need not hold the successor of its last token."""
ROW_KEY = "anneal_row"
"""The row's content key, from which its tail draws start; without it they start as those of no bytes."""


def encode_positions(positions: np.ndarray, num_tokens: int) -> bytes:
    """A bit per token of the row, set where the token's successor is selected."""
    mask = np.zeros(num_tokens, dtype=np.bool_)
    mask[positions] = True
    return np.packbits(mask).tobytes()


def decode_positions(data: bytes, num_tokens: int) -> np.ndarray:
    """int64 [P], ascending: the inverse of `encode_positions`."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=num_tokens)
    return np.flatnonzero(bits)


def encode_labels(label_ids: np.ndarray) -> bytes:
    """The value of `LABELS_KEY`."""
    return np.ascontiguousarray(label_ids, dtype="<i4").tobytes()


def _label_ids(data: bytes | None, num_positions: int) -> np.ndarray:
    """int64 [P]: the inverse of `encode_labels`; token 0 for requests of vLLM's own warm-up."""
    if data is None:
        return np.zeros(num_positions, np.int64)
    ids = np.frombuffer(data, dtype="<i4").astype(np.int64)
    assert len(ids) == num_positions, (len(ids), num_positions)
    return ids


class TeacherPooler(Pooler):
    """Projects and reduces the selected rows of every request."""

    def __init__(self, model: Any, capture: CaptureSettings, vocab_size: int) -> None:
        super().__init__()
        # In a tuple, so that torch does not register the model as a child of its own child.
        self._model = (model,)
        self.capture = capture
        self.vocab_size = vocab_size
        self._rehearsed = False

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {TASK}

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        """A packed int32 tensor (see `wire`) for every request that ends in this step, else None."""
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.numpy().astype(np.int64)
        seen = cursor.seq_lens_cpu.numpy().astype(np.int64)
        prompt = cursor.prompt_lens_cpu.numpy().astype(np.int64)
        step_starts = np.concatenate([[0], np.cumsum(scheduled)])

        selected: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        draw_starts: list[np.ndarray] = []
        for i, params in enumerate(pooling_metadata.pooling_params):
            first = seen[i] - scheduled[i]  # position in the row of the first token of this step
            asked = params.extra_kwargs or {}
            mask = asked.get(POSITIONS_KEY)
            every = np.arange(prompt[i] - 1) if mask is None else decode_positions(mask, int(prompt[i]))
            here = (every >= first) & (every < seen[i])
            positions = every[here]
            ids = asked.get(LABELS_KEY)
            labels.append(_label_ids(ids, len(every))[here])
            selected.append(positions - first + step_starts[i])
            draw_starts.append(starts(asked.get(ROW_KEY, b""), positions))

        if all(not params.extra_kwargs for params in pooling_metadata.pooling_params):
            self._rehearse(hidden_states.device)
        rows, ids, begin = (np.concatenate(parts) for parts in (selected, labels, draw_starts))
        reduced = self._reduce(hidden_states, rows, ids, begin)
        return self._collect(reduced, [len(rows) for rows in selected], pooling_metadata)

    def _rehearse(self, device: torch.device) -> None:
        """Reduce what takes most memory, once, while vLLM measures what a step takes on a GPU."""
        if device.type != "cpu" and not self._rehearsed:
            self._rehearsed = True
            reduce.reduce_hardest(self.vocab_size, self.capture, device)

    def _reduce(
        self, hidden_states: torch.Tensor, rows: np.ndarray, labels: np.ndarray, draw_starts: np.ndarray
    ) -> reduce.ReducedRows:
        """Project and reduce the given rows, a chunk of the reduction at a time."""
        device = hidden_states.device
        index = torch.from_numpy(rows).to(device, non_blocking=True)
        labels_N = torch.from_numpy(labels).to(device, non_blocking=True)
        starts_N = torch.from_numpy(draw_starts).to(device, non_blocking=True)
        step = reduce.rows_per_chunk(self.vocab_size, reduce.chunk_bytes(device))

        def chunks() -> Iterator[reduce.Chunk]:
            for start in range(0, len(rows), step):
                chunk = slice(start, start + step)
                logits_NV = self._model[0].compute_logits(hidden_states[index[chunk]])
                if logits_NV is None:  # a tensor-parallel rank that gathers nothing answers with nothing
                    continue
                if logits_NV.shape[-1] != self.vocab_size:
                    raise RuntimeError(f"expected {self.vocab_size} logits, got {logits_NV.shape[-1]}")
                yield reduce.Chunk(logits_NV, labels_N[chunk], starts_N[chunk])
                del logits_NV  # before the next chunk's are made

        return reduce.reduce_chunks(chunks(), self.capture, device)

    def _collect(
        self, reduced: reduce.ReducedRows, lengths: list[int], metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        finished = metadata.get_pooling_cursor().get_finished_mask()
        if len(reduced.counts) == 0:  # also on a rank that saw no logits: its output is not used
            lengths = [0] * len(lengths)
        rows_at = np.concatenate([[0], np.cumsum(lengths)])
        entries_at, draws_at = _offsets_at([reduced.counts, reduced.draw_counts], rows_at)
        entries, drawn = np.diff(entries_at).tolist(), np.diff(draws_at).tolist()
        parts = wire.split(reduced, lengths, entries, drawn)
        wholes: list[list[wire.Part]] = []
        for state, done, part in zip(metadata.pooling_states, finished, parts, strict=True):
            waiting: list[Any] = state.hidden_states_cache  # vLLM's place for what a request keeps
            waiting.append(part)
            if done:
                wholes.append(list(waiting))
                state.clean()
        triton = kernels.run_on(reduced.counts.device.type, self.vocab_size)
        packed = iter(wire.pack_all(wholes, triton=triton))
        return [next(packed) if done else None for done in finished]


def _offsets_at(counts: list[torch.Tensor], rows_at: np.ndarray) -> list[list[int]]:
    """Where the entries of these rows begin, if row i owns the next `counts[i]`, for each of the counts."""
    at = torch.from_numpy(rows_at).to(counts[0].device, non_blocking=True)
    ends = torch.stack([torch.nn.functional.pad(each.cumsum(0), (1, 0)) for each in counts])
    return ends[:, at].tolist()


def _build(architecture: str) -> type:
    """Subclass vLLM's class for `architecture` with the teacher's pooler."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces import is_attention_free, is_hybrid

    base: Any = ModelRegistry.models[architecture].load_model_cls()

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        vocab_size = vllm_config.model_config.get_vocab_size()
        capture = CaptureSettings(**vllm_config.additional_config[CONFIG_KEY])
        self.pooler = TeacherPooler(self, capture, vocab_size)

    # A pooling model states how it attends; a generating one is asked other questions about the same.
    attention = "hybrid" if is_hybrid(base) else "attention_free" if is_attention_free(base) else "decoder"
    namespace = {
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": f"vLLM's {architecture} with `TeacherPooler`.",
        "is_pooling_model": True,
        "attn_type": attention,
    }
    return type(PREFIX + architecture, (base,), namespace)


def __getattr__(name: str) -> Any:
    if name.startswith(PREFIX) and name != PREFIX:
        built = _build(name.removeprefix(PREFIX))
        globals()[name] = built
        return built
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
