"""A corpus and its cache, built by the command itself with the transformers engine."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from corpora import write_jsonl

    texts = ["def add(a, b):\n    return a + b\n" * 5, "class Point:\n    x = 0\n" * 8, "import sys\n" * 9]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_llama_dir: Path) -> Path:
    import warm_process

    path = tmp_path_factory.mktemp("built") / "cache"
    words = ("cache", "build", corpus, "--model", tiny_llama_dir, "--out", path, "--engine", "transformers")
    done = warm_process.anneal(*words)
    assert done.returncode == 0, done.stderr
    return path
