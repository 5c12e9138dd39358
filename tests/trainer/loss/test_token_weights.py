"""Weights of the cross-entropy, label smoothing, and the KL without the label: against dense float64 computations.

Every reference here is one line of algebra over whole rows of logits, differentiated by autograd; nothing of the
product's is in it.
"""

import math
from dataclasses import replace

import pytest
import torch
from dense_reference import bucketed_kl_row, dense_logits, drawn_tail_row, relative_error, teacher_from_logits
from loss_cases import Case, fused_gradients, make_case

from formats.errors import ConfigError, FormatError
from trainer.loss.token_weights import LabelTerms
from trainer.objective import CE_WEIGHTS, Objective

TEMPERATURES = (0.5, 1.0, 2.0)
HEADS = {
    "plain": {},
    "all": dict(with_bias=True, softcap=4.0, scale=1.7, padding=3),
    "chunks": dict(num_rows=29, vocab_size=300, hidden_size=12),
}
WEIGHTS = ("dft", "dft:0.5", "talr:1.7", "psft", "psft:0.05", "eaft", "eaft:2", "flow:1.1", "eaft0")


def terms_of(case: Case, seed: int = 3) -> LabelTerms:
    """What a cache might say: log p0 of every label, near the student's own on half of the rows, and some weights."""
    generator = torch.Generator().manual_seed(seed)
    log_q = torch.log_softmax(dense_logits(case.hidden, case.weight, bias=case.bias, **case.options), -1)
    own = log_q[torch.arange(len(case.labels)), case.labels.clamp_min(0)]
    noise = torch.randn(len(own), generator=generator, dtype=torch.float64) * 0.3
    return LabelTerms(torch.rand(len(own), generator=generator, dtype=torch.float64), own + noise)


def dense_weights(name: str, logits, log_q_label, terms: LabelTerms):
    """The definitions of the papers."""
    kind, _, number = name.partition(":")
    if kind == "dft":
        return log_q_label.exp() ** float(number or 1)
    if kind == "talr":
        return log_q_label.exp() ** (1 / float(number))
    if kind == "psft":
        ratio = log_q_label.exp() / terms.logprobs_N.exp()
        return torch.where(ratio <= 1 + float(number or 0.2), ratio, 0.0)
    if kind == "eaft":
        top = torch.softmax(torch.sort(logits, dim=-1, descending=True).values[:, :20], -1)
        return (-(top * top.log()).sum(-1) / math.log(20)) ** float(number or 1)
    return terms.weights_N


def leaves_of(case: Case) -> dict:
    names = ("hidden", "weight") if case.bias is None else ("hidden", "weight", "bias")
    return {name: getattr(case, name).clone().requires_grad_() for name in names}


def logits_of(case: Case, leaves: dict):
    return dense_logits(leaves["hidden"], leaves["weight"], bias=leaves.get("bias"), **case.options)


def compare(case: Case, dense_loss, leaves: dict, tolerance: float = 1e-10, **arguments) -> None:
    """The fused loss and all of its gradients are those of a dense scalar of `leaves`, whole and in chunks."""
    dense_loss.backward()
    for chunk_size in (None, 4):
        output, gradients = fused_gradients(case, chunk_size=chunk_size, **arguments)
        assert output.loss.item() == pytest.approx(dense_loss.item(), rel=tolerance)
        for name, gradient in gradients.items():
            assert relative_error(gradient, leaves[name].grad) < tolerance, name


def dense_kl(case: Case, logits, kl_coef: float):
    """The bucketed KL with draws, of dense_reference.py."""
    teacher, total = case.teacher, logits.sum() * 0
    for k, row in enumerate(teacher.rows.tolist()):
        span = slice(*teacher.offsets[k : k + 2].tolist())
        ids, tail = teacher.token_ids[span].long(), teacher.log_tail[k]
        total = total + bucketed_kl_row(
            logits[row], ids, teacher.logprobs[span], tail, teacher.temperature, False
        )
    return kl_coef * total / len(teacher)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("head", HEADS)
