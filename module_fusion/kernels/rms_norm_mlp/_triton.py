"""Whether Triton is there and can run."""

from __future__ import annotations

import functools
import os

import torch

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

# Triton decides when it is imported whether its kernels run in Python, on CPU tensors.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def can_run_triton(device: torch.device) -> bool:
    """Whether tensors on this device go through the Triton kernels: NVIDIA, from Ampere on."""
    if not HAS_TRITON:
        return False
    if device.type != "cuda" or torch.version.hip is not None:
        return INTERPRETED and device.type == "cpu"
    return torch.cuda.get_device_capability(device) >= (8, 0)
