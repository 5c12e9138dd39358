"""Sweeps of tiny runs, by options."""

from pathlib import Path

import pytest
from caches import write_cache
from runs import QUICK

from trainer.sweep.config import sweep_from_options


@pytest.fixture(scope="module")
def texts(tiny_llama_dir, tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("texts")
    found = {}
    for side, seed in (("source", 1), ("target", 2)):
        found[side] = {side: str(write_cache(folder / side, tiny_llama_dir, num_rows=3, seed=seed))}
    return found


@pytest.fixture(scope="module")
def ask(llama_cache, tiny_llama_dir, texts):
    """A sweep of two-step runs, by options."""

    def asked(out: Path, **options):
        overrides = [*QUICK, *options.pop("overrides", [])]
        place = str(options.pop("place", llama_cache))
        return sweep_from_options(
            place, model=str(tiny_llama_dir), out=str(out), overrides=overrides, **{**texts, **options}
        )

    return asked
