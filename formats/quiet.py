"""Libraries that warn while they are imported, kept silent: what they say then concerns no user of this program."""

import logging

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn of kernels for other hardware and of another library's use of torch."""


def quiet_imports() -> None:
    """Keep them silent; to be called before torch is imported."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
