"""A student must read the token ids of a cache as its teacher wrote them.

The teacher itself is proven by its identity. Another student is free in its weights, its chat template and the padding
of its output head, but every id must stand for the same token: a cache holds ids, so a student of another mapping would
learn noise without any sign of it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from formats.cache import TeacherCache
from formats.errors import IdentityMismatchError
from formats.identity.fingerprint import TokenizerFingerprint

TOKENIZER_FILE = "tokenizer.json"


def shared_vocabulary(
    caches: Iterable[TeacherCache], num_outputs: int, tokenizer: Any, *, different_student: bool
) -> int:
    """V: the tokens that the loss compares, the first of both heads.

    Args:
        caches: all caches of the run.
        num_outputs: rows of the student's output head.
        tokenizer: the student's, loaded.
        different_student: whether the model may be another one than the teacher.

    Raises:
        IdentityMismatchError: another vocabulary, and which token differs first.
    """
    smallest = num_outputs
    for cache in caches:
        size = cache.manifest.vocab_size
        if not different_student:
            if num_outputs != size:
                raise IdentityMismatchError(
                    f"a cache serves models of its own vocabulary, got {size} tokens and a model of {num_outputs}: "
                    f"{cache.path}; use the model that built it"
                )
            continue
        require_outputs(cache, num_outputs, tokenizer)
        smallest = min(smallest, size)
    return smallest


def require_outputs(cache: TeacherCache, num_outputs: int, tokenizer: Any) -> None:
    """Refuse a model that reads the cache's token ids otherwise, or cannot predict one of them.

    Raises:
        IdentityMismatchError: names the first id that differs, or the sizes.
    """
    require_same_token_ids(cache, tokenizer)
    num_tokens, size = max(tokenizer.get_vocab().values(), default=-1) + 1, cache.manifest.vocab_size
    if num_outputs < min(num_tokens, size):
        raise IdentityMismatchError(
            f"a student must have an output for each token of its vocabulary, got {num_outputs} outputs for "
            f"{num_tokens} tokens, and {cache.path} of {size}; use a model whose head covers its tokenizer"
        )


def require_same_token_ids(cache: TeacherCache, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives an id of the cache another token.

    Raises:
        IdentityMismatchError: names the first id that differs, and both tokens.
    """
    recorded = cache.identity.tokenizer.get("vocabulary")
    if recorded == TokenizerFingerprint.of(tokenizer).vocabulary:
        return
    rule = "a student must read token ids as the teacher wrote them"
    if TOKENIZER_FILE not in cache.manifest.files:
        raise IdentityMismatchError(
            f"{rule}, but its vocabulary is not the one recorded in {cache.path}; use a student of the same tokenizer"
        )
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(cache.file(TOKENIZER_FILE).decode("utf-8")).get_vocab(with_added_tokens=True)
    token_id, written, read = first_difference(theirs, tokenizer.get_vocab())
    if token_id is not None:
        raise IdentityMismatchError(
            f"{rule}, but id {token_id} is {written} in {cache.path} and {read} in --model; use a student of the same "
            "vocabulary"
        )


def first_difference(theirs: Mapping[str, int], ours: Mapping[str, int]) -> tuple[int | None, str, str]:
    """(id, its token here, its token there) at the lowest id that differs; None as the id if none does."""
    written, read = ({number: token for token, number in side.items()} for side in (theirs, ours))
    for number in sorted({*written, *read}):
        left, right = (repr(side[number]) if number in side else "no token" for side in (written, read))
        if left != right:
            return number, left, right
    return None, "", ""
