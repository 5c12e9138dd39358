"""Whether the reduction runs as Triton kernels (triton_rows.py), which is asked before Triton is imported.

ANNEAL_TRITON=0 runs plain operations everywhere. With TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

import os
import warnings
from functools import lru_cache

import torch


def run_on(device_type: str, vocab_size: int) -> bool:
    """Whether kernels run on this kind of device."""
    if os.environ.get("ANNEAL_TRITON") == "0" or (
        device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"
    ):
        return False
    return _failure(device_type, vocab_size) is None


@lru_cache
def _failure(device_type: str, vocab_size: int) -> str | None:
    """Why the kernels do not run there, by running them on two rows, for which they are compiled as for any number;
    the plain operations are slower, not wrong."""
    try:
        from cache_builder.reduction import triton_rows

        labels_N = torch.zeros(2, dtype=torch.int64, device=device_type)
        logits_NV = torch.arange(2.0 * vocab_size, device=device_type).view(2, vocab_size) / vocab_size
        found = triton_rows.pick(
            logits_NV, labels_N, labels_N.double(), room=102, log_min_prob=-4.6, max_k=128, rate=8
        )
        num_entries, num_draws, _ = found.ends_3N[:, -1].tolist()
        triton_rows.hand_over(found, num_entries, num_draws)
    except Exception as error:  # no compiler, no Triton, an unsupported device
        warnings.warn(f"Triton failed, reducing without it: {f'{error}'[:300]}", stacklevel=3)
        return f"{error}"
    return None
