"""Values that no run can take: refused in one line that names the setting, before a name or a hash is made of them."""

import datetime
import math

import pytest

from formats.errors import ConfigError
from trainer.sweep.config import sweep_from_dict
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
