"""Sections of `benchmarks/gpu_smoke.py`, one module each: `SECONDS`, its time limit, and `run(report, place)`."""
