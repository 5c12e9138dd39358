"""JSON text of a corpus, parsed so that nothing of it is lost.

Of an object that has a name twice, as `{"text": "a", "text": "b"}`, Python would keep the last value.
"""

import json
from typing import Any

from formats.errors import CorpusError


class _RepeatedName(Exception):  # never leaves this file
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedName(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def parse_json(text: str, where: str) -> Any:
    """What the text says; `where` it stands.

    Raises:
        json.JSONDecodeError: it is no JSON.
        CorpusError: an object has a name twice, a number has thousands of digits, or it is nested too deeply.
    """
    try:
        return _DECODER.decode(text)
    except _RepeatedName as error:
        raise CorpusError(
            f"an object must have every name once, got {str(error)!r:.80} twice in {where}; keep one of them"
        ) from None
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise CorpusError(
            f"a record must be flat JSON, got deep nesting in {where}; mend or drop it"
        ) from None
    except ValueError:  # Python's limit of digits
        raise CorpusError(
            f"a number must be readable, got one of thousands of digits in {where}; write it as text"
        ) from None
