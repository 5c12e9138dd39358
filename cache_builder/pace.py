"""How fast an engine can be expected to be, and the sizes of shards and waves that follow from it.

A shard is what a killed build loses, a wave is what progress waits for. Both should be a matter of seconds on
every machine, so they have fewer tokens on a slower one. The estimate is rough, deterministic and made once:
the sizes are written into the plan, and whoever continues the build takes them from there.
"""

import os
from pathlib import Path

from formats.identity.fingerprint import weight_files

FLOPS_PER_CORE = 20e9
"""Of a CPU core in float32 (measured 2026-11-25, AVX2 server, SmolLM2-135M: 29e9)."""
FLOPS_PER_GPU = 100e12
"""A quarter of what data-centre cards of 2022 to 2025 do in bfloat16; not measured here."""
SHARD_SECONDS = 20.0
"""A third of the minute that may be lost, since the estimate may be three times too fast."""
WAVES_PER_SHARD = 4
LEAST_TOKENS, MOST_TOKENS = 1 << 12, 1 << 20


def num_weights(model_dir: Path, bytes_per_weight: int) -> int:
    """About how many weights a checkpoint has, from the size of its files; 0 where it has none."""
    return sum(path.stat().st_size for path in weight_files(model_dir)) // bytes_per_weight


def tokens_per_second(weights: int, *, num_gpus: int, num_cores: int) -> float:
    """Expected prefill speed: two operations per weight and token."""
    speed = num_gpus * FLOPS_PER_GPU if num_gpus else num_cores * FLOPS_PER_CORE
    return speed / (2.0 * max(weights, 1))


def shard_tokens(speed: float) -> int:
    """Tokens of a shard: what takes `SHARD_SECONDS`, as a power of two within the limits."""
    wanted = max(speed * SHARD_SECONDS, 1.0)
    return min(max(1 << (int(wanted).bit_length() - 1), LEAST_TOKENS), MOST_TOKENS)


def num_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
