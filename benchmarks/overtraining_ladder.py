"""Pretraining for `overtraining.py`: the same small model on more and more of one text, each to a rate of zero.

The text is the prose of `examples/stdlib_text.py` (docstrings and READMEs of the interpreter and the installed
packages), cut into windows in one fixed order, so that a longer run begins with the windows of a shorter one. Every run
has its own schedule, warm-up and then a cosine to zero: a checkpoint in the middle of a run is at a high rate, and more
fragile for that reason alone (Springer et al. 2025 train their small models so too). AdamW, fp32, one seed.

TOKENS.npy, tokenizer/      what is read; heldout.jsonl is never trained on
models/8M                   a finished model; models/8M.unfinished.pt where it goes on after a kill, every 250 steps

B sequences of a batch, L tokens of a window.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "examples") not in sys.path:
    sys.path.insert(0, str(ROOT / "examples"))

from make_tiny_base import Recipe, build_model, loss_of, tokenize, train_tokenizer  # noqa: E402
from stdlib_text import documents  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

BYTES_PER_TOKEN = 3
"""More than a token of these small vocabularies has, so that a ladder never reads a window twice if there is text."""
HELDOUT = 40
"""Every so many documents one is held out."""
TOKENIZER_BYTES = 4_000_000
SAVE_EVERY = 250


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of everything: which models, on how many tokens, tuned on how much."""

    tokens: tuple[int, ...]
    """Of the pretraining runs, smallest first."""
    vocab_size: int
    width: int
    layers: int
    context: int = 256
    batch: int = 8
    rate: float = 3e-3
    split: str = "base-train"
    """Of the prose in `stdlib_text.py`; `source-train` is the small part of it that is read in seconds."""
    heldout_bytes: int = 60_000
    tuning_bytes: int = 100_000
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        """For the functions of `make_tiny_base.py`."""
        return Recipe(
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=max(1, self.width // 32),
            num_kv_heads=max(1, self.width // 32),
            intermediate_size=3 * self.width,
            context=self.context,
            seed=self.seed,
        )


SCALES = {
    "full": Scale(tokens=tuple(2**n * 1_000_000 for n in range(7)), vocab_size=1024, width=128, layers=4),
    "small": Scale(tokens=tuple(2**n * 250_000 for n in range(5)), vocab_size=512, width=32, layers=2),
    "quick": Scale(
        tokens=(8_192, 16_384), vocab_size=300, width=32, layers=1, context=64, split="source-train",
        heldout_bytes=6_000, tuning_bytes=8_000,
    ),
}  # fmt: skip
"""`full` is 0.8 million parameters on 1 to 64 million tokens, for a GPU or a night; `small` 43,000 on 0.25 to 4 million
(6 to 93 tokens a parameter), for one core and less than half an hour; `quick` says whether it runs."""


def name_of(num_tokens: int) -> str:
    """`250K`, `8M`: the label of a model."""
    millions = num_tokens / 1_000_000
    return f"{millions:g}M" if millions >= 1 else f"{num_tokens / 1_000:g}K"


def prepare(folder: Path, scale: Scale) -> tuple[np.ndarray, PreTrainedTokenizerFast]:
    """Token ids of the training text, [tokens], and the tokenizer; `heldout.jsonl` is written beside them."""
    path, tokenizer_path = folder / "TOKENS.npy", folder / "tokenizer"
    if path.exists():
        return np.load(path), PreTrainedTokenizerFast.from_pretrained(tokenizer_path)
    print(f"reading prose ({scale.split})", flush=True)
    found = documents("prose", scale.split)  # in the order of a hash of the names, so a cross-section
    heldout, train = found[::HELDOUT], [d.text for n, d in enumerate(found) if n % HELDOUT]
    if (wanted := BYTES_PER_TOKEN * scale.tokens[-1]) < sum(len(text) for text in train):
        reached = np.cumsum([len(text) for text in train])
        train = train[: int(np.searchsorted(reached, wanted)) + 1]
    count = int(np.searchsorted(np.cumsum([len(text) for text in train]), TOKENIZER_BYTES)) + 1
    tokenizer = train_tokenizer(train[:count], scale.recipe)
    tokenizer.save_pretrained(tokenizer_path)
    tokens = np.concatenate(tokenize(train, tokenizer)).astype(np.uint16)
    lines, size = [], 0
    for document in heldout:
        if size < scale.heldout_bytes:
            text = document.text[: scale.heldout_bytes // 10]
            lines.append(json.dumps({"text": text}) + "\n")
            size += len(text)
    (folder / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
    with open(folder / "TOKENS.tmp", "wb") as file:
        np.save(file, tokens)
    os.replace(folder / "TOKENS.tmp", path)  # last: where it is, the rest is too
    print(f"{len(train):,} documents, {len(tokens):,} tokens", flush=True)
    return tokens, tokenizer


def windows(tokens: np.ndarray, scale: Scale, first: int, num_steps: int) -> Iterator[torch.Tensor]:
    """Token ids [B, L] of the steps from `first` on; the same for every length of run, and after a restart."""
    count = len(tokens) // scale.context
    table = tokens[: count * scale.context].reshape(count, scale.context)
    orders: dict[int, np.ndarray] = {}  # of the passes over the text that are read now
    for step in range(first, num_steps):
        places = np.arange(step * scale.batch, (step + 1) * scale.batch)
        turns = sorted({int(place) // count for place in places})
        orders = {
            turn: orders[turn]
            if turn in orders
            else np.random.default_rng((scale.seed, turn)).permutation(count)
            for turn in turns
        }
        rows = [int(orders[place // count][place % count]) for place in places.tolist()]
        yield torch.from_numpy(table[rows].astype(np.int64))


def rate_of(step: int, num_steps: int) -> float:
    """Share of the largest rate: warm-up over a twentieth, then a cosine that reaches zero after the last step."""
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def pretrain(folder: Path, num_tokens: int, scale: Scale, *, stop_after: int | None = None) -> Path | None:
    """The model after so many tokens, trained or continued where it is not there yet.

    Args:
        folder: of the ladder.
        num_tokens: rounded down to whole batches.
        scale: the model and its text.
        stop_after: save after so many steps of this call, and return None: for the test of a restart.
    """
    out = folder / "models" / name_of(num_tokens)
    if (out / "config.json").exists():
        return out
    tokens, tokenizer = prepare(folder, scale)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = build_model(scale.recipe, tokenizer)
    model = model.to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=scale.rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    checkpoint, first = out.with_name(f"{out.name}.unfinished.pt"), 0
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    num_steps = num_tokens // (scale.batch * scale.context)
    started, loss = time.perf_counter(), torch.tensor(math.nan)
    for step, tokens_BL in enumerate(windows(tokens, scale, first, num_steps), first):
        for group in optimizer.param_groups:
            group["lr"] = scale.rate * rate_of(step, num_steps)
        loss = loss_of(model, tokens_BL.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done, stopped = step + 1, stop_after is not None and step + 1 == first + stop_after
        if stopped or (done % SAVE_EVERY == 0 and done < num_steps):
            states = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(states, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
            if stopped:
                return None
    seconds = time.perf_counter() - started
    speed = (num_steps - first) * scale.batch * scale.context / max(seconds, 1e-9)
    print(
        f"{out.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {num_steps} steps, last loss "
        f"{float(loss.detach()):.3f}, {seconds:.0f} s, {speed:,.0f} tokens/s",
        flush=True,
    )
    unfinished = out.with_name(f"{out.name}.saving")
    model.cpu().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, out)
    checkpoint.unlink(missing_ok=True)
    return out
