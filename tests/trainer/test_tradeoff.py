"""The trade-off picture: the front by hand, and a file that is a picture."""

import pytest

from formats.errors import ConfigError
from trainer.tradeoff import pareto_front, plot_tradeoff

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


def test_incomplete_results_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no source for 'a'"):
        plot_tradeoff({"a": {"target": 1.0}}, tmp_path / "p.png")
    with pytest.raises(ConfigError, match="at least one model"):
        plot_tradeoff({}, tmp_path / "p.png")
    with pytest.raises(ConfigError, match="got 'nobody'"):
        plot_tradeoff(POINTS, tmp_path / "p.png", families={"x": ["nobody"]})
    with pytest.raises(ConfigError, match="writable"):
        plot_tradeoff(POINTS, tmp_path / "missing" / "p.png")