def test_weighted_cross_entropy_beside_the_kl(name, temperature, head):
    case = make_case(temperature=temperature, **HEADS[head])
    terms, leaves = terms_of(case), leaves_of(case)
    logits = logits_of(case, leaves)
    labelled = case.labels != -100
    log_q = torch.log_softmax(logits, -1)[torch.arange(len(case.labels)), case.labels.clamp_min(0)]
    weights = dense_weights(name, logits, log_q, terms).detach()
    ce = -(weights * log_q)[labelled].sum() / labelled.sum()
    compare(
        case,
        ce + dense_kl(case, logits, 0.7),
        leaves,
        kl_coef=0.7,
        objective=Objective(ce_weight=name),
        label_terms=terms,
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_without_a_teacher(name):
    case = replace(make_case(num_rows=21), teacher=None)
    terms, leaves = terms_of(case), leaves_of(case)
    logits, labelled = logits_of(case, leaves), case.labels != -100
    log_q = torch.log_softmax(logits, -1)[torch.arange(len(case.labels)), case.labels.clamp_min(0)]
    weights = dense_weights(name, logits, log_q, terms).detach()
    loss = -(weights * log_q)[labelled].sum() / labelled.sum()
    compare(case, loss, leaves, objective=Objective(ce_weight=name), label_terms=terms)


def test_psft_has_the_gradient_of_the_clipped_objective():
    """-min(r, clip(r, 1 - e, 1 + e)) of the paper, differentiated as it stands; both kinds of tokens are there."""
    case = replace(make_case(num_rows=40), teacher=None)
    terms, leaves = terms_of(case), leaves_of(case)
    labelled = case.labels != -100
    log_q = torch.log_softmax(logits_of(case, leaves), -1)[torch.arange(40), case.labels.clamp_min(0)]
    ratio = (log_q - terms.logprobs_N).exp()[labelled]
    assert 2 < int((ratio > 1.2).sum()) < len(ratio) - 5 and int((ratio < 0.8).sum()) > 2
    (-torch.minimum(ratio, ratio.clamp(0.8, 1.2)).sum() / labelled.sum()).backward()
    _, gradients = fused_gradients(case, objective=Objective(ce_weight="psft"), label_terms=terms)
    for name, gradient in gradients.items():
        assert relative_error(gradient, leaves[name].grad) < 1e-10


def test_an_impossible_label_is_clipped_by_psft():
    case = replace(make_case(), teacher=None)
    terms = LabelTerms(None, torch.full_like(case.labels, -torch.inf, dtype=torch.float64))
    output, gradients = fused_gradients(case, objective=Objective(ce_weight="psft"), label_terms=terms)
    assert output.loss.item() == 0 and all(gradient.norm() == 0 for gradient in gradients.values())


@pytest.mark.parametrize("epsilon", (0.05, 0.1, 0.5))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_label_smoothing_is_that_of_torch(epsilon, head, temperature):
    case = make_case(temperature=temperature, **HEADS[head])
    leaves = leaves_of(case)
    logits = logits_of(case, leaves)
    ce = torch.nn.functional.cross_entropy(logits, case.labels, label_smoothing=epsilon)
    objective = Objective(label_smoothing=epsilon)
    compare(case, ce + dense_kl(case, logits, 0.7), leaves, kl_coef=0.7, objective=objective)
    alone, leaves = replace(case, teacher=None), leaves_of(case)
    ce = torch.nn.functional.cross_entropy(logits_of(case, leaves), case.labels, label_smoothing=epsilon)
    compare(alone, ce, leaves, objective=objective)


def test_smoothing_and_weights_compose():
    case = make_case()
    leaves = leaves_of(case)
    logits, labelled = logits_of(case, leaves), case.labels != -100
    log_q = torch.log_softmax(logits, -1)[torch.arange(len(case.labels)), case.labels.clamp_min(0)]
    each = torch.nn.functional.cross_entropy(logits, case.labels, label_smoothing=0.1, reduction="none")
    loss = (log_q.exp().detach() * each)[labelled].sum() / labelled.sum() + dense_kl(case, logits, 0.7)
    compare(case, loss, leaves, kl_coef=0.7, objective=Objective(ce_weight="dft", label_smoothing=0.1))


def test_asft_is_dft_with_a_little_kl():
    """The definition of ASFT as LLaMA-Factory has it, with both models there: mean over labels of sg(q) CE, plus
    alpha times the mean over labels of the full-vocabulary KL to the reference model."""
    case = make_case(num_rows=20)
    labelled = (case.labels != -100).nonzero().squeeze(1)
    reference = torch.randn(
        len(labelled), 37, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    teacher = teacher_from_logits(reference, labelled, [37] * len(labelled), 1.0)
    case, leaves = replace(case, teacher=teacher), leaves_of(case)
    logits = logits_of(case, leaves)[labelled]
    each = torch.nn.functional.cross_entropy(logits, case.labels[labelled], reduction="none")
    dft = ((-each.detach()).exp() * each).mean()
    log_q, p = torch.log_softmax(logits, -1), torch.softmax(reference, -1)
    kl = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1).mean()
    compare(case, dft + 0.1 * kl, leaves, kl_coef=0.1, objective=Objective(ce_weight="dft"))


# --- the KL without the label -------------------------------------------------------------------------------


def masked_case(temperature: float, *, drift=0.4, draw_rate=4.0, max_kept=12, **options):
    """(case whose teacher keeps every label, [P, V] logits of the teacher); labels everywhere but on two rows."""
    case = make_case(temperature=temperature, drift=drift, draw_rate=draw_rate, max_kept=max_kept, **options)
    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(0, 37, case.labels.shape, generator=generator)
    labels[case.teacher.rows[[1, 4]]] = -100
    rows = case.teacher.rows
    shift = drift * torch.randn(len(rows), 37, generator=generator, dtype=torch.float64)
    teacher_logits = dense_logits(case.hidden, case.weight, bias=case.bias, **case.options)[rows] + shift
    kept = torch.randint(1, max_kept + 1, (len(rows),), generator=generator).tolist()
    raised = teacher_logits.clone()  # every label is among the kept ones, by rank; values are put right below
    at = labels[rows].clamp_min(0)
    raised[torch.arange(len(rows)), at] += 100.0
    order = teacher_from_logits(raised, rows, kept, temperature)
    logprobs = torch.log_softmax(teacher_logits, -1)
    position = torch.repeat_interleave(torch.arange(len(rows)), order.counts)
    ids = order.token_ids.long()
    tails = []
    for k in range(len(rows)):
        outside = torch.ones(37, dtype=torch.bool)
        outside[ids[position == k]] = False
        tails.append(torch.logsumexp(logprobs[k][outside] / temperature, 0))
    columns = {}
    if draw_rate:
        expected = draw_rate * logprobs.exp() ** 0.75
        times = torch.poisson(expected, generator=generator).long()
        times[position, ids] = 0
        row, token = times.nonzero(as_tuple=True)
        columns = {
            "draw_offsets": torch.cat([torch.zeros(1).long(), (times > 0).sum(1).cumsum(0)]),
            "draw_ids": token.int(),
            "draw_logprobs": logprobs[row, token],
            "draw_weights": times[row, token] / expected[row, token],
        }
    masked = (ids == labels[rows][position]) & (labels[rows][position] != -100)
    teacher = replace(
        order, logprobs=logprobs[position, ids], log_tail=torch.stack(tails), masked=masked, **columns
    )
    return replace(case, labels=labels, teacher=teacher), teacher_logits


def dense_masked(case: Case, logits, teacher_logits, weighted: bool, *, whole: bool):
    """Per position, the KL of both sides without the label, renormalised; with a bucket unless `whole`."""
    teacher, total = case.teacher, logits.sum() * 0
    beta = 1 / teacher.temperature
    for k, row in enumerate(teacher.rows.tolist()):
        label = int(case.labels[row])
        log_p = torch.log_softmax(beta * teacher_logits[k], -1)
        others = torch.ones(37, dtype=torch.bool)
        if label != -100:
            others[label] = False
        p = torch.softmax(beta * teacher_logits[k][others], -1)
        q = torch.softmax(beta * logits[row][others], -1)
        share = log_p[others].exp().sum() if weighted else 1.0
        if whole:
            total = total + share * (p * (p / q).log()).sum()
            continue
        span = slice(*teacher.offsets[k : k + 2].tolist())
        index = torch.arange(37)[others]
        kept = torch.isin(index, teacher.token_ids[span].long())
        p_cells = torch.cat([p[kept], p[~kept].sum()[None]])
        q_cells = torch.cat([q[kept], q[~kept].sum()[None]])
        total = total + share * (p_cells * (p_cells / q_cells).log()).sum()
        if teacher.draw_offsets is not None:
            draws = slice(*teacher.draw_offsets[k : k + 2].tolist())
            ids = teacher.draw_ids[draws].long()
            outside = torch.cat([index[kept], torch.tensor([label] if label != -100 else []).long()])
            log_p_masked = (torch.log_softmax(beta * teacher_logits[k][others], -1))[
                torch.searchsorted(index, ids)
            ]
            total = total + share * drawn_tail_row(
                logits[row], outside, ids, log_p_masked, teacher.draw_weights[draws], 1 / beta, p[~kept].sum()
            )
    return total / len(teacher)


@pytest.mark.parametrize("kind", ("masked", "masked-weighted"))
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("head", ({}, dict(with_bias=True, softcap=4.0, scale=1.7)))
@pytest.mark.parametrize("draw_rate", (0.0, 4.0))
def test_masked_kl_equals_the_dense_reference(kind, temperature, head, draw_rate):
    case, teacher_logits = masked_case(temperature, draw_rate=draw_rate, **head)
    assert int(case.teacher.masked.sum()) == len(case.teacher) - 2
    leaves = leaves_of(case)
    logits = logits_of(case, leaves)
    kl = dense_masked(case, logits, teacher_logits, kind == "masked-weighted", whole=False)
    ce = torch.nn.functional.cross_entropy(logits, case.labels)
    compare(case, ce + 0.7 * kl, leaves, kl_coef=0.7, objective=Objective(kl_target=kind))


@pytest.mark.parametrize("kind", ("masked", "masked-weighted"))
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_masked_kl_of_the_whole_vocabulary_is_the_definition(kind, temperature):
    case, teacher_logits = masked_case(temperature, draw_rate=0.0)
    whole = teacher_from_logits(teacher_logits, case.teacher.rows, [37] * len(case.teacher), temperature)
    labels = case.labels[whole.rows].repeat_interleave(37)
    case = replace(case, teacher=replace(whole, masked=whole.token_ids == labels))
    leaves = leaves_of(case)
    kl = dense_masked(case, logits_of(case, leaves), teacher_logits, kind == "masked-weighted", whole=True)
    no_labels = replace(case, labels=torch.full_like(case.labels, -100))
    compare(no_labels, kl, leaves, objective=Objective(kl_target=kind))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_chain_rule(temperature):
    """KL(p || q) = KL(Bernoulli(p_y) || Bernoulli(q_y)) + (1 - p_y) KL without y, value and gradient."""
    case, teacher_logits = masked_case(temperature, draw_rate=0.0)
    plain = replace(case, labels=torch.full_like(case.labels, -100))
    full, full_gradients = fused_gradients(replace(plain, teacher=replace(case.teacher, masked=None)))
    part, part_gradients = fused_gradients(plain, objective=Objective(kl_target="masked-weighted"))
    leaves = leaves_of(case)
    logits, total = logits_of(case, leaves), 0.0
    for k, row in enumerate(case.teacher.rows.tolist()):
        label = int(case.labels[row])
        if label == -100:
            continue
        p = torch.softmax(teacher_logits[k] / temperature, -1)[label]
        q = torch.softmax(logits[row] / temperature, -1)[label]
        total = total + p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    bernoulli = total / len(case.teacher)
    bernoulli.backward()
    assert full.kl.item() == pytest.approx(bernoulli.item() + part.kl.item(), rel=1e-10)
    for name, gradient in full_gradients.items():
        assert relative_error(part_gradients[name] + leaves[name].grad, gradient) < 1e-10


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("direction", ("forward", "reverse"))
def test_the_label_is_never_pulled_and_nothing_is_at_the_initial_weights(temperature, direction):
    case, _ = masked_case(temperature)
    plain = replace(case, labels=torch.full_like(case.labels, -100))
    # An output head of its own per logit: the hidden state is the row of logits.
    logits = dense_logits(case.hidden, case.weight)
    plain = Case(logits, torch.eye(37, dtype=torch.float64), plain.labels, case.teacher)
    objective = Objective(kl_target="masked")
    _, gradients = fused_gradients(plain, objective=objective, kl_direction=direction)
    rows = case.teacher.rows[case.labels[case.teacher.rows] != -100]
    at_label = gradients["hidden"][rows, case.labels[rows]]
    assert (at_label == 0).all() and gradients["hidden"][rows].norm() > 1e-3
    same, _ = masked_case(temperature, drift=0.0, draw_rate=8.0)
    same = replace(same, labels=torch.full_like(same.labels, -100))
    output, gradients = fused_gradients(same, objective=objective, kl_direction=direction)
    assert abs(output.kl.item()) < 1e-12
    assert all(gradient.norm() < 1e-12 for gradient in gradients.values())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_student_that_is_sure_of_the_label_gives_finite_gradients(dtype):
    """1 - q of the label underflows in fp32; and a position where nothing but the label is known counts as zero."""
    logits = torch.zeros(2, 5, dtype=dtype)
    logits[:, 0] = 300.0
    rows = torch.tensor([0, 1])
    teacher = teacher_from_logits(torch.tensor([[2.0, 1, 0, -1, -2]] * 2), rows, [2, 1], 1.0, dtype=dtype)
    tails = torch.tensor([float(teacher.log_tail[0]), -torch.inf], dtype=dtype)
    masked = torch.tensor([True, False, True])
    teacher = replace(teacher, masked=masked, log_tail=tails)
    case = Case(logits, torch.eye(5, dtype=dtype), torch.tensor([0, 0]), teacher)
    for kind in ("masked", "masked-weighted"):
        output, gradients = fused_gradients(case, objective=Objective(kl_target=kind))
        assert math.isfinite(output.loss.item())
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


# --- what cannot be ------------------------------------------------------------------------------------------


def test_every_weight_is_tested_here():
    assert {name.partition(":")[0] for name in WEIGHTS} == set(CE_WEIGHTS) - {
        "none",
        "stm",
    }  # stm: labels, in data


@pytest.mark.parametrize(
    ("objective", "kernel", "message"),
    [
        (Objective(ce_weight="talr"), "torch", "talr needs its tau"),
        (Objective(ce_weight="psft"), "torch", "psft needs the initial model's logprobs"),
        (Objective(ce_weight="flow:1"), "torch", "flow needs weights from the cache"),
        (Objective(ce_weight="eaft"), "triton", "ce_weight: eaft is not available with loss_kernel: triton"),
        (
            Objective(label_smoothing=0.1),
            "triton",
            "label_smoothing is not available with loss_kernel: triton",
        ),
    ],
)
def test_what_is_missing_is_refused_in_one_line(objective, kernel, message, monkeypatch):
    monkeypatch.setattr("trainer.loss.label_annealing_loss.logits_type", lambda *_: None)
    with pytest.raises(ConfigError, match=message) as error:
        fused_gradients(make_case(), objective=objective, kernel=kernel)
    assert "\n" not in str(error.value)


def test_flags_that_do_not_fit_are_refused():
    with pytest.raises(FormatError, match="every kept token is masked or not"):
        replace(make_case().teacher, masked=torch.ones(2, dtype=torch.bool))
