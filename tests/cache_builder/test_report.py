"""What a build says before it starts."""

from cache_builder.report import rough_bytes
from formats.capture_settings import CaptureSettings


def test_the_rough_size_falls_with_the_threshold_and_grows_with_the_draws() -> None:
    sizes = [rough_bytes(1000, 1000, CaptureSettings(min_prob=p)) for p in (0.0, 1e-3, 3e-3, 1e-2)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 5000
    rates = [rough_bytes(1000, 1000, CaptureSettings(draw_rate=rate)) for rate in (0, 8, 16)]
    assert rates == sorted(rates) and rates[0] < rates[1]
    assert rough_bytes(1000, 0, CaptureSettings()) == 5000
    # Measured: SmolLM2-135M-Instruct, news text, defaults.
    assert 55_000 < rough_bytes(1000, 1000, CaptureSettings()) < 75_000
