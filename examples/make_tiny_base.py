"""Train `examples/tiny-base`: a byte-level BPE tokenizer and a Llama-architecture base model for the demo.

Data: the `base-train` splits of `stdlib_text.py` (prose: standard-library documentation and the docstrings
and READMEs of installed packages; a little package code, so that the demo's target domain is not gibberish
to the model). Held-out modules and the standard library's code serve to print perplexities only.

Method: documents end with `<|endoftext|>` (there is no beginning-of-sequence token), are shuffled,
concatenated and cut into windows of 512 tokens; rows of a batch are drawn from the three sources with fixed
shares. Hidden matrices are trained with Muon (Jordan et al., 2024: momentum, orthogonalised by a
Newton-Schulz iteration), embeddings and norms with AdamW; warm-up, constant rate, linear decay to zero.
fp32, saved as bf16.

    python examples/make_tiny_base.py --out examples/tiny-base --work base-work

Everything is seeded: one set of installed packages gives one model, but for the rounding of other CPUs and
thread counts. `--work` keeps the tokenizer and a checkpoint that a second start resumes from. Cost: 4.5
million tokens, 55 minutes on one CPU core without AVX-512 or AMX, less on two.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stdlib_text import Document, documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Shapes: B rows of a batch, S tokens of a window, V vocabulary.

END_OF_TEXT, TURN_START, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>' }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result, apart from the installed packages."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    context: int = 512
    shares: tuple[tuple[str, float], ...] = (("stdlib", 0.35), ("packages", 0.57), ("code", 0.08))
    """Share of the windows drawn from each source."""
    batch_size: int = 8
    num_steps: int = 1100
    num_warmup_steps: int = 50
    num_decay_steps: int = 400
    muon_lr: float = 0.02
    """Step size of the hidden matrices, in units of the root mean square of their orthogonalised update."""
    adam_lr: float = 3e-3
    """Step size of embeddings and norms."""
    weight_decay: float = 0.02
    seed: int = 0


def train_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no unknown token, every byte string round-trips; runs of spaces and line ends merge."""
    bpe = Tokenizer(models.BPE())
    # Words with their leading space, digits in groups of up to three, punctuation, line ends, indentation.
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=None,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Token ids of each text, ended by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray([*row, tokenizer.eos_token_id], dtype=np.int64) for row in rows]


class Windows:
    """Endless windows of one source: each pass shuffles the documents and shifts the cuts."""

    def __init__(self, rows: list[np.ndarray], context: int, seed: int) -> None:
        self.rows, self.context = rows, context
        self.random = np.random.default_rng(seed)
        self.num_tokens = sum(len(row) for row in rows)
        self.stream = self._stream()

    def _stream(self) -> Iterator[np.ndarray]:
        while True:
            tokens = np.concatenate([self.rows[i] for i in self.random.permutation(len(self.rows))])
            tokens = np.roll(tokens, int(self.random.integers(self.context)))
            num_windows = len(tokens) // self.context
            windows = tokens[: num_windows * self.context].reshape(num_windows, self.context)
            yield from windows[self.random.permutation(num_windows)]


