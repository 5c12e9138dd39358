"""An exact teacher in a few lines: the model's own float64 log-softmax, cut to heads with numpy."""

from pathlib import Path

import numpy as np


def random_rows(num_rows: int, vocab_size: int, seed: int = 0, longest: int = 40) -> list:
    """Token rows of uneven length whose masks are prefixes, suffixes, holes, or everything."""
    from formats.disk.token_row import TokenRow

    generator = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        length = int(generator.integers(6, longest + 1))
        ids = generator.integers(6, vocab_size, length)
        mask = np.ones(length, bool)
        if index % 4 == 1:
            mask[: length // 2] = False
        elif index % 4 == 2:
            mask = generator.random(length) < 0.4
            mask[-1] = True
        elif index % 4 == 3:
            mask[: length - 2] = False
        mask[0] = False
        rows.append(TokenRow(ids, mask))
    return rows


def topk_of(
    logprobs_PV: np.ndarray,
    min_prob: float = 0.0,
    max_k: int | None = None,
    draw_rate: int = 0,
    label_ids: np.ndarray | None = None,
):
    """Kept tokens of exact logprobs: p >= min_prob, at most max_k, always the best; tails summed directly.

    Each tail token is drawn floor(x) times and once more with the probability that is left of its expected
    number x: the same tokens for the same logprobs. Without `label_ids` [P] the labels are unknown.
    """
    from formats.logprobs.tail_draws import TailDraws
    from formats.logprobs.topk import TAIL_BETAS, TopKLogprobs

    if not len(logprobs_PV):
        return TopKLogprobs.empty(logprobs_PV.shape[1], draw_rate)
    ids, values, counts, tails, drawn = [], [], [], [], []
    generator = np.random.default_rng(int(logprobs_PV[0, 0].view(np.int64)) & 0xFFFFFFFF)
    for logprobs in logprobs_PV.astype(np.float64):
        order = np.argsort(-logprobs, kind="stable")
        keep = max(1, int((logprobs >= np.log(max(min_prob, 1e-300))).sum()))
        keep = min(keep, max_k or len(logprobs))
        ids.append(order[:keep])
        values.append(logprobs[order[:keep]])
        counts.append(keep)
        rest = logprobs[order[keep:]]
        hits = np.floor(draw_rate * np.exp(0.75 * rest) + generator.random(len(rest))).astype(int)
        drawn.append(np.repeat(order[keep:], hits))
        with np.errstate(divide="ignore"):
            tails.append([np.log(np.exp(beta * rest).sum()) for beta in TAIL_BETAS])
    offsets = np.concatenate([[0], np.cumsum(counts)])
    row = np.repeat(np.arange(len(drawn)), [len(tokens) for tokens in drawn])
    tokens = np.concatenate(drawn)
    return TopKLogprobs(
        offsets,
        np.concatenate(ids),
        np.concatenate(values),
        np.asarray(tails),
        logprobs_PV.shape[1],
        TailDraws(
            np.concatenate([[0], np.cumsum([len(tokens) for tokens in drawn])]),
            tokens,
            logprobs_PV[row, tokens],
            draw_rate,
        ),
        np.full(len(logprobs_PV), np.nan)
        if label_ids is None
        else logprobs_PV[np.arange(len(logprobs_PV)), label_ids],
    )


def identity_of(model_dir: Path) -> dict:
    """The identity that a build would record for this model and tokenizer."""
    from transformers import AutoTokenizer

    from formats.identity.fingerprint import ModelFingerprint, TokenizerFingerprint

    model = ModelFingerprint.of(model_dir)
    tokenizer = TokenizerFingerprint.of(AutoTokenizer.from_pretrained(model_dir))
    return {
        "teacher": {"weights": model.weights, "config": model.config, "name": str(model_dir)},
        "tokenizer": vars(tokenizer),
        "corpus": {"source": "random rows"},
        "preprocessing": {"max_length": 40},
    }


def model_logprobs(model, input_ids: np.ndarray) -> np.ndarray:
    """float64 [L, V] of one row."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(input_ids[None].astype(np.int64))).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()


def write_cache(
    path: Path,
    model_dir: Path,
    *,
    num_rows: int = 24,
    seed: int = 0,
    min_prob: float = 0.0,
    max_k: int | None = None,
    positions: str = "loss",
    rows: list | None = None,
    identity: dict | None = None,
    draw_rate: int = 4,
) -> Path:
    """Write the exact logprobs of the model in `model_dir` on random rows, with tail draws."""
    from dataclasses import replace

    from formats.codec.config import CodecConfig
    from formats.writer import CacheWriter
    from trainer.loading import load_model

    model = load_model(model_dir, dtype="float32").eval()
    vocab_size = model.config.get_text_config().vocab_size
    rows = random_rows(num_rows, vocab_size, seed) if rows is None else rows
    with CacheWriter(
        path,
        identity=identity or identity_of(model_dir),
        vocab_size=vocab_size,
        positions=positions,
        min_prob=min_prob,
        max_k=max_k or vocab_size,
        codec=replace(CodecConfig.lossless(), draw_rate=draw_rate),
        rows_per_shard=10,
    ) as writer:
        for row in rows:
            logprobs = model_logprobs(model, row.input_ids)
            at, labels = row.positions(positions), row.label_ids(positions)
            writer.append(row, topk_of(logprobs[at], min_prob, max_k, draw_rate, labels))
    return path
