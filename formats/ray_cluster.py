"""The connection to a Ray cluster, for whatever `--ray` spreads over one."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from formats.errors import ConfigError, one_line
from formats.install import how_to_install


@contextmanager
def connected(address: str | None, runtime_env: dict[str, Any] | None = None) -> Iterator[None]:
    """Within this, `ray` works; a connection that was there before stays afterwards.

    Args:
        address: of a running cluster, `auto` for the one this machine belongs to; None starts Ray on this machine.
        runtime_env: passed to Ray.

    Raises:
        ConfigError: Ray is not installed, or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            f"--ray needs the package ray, which is not installed; {how_to_install('ray')}"
        ) from None
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(
            address=address,
            runtime_env=runtime_env,
            log_to_driver=False,
            include_dashboard=False if address is None else None,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = one_line(error, 200, whole=True)
        raise ConfigError(f"--ray must name a Ray cluster that can be reached, got: {reason}") from error
    try:
        yield
    finally:
        ray.shutdown()


def machines_of(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """The resources of each machine that is there, of what `ray.nodes` returns."""
    return [node["Resources"] for node in nodes if node["Alive"]]
