"""All that decides which rows a model writes: prompts, sampling settings, and what ends a row.

A row is a prompt and its continuation. Every token of that carries loss, and so does one that ends the row.

L: tokens of a row.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder.generation.prompts import Prompts
from cache_builder.generation.settings import GenerationConfig
from cache_builder.rows.preview import render_row
from cache_builder.teachers.model_config import read_model_config
from cache_builder.teachers.protocol import SampleRequest
from formats.disk.token_row import TokenRow
from formats.identity.config_file import read_config
from formats.identity.fingerprint import sha256_json
from formats.progress import counted

BATCH_TOKENS_PER_SHARD_TOKEN = 4
"""A batch of rows may be so much larger than a shard: writing is slower than reading, but a batch of few rows leaves an
engine idle. A guess, not measured on a GPU."""
LEAST_BATCH, MOST_BATCH = 16, 256
TURNS = 1 << 31
"""Added to a row's number for the random numbers of its user's turn; there are no more rows than that."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the sampler is asked for, row by row."""

    config: GenerationConfig
    """Number of rows, temperature, seed."""
    prompts: Prompts
    """Row i begins with prompt i modulo their number."""
    stop_tokens: tuple[int, ...]
    """Tokens that end a row; ascending."""
    max_length: int
    """Longest row in tokens, its prompt included."""

    def turn_request(self, row: int) -> SampleRequest:
        """What the sampler is asked for the user's turn of row number `row`."""
        turn = self.prompts.turn
        assert turn is not None
        return SampleRequest(
            prompt=turn.before,
            max_new_tokens=turn.max_new_tokens,
            stop_tokens=tuple(sorted({*self.stop_tokens, *turn.stop_tokens})),
            temperature=self.config.temperature,
            seed=row_seed(self.config.seed, row + TURNS),
        )

    def request(self, row: int, prompt: np.ndarray) -> SampleRequest:
        """What the sampler is asked for row number `row`, which begins with int32 [L] `prompt`."""
        return SampleRequest(
            prompt=prompt,
            max_new_tokens=self.max_length - len(prompt),
            stop_tokens=self.stop_tokens,
            temperature=self.config.temperature,
            seed=row_seed(self.config.seed, row),
        )

    @staticmethod
    def row(prompt: np.ndarray, new_tokens: np.ndarray) -> TokenRow:
        """A row of int32 [L] tokens that the sampler returned, behind its prompt."""
        ids = np.concatenate([prompt, new_tokens]).astype(np.int32)
        return TokenRow(ids, np.arange(len(ids)) >= len(prompt))

    def prompt(self, row: int) -> np.ndarray:
        """int32 [L] that row number `row` begins with; of a user's turn that the model writes, what stands before."""
        return self.prompts.tokens[row % len(self.prompts.tokens)]

    def batch_rows(self, tokens_per_shard: int) -> int:
        """Rows that are written together and committed together; of a shard's size, which a build records."""
        rows = BATCH_TOKENS_PER_SHARD_TOKEN * tokens_per_shard // self.max_length
        return min(max(rows, LEAST_BATCH), MOST_BATCH)

    def most_tokens(self) -> tuple[int, int]:
        """(tokens, new tokens) if every row went on to its end."""
        num_rows = self.config.num_rows
        lengths = [len(prompt) for prompt in self.prompts.tokens]
        turns, rest = divmod(num_rows, len(lengths))
        in_prompts = turns * sum(lengths) + sum(lengths[:rest])
        return num_rows * self.max_length, num_rows * self.max_length - in_prompts

    def describe(self) -> dict[str, Any]:
        """The corpus as the identity of a cache records it; plain JSON values."""
        digest = hashlib.sha256(b"anneal prompts\n")
        for prompt in self.prompts.tokens:
            digest.update(len(prompt).to_bytes(8, "little") + prompt.astype("<u4").tobytes())
        decisive = {
            "generate": self.config.num_rows,
            "generate_temperature": self.config.temperature,
            "seed": self.config.seed,
            "prompts": digest.hexdigest(),
            "stop_tokens": list(self.stop_tokens),
        }
        if self.prompts.turn is not None:
            decisive["generate_from"] = "dialogue"
        return {
            "source": self.prompts.source,
            "fingerprint": sha256_json(decisive),
            "format": "generated",
            **decisive,
        }

    def announcements(self, tokenizer: Any) -> list[str]:
        """How rows come to be: sentences to announce before a build."""
        config, prompts = self.config, self.prompts
        count = len(prompts.tokens)
        what = prompts.kind
        if config.prompts is not None:
            what = f"{count} of {prompts.source} ({prompts.kind}), in turn"
        ends = " or ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in self.stop_tokens)
        return [
            f"corpus: {counted(config.num_rows, 'row')} that the model writes itself, temperature "
            f"{config.temperature:g}, seed {config.seed}",
            f"prompts: {what}; loss on every new token{' of the answer' if prompts.turn else ''}",
            f"rows end with {f'{ends}, or' if ends else 'nothing but'} {self.max_length} tokens",
            *prompts.notes(),
        ]

    def sample(self, tokenizer: Any) -> str:
        """The announcements and the first prompt as text."""
        prompt = self.prompts.tokens[0]
        heading = f"first prompt: {counted(len(prompt), 'token')}"
        shown = render_row(TokenRow(prompt, np.zeros(len(prompt), np.bool_)), tokenizer)
        return "\n".join([*self.announcements(tokenizer), heading, shown])


def row_seed(seed: int, row: int) -> int:
    """Seed of one row's random numbers, below 2^63: no two rows of a build share one, nor its lower half, which is all
    that torch's generator on a CPU reads.
    """
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8, person=b"anneal-gen-v1").digest()
    low = (row + int.from_bytes(digest[:4], "little")) & 0xFFFFFFFF
    # The finaliser of MurmurHash3, which maps the 32-bit numbers onto themselves: neighbours end up far apart.
    low = ((low ^ (low >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    low = ((low ^ (low >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return ((int.from_bytes(digest[4:], "little") & 0x7FFFFFFF) << 32) | (low ^ (low >> 16))


def stop_tokens(model_dir: Path, tokenizer: Any, num_outputs: int | None) -> tuple[int, ...]:
    """Tokens that end a text or a turn: those of generation_config.json, of config.json and of the tokenizer."""
    found: set[int] = set()
    model_config = read_model_config(str(model_dir))
    name = "generation_config.json"
    generation = read_config(model_dir, name=name) if (model_dir / name).is_file() else {}
    for part in (generation, model_config, model_config.get("text_config") or {}):
        value = part.get("eos_token_id") if isinstance(part, dict) else None
        found |= {token for token in (value if isinstance(value, list) else [value]) if type(token) is int}
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    return tuple(sorted(token for token in found if 0 <= token < (num_outputs or 1 << 31)))
