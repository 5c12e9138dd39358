"""Models to merge."""

from pathlib import Path

import pytest
from runs import copy_model, noise


@pytest.fixture(scope="package")
def models(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The initial model and two that were moved away from it; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("models")
    return {"initial": tiny_llama_dir} | {
        name: copy_model(tiny_llama_dir, folder / name, noise(seed)) for name, seed in (("a", 1), ("b", 2))
    }
