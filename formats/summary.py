"""What `anneal cache inspect` prints, as one dictionary."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formats.cache import TeacherCache


def summarise(cache: "TeacherCache") -> dict[str, Any]:
    """Counts from the manifest."""
    shards = cache.manifest.shards
    return {
        "identity": cache.manifest.identity,
        **{
            name: sum(getattr(shard, name) for shard in shards)
            for name in (
                "num_rows",
                "num_tokens",
                "num_positions",
                "num_entries",
                "num_bytes",
                "num_payload_bytes",
            )
        },
        "num_shards": len(shards),
    }
