"""Fixtures shared by all tests: tiny random models and their tokenizer, made once per run.

Nothing here may reach a network, and no test may use more than two threads.
"""

import os
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Beside other test processes threads that wait for each other in a busy loop take the cores from all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of 1003 entries, its chat template with generation markers."""
    from tiny_models import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_dir: Path):
    """The loaded tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A random Llama in fp32 with its tokenizer."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-llama"), "llama", tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A random Qwen3 (query and key norms) in fp32 with its tokenizer."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-qwen3"), "qwen3", tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def tiny_gemma2_uncapped_attention_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path
) -> Path:
    """Gemma 2 with its softcap on the final logits but none on attention: vLLM on a CPU runs it in fp32."""
    from tiny_models import save_tiny_model

    directory = tmp_path_factory.mktemp("tiny-gemma2-uncapped")
    return save_tiny_model(directory, "gemma2", tiny_tokenizer_dir, attn_logit_softcapping=None)


@pytest.fixture(scope="session")
def tiny_gemma2_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A random Gemma 2 (softcaps, sliding windows, tied embeddings) in fp32 with its tokenizer."""
    from tiny_models import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny-gemma2"), "gemma2", tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def pruned_cache(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """24 rows of the tiny Llama with heads as a build makes them: p >= 1e-3, at most 128 entries, with tail draws."""
    from caches import write_cache

    path = tmp_path_factory.mktemp("cache") / "pruned"
    return write_cache(path, tiny_llama_dir, num_rows=24, min_prob=1e-3, max_k=128)


@pytest.fixture
def anneal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `anneal WORDS...` in this process; gives exit code, stdout, stderr (`typed_here.Run`)."""
    from typed_here import run_here

    return partial(run_here, monkeypatch, capsys)
