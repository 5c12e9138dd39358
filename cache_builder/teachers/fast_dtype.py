"""Which type `--dtype auto` means: the checkpoint's, or float32 where a CPU has no instructions for it.

A CPU without 16-bit matrix instructions computes bfloat16 in float32 anyway and converts at every step: the
same numbers or worse ones in twice the time. Float32 holds every bfloat16 and float16 weight exactly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLAGS_OF = {
    "bfloat16": frozenset({"amx_bf16", "avx512_bf16", "bf16"}),
    "float16": frozenset({"amx_fp16", "avx512_fp16", "fphp"}),
}
"""Type -> the names that Linux gives to its matrix instructions, on x86 and on Arm; one of them is enough."""
CPU_INFO = Path("/proc/cpuinfo")


def cpu_flags(path: Path = CPU_INFO) -> frozenset[str]:
    """The instruction sets of this machine's first processor; empty where Linux does not tell."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def resolve_dtype(
    requested: str,
    checkpoint: str,
    *,
    on_cpu: bool,
    softcap: float | None,
    flags: frozenset[str] | None = None,
) -> str:
    """The type an engine runs in.

    Args:
        requested: `auto`, or a type, which is then what it is.
        checkpoint: the type that the weights are stored in.
        softcap: of the attention logits; vLLM on a CPU honours one in bfloat16 only, so that `auto` leaves
            such a model alone.
        flags: of the processor; None asks this machine.
    """
    if requested != "auto":
        return requested
    known = cpu_flags() if flags is None else flags
    slow = on_cpu and checkpoint in FLAGS_OF and known and not known & FLAGS_OF[checkpoint]
    return "float32" if slow and softcap is None else checkpoint


def dtype_note(requested: str, checkpoint: str | None, description: Mapping[str, Any]) -> str | None:
    """One line for a person whose engine does not run in the checkpoint's type; None where it does."""
    dtype = description.get("dtype")
    if requested != "auto" or None in (dtype, checkpoint) or dtype == checkpoint:
        return None
    return f"the engine runs in {dtype}: this CPU has no {checkpoint} matrix instructions (--dtype overrides)"
