"""A small teacher and a student some steps away from it: data for encoding.py.

By default a Llama of about 3 million parameters with a vocabulary of 16,000 (its own BPE) is trained from
nothing on the text that every Python installation carries, prose and code, in some ten minutes on two
cores; `model` takes any local Hugging Face model instead. The student takes 60 more steps on code at a
fine-tuning rate. Both are run over held-out rows. Kept are final hidden states and output heads, from which
full-vocabulary logprobs are recomputed. Seeded; cached in the temporary directory, delete the file to start
again.

    python benchmarks/small_model.py [--steps 200 | --model DIR]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

VOCAB_SIZE = 16_000
ROW_TOKENS = 512
DOMAINS = ("prose", "code")


@dataclass(frozen=True)
class Pair:
    """Teacher and student on the same held-out rows of one domain. N: positions, D: width, V: vocabulary."""

    token_ids_N: np.ndarray
    """int32, the tokens themselves, row after row."""
    teacher_ND: np.ndarray
    teacher_VD: np.ndarray
    student_ND: np.ndarray
    student_VD: np.ndarray

    def logprobs(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """float64 (teacher, student) [stop - start, V], T = 1."""
        both = []
        for hidden, head in ((self.teacher_ND, self.teacher_VD), (self.student_ND, self.student_VD)):
            logits = (hidden[start:stop] @ head.T).astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            both.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        return both[0], both[1]


def _cache_file(model: str | None, steps: int, num_rows: int) -> Path:
    name = f"{VOCAB_SIZE}-{steps}" if model is None else Path(model).resolve().name
    return Path(tempfile.gettempdir()) / f"anneal-encoding-{name}-{num_rows}.npz"


def load(model: str | None = None, steps: int = 200, num_rows: int = 8) -> dict[str, Pair]:
    """The two domains, `num_rows` rows of each; trains on the first call."""
    path = _cache_file(model, steps, num_rows)
    if not path.exists():
        _make(path, model, steps, num_rows)
    with np.load(path) as data:
        return {
            domain: Pair(
                data[f"{domain}_ids"],
                data[f"{domain}_teacher"],
                data["teacher_head"],
                data[f"{domain}_student"],
                data["student_head"],
            )
            for domain in DOMAINS
        }


def _make(path: Path, model_dir: str | None, steps: int, num_rows: int) -> None:
    import torch

    size = 6_000_000 if model_dir is None else 1_000_000
    train = {domain: list(_texts(domain, "train", size)) for domain in DOMAINS}
    held = {domain: "\n\n".join(_texts(domain, "heldout", 60_000 + 3000 * num_rows)) for domain in DOMAINS}
    torch.manual_seed(0)
    tokenizer, model = _scratch(train) if model_dir is None else _existing(model_dir)
    ids = _token_ids(tokenizer, train)
    generator = torch.Generator().manual_seed(1)
    rows = {
        d: torch.tensor(tokenizer.encode(held[d]).ids[: ROW_TOKENS * num_rows]).view(num_rows, ROW_TOKENS)
        for d in DOMAINS
    }
    kept: dict[str, np.ndarray] = {f"{d}_ids": r.flatten().numpy().astype(np.int32) for d, r in rows.items()}

    def keep(name: str) -> None:
        with torch.no_grad():
            for d, r in rows.items():
                hidden = torch.cat([model.model(input_ids=row[None]).last_hidden_state[0] for row in r])
                kept[f"{d}_{name}"] = hidden.numpy()
            kept[f"{name}_head"] = model.lm_head.weight.detach().numpy().copy()

    if model_dir is None:
        _fit(model, ids, generator, steps, 4e-3, DOMAINS, "teacher", 16, 256)
    keep("teacher")
    _fit(model, ids, generator, 60, 3e-4, ("code",), "student", 4, 128)
    keep("student")
    np.savez(path, **kept)  # type: ignore[arg-type]


def train_teacher(out: Path, steps: int) -> None:
    """The small model and its tokenizer as a model directory: the teacher of `load`, by the same recipe."""
    import torch

    train = {domain: list(_texts(domain, "train", 6_000_000)) for domain in DOMAINS}
    torch.manual_seed(0)
    tokenizer, model = _scratch(train)
    generator = torch.Generator().manual_seed(1)
    _fit(model, _token_ids(tokenizer, train), generator, steps, 4e-3, DOMAINS, "teacher", 16, 256)
    tokenizer.save(str(_made(out) / "tokenizer.json"))
    model.save_pretrained(out)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _texts(domain: str, side: str, max_bytes: int) -> Iterator[str]:
    """Documents of a domain, side `train` or `heldout`."""
    from stdlib_text import documents  # type: ignore[import-not-found]

    split = f"{'source' if domain == 'prose' else 'target'}-{side}"
    return (document.text for document in documents(domain, split, max_bytes=max_bytes))


def _token_ids(tokenizer: Any, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Per domain one long int64 tensor."""
    import torch

    return {
        domain: torch.tensor([i for found in tokenizer.encode_batch(some) for i in found.ids])
        for domain, some in texts.items()
    }


def _fit(
    model: Any,
    ids: dict[str, Any],
    generator: Any,
    count: int,
    rate: float,
    domains: tuple[str, ...],
    what: str,
    rows: int,
    length: int,
) -> None:
    """`count` steps of AdamW over windows drawn from the domains in turn."""
    import torch

    start = time.time()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=rate, total_steps=count + 1, pct_start=0.1
    )
    for step in range(count):
        parts = []
        for i in range(rows):
            flat = ids[domains[i % len(domains)]]
            at = int(torch.randint(len(flat) - length - 1, (1,), generator=generator))
            parts.append(flat[at : at + length + 1])
        batch = torch.stack(parts)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0 or step == count - 1:
            seconds = time.time() - start
            print(f"{seconds:.0f} s: {what} {step}/{count} loss {loss.item():.3f}", file=sys.stderr)


def _scratch(train: dict[str, list[str]]) -> tuple[Any, Any]:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = ByteLevelBPETokenizer()
    texts = [text for domain in DOMAINS for text in train[domain]]
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB_SIZE, show_progress=False)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=ROW_TOKENS,
        tie_word_embeddings=True,
    )
    return tokenizer, LlamaForCausalLM(config)


def _existing(model_dir: str) -> tuple[Any, Any]:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer, AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    for domain, pair in load(args.model, args.steps, args.rows).items():
        print(domain, pair.teacher_ND.shape, pair.teacher_VD.shape)
