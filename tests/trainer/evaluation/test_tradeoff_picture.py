"""The trade-off picture: the front by hand, and a file that is a picture."""

import sys

import matplotlib
import pytest

from formats.errors import ConfigError
from trainer.evaluation.tradeoff_picture import pareto_front, plot_tradeoff, require_plottable

POINTS = {
    "initial": {"source": 9.6, "target": 30.0},
    "direct": {"source": 10.7, "target": 12.0},
    "annealed 1": {"source": 10.1, "target": 12.1},
    "annealed 4": {"source": 9.8, "target": 12.6},
    "beaten": {"source": 10.2, "target": 12.7},
}


def test_the_front_holds_what_nothing_beats():
    assert pareto_front(POINTS) == ["direct", "annealed 1", "annealed 4", "initial"]
    assert pareto_front({"a": {"source": 1.0, "target": 1.0}, "b": {"source": 2.0, "target": 2.0}}) == ["a"]


def test_equal_points_are_on_the_front_together():
    one, worse, better = ({"source": s, "target": 1.0} for s in (1.0, 1.5, 0.5))
    assert pareto_front({"a": one, "b": dict(one), "c": worse}) == ["a", "b"]
    assert pareto_front({"a": one, "b": dict(one), "c": better}) == ["c"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written(tmp_path, ending):
    path = tmp_path / f"tradeoff.{ending}"
    families = {"annealed": ["annealed 1", "annealed 4"]}
    assert plot_tradeoff(POINTS, path, families=families, title="kept against learnt") == path
    data = path.read_bytes()
    assert (
        data.startswith(b"\x89PNG") if ending == "png" else b"kept against learnt" in data or b"<svg" in data
    )
    assert len(data) > 10_000


def test_a_dollar_in_a_name_is_drawn_as_typed(tmp_path):
    names = ("cost $x_{$", "$a^$", "b$")
    results = {name: {"source": 1.0 + n, "target": 3.0 - n} for n, name in enumerate(names)}
    words = {"title": "t $\\bad{$", "source_label": "s $^$", "target_label": "t $_$"}
    families = {"f $\\x$": list(names[:2])}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        path = plot_tradeoff(results, tmp_path / "p.svg", initial="b$", families=families, **words)
    drawn = path.read_text()
    for word in ("cost $x_{$", "$a^$", "b$ model", "f $\\x$", *words.values()):
        assert f">{word}</text>" in drawn


def test_incomplete_results_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no source for 'a'"):
        plot_tradeoff({"a": {"target": 1.0}}, tmp_path / "p.png")
    with pytest.raises(ConfigError, match="at least one model"):
        plot_tradeoff({}, tmp_path / "p.png")
    with pytest.raises(ConfigError, match="got 'nobody'"):
        plot_tradeoff(POINTS, tmp_path / "p.png", families={"x": ["nobody"]})
    with pytest.raises(ConfigError, match="writable"):
        plot_tradeoff(POINTS, tmp_path / "missing" / "p.png")


def test_what_cannot_be_plotted_is_known_before_the_work(tmp_path, monkeypatch):
    assert require_plottable(tmp_path / "p.SVG") == tmp_path / "p.SVG"
    for path in ("p", "p.txt", "missing/p.png"):
        with pytest.raises(ConfigError, match="writable"):
            require_plottable(tmp_path / path)
    (tmp_path / "d.png").mkdir()
    with pytest.raises(ConfigError, match="a directory"):
        require_plottable(tmp_path / "d.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'label-annealing\[plot\]'"):
        require_plottable(tmp_path / "p.png")
    assert [path.name for path in tmp_path.iterdir()] == ["d.png"]


def test_the_dashed_line_leaves_out_what_the_initial_model_beats(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = {}, Axes.plot

    def recording(axes, xs, ys, *args, **options):
        drawn[options.get("label")] = list(xs)
        return plot(axes, xs, ys, *args, **options)

    monkeypatch.setattr(Axes, "plot", recording)
    spoilt = {"source": 9.7, "target": 31.0}  # better on the source than every model but the initial one
    plot_tradeoff({**POINTS, "spoilt": spoilt}, tmp_path / "p.png")
    assert drawn["Pareto front"] == [12.0, 12.1, 12.6]
