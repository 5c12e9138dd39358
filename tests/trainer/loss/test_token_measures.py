"""What is measured of each token, against every logit at once in float64."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from caches import write_cache
from dense_reference import dense_logits
from loss_cases import Case, make_case
from loss_on_device import label_annealing_loss

from formats.disk.token_row import TokenRow
from trainer import evaluate
from trainer.data.collator import LabelAnnealingCollator
from trainer.data.dataset import CachedDataset
from trainer.loading import load_model, load_tokenizer
from trainer.loop.measure import FIELDS, Measurement, batch_sums, measure
from trainer.loop.output_head import OutputHead
from trainer.loss.token_measures import NUM_BINS

TINY_BASE = Path(__file__).parents[3] / "examples" / "tiny-base"
NAMED = {"softcap": "logit_softcap", "scale": "logit_scale"}
NAMES = ("accuracy", "entropy", "confidence", "calibration_error", "kept")


def dense_means(logits_NV: torch.Tensor, labels: list[int], known: set[int]) -> dict[str, float]:
    """Token by token, in Python."""
    rows = [row for row, label in enumerate(labels) if label != -100]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    entropy, right = 0.0, {}
    for row in rows:
        probs = torch.softmax(logits_NV[row].double(), 0).tolist()
        entropy -= sum(p * math.log(p) for p in probs if p > 0)
        best = max(range(len(probs)), key=probs.__getitem__)
        right[row] = best == labels[row]
        place = next(number for number in range(NUM_BINS) if probs[best] <= (number + 1) / NUM_BINS)
        bins[place].append((probs[best], right[row]))
    error = sum(abs(sum(c for c, _ in entries) - sum(r for _, r in entries)) for entries in bins)
    return {
        "accuracy": sum(right.values()) / len(rows),
        "entropy": entropy / len(rows),
        "confidence": sum(c for entries in bins for c, _ in entries) / len(rows),
        "calibration_error": error / len(rows),
        "kept": sum(right[row] for row in known) / len(known) if known else math.nan,
        "num_known": len(known),
    }


def confident(case: Case) -> tuple[Case, set[int]]:
    """With labels that the teacher has right on every other position, and the rows where it is sure of them."""
    assert case.teacher is not None
    labels, known = case.labels.clone(), set()
    teacher = case.teacher
    for number, row in enumerate(teacher.rows.tolist()):
        entries = slice(*teacher.offsets[number : number + 2].tolist())
        best = int(teacher.logprobs[entries].argmax())
        if number % 2:
            labels[row] = teacher.token_ids[entries][best]
            if teacher.logprobs[entries][best].exp() > 0.5:
                known.add(row)
        elif labels[row] == teacher.token_ids[entries][best]:
            labels[row] = -100
    return replace(case, labels=labels), known


def found_in(case: Case, **arguments) -> Measurement:
    options = {NAMED.get(name, name): value for name, value in case.options.items()}
    with torch.no_grad():
        output = label_annealing_loss(
            case.hidden, case.weight, case.labels, case.teacher, bias_V=case.bias, measure_tokens=True,
            num_ce=1.0, num_kl=1.0, **arguments, **options,
        )  # fmt: skip
    assert output.tokens is not None
    sums = [output.ce, output.kl, output.kept_mass, output.student_kept_mass, output.num_ce, output.num_kl]
    return Measurement.of_sums(torch.cat([torch.stack([s.double() for s in sums]), output.tokens.double()]))


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize(
    ("temperature", "options"),
    [
        (1.0, {}),
        (2.0, {"with_bias": True, "padding": 5}),
        (1.0, {"softcap": 12.0, "scale": 1.5, "draw_rate": 3.0}),
    ],
)
def test_equal_to_dense_float64(temperature, options, chunk_size):
    case = make_case(num_rows=61, temperature=temperature, drift=0.8, sharpness=5.0, **options)
    case, known = confident(case)
    assert len(known) > 5
    logits = dense_logits(case.hidden, case.weight, bias=case.bias, **case.options)
    expected = dense_means(logits, case.labels.tolist(), known)
    assert 0 < expected["kept"] < 1 and 0 < expected["accuracy"] < 1
    found = found_in(case, chunk_size=chunk_size)
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-10), name


def test_loss_and_gradients_are_the_same_bits_with_and_without():
    case = make_case(num_rows=29, drift=0.5, draw_rate=2.0)

    def loss_and_gradient(measure_tokens: bool):
        hidden = case.hidden.clone().requires_grad_()
        output = label_annealing_loss(
            hidden, case.weight, case.labels, case.teacher, measure_tokens=measure_tokens
        )
        output.loss.backward()
        return output.loss.detach(), hidden.grad

    with_them, without = loss_and_gradient(True), loss_and_gradient(False)
    assert all(map(torch.equal, with_them, without))


def test_a_hidden_token_counts_nothing_and_a_diverged_model_gives_no_number():
    case, _ = confident(make_case(num_rows=20, with_bias=True, sharpness=5.0))
    assert case.bias is not None
    case.bias[3] = -torch.inf
    case.labels[case.labels == 3] = 4
    assert math.isfinite(found_in(replace(case, teacher=None)).entropy)
    case.hidden.fill_(torch.nan)
    diverged = found_in(case)
    assert math.isnan(diverged.entropy) and math.isnan(diverged.confidence)


@pytest.fixture(scope="module")
def english(tmp_path_factory) -> Path:
    """What the small base model says of a module's documentation, lossless."""
    tokenizer = load_tokenizer(TINY_BASE)
    texts = [ast.get_docstring(ast.parse(Path(module.__file__).read_text())) for module in (ast, math_like())]
    ids = [tokenizer(text)["input_ids"][:110] for text in texts]
    rows = [TokenRow(torch.tensor(row).numpy(), (torch.arange(len(row)) > 0).numpy()) for row in ids]
    return write_cache(tmp_path_factory.mktemp("english") / "docs", TINY_BASE, rows=rows)


