"""What the card gives at best: every later figure is to be read against these."""

import subprocess

import torch

from gpu.report import Place, Report
from gpu.timing import milliseconds

SECONDS: int = 40


def run(report: Report, place: Place) -> None:
    import accelerate
    import transformers

    device = place.device
    report.info("torch", torch.__version__)
    report.info("transformers", transformers.__version__)
    report.info("accelerate", accelerate.__version__)
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        report.info("triton", triton.__version__)
        report.info("CUDA of torch", str(torch.version.cuda))
        report.info("card", properties.name)
        report.info("capability", f"{properties.major}.{properties.minor}")
        report.info("multiprocessors", properties.multi_processor_count)
        report.info("memory", properties.total_memory / 2**30, "GiB")
        report.info("driver", driver())
    copy_bandwidth(report, place)
    matmul(report, place)


def driver() -> str:
    """Its version, and the clocks, as nvidia-smi gives them."""
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"


def copy_bandwidth(report: Report, place: Place) -> None:
    num_bytes = (1 << 20) if place.tiny else (4 << 30)
    source = torch.randint(0, 2**31 - 1, (num_bytes // 4,), dtype=torch.int32, device=place.device)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), place.device)
    report.info("copy, read and written", 2 * num_bytes / took / 1e6, "GB/s")
    host = torch.empty(num_bytes // 32, dtype=torch.int32, pin_memory=place.device.type == "cuda")
    device_part = target[: len(host)]
    took = milliseconds(lambda: device_part.copy_(host, non_blocking=True), place.device)
    report.info("pinned host to device", 4 * len(host) / took / 1e6, "GB/s")


def matmul(report: Report, place: Place) -> None:
    size = 128 if place.tiny else 8192
    a, b = (torch.randn(size, size, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    took = milliseconds(lambda: a @ b, place.device)
    report.info(f"bf16 matrices of {size}", 2 * size**3 / took / 1e9, "TFLOP/s")
