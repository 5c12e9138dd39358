"""Small tokenizers whose output can be worked out by hand, and chat templates of the kinds found in the wild.

`byte_tokenizer` has one token per byte and one per special token, so a mask over tokens is a mask over
characters.
`merging_tokenizer` has the few merges that a test names.
"""

from typing import Any

import numpy as np

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Llama 2's manner: turns alternate, no generation prompt, BOS before every question.
INST = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Qwen3's manner: reasoning is shown in the last answer and dropped from the earlier ones.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m['content'].split('</think>')[0].replace('<think>', '') "
    "if '</think>' in m['content'] else '' %}"
    "{% if loop.last %}{{ '<think>' + thought + '</think>\\n' + answer }}{% else %}{{ answer }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The generation prompt opens a thought that the answers in the data do not have.
OPENED_THOUGHT = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
# No beginning of a conversation is rendered as within the whole.
UNSTABLE = "{{ '[' + (messages | length | string) + ']' }}" + CHATML

# Tools and their calls as JSON, in the manner of Qwen and Hermes.
TOOLS = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    "{{ '<call>{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + '}' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(template: str | None = None, *, adds_bos: bool = False, has_eos: bool = True) -> Any:
    """One token per byte; ids 0 to 4 are `SPECIAL_TOKENS`."""
    return merging_tokenizer([], template, adds_bos=adds_bos, has_eos=has_eos)


def merging_tokenizer(
    merges: list[tuple[str, str]],
    template: str | None = None,
    *,
    adds_bos: bool = False,
    adds_eos: bool = False,
    has_eos: bool = True,
    trim_offsets: bool = False,
) -> Any:
    """Byte-level BPE with exactly these merges; a blank is written as Ġ, a line break as Ċ."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    # use_regex=False: no merge is prevented by a word boundary
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos or adds_eos:
        single = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
        steps.append(processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)]))
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>" if has_eos else None, pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def text_of(row: Any, tokenizer: Any) -> str:
    """Everything the model sees."""
    return str(tokenizer.decode(row.input_ids.tolist()))


def targets_of(row: Any, tokenizer: Any) -> list[str]:
    """The stretches of the row that carry loss, each decoded on its own."""
    edges = np.flatnonzero(np.diff([False, *row.loss_mask.tolist(), False]))
    return [tokenizer.decode(row.input_ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


def shown(row: Any, tokenizer: Any) -> tuple[str, list[str]]:
    """Both."""
    return text_of(row, tokenizer), targets_of(row, tokenizer)
