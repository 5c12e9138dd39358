"""Which `--min-prob` and `--tail-draws`? Bytes per position against the angle of the parameter gradient.

    python benchmarks/operating_point.py --work WORK --teacher tiny [--rows 128] [--steps 10 100]

For one teacher of teacher_models.py and each of its students every pair of threshold and rate is stored with
the real codec, read back, and compared with the exact full-vocabulary KL gradient with respect to *all
parameters*. What is reported for a step of N tokens is the angle in degrees and the ratio of the norms.

A backward pass per setting would take days, so errors are measured along a few directions v of parameter
space. With J the derivative of all logits with respect to the parameters and e the error of the gradient
with respect to the logits, the parameter gradient errs by J'e, and

    v . J'e = (J v) . e            E over v ~ N(0, 1) of (v . J'e)^2 = |J'e|^2

so one difference quotient of the logits along v serves every setting and every temperature. Rows of text are
independent; for each setting the variance of v . J'e over rows is its *noise*, which grows with the number of
rows, and the square of its mean (less noise) its *bias*, which grows with the number's square. The exact
gradient g is taken by backward passes; the quotient along g itself gives the norm's ratio, and checks the
whole arrangement: it must return |g|. benchmarks/fidelity.py has no such shortcut and confirms the outcome.

P: positions of a row, V: vocabulary, E: kept entries, S: draws, K: directions, R: rows.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import numpy as np
import torch
from gradient_errors import (
    Exact,
    along,
    angle,
    exact_gradients,
    gradient,
    hidden_states,
    random_direction,
    row_at,
    slope,
)
from stored_teachers import Setting, Stored, captures, codec_variants, grid, pairs_of, store
from teacher_batches import batch_from_topk
from teacher_models import TEACHERS, Subject, prepare

from formats.codec.config import CodecConfig
from formats.logprobs.topk import TopKLogprobs
from trainer.loss.label_annealing_loss import label_annealing_loss

TEMPERATURES = (1.0, 2.0, 4.0)
DEFAULT_STEP = 65_536


def measure(
    subject: Subject,
    steps: int,
    stored: dict[str, Stored],
    rows: int,
    num_directions: int,
    temperatures: Sequence[float],
) -> tuple[dict[tuple[str, float], np.ndarray], dict[float, Exact], dict[str, float]]:
    """Errors [R, K] per setting and temperature, the exact gradients, and facts about the drift."""
    rows_RS = subject.held_out_RS[:rows]
    teacher, student = subject.teacher(), subject.student(steps).eval()
    begin = time.time()

    def say(what: str) -> None:
        print(
            f"{subject.name}, {steps} steps: {what}, {time.time() - begin:.0f} s", file=sys.stderr, flush=True
        )

    teacher_RPD, teacher_VD = hidden_states(teacher, rows_RS), teacher.lm_head.weight.detach()
    exact = exact_gradients(student, rows_RS, teacher_RPD, teacher_VD, temperatures)
    say("exact gradients")
    student_RPD = hidden_states(student, rows_RS)
    slopes = [slope(student, rows_RS, random_direction(student, k)) for k in range(num_directions)]
    norm = math.sqrt(sum(float(part.double().square().sum()) for part in exact[1.0].total))
    slopes.append(slope(student, rows_RS, [part / norm for part in exact[1.0].total]))
    say("slopes")
    student_VD = student.lm_head.weight.detach()
    errors: dict[tuple[str, float], list[np.ndarray]] = {}
    along_exact, kl = 0.0, 0.0
    for r in range(rows):
        l_PV, z_PV = teacher_RPD[r] @ teacher_VD.T, student_RPD[r] @ student_VD.T
        slopes_KPV = [one.logits(r) for one in slopes]
        kl += float(
            torch.nn.functional.kl_div(
                torch.log_softmax(z_PV, -1),
                torch.log_softmax(l_PV, -1),
                log_target=True,
                reduction="batchmean",
            )
        )
        for t in temperatures:
            row = row_at(1 / t, z_PV, l_PV, slopes_KPV)
            if t == 1.0:
                along_exact += float(row.exact_K[-1])
            for name, found in stored.items():
                errors.setdefault((name, t), []).append(along(row, found.rows[r]) - row.exact_K)
    say("errors")
    facts = {"kl": kl / rows, "along_exact_over_norm": along_exact / norm, "rows": rows}
    return {key: np.stack(value) for key, value in errors.items()}, exact, facts


def rounding(
    subject: Subject,
    steps: int,
    captured: dict[int, list[TopKLogprobs]],
    pairs: Sequence[tuple[float, int]],
    rows: int,
    temperatures: Sequence[float],
) -> list[dict[str, Any]]:
    """What coarser codecs add to the noise of draws, per token and with respect to the logits.

    Both are noise that is independent from token to token, so the ratio of their squares is the share by which
    a step's squared angle grows.
    """
    rows_RS = subject.held_out_RS[:rows]
    teacher, student = subject.teacher(), subject.student(steps).eval()
    with torch.no_grad():
        l_RPV = [teacher(input_ids=row[None]).logits[0, :-1] for row in rows_RS]
        z_RPV = [student(input_ids=row[None]).logits[0, :-1] for row in rows_RS]
    lines = []
    for min_prob, rate in pairs:
        exact = store(Setting(min_prob, rate, CodecConfig.lossless()), captured, subject.held_out_RS)
        variants = [Setting(min_prob, rate), *codec_variants([(min_prob, rate)])[1:]]
        stored = {variant.name: store(variant, captured, subject.held_out_RS) for variant in variants}
        for t in temperatures:
            noise, added = 0.0, dict.fromkeys(stored, 0.0)
            for r in range(rows):
                q_PV = torch.softmax(z_RPV[r].double() / t, -1).numpy()
                p_PV = torch.softmax(l_RPV[r].double() / t, -1).numpy()
                unrounded = gradient(1 / t, q_PV, exact.rows[r])
                noise += float(((unrounded - (q_PV - p_PV) / t) ** 2).sum())
                for name, found in stored.items():
                    added[name] += float(((gradient(1 / t, q_PV, found.rows[r]) - unrounded) ** 2).sum())
            for name, found in stored.items():
                share = added[name] / noise
                lines.append(
                    {"setting": name, "steps": steps, "temperature": t, "share": share} | found.sections
                )
                parts = ", ".join(f"{key} {value:.2f}" for key, value in found.sections.items())
                print(
                    f"rounding: {steps} steps, T = {t:g}, {found.payload:.2f} B, adds {share:8.2%} to the squared "
                    f"noise of draws  {name}: {parts}",
                    flush=True,
                )
    return lines


def confirm(
    subject: Subject,
    steps: int,
    stored: dict[str, Stored],
    rows: int,
    temperature: float,
    sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """The same by backward passes of the product's loss: angle and norm of steps of the first `sizes` rows."""
    teacher = subject.teacher()
    teacher_RPD = hidden_states(teacher, subject.held_out_RS[:rows])
    teacher_VD = teacher.lm_head.weight.detach().clone()
    del teacher
    student = subject.student(steps).eval()
    parameters = list(student.parameters())
    totals: dict[str, torch.Tensor] = {}
    lines: list[dict[str, Any]] = []

    def add(name: str, gradient: Sequence[torch.Tensor]) -> None:
        flat = torch.cat([part.flatten() for part in gradient])
        totals[name] = totals[name].add_(flat) if name in totals else flat

    for number, row in enumerate(subject.held_out_RS[:rows]):
        there = teacher_RPD[number : number + 1]
        exact = exact_gradients(student, row[None], there, teacher_VD, [temperature])[temperature]
        add("exact", exact.total)
        for name, found in stored.items():
            hidden_PD = student.model(input_ids=row[None]).last_hidden_state[0, :-1]
            batch = batch_from_topk(np.arange(len(row) - 1), found.rows[number], temperature)
            labels_P = torch.full((len(row) - 1,), -100)
            loss = label_annealing_loss(hidden_PD, student.lm_head.weight, labels_P, batch).loss
            add(name, torch.autograd.grad(loss * (len(row) - 1), parameters))
        if number + 1 not in sizes:
            continue
        true = totals["exact"]
        for name in stored:
            across = totals[name] - true * (true.dot(totals[name]) / true.dot(true))
            along_it = float(totals[name].dot(true) / true.norm())
            degrees = math.degrees(math.atan2(float(across.norm()), along_it))
            norm = float(totals[name].norm() / true.norm())
            tokens = (number + 1) * (len(row) - 1)
            line = {"setting": name, "steps": steps, "temperature": temperature, "tokens": tokens}
            lines.append(line | {"degrees": degrees, "norm": norm, "bytes": stored[name].payload})
            print(
                f"confirmed: {steps} steps, T = {temperature:g}, {tokens} tokens, {stored[name].payload:.1f} B  "
                f"{degrees:.3f} deg, norm {norm:.4f}  {name}",
                flush=True,
            )
    return lines


