"""Launches Triton kernels with little Python per call, on the device of their tensors."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

# From Triton 3.3 on a compiled kernel takes all arguments in order, constexpr ones included.
_REUSABLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
_MOST_COMPILED = 4096
_COMPILED: dict[Any, Any] = {}


def launch(
    function: Any,
    programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
) -> None:
    """Run `function` on the device of its first argument.

    Triton's own look-up of the compiled kernel takes 15 µs of Python. It depends on dtypes,
    alignment and some properties of integers; here the integers themselves are in the key.

    Args:
        programs: size of the grid.
        arguments: tensors, None, integers and floats; a tensor first.
        constants: the constexpr arguments, which come last.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(function, programs, arguments, constants, warps)
    key = (
        id(function),
        device,
        warps,
        constants,
        *[(a.dtype, a.data_ptr() & 15) if isinstance(a, Tensor) else a for a in arguments],
    )
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *constants)
        return None
    compiled = function[programs, 1, 1](*arguments, *constants, num_warps=warps)
    # The interpreter returns None.
    if _REUSABLE and compiled is not None:
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        _COMPILED[key] = compiled
    return None
