"""Machine code of a Triton kernel for a GPU that is not there."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any


def compiled_for(
    kernel: Any,
    capability: int,
    signature: dict[str, str],
    fixed: dict[str, Any],
    aligned: dict[tuple[int], Any],
    num_warps: int,
) -> tuple[dict[str, int], str]:
    """(what the assembler says of the kernel's resources, its PTX), compiled ahead of time.

    Args:
        capability: 90 for sm_90.
        signature, fixed, aligned: types by argument, values of what is constant, and what a launcher finds of pointers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = triton.compile(
        ASTSource(kernel, signature, fixed, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = [field.split(":") for field in usage.split() if field.count(":") == 1]
    used = {name: int(value) for name, value in fields if value.isdigit()}
    return {**used, "SHARED": found.metadata.shared}, found.asm["ptx"]
