"""What of a prediction is captured: every setting is checked here and nowhere else."""

import pytest

from formats.capture_settings import CaptureSettings
from formats.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("positions", "some", "positions must be one of loss, all, got 'some'"),
        ("min_prob", 1.0, "min_prob must be at least 0 and below 1, got 1.0"),
        ("min_prob", -0.1, "min_prob must be at least 0"),
        ("min_prob", float("nan"), "min_prob must be at least 0"),
        ("min_prob", "0.1", "min_prob must be at least 0"),
        ("min_prob", True, "min_prob must be at least 0"),
        ("max_k", 0, "max_k must be a whole number of at least 1, got 0"),
        ("max_k", 2.0, "max_k must be a whole number"),
        ("draw_rate", -1, r"draw_rate \(--tail-draws\) must be a whole number from 0 to 64, got -1"),
        ("draw_rate", 65, "from 0 to 64, got 65"),
        ("draw_rate", 0.5, "must be a whole number"),
        ("draw_rate", True, "must be a whole number"),
    ],
)
def test_settings_out_of_range(setting: str, value: object, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        CaptureSettings(**{setting: value})
    assert "\n" not in str(caught.value)


def test_defaults_and_the_way_through_json():
    assert CaptureSettings(**CaptureSettings().to_dict()) == CaptureSettings()
    assert CaptureSettings().to_dict() == {
        "positions": "all",
        "min_prob": 1e-2,
        "max_k": 128,
        "draw_rate": 8,
    }
