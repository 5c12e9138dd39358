"""One model in memory and held-out texts, measured again and again while something is done to its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from formats.cache import TeacherCache
from formats.errors import ConfigError
from trainer.data.collator import LabelAnnealingCollator
from trainer.data.dataset import CachedDataset
from trainer.evaluation.evaluate import batches_of_tokens, require_related
from trainer.loading import default_device, load_model, load_tokenizer, on_device, quiet_transformers
from trainer.loop.measure import Measurement, measure
from trainer.loop.output_head import OutputHead
from trainer.preflight.vocabulary import shared_vocabulary

BATCH_TOKENS = 8192
"""Padded tokens per forward pass."""


class LoadedModel:
    """A model with its texts, of which only the tokens are read.

    Args:
        directory: a whole model.
        texts: name -> cache.
        dtype, device: of the weights; the first GPU by default, else the CPU.
        limit: only the first rows of each text.

    Raises:
        ConfigError: not a model, or a text has no tokens that carry loss.
        IdentityMismatchError: a text of another vocabulary.
    """

    def __init__(
        self,
        directory: Path,
        texts: Mapping[str, str],
        *,
        dtype: str = "float32",
        device: str | None = None,
        limit: int | None = None,
    ) -> None:
        quiet_transformers()
        caches = {name: TeacherCache(path) for name, path in texts.items()}
        tokenizer = load_tokenizer(directory)
        for cache in caches.values():
            require_related(cache, directory, tokenizer, kl=False)
        self.device = torch.device(default_device(device))
        self.model: Any = load_model(directory, dtype=dtype).to(self.device).eval()
        self.head = OutputHead.of(self.model).install()
        collator = LabelAnnealingCollator(getattr(tokenizer, "pad_token_id", None) or 0)
        self.batches: dict[str, list[dict[str, Any]]] = {}
        self._vocab_sizes: dict[str, int | None] = {}
        for name, cache in caches.items():
            dataset = CachedDataset(cache, loss="ce")
            self._vocab_sizes[name] = shared_vocabulary(
                [cache], self.head.num_outputs, tokenizer, different_student=True
            )
            dataset.vocab_size = self._vocab_sizes[name]
            count = len(dataset) if limit is None else min(limit, len(dataset))
            groups = batches_of_tokens(dataset.lengths()[:count], BATCH_TOKENS)
            self.batches[name] = [collator([dataset[row] for row in group]) for group in groups]
        for name, found in self.measure().items():
            if not found.num_ce:
                raise ConfigError(f"{name} needs tokens that carry loss, got none in {texts[name]}")

    def measure(self) -> dict[str, Measurement]:
        """Text -> means, with the weights as they are now."""
        found = {}
        for name, batches in self.batches.items():
            self.head.vocab_size = self._vocab_sizes[name]
            found[name] = measure(self.model, self.head, batches, prepare=self._placed)
        return found

    def ce(self) -> dict[str, float]:
        """Text -> cross-entropy per token, in nats."""
        return {name: found.ce for name, found in self.measure().items()}

    def _placed(self, batch: dict[str, Any]) -> dict[str, Any]:
        return on_device(batch, self.device)
