"""The page: well-formed, self-contained, every point reachable and named, names of any kind escaped."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from formats.errors import ConfigError
from trainer.comparison.comparison import Comparison
from trainer.comparison.lines import Cell, ComparedModel
from trainer.comparison.metric import Metric
from trainer.comparison.page import page_html, require_page, write_page
from trainer.comparison.picture import picture_axes
from trainer.comparison.svg import LEFT, RIGHT, WIDTH, Scale
from trainer.evaluation.recorded_method import AppliedMethod

VOID = {"meta", "br", "input", "link"}
NASTY = '</script><b a="1">&amp;'


def comparison(num_sources: int = 1) -> Comparison:
    metrics = [
        Metric(side="source", name=f"s{n}", kind="text", measure="perplexity", higher_is_better=False)
        for n in range(num_sources)
    ]
    metrics.append(Metric(side="target", name="piqa", kind="task", measure="acc,none", higher_is_better=True))
    rows = {
        "base": (10.0, 0.5, None),
        "direct": (30.0, 0.8, 0.0),
        "kl-1": (12.0, 0.75, 1.0),
        NASTY: (11.0, 0.6, 4.0),
    }
    models = []
    for label, (source, target, kl) in rows.items():
        cells = {m.key: Cell(value=source if m.side == "source" else target) for m in metrics}
        parts = () if not kl else (("label annealing", {"kl_coef": kl}),)
        method = None if kl is None else AppliedMethod(parts)
        models.append(
            ComparedModel(label=label, members=(label,), paths=(label,), method=method, cells=cells)
        )
    return Comparison(metrics=tuple(metrics), models=tuple(models), initial="base", direct="direct")


class Checker(HTMLParser):
    """Collects tags, and fails on one that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


@pytest.mark.parametrize("num_sources", [1, 2])
def test_the_page_is_whole(num_sources):
    made = comparison(num_sources)
    text = page_html(made)
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    points = [attributes for tag, attributes in checker.tags if attributes.get("class") == "point"]
    pictures = 1 if num_sources == 1 else 1 + num_sources
    assert len(points) == 4 * pictures
    for attributes in points:
        assert attributes["tabindex"] == "0" and attributes["role"] == "img"
        assert attributes["aria-label"].startswith(attributes["data-label"])
    tips = {attributes["data-label"]: attributes["aria-label"] for attributes in points}
    assert set(tips) == {"base", "direct", "kl-1", NASTY}
    assert "source s0 ppl: 12.00" in tips["kl-1"] and "target piqa acc: 0.7500" in tips["kl-1"]
    assert "gain kept: 83%" in tips["kl-1"] and "label annealing kl_coef 1" in tips["kl-1"]
    rows = [
        attributes["data-label"]
        for tag, attributes in checker.tags
        if tag == "tr" and "data-label" in attributes
    ]
    assert rows == ["base", "direct", "kl-1", NASTY]
    assert sum(tag == "option" for tag, _ in checker.tags) == (0 if num_sources == 1 else pictures)


def test_nothing_comes_from_elsewhere():
    text = page_html(comparison())
    assert re.findall(r"https?://[^\"'\s>]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<(link|img|iframe|object|embed)\b|\bsrc=|@import|url\(|fetch\(|XMLHttp", text)
    assert "default-src 'none'" in text and text.count("<script>") == 1
    assert "prefers-color-scheme: dark" in text


def test_points_lie_where_their_numbers_are():
    text = page_html(comparison())
    svg = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    space = "{http://www.w3.org/2000/svg}"
    places = {}
    for group in svg.iter(f"{space}g"):
        x, y = re.fullmatch(r"translate\(([\d.]+) ([\d.]+)\)", group.attrib["transform"]).groups()
        places[group.attrib["data-label"]] = (float(x), float(y))
    across = sorted(places, key=lambda label: places[label][0])
    assert across == ["base", NASTY, "kl-1", "direct"]  # accuracy: higher to the right
    up = sorted(places, key=lambda label: -places[label][1])
    assert up == ["base", NASTY, "kl-1", "direct"]  # perplexity: higher up
    axes = picture_axes(comparison())
    scale = Scale([point["target"] for point in axes.points.values()], LEFT, WIDTH - RIGHT)
    assert places["kl-1"][0] == pytest.approx(scale(0.75), abs=0.06)


@pytest.mark.parametrize(
    "values", [[0.5, 0.8], [10.0, 30.0], [25.3, 25.4], [3.0], [0.0, 0.0], [-2.0, 90.0], [1.0, 1e6]]
)
def test_axes_have_ticks(values):
    scale = Scale(values, 0.0, 100.0)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12 and ticks == sorted(ticks)
    assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)
    assert all(0 < scale(value) < 100 for value in values)


def test_where_a_page_can_go(tmp_path):
    assert write_page(comparison(), tmp_path / "p.html").read_text().startswith("<!doctype html>")
    (tmp_path / "d.html").mkdir()
    for name, reason in (("p.txt", "ending"), ("d.html", "a directory"), ("gone/p.html", "no directory")):
        with pytest.raises(ConfigError, match=f"page must go to a writable .html file.*{reason}"):
            require_page(tmp_path / name)
