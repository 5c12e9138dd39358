"""The pooler behind the runner that vLLM has on GPUs (V2), which its CPU build never starts: vLLM's own class and
metadata, batches as its scheduler makes them, and padding that must not be read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from teacher_agreement import random_rows

from cache_builder.teachers.wire import unpack
from formats.capture_settings import CaptureSettings
from formats.disk.token_row import TokenRow
from formats.logprobs.topk import TopKLogprobs

pytestmark = pytest.mark.vllm
VOCAB_SIZE, RATE = 1003, 8
CAPTURE = CaptureSettings(min_prob=2.5e-3, max_k=64, draw_rate=RATE)
LENGTHS = [2, 30, 7, 45, 12, 3, 21, 33]


class TableModel(torch.nn.Module):
    """Hidden states are (row, position), logits entries of a table; a row of NaN stands for padding."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: object = None) -> None:
        from cache_builder.teachers.vllm_pooler import TeacherPooler

        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(len(LENGTHS), max(LENGTHS), VOCAB_SIZE, generator=generator) * 3
        self.pooler = TeacherPooler(self, CAPTURE, VOCAB_SIZE)
        self.flat = False

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Asked for by vLLM's check of what a model is."""
        return input_ids

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The same."""
        return positions

    def compute_logits(self, hidden_T2: torch.Tensor) -> torch.Tensor:
        if self.flat:
            return hidden_T2[:, :1].expand(-1, VOCAB_SIZE).contiguous()
        assert not hidden_T2.isnan().any(), "padding was projected"
        return self.logits[hidden_T2[:, 0].long(), hidden_T2[:, 1].long()]


@pytest.fixture(scope="module")
def model() -> TableModel:
    return TableModel()


def runner_of(model: TableModel, max_num_seqs: int = 16):
    from vllm.v1.worker.gpu.pool.pooling_runner import PoolingRunner

    settings = SimpleNamespace(get_pooling_task=lambda tasks: tasks[0], pooler_config=None)
    return PoolingRunner(
        model,
        SimpleNamespace(model_config=settings, scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs)),
    )


def add(runner, number: int, row: TokenRow, positions: str) -> None:
    from vllm import PoolingParams

    from cache_builder.teachers import vllm_pooler as p

    asked = {p.ROW_KEY: row.key, p.LABELS_KEY: p.encode_labels(row.label_ids(positions))}
    if positions == "loss":
        asked[p.POSITIONS_KEY] = p.encode_positions(row.positions("loss"), len(row))
    runner.add_request(str(number), number, PoolingParams(task=p.TASK, extra_kwargs=asked), None)


def step(runner, chosen: dict[int, int], seen: list[int], rows: list[TokenRow], padding: int):
    """One step of `tokens` more tokens of every chosen request, as vLLM's runner hands it on."""
    hidden = [(i, seen[i] + t) for i, tokens in chosen.items() for t in range(tokens)]
    for i, tokens in chosen.items():
        seen[i] += tokens
    scheduled = np.array(list(chosen.values()), np.int32)
    lengths = torch.tensor([*(seen[i] for i in chosen), *[0] * padding], dtype=torch.int32)
    batch = SimpleNamespace(
        idx_mapping_np=np.array(list(chosen), np.int32),
        num_reqs=len(chosen),
        num_tokens=len(hidden),
        num_scheduled_tokens=scheduled,
        seq_lens_cpu_upper_bound=lengths,
        query_start_loc=torch.tensor([0, *np.cumsum(scheduled), *[len(hidden)] * padding], dtype=torch.int32),
        req_ids=[str(i) for i in chosen],
    )
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([len(row) for row in rows], np.int32)))
    padded = torch.cat([torch.tensor(hidden).double(), torch.full((padding, 2), torch.nan).double()])
    return runner.pool(padded, batch, states)


def answers(model: TableModel, rows: list[TokenRow], positions: str, rng: np.random.Generator | None):
    """Every row's answer under a random schedule with chunks; without a generator all rows in one step."""
    runner = runner_of(model)
    seen, found = [0] * len(rows), {}
    waiting, running = list(range(len(rows))), []
    while waiting or running:
        while waiting and (rng is None or not running or rng.random() < 0.6):
            add(runner, waiting[0], rows[waiting[0]], positions)
            running.append(waiting.pop(0))
        left = {i: len(rows[i]) - seen[i] for i in running}
        chosen = dict(left)
        if rng is not None:
            some = [int(i) for i in rng.permutation(running)[: rng.integers(1, len(running) + 1)]]
            chosen = {i: int(rng.integers(1, left[i] + 1)) for i in some}
        padding = 0 if rng is None else int(rng.integers(0, 9))
        outputs, finished = step(runner, chosen, seen, rows, padding)
        assert finished == [seen[i] == len(rows[i]) for i in chosen]
        for i, packed, done in zip(chosen, outputs, finished, strict=True):
            assert (packed is not None) == done
            if done:
                found[i] = unpack(packed, VOCAB_SIZE, RATE).validate()
                runner.remove_request(i)
                running.remove(i)
    assert not runner.pooling_states and not runner.pooling_params
    return [found[i] for i in range(len(rows))]


@pytest.mark.parametrize("positions", ["all", "loss"])
def test_random_schedules_answer_what_one_step_answers(model, positions):
    rows = random_rows(LENGTHS, VOCAB_SIZE)
    whole = answers(model, rows, positions, None)
    for row, answer in zip(rows, whole, strict=True):
        assert len(answer) == len(row.positions(positions))
    for number, (row, answer) in enumerate(zip(rows, whole, strict=True)):
        wanted = torch.log_softmax(model.logits[number, row.positions(positions)].double(), -1)
        for at in range(len(answer)):
            ids = answer.token_ids[answer.offsets[at] : answer.offsets[at + 1]]
            np.testing.assert_allclose(
                answer.logprobs[answer.offsets[at] : answer.offsets[at + 1]], wanted[at, ids], atol=2e-5
            )
    for seed in range(12):
        for one, other in zip(
            whole, answers(model, rows, positions, np.random.default_rng(seed)), strict=True
        ):
            equal(one, other)


def equal(one: TopKLogprobs, other: TopKLogprobs) -> None:
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.draws.token_ids.tolist() == other.draws.token_ids.tolist()
    for name in ("logprobs", "log_tail_nodes", "label_logprobs"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, torch.nan])
@pytest.mark.parametrize(("num_tokens", "max_num_seqs"), [(64, 16), (67, 16), (5, 16), (1, 1)])
def test_the_profile_run_passes_whatever_the_logits_are(model, monkeypatch, value, num_tokens, max_num_seqs):
    """vLLM's measurement of memory: equal logits, or none that are numbers, and requests that ask for nothing."""
    monkeypatch.setattr(model, "flat", True)
    runner_of(model, max_num_seqs).dummy_pooler_run(torch.full((num_tokens, 2), value))


def test_the_profile_run_of_a_gpu_rehearses_once(model, monkeypatch):
    from cache_builder.reduction import reduce

    rehearsed = []
    monkeypatch.setattr(reduce, "reduce_hardest", lambda *args: rehearsed.append(args))
    runner_of(model).dummy_pooler_run(torch.zeros(32, 2))
    assert not rehearsed, "nobody measures the memory of a CPU"
    gpu = SimpleNamespace(type="cuda")
    for _ in range(2):
        model.pooler._rehearse(gpu)
    assert rehearsed == [(VOCAB_SIZE, CAPTURE, gpu)]