def batches(sources: dict[str, Windows], recipe: Recipe) -> Iterator[Tensor]:
    """[B, S] token ids; the source of each row is drawn with the recipe's shares."""
    random = np.random.default_rng(recipe.seed)
    names = [name for name, _ in recipe.shares]
    shares = [share for _, share in recipe.shares]
    while True:
        drawn = random.choice(names, size=recipe.batch_size, p=shares)
        yield torch.from_numpy(np.stack([next(sources[name].stream) for name in drawn]))


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values near 1, by five quintic Newton-Schulz steps in fp32."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for matrices; torch's own computes in bf16, slow on plain CPUs."""

    def __init__(self, params: list[torch.nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalise(param.grad.lerp(momentum, group["momentum"]))
                scale = math.sqrt(max(1.0, param.shape[0] / param.shape[1]))
                param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Randomly initialised model with tied embeddings."""
    torch.manual_seed(recipe.seed)
    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            head_dim=recipe.hidden_size // recipe.num_heads,
            intermediate_size=recipe.intermediate_size,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id)
    return model


def loss_of(model: Callable[..., Any], tokens_BS: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy (nats) of each next token."""
    logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
    return cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def perplexity(model: Callable[..., Any], rows: list[np.ndarray], context: int, max_windows: int) -> float:
    """exp of the mean loss over windows of the concatenated documents."""
    tokens = np.concatenate(rows)
    num_windows = min(max_windows, len(tokens) // context)
    windows = torch.from_numpy(tokens[: num_windows * context].reshape(num_windows, context))
    total = sum(loss_of(model, window, "sum").item() for window in windows.split(8))
    return math.exp(total / (num_windows * (context - 1)))


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, linear decay to zero at the last step."""
    left = (recipe.num_steps - step) / recipe.num_decay_steps
    return min(1.0, (step + 1) / recipe.num_warmup_steps, left)


def train(
    model: LlamaForCausalLM,
    sources: dict[str, Windows],
    heldout: dict[str, list[np.ndarray]],
    recipe: Recipe,
    work: Path,
) -> None:
    """Trains in place, with a checkpoint every 200 steps in `work` from which a second start resumes."""
    matrices = [param for name, param in model.named_parameters() if param.ndim == 2 and "embed" not in name]
    others = [param for name, param in model.named_parameters() if param.ndim < 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    compiled = torch.compile(model)
    checkpoint, first_step = work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first_step = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    stream = batches(sources, recipe)
    for _ in range(first_step):
        next(stream)
    started, running = time.perf_counter(), 0.0
    for step in range(first_step, recipe.num_steps):
        for optimizer, base_lr in zip(optimizers, base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base_lr * learning_rate_factor(step, recipe)
        loss = loss_of(compiled, next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)  # Muon's updates have a fixed size
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = loss.item() if step == first_step else 0.95 * running + 0.05 * loss.item()
        done = step + 1
        if done % 20 == 0 or done == recipe.num_steps:
            seconds = time.perf_counter() - started
            speed = (done - first_step) * recipe.batch_size * recipe.context / seconds
            left = seconds / (done - first_step) * (recipe.num_steps - done) / 60
            line = f"step {done}/{recipe.num_steps}  loss {running:.3f}  {speed:,.0f} tokens/s"
            print(f"{line}  {left:.0f} min left", flush=True)
        if done % 200 == 0 or done == recipe.num_steps:
            report(model, heldout, recipe, max_windows=48 if done < recipe.num_steps else 10_000)
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"step": done, "model": model.state_dict(), "optimizers": states}
            torch.save(state, work / "checkpoint.tmp")
            (work / "checkpoint.tmp").replace(checkpoint)


def report(
    model: LlamaForCausalLM, heldout: dict[str, list[np.ndarray]], recipe: Recipe, max_windows: int
) -> None:
    """Prints the held-out perplexities."""
    values = {name: perplexity(model, rows, recipe.context, max_windows) for name, rows in heldout.items()}
    print("  perplexity: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint, resumed if there")
    parser.add_argument("--num-steps", type=int, default=Recipe.num_steps)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(num_steps=args.num_steps)

    print("reading the text (1-3 minutes)", flush=True)
    prose = documents("prose", "base-train")
    stdlib_names = {document.name for document in documents("prose", "source-train")}
    groups: dict[str, list[Document]] = {
        "stdlib": [document for document in prose if document.name in stdlib_names],
        "packages": [document for document in prose if document.name not in stdlib_names],
        "code": documents("code", "base-train"),
    }
    texts = {name: [document.text for document in group] for name, group in groups.items()}
    if (args.work / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    else:
        tokenizer = train_tokenizer([text for group in texts.values() for text in group], recipe)
        tokenizer.save_pretrained(args.work / "tokenizer")
    sources = {
        name: Windows(tokenize(group, tokenizer), recipe.context, recipe.seed + number)
        for number, (name, group) in enumerate(texts.items())
    }
    for name, windows in sources.items():
        print(f"{name}: {len(groups[name])} documents, {windows.num_tokens:,} tokens")
    heldout = {
        f"{domain} {split}": tokenize([document.text for document in documents(domain, split)], tokenizer)
        for domain, split in (("prose", "source-heldout"), ("code", "target-heldout"))
    }
    model = build_model(recipe, tokenizer)
    print(f"{sum(param.numel() for param in model.parameters()):,} parameters", flush=True)
    train(model, sources, heldout, recipe, args.work)
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print("as saved (bf16):")
    report(model.float(), heldout, recipe, max_windows=10_000)


if __name__ == "__main__":
    main()
