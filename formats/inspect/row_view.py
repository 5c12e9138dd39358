"""One row of a cache for reading: its tokens, and what the teacher expected at each position.

Token texts come from the cache's own `tokenizer.json` through the `tokenizers` library; without one, ids
are shown.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from formats.cache_row import ReadableCache
from formats.errors import FormatError, one_line
from formats.logprobs.entropy import entropy

TOKENIZER_FILE = "tokenizer.json"
NUM_ALTERNATIVES = 4


def token_texts(cache: ReadableCache) -> Callable[[int], str]:
    """A function from token id to its text, `#id` where the cache carries no tokenizer or the id is
    unknown."""
    if TOKENIZER_FILE not in cache.manifest.files:
        return lambda token_id: f"#{token_id}"
    from tokenizers import Tokenizer

    data = cache.file(TOKENIZER_FILE)
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # what it raises is a plain Exception
        raise FormatError(
            f"{TOKENIZER_FILE} of {cache.path} must be one that the installed tokenizers package reads, "
            f"got: {one_line(error)}; upgrade that package"
        ) from None

    def text(token_id: int) -> str:
        decoded = tokenizer.decode([token_id], skip_special_tokens=False)
        if decoded and "\ufffd" not in decoded:
            return decoded
        # Part of a character, or nothing to show: the vocabulary's own spelling says more.
        return tokenizer.id_to_token(token_id) or f"#{token_id}"

    return text


def view_row(cache: ReadableCache, index: int) -> dict[str, Any]:
    """Row `index` as a JSON-ready dictionary.

    Keys: row, key, num_tokens, tokens [{id, text, loss}], positions [{position, token, label_id, label,
    label_logprob (None for an impossible token), label_kept, head_size, head_mass, entropy,
    top [{id, token, prob}]}].

    Raises:
        IndexError: no such row.
        FormatError: the row is damaged.
    """
    row = cache[index]
    text = token_texts(cache)
    teacher = row.teacher.sorted()
    nats, mass = entropy(teacher), teacher.head_mass(1.0)
    kept = np.zeros(len(teacher), np.bool_)
    kept[teacher.kept_labels(row.label_ids)[0]] = True
    positions = []
    for p, position in enumerate(row.positions.tolist()):
        a, b = teacher.offsets[p : p + 2]
        ids, probs = teacher.token_ids[a:b], np.exp(teacher.logprobs[a:b].astype(np.float64))
        label_id, logprob = int(row.label_ids[p]), float(teacher.label_logprobs[p])
        positions.append(
            {
                "position": position,
                "token": text(int(row.input_ids[position])),
                "label_id": label_id,
                "label": text(label_id),
                "label_logprob": logprob if np.isfinite(logprob) else None,
                "label_kept": bool(kept[p]),
                "head_size": int(b - a),
                "head_mass": float(mass[p]),
                "entropy": float(nats[p]),
                "top": [
                    {"id": int(ids[k]), "token": text(int(ids[k])), "prob": float(probs[k])}
                    for k in range(min(NUM_ALTERNATIVES, len(ids)))
                ],
            }
        )
    return {
        "row": index,
        "key": row.key.hex(),
        "num_tokens": len(row),
        "tokens": [
            {"id": token, "text": text(token), "loss": loss}
            for token, loss in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True)
        ],
        "positions": positions,
    }
