"""`_build/engine.json`: what the first engine of a build said of itself. Every later one must say the same.

Settings can be compared before an engine starts; the type it really runs in, and its vocabulary, only
afterwards. Two machines with different engine versions would otherwise mix their noise in one cache without a
trace.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_builder.commit.build_directory import build_directory
from formats.disk.durable import commit_exclusive, temporary_name
from formats.errors import IdentityMismatchError
from formats.identity.teacher_identity import TeacherIdentity, short

if TYPE_CHECKING:
    from cache_builder.teachers.protocol import Teacher

ENGINE_NAME = "engine.json"


def settle_engine(out: Path, teacher: "Teacher") -> None:
    """Record this engine as that of the build, or prove that it equals the recorded one.

    Raises:
        IdentityMismatchError: another kind of engine captured the first shards.
    """
    path = build_directory(out) / ENGINE_NAME
    mine = {"description": teacher.describe(), "vocab_size": int(teacher.vocab_size)}
    mine = json.loads(json.dumps(mine))
    if not path.exists():
        temporary = temporary_name(path)
        temporary.write_text(json.dumps(mine, indent=1))
        commit_exclusive(temporary, path)
    recorded = json.loads(path.read_text())
    if recorded == mine:
        return
    before, now = flatten(recorded), flatten(mine)
    parts = [
        f"{key}: {short(before.get(key))} there, {short(now.get(key))} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    raise IdentityMismatchError(
        f"all shards of a cache come from equal engines, but {out} was begun with another "
        f"({'; '.join(parts)}); use the same engine, or start over with --overwrite"
    )


def flatten(record: dict[str, Any]) -> dict[str, Any]:
    """The description's entries and the vocabulary size side by side."""
    return {**record["description"], "vocab_size": record["vocab_size"]}


def read_engine(out: Path) -> dict[str, Any]:
    """The recorded engine of a build that has committed at least one shard."""
    return json.loads((build_directory(out) / ENGINE_NAME).read_text())


def identity_with_engine(identity: TeacherIdentity, record: dict[str, Any]) -> TeacherIdentity:
    """The identity of the finished cache: what was asked for, completed by what the engine said of itself."""
    data = identity.to_dict()
    data["teacher"] = {**record["description"], **data["teacher"]}
    return TeacherIdentity.from_dict(data)