def compare(
    subject: Subject, stored: dict[str, Stored], args: argparse.Namespace, write: Callable[[object], None]
) -> None:
    """Bytes and angles of all settings, printed, and written after every stop."""
    print(f"{TEACHERS[args.teacher].what}: {args.rows} rows of 511 positions")
    report: dict[str, Any] = {
        "bytes": {
            name: {"payload": s.payload, "entries": s.entries, "draws": s.draws, "mass": s.mass} | s.sections
            for name, s in stored.items()
        },
        "angles": [],
    }
    for name, sizes in report["bytes"].items():
        print(f"{name:72} " + ", ".join(f"{key} {value:.2f}" for key, value in sizes.items()))
    for steps in args.steps:
        errors, exact, facts = measure(subject, steps, stored, args.rows, args.directions, args.temperatures)
        print(f"\n{steps} steps: " + ", ".join(f"{key} {value:.5g}" for key, value in facts.items()))
        for (name, t), errors_RK in errors.items():
            for tokens in args.step_tokens:
                got = angle(errors_RK, exact[t], tokens / (subject.held_out_RS.shape[1] - 1))
                line = {"setting": name, "steps": steps, "temperature": t, "tokens": tokens} | vars(got)
                report["angles"].append(line)
                print(
                    f"{steps:4} steps, T = {t:g}, {tokens} tokens, {stored[name].payload:6.1f} B  "
                    f"{got.degrees:7.3f} deg (noise {got.noise_degrees:.3f}, bias {got.bias_degrees:.3f}), "
                    f"norm {got.norm:.4f}  {name}"
                )
        report[f"facts-{steps}"] = facts
        write(report)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models and captures")
    parser.add_argument("--teacher", choices=TEACHERS, required=True)
    parser.add_argument("--real-model", type=Path, help="a directory that examples/real/make_model.py made")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of 512 tokens")
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 100], help="of drift; none: bytes only")
    parser.add_argument("--directions", type=int, default=4, help="random ones")
    parser.add_argument("--temperatures", type=float, nargs="+", default=list(TEMPERATURES))
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[DEFAULT_STEP])
    parser.add_argument("--variants", nargs="*", default=[], metavar="P:RATE", help="try codec settings here")
    parser.add_argument(
        "--confirm",
        nargs="*",
        default=[],
        metavar="P:RATE",
        help="only these, by backward passes of the loss",
    )
    parser.add_argument(
        "--rounding",
        nargs="*",
        default=[],
        metavar="P:RATE",
        help="only what coarser codecs add to the noise here",
    )
    parser.add_argument("--bytes", nargs="*", default=[], metavar="P:RATE", help="only the bytes of these")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128], help="rows of a confirmed step")
    parser.add_argument("--codec", default="{}", metavar="JSON", help="codec settings of what is confirmed")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if 1.0 not in args.temperatures and not args.confirm:
        parser.error("--temperatures must include 1")
    subject = prepare(args.teacher, args.work, args.rows, args.steps, args.real_model)
    captured = captures(subject, args.rows)
    codec = replace(CodecConfig(), **json.loads(args.codec))

    def stored_at(settings: Sequence[Setting]) -> dict[str, Stored]:
        return {setting.name: store(setting, captured, subject.held_out_RS) for setting in settings}

    def write(found: object) -> None:
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    if args.confirm:
        chosen = stored_at([Setting(min_prob, rate, codec) for min_prob, rate in pairs_of(args.confirm)])
        lines = []
        for steps in args.steps:
            for t in args.temperatures:
                lines += confirm(subject, steps, chosen, args.rows, t, args.sizes)
        write(lines)
    elif args.bytes:
        for min_prob, rate in pairs_of(args.bytes):
            found = store(Setting(min_prob, rate, codec), captured, subject.held_out_RS)
            print(
                f"p >= {min_prob:g}, draws at {rate}: {found.payload:.2f} B, {found.entries:.2f} entries, "
                f"{found.draws:.2f} draws, mass {found.mass:.3f}: "
                + ", ".join(f"{name} {size:.2f}" for name, size in found.sections.items()),
                flush=True,
            )
    elif args.rounding:
        lines = []
        for steps in args.steps:
            lines += rounding(subject, steps, captured, pairs_of(args.rounding), args.rows, args.temperatures)
        write(lines)
    else:
        compare(subject, stored_at(grid() + codec_variants(pairs_of(args.variants))), args, write)


if __name__ == "__main__":
    main()
