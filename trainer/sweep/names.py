"""Names of runs: short, readable, safe as names of directories, the same in whatever order settings were typed.

`kl_coef=1,temperature=2,lr=3e-4,seed=1`. Left out is what the run has in common with the base, so that a sweep that is
given more values later keeps the names of the runs that it has.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from formats.named_path import short_name
from trainer.checks import is_finite

LONGEST = 150
"""Characters of a name; the staging directories of a run add some, and file systems end at 255 bytes."""
DIRECT = "direct"
SHORT = {"training.learning_rate": "lr", "training.seed": "seed"}
FIRST = ("kl_coef", "temperature", "kl_direction", "l2", "ewc", "sfa", "freeze", "lora", "caches", "cache")


def setting_name(setting: str) -> str:
    """A setting as it stands in names: `lr`, `seed`, `l2.coef`, `weight_decay`."""
    return SHORT.get(setting, setting.removeprefix("training."))


def place_of(setting: str) -> tuple[int, str]:
    """The order of settings in a name: methods, then the rest by name, the seed last."""
    section = setting.split(".")[0]
    if setting == "training.seed":
        return len(FIRST) + 1, setting
    return (FIRST.index(section) if section in FIRST else len(FIRST)), setting


def number_text(value: float) -> str:
    """The shortest text of a number that reads back as the same one: 3e-4, 0.25, 16."""
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    plain, size = repr(float(value)), abs(float(value))
    if "e" not in plain and 1e-3 <= size < 1e6:
        return plain
    for length in range(18):
        digits, _, exponent = f"{size:.{length}e}".partition("e")
        if float(f"{digits}e{exponent}") == size:
            break
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{'-' if value < 0 else ''}{digits}e{int(exponent)}"


def value_text(value: Any) -> str:
    """A value as it stands in names."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):  # of what is not finite, for the message that refuses it
        return number_text(value) if is_finite(value) else f"{value}"[:20]
    if isinstance(value, str):
        return safe(short_name(value))
    if isinstance(value, list | tuple):
        return "+".join(map(value_text, value))
    if isinstance(value, Mapping) and "path" in value:
        share = {} if value.get("share") is None else {"share": f"share{value_text(value['share'])}"}
        shown = {**value, **share}
        return "-".join(value_text(e) for key in ("path", "weight", "share", "loss") if (e := shown.get(key)))
    if isinstance(value, Mapping) and "cache" in value:
        return "-".join(value_text(entry) for key in ("cache", "model", "coef") if (entry := value.get(key)))
    return digest(value)


def safe(text: str) -> str:
    """Text with nothing that a file system or a shell could take for something else."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).lstrip(".-") or "_"


def digest(value: Any) -> str:
    """Eight letters that stand for a value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(shown: Mapping[str, Any], *, prefix: str | None = None, direct: bool = False) -> str:
    """The name of a run.

    Args:
        shown: settings that the run does not have in common with the base, with dots.
        prefix: the name of its entry.
        direct: whether no method holds on to the initial model.
    """
    words = [safe(prefix)] if prefix else []
    words += [DIRECT] if direct and not prefix else []
    for setting in sorted(shown, key=place_of):
        words.append(f"{safe(setting_name(setting))}={value_text(shown[setting])}")
    return shortened(",".join(words) or "base", dict(shown))


def shortened(name: str, content: Any) -> str:
    """A name of at most `LONGEST` characters; of a longer one the end is a digest of what it stands for."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{digest(content)}"
