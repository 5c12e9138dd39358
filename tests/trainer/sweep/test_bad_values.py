"""Values that no run can take: refused in one line that names the setting, before a name or a hash is made of them."""

import datetime
import math

import pytest

from formats.errors import ConfigError
from trainer.sweep.config import sweep_from_dict, sweep_from_options
from trainer.sweep.plan import plan_runs

BASE = {"cache": "C", "model": "M"}
HUGE, DAY = 10**400, datetime.date(2020, 1, 1)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        *(({"runs": [{"kl_coef": [value]}]}, "kl_coef") for value in (math.nan, math.inf, HUGE, DAY)),
        *(({"every": {"training.learning_rate": [v]}}, "training.learning_rate") for v in (math.inf, HUGE, DAY)),
        ({"runs": [{"l2.coef": [math.nan]}]}, "l2.coef"),
        ({"runs": [{"caches": [{"path": "x", "weight": -math.inf}]}]}, "caches.weight"),
        ({"runs": [{"kl_coef": 1}], "merges": [{"method": "soup", "by": None, "of": "all"}]}, "merges.soup.by"),
        ({"merges": [{"method": "ties", "trim": [None]}]}, "merges.ties.trim"),
        ({"merges": [{"method": "wise-ft", "alpha": HUGE}]}, "merges.wise-ft.alpha"),
        ({"base": {**BASE, "training": [1]}}, "base.training"),
        ({"base": {**BASE, "lora": {"r": HUGE}}}, "lora.r"),
        ({"keep_gain": HUGE}, "keep_gain"),
        *(({"source": {name: "S"}}, "source") for name in (None, 2024, "", " ", "a\nb")),
    ],
)  # fmt: skip
def test_they_are_refused_by_name(asked, named):
    texts = {"source": {"s": "S"}, "target": {"t": "T"}}
    with pytest.raises(ConfigError, match=rf"(^|: ){named} must .*, got ") as caught:
        plan_runs(sweep_from_dict({"base": BASE, "out": "OUT", **texts, **asked}))
    assert "\n" not in str(caught.value)


KL, L2 = {"kl_coef": 3}, {"l2.coef": 1}


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"every": {"temperature": [1, 2]}}, "every temperature would have no effect: it acts on the KL term"),
        ({"every": {"kl_gate": ["unsure"]}, "runs": [L2]}, "every kl_gate would have no effect"),
        ({"every": {"kl_coef": [1]}, "runs": [KL]}, "every kl_coef would have no effect: each run has a value"),
        ({"every": {"kl_coef": [1]}, "search": True}, "every kl_coef would have no effect"),
        ({"every": {"temperature": [1]}, "runs": [{**KL, "temperature": 2}]}, "every temperature would have no"),
        *(({"search_runs": n}, "search_runs .* needs search: true .*, got") for n in (4, 8)),
        ({"runs": [{**KL, "name": "all"}]}, "name of an entry of runs must not be 'all'"),
        ({"runs": [{**KL, "name": "direct"}]}, "name of an entry of runs must not be 'direct'"),
    ],
)  # fmt: skip
def test_what_would_be_left_out_is_refused(asked, named):
    texts = {"source": {"s": "S"}, "target": {"t": "T"}}
    with pytest.raises(ConfigError, match=named) as caught:
        plan_runs(sweep_from_dict({"base": BASE, "out": "OUT", **texts, **asked}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"every": {"temperature": [1, 2]}, "search": True}, 1),
        ({"every": {"temperature": [1, 2]}, "runs": [KL]}, 3),
        ({"every": {"temperature": [1, 2]}, "base": {**BASE, **KL}}, 3),
        ({"every": {"temperature": [1, 2], "kl_coef": [1]}}, 3),
        ({"every": {"kl_coef": [1, 2]}, "runs": [KL, L2]}, 4),
        ({"search": True, "search_runs": 4}, 1),
    ],
)
def test_what_reaches_a_run_is_taken(asked, count):
    texts = {"source": {"s": "S"}, "target": {"t": "T"}}
    assert len(plan_runs(sweep_from_dict({"base": BASE, "out": "OUT", **texts, **asked}))) == count


def test_texts_of_options_come_beside_those_of_the_file(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("base: {cache: C, model: M}\nsource: {a: A, b: B}\ntarget: {t: T}\n")
    found = sweep_from_options(str(path), out="OUT", source={"b": "other", "c": "C"}, target={})
    assert found.source == {"a": "A", "b": "other", "c": "C"} and found.target == {"t": "T"}
    path.write_text("base: {cache: C, model: M}\nsource: [A]\ntarget: {t: T}\n")
    with pytest.raises(ConfigError, match="source must be a mapping, got"):
        sweep_from_options(str(path), out="OUT", source={"c": "C"}, target={})
