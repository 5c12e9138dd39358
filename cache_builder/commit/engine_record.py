"""What the first engine of a build said of itself. Every later one must say the same.

Settings can be compared before an engine starts; the type it really runs in, and its vocabulary, only
afterwards. Two machines with different engine versions would otherwise mix their noise in one cache without a
trace.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_builder.commit.plan import sealed, unsealed
from formats.errors import IdentityMismatchError
from formats.identity.teacher_identity import TeacherIdentity, short

if TYPE_CHECKING:
    from cache_builder.teachers.protocol import Sampler, Teacher


@dataclass(frozen=True)
class EngineRecord:
    """Description and vocabulary of an engine, as `_build/engine.json` keeps them."""

    description: Mapping[str, Any]
    """See `Teacher.describe`."""
    vocab_size: int
    """V: tokens the engine predicts, without padding."""

    @classmethod
    def of(cls, teacher: "Teacher | Sampler") -> "EngineRecord":
        """What a running engine says of itself."""
        return cls(json.loads(json.dumps(teacher.describe())), int(teacher.vocab_size))

    def to_bytes(self) -> bytes:
        """Sealed JSON text of engine.json."""
        return sealed(asdict(self), indent=1)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "EngineRecord":
        """The inverse of `to_bytes`; `name` is the file's.

        Raises:
            FormatError: written by another version, or damaged.
        """
        return cls(**unsealed(data, name))

    def require_same(self, other: "EngineRecord", out: Path, what: str = "shards") -> None:
        """Raise unless `other` may go on with what this engine began.

        Args:
            what: the engine makes, for the message.

        Raises:
            IdentityMismatchError: names what differs.
        """
        before, now = self._flat(), other._flat()
        parts = [
            f"{key}: {short(before.get(key))} there, {short(now.get(key))} now"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if parts:
            raise IdentityMismatchError(
                f"all {what} of a cache come from equal engines, but {out} was begun with another "
                f"({'; '.join(parts)}); use the same engine, or start over with --overwrite"
            )

    def _flat(self) -> dict[str, Any]:
        return {**self.description, "vocab_size": self.vocab_size}

    def completing(self, identity: TeacherIdentity) -> TeacherIdentity:
        """The identity of the finished cache: what was asked for, completed by what the engine said."""
        data = identity.to_dict()
        data["teacher"] = {**self.description, **data["teacher"]}
        return TeacherIdentity.from_dict(data)
