"""Launches Triton kernels with little Python per call, on the device of their tensors."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# From Triton 3.3 on a compiled kernel takes all arguments in order, constexpr ones included.
_REUSABLE = _VERSION >= (3, 3)
# Where a compiled kernel is run by what was seen in these versions, not by its public call.
_DIRECT = (3, 4) <= _VERSION <= (3, 9) and torch.version.hip is None
_MOST_COMPILED = 4096
_COMPILED: dict[Any, Any] = {}


def launch(
    function: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
) -> None:
    """Run `function` on the device of its first argument.

    Triton's own look-up of the compiled kernel takes 15 µs of Python. It depends on dtypes,
    alignment and some properties of integers; here the integers themselves are in the key.

    Args:
        programs: size of the grid.
        tensors: the first arguments.
        numbers: the arguments after them.
        constants: the constexpr arguments, which come last.
    """
    index = tensors[0].get_device()  # type: ignore[union-attr]
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(function, programs, tensors, numbers, constants, warps)
    bits = 0
    pointers: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    for tensor in tensors:
        if tensor is None:
            pointers.append(None)
            dtypes.append(None)
        else:
            pointer = tensor.data_ptr()
            bits |= pointer
            pointers.append(pointer)
            dtypes.append(tensor.dtype)
    unaligned = None
    if bits & 15:
        unaligned = tuple([None if pointer is None else pointer & 15 for pointer in pointers])
    key = (id(function), index, warps, constants, numbers, tuple(dtypes), unaligned)
    compiled = _COMPILED.get(key)
    if compiled is None:
        grid = function[programs, 1, 1]
        compiled = grid(*tensors, *numbers, *constants, num_warps=warps)
        # The interpreter returns None.
        if _REUSABLE and compiled is not None:
            if len(_COMPILED) >= _MOST_COMPILED:
                _COMPILED.clear()
            _COMPILED[key] = compiled
    elif _DIRECT and not _is_watched():
        # Of a number it does not ask the driver whether that is memory of this device.
        compiled.run(
            programs, 1, 1, torch._C._cuda_getCurrentRawStream(index), compiled.function,
            compiled.packed_metadata, None, None, None, *pointers, *numbers, *constants,
        )  # fmt: skip
    else:
        compiled[programs, 1, 1](*tensors, *numbers, *constants)
    return None


def _is_watched() -> bool:
    """Whether a profiler has a hook on every launch; later versions have a chain of them."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False
