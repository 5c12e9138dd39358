"""How far an unfinished build has come, told from the directory alone.

A build keeps its plan in `_build/plan.json` until the manifest is written; `formats` must not import the
builder, and the reader wants to say "12 of 40 shards" instead of "no manifest".
"""

import json
from pathlib import Path

BUILD_DIRECTORY = "_build"
PLAN_NAME = "plan.json"


def build_progress(directory: str | Path) -> tuple[int, int] | None:
    """(shards on the disk, shards planned) of an unfinished build; None where there is no build.

    Planned is 0 while the build is still planning.
    """
    directory = Path(directory)
    build = directory / BUILD_DIRECTORY
    if not build.is_dir():
        return None
    done = sum(1 for _ in directory.glob("shard-*.arrow"))
    try:
        plan = json.loads((build / PLAN_NAME).read_text(encoding="utf-8"))
        return done, len(plan["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return done, 0
