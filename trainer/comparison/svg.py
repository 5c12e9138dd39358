"""The picture of a comparison as inline SVG, drawn here: points that can be hovered and reached with the keyboard.

Colours are CSS variables (`--c0` ... `--c6`, `--grid`, `--soft`), so that the page decides light or dark. Every point
is a focusable element with its name and numbers as its label.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence

from trainer.comparison.picture import PictureAxes
from trainer.evaluation.tradeoff_picture import WIDE, pareto_front

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 20, 56
NUM_COLOURS = 7
MARKERS = (
    "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0",
    "M-5.3 -5.3h10.6v10.6h-10.6z",
    "M0 -7L6.5 5H-6.5z",
    "M0 -7.5L7 0L0 7.5L-7 0z",
    "M0 7L6.5 -5H-6.5z",
    "M-2.2 -6.5h4.4v4.3h4.3v4.4h-4.3v4.3h-4.4v-4.3h-4.3v-4.4h4.3z",
)
STAR = "M0 -10L2.6 -3.4L9.6 -3.1L4.2 1.3L6 8.1L0 4.3L-6 8.1L-4.2 1.3L-9.6 -3.1L-2.6 -3.4z"


class Scale:
    """From values of one axis to pixels; logarithmic where they spread widely, as in the PNG."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(values), max(values)
        self.log = high > WIDE * low > 0
        low, high = (math.log(low), math.log(high)) if self.log else (low, high)
        room = 0.08 * (high - low) or abs(high) * 0.05 or 1.0
        self.low, self.high, self.start, self.stop = low - room, high + room, start, stop

    def __call__(self, value: float) -> float:
        """Pixels."""
        at = math.log(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis, five or so."""
        if self.log:
            low, high = math.exp(self.low), math.exp(self.high)
            found = [
                m * 10.0**e for e in range(-12, 13) for m in (1, 2, 3, 5, 7) if low <= m * 10.0**e <= high
            ]
            if len(found) >= 3:
                return found[:: 1 + len(found) // 9]
        low, high = (math.exp(self.low), math.exp(self.high)) if self.log else (self.low, self.high)
        raw = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - raw))
        first = math.ceil(low / step)
        return [n * step for n in range(first, math.floor(high / step) + 1)]


def scatter_svg(
    axes: PictureAxes,
    *,
    initial: str,
    families: Mapping[str, Sequence[str]],
    tips: Mapping[str, str],
    title: str,
) -> str:
    """One picture; empty text where there is nothing to draw.

    Args:
        axes: the points and what the axes are called.
        initial: label of the initial model, a star; empty without one.
        families: method -> labels that are joined by a line, in order.
        tips: label -> what is shown on hover and read out.
        title: read out for the picture as a whole.
    """
    points = axes.points
    if not points:
        return ""
    x = Scale([point["target"] for point in points.values()], LEFT, WIDTH - RIGHT)
    y = Scale([point["source"] for point in points.values()], HEIGHT - BOTTOM, TOP)
    place = {label: (x(point["target"]), y(point["source"])) for label, point in points.items()}
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{html.escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">',
        *_frame(axes, x, y),
    ]
    if initial in place:
        at_x, at_y = place[initial]
        parts.append(
            f'<path class="cross" d="M{at_x:.1f} {TOP}V{HEIGHT - BOTTOM}M{LEFT} {at_y:.1f}H{WIDTH - RIGHT}"/>'
        )
    front = [label for label in pareto_front(points, axes.higher_is_better) if label != initial]
    if len(front) > 1:
        parts.append(f'<path class="front" d="{_path(place[label] for label in front)}"/>')
    groups = {name: [label for label in labels if label in place] for name, labels in families.items()}
    joined = {label for labels in groups.values() for label in labels}
    groups |= {label: [label] for label in place if label not in joined and label != initial}
    taken: list[tuple[float, float, float]] = []
    names = []
    for number, labels in enumerate(labels for labels in groups.values() if labels):
        colour = f"var(--c{number % NUM_COLOURS})"
        if len(labels) > 1:
            parts.append(f'<path d="{_path(place[at] for at in labels)}" fill="none" stroke="{colour}"/>')
        for label in labels:
            parts.append(_point(label, place[label], MARKERS[number % len(MARKERS)], colour, tips))
            names += _name(label, place[label], taken)
    if initial in place:
        parts.append(_point(initial, place[initial], STAR, "currentColor", tips))
        names += _name(initial, place[initial], taken)
    return "\n".join([*parts, *names, "</svg>"])


def _frame(axes: PictureAxes, x: Scale, y: Scale) -> list[str]:
    parts = []
    for value in x.ticks():
        parts.append(f'<path class="grid" d="M{x(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
        )
    for value in y.ticks():
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    better = {True: "higher is better", False: "lower is better"}
    parts.append(
        f'<text class="axis" x="{middle_x:.0f}" y="{HEIGHT - 14}" text-anchor="middle">'
        f"{html.escape(axes.target_label)}, {better[axes.higher_is_better['target']]}</text>"
    )
    parts.append(
        f'<text class="axis" transform="translate(18 {middle_y:.0f}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(axes.source_label)}, {better[axes.higher_is_better['source']]}</text>"
    )
    return parts


def _point(label: str, at: tuple[float, float], marker: str, colour: str, tips: Mapping[str, str]) -> str:
    tip = html.escape(tips.get(label, label), quote=True)
    return (
        f'<g class="point" tabindex="0" role="img" aria-label="{tip}" data-label="{html.escape(label, quote=True)}" '
        f'transform="translate({at[0]:.1f} {at[1]:.1f})"><title>{tip}</title><circle r="13" fill="transparent"/>'
        f'<path d="{marker}" fill="{colour}"/></g>'
    )


def _name(label: str, at: tuple[float, float], taken: list[tuple[float, float, float]]) -> list[str]:
    """The label beside its point, on the first side where it hides no other one; none where all are taken."""
    width = 6.6 * len(label)
    for right, down in ((True, -8.0), (True, 16.0), (False, -8.0), (False, 16.0)):
        left = at[0] + 10 if right else at[0] - 10 - width
        box = (left, left + width, at[1] + down)
        clear = all(box[1] < a or box[0] > b or abs(box[2] - line) > 12 for a, b, line in taken)
        if clear and box[0] > LEFT and box[1] < WIDTH - 2 and TOP < box[2] < HEIGHT - BOTTOM:
            taken.append(box)
            return [
                f'<text class="name" x="{left:.1f}" y="{box[2]:.1f}" aria-hidden="true">{html.escape(label)}</text>'
            ]
    return []


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
