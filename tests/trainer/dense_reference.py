"""The slow, obvious loss: every logit at once, in float64, differentiated by plain autograd.

Nothing here is shared with the product. Tests hold the fused loss to these functions for ever.
N: rows, D: hidden size, V: vocabulary, P: positions with teacher targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.data.teacher_batch import TeacherBatch


@dataclass
class DenseResult:
    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def dense_logits(hidden, weight, *, bias=None, scale=1.0, softcap=None, vocab_size=None):
    """[N, V] logits in the order the model families use."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits[:, : vocab_size or weight.shape[0]] * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def bucketed_kl_row(student_logits, ids, logprobs, log_tail, temperature, reverse):
    """KL of one row over the listed tokens and one bucket that holds all others."""
    beta = 1.0 / temperature
    vocab_size = student_logits.shape[0]
    p_unnormalised = torch.cat([(beta * logprobs).exp(), log_tail.exp()[None]])
    p = p_unnormalised / p_unnormalised.sum()
    q_all = torch.softmax(beta * student_logits, dim=0)
    outside = torch.ones(vocab_size, dtype=torch.bool)
    outside[ids] = False
    q = torch.cat([q_all[ids], q_all[outside].sum()[None]])
    if not outside.any():
        p, q = p[:-1], q[:-1]
    if reverse:
        p, q = q, p
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


def drawn_tail_row(student_logits, ids, drawn, log_p, weights, temperature, tail_mass):
    """What the draws of one row estimate: sum over the tail of p (r - 1 - log r), r = (1 - P) q~ / p.

    `log_p` are the logarithms of the draws' p at the temperature. Where the first r is above 10 and its share,
    r p / pi, above 1 it goes on with the logarithm, so that its slope stays.
    """
    outside = torch.ones(len(student_logits), dtype=torch.bool)
    outside[ids] = False
    log_share = student_logits / temperature - torch.logsumexp(student_logits[outside] / temperature, 0)
    total = student_logits.sum() * 0
    for token, log_probability, weight in zip(drawn.tolist(), log_p, weights, strict=True):
        log_ratio = tail_mass.log() + log_share[token] - log_probability
        first = log_ratio.exp()
        limit = max(10.0, 1.0 / (weight * log_probability.exp()).item())
        if first > limit:
            first = limit * (1 + (first / limit).log())
        total = total + weight * log_probability.exp() * (first - 1 - log_ratio)
    return total


def dense_loss(
    hidden,
    weight,
    labels,
    teacher: TeacherBatch | None,
    *,
    kl_coef=1.0,
    reverse=False,
    num_ce=None,
    num_kl=None,
    **logit_options,
) -> DenseResult:
    """The whole objective in the dtype of its inputs (tests pass float64)."""
    logits = dense_logits(hidden, weight, **logit_options)
    labelled = labels != -100
    log_softmax = torch.log_softmax(logits, dim=-1)
    sum_ce = -log_softmax[labelled, labels[labelled]].sum()
    sum_kl = logits.new_zeros(())
    if teacher is not None:
        offsets = teacher.offsets.tolist()
        weights = [1.0] * len(teacher) if teacher.weights is None else teacher.weights.to(logits)
        for k, row in enumerate(teacher.rows.tolist()):
            entries = slice(offsets[k], offsets[k + 1])
            sum_kl = sum_kl + weights[k] * bucketed_kl_row(
                logits[row],
                teacher.token_ids[entries].long(),
                teacher.logprobs[entries].to(logits),
                teacher.log_tail[k].to(logits),
                teacher.temperature,
                reverse,
            )
            if reverse:
                continue
            ids, student = teacher.token_ids[entries].long(), logits[row]
            log_kept = torch.logsumexp(teacher.logprobs[entries].to(logits) / teacher.temperature, 0)
            log_z = torch.logaddexp(log_kept, teacher.log_tail[k].to(logits))
            tail_mass = (teacher.log_tail[k].to(logits) - log_z).exp()
            if teacher.draw_offsets is not None:
                draws = slice(*teacher.draw_offsets[k : k + 2].tolist())
                sum_kl = sum_kl + weights[k] * drawn_tail_row(
                    student,
                    ids,
                    teacher.draw_ids[draws].long(),
                    teacher.draw_logprobs[draws].to(logits) / teacher.temperature - log_z,
                    teacher.draw_weights[draws].to(logits),
                    teacher.temperature,
                    tail_mass,
                )
    ce = sum_ce / (int(labelled.sum()) or 1 if num_ce is None else num_ce)
    kl = sum_kl / ((len(teacher) if teacher is not None else 1) or 1 if num_kl is None else num_kl)
    return DenseResult(ce + kl_coef * kl, ce, kl)


def online_two_model_kl(student_logits, teacher_logits, temperature, reverse=False):
    """Sum over rows of the full-vocabulary KL: what the paper computes with a second model in memory."""
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)
    if reverse:
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum()


def teacher_from_logits(
    teacher_logits, rows, counts, temperature, dtype=torch.float64, draws=None
) -> TeacherBatch:
    """Exact targets: the `counts[k]` most likely tokens of each row and the exact tail at this temperature.

    `teacher_logits` [P, V] in float64; a count of V keeps everything and leaves a tail of -inf. `draws` are
    (number of draws of each token [P, V], expected number of draws of each token [P, V]); those of kept
    tokens are left out.
    """
    logprobs = torch.log_softmax(teacher_logits.double(), dim=-1)
    ids, values, tails, offsets = [], [], [], [0]
    for k, count in enumerate(counts):
        order = torch.argsort(logprobs[k], descending=True)
        ids.append(order[:count])
        values.append(logprobs[k][order[:count]])
        rest = logprobs[k][order[count:]] / temperature
        tails.append(torch.logsumexp(rest, 0) if len(rest) else torch.tensor(-torch.inf, dtype=torch.float64))
        offsets.append(offsets[-1] + count)
    columns = {}
    none = torch.empty(0, dtype=torch.float64)
    if draws is not None:
        drawn, expected = draws[0].clone(), draws[1]
        for k, kept in enumerate(ids):
            drawn[k, kept] = 0
        row, token = drawn.nonzero(as_tuple=True)
        times = drawn[row, token]
        row, token = row.repeat_interleave(times), token.repeat_interleave(times)
        columns = {
            "draw_offsets": torch.cat([torch.zeros(1).long(), drawn.sum(1).cumsum(0)]),
            "draw_ids": token.int(),
            "draw_logprobs": logprobs[row, token].to(dtype),
            "draw_weights": (1 / expected[row, token]).to(dtype),
        }
    return TeacherBatch(
        rows=torch.as_tensor(rows, dtype=torch.int64),
        offsets=torch.tensor(offsets),
        token_ids=torch.cat([none.int(), *ids]).int(),
        logprobs=torch.cat([none, *values]).to(dtype),
        log_tail=torch.stack(tails).to(dtype) if tails else none.to(dtype),
        temperature=temperature,
        **columns,
    )


def relative_error(got, expected) -> float:
    """|got - expected| / |expected| in float64; |got| where the expectation is zero."""
    got, expected = got.double(), expected.double()
    scale = expected.norm()
    return float((got - expected).norm() / (scale if scale > 0 else 1.0))
