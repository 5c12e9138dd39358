"""Texts of tasks and quick settings for chains of tiny runs in this process."""

from dataclasses import replace

import pytest
from caches import write_cache
from runs import QUICK


@pytest.fixture(scope="session")
def task_caches(tiny_llama_dir, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Task -> (training cache, held-out cache)."""
    folder = tmp_path_factory.mktemp("tasks")
    found = {}
    for seed, name in enumerate(("one", "two", "three")):
        train = write_cache(folder / name, tiny_llama_dir, num_rows=8 + 4 * seed, seed=10 + seed)
        heldout = write_cache(folder / f"{name}-heldout", tiny_llama_dir, num_rows=3, seed=20 + seed)
        found[name] = (str(train), str(heldout))
    return found


@pytest.fixture(scope="session")
def ask_chain(tiny_llama_dir, task_caches):
    """A chain of two-step runs, by options; `methods` gives tasks methods of their own."""
    from trainer.chain.config import chain_from_options

    def asked(out, *tasks: str, methods: dict | None = None, overrides=(), **options):
        words = [f"{name}={train},{heldout}" for name in tasks for train, heldout in [task_caches[name]]]
        config = chain_from_options(
            None, tasks=words, out=str(out), model=str(tiny_llama_dir),
            overrides=[*QUICK, *overrides], **options,
        )  # fmt: skip
        own = {name: replace(task, method=(methods or {}).get(name)) for name, task in config.tasks.items()}
        return replace(config, tasks=own)

    return asked