def math_like():
    import statistics

    return statistics


def test_the_initial_model_has_kept_everything(english):
    found = evaluate(TINY_BASE, {"docs": english})["docs"]
    assert found["num_known"] > 10 and found["kept"] == 1.0 and abs(found["kl"]) < 1e-6
    assert 0 < found["accuracy"] < 1 and 0 < found["calibration_error"] < 1


def test_a_model_over_batches_of_any_size_equals_its_logits(english):
    """Through the output head, in float64, and the same from two ranks' sums."""
    model = load_model(TINY_BASE, dtype="float64").eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            spread = 0.45 * parameter.std() * torch.randn(parameter.shape, generator=generator)
            parameter.add_(spread.double())
    dataset = CachedDataset(english)
    items = [dataset[row] for row in range(len(dataset))]
    logits, labels, known = [], [], set()
    for row, item in enumerate(items):
        ids = torch.as_tensor(item["input_ids"].astype("int64"))[None]
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits[0, :-1])
        teacher = dataset.cache[row].teacher
        for at, place in enumerate(item["teacher_positions"].tolist()):
            kept = slice(*teacher.offsets[at : at + 2])
            probs = dict(zip(teacher.token_ids[kept].tolist(), teacher.logprobs[kept].tolist(), strict=True))
            if probs[int(ids[0, place + 1])] > math.log(0.5):
                known.add(len(labels) + place)
        labels += ids[0, 1:].tolist()
    expected = dense_means(torch.cat(logits), labels, known)
    assert 0 < expected["kept"] < 1

    head, collate = OutputHead.of(model).install(), LabelAnnealingCollator(0)
    found = measure(model, head, [collate(items)])
    ranks = [batch_sums(model, head, collate([item]), "forward") for item in items]
    assert all(sums.shape == (FIELDS,) for sums in ranks)
    for measured in (found, Measurement.of_sums(sum(ranks))):
        for name, value in expected.items():
            assert getattr(measured, name) == pytest.approx(value, abs=1e-10), name
    assert found.to_dict().keys() >= {*NAMES, "num_known"}


def test_without_labels_or_known_tokens_there_is_no_mean():
    case = make_case(num_rows=9, sharpness=0.1)
    found = found_in(case)
    assert (
        found.num_known == 0 and found.to_dict()["kept"] is None and found.to_dict()["accuracy"] is not None
    )
    silent = found_in(replace(case, labels=torch.full_like(case.labels, -100))).to_dict()
    assert {name: silent[name] for name in NAMES} == dict.fromkeys(NAMES)
