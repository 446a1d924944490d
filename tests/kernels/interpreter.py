"""Makes Triton's interpreter compute bfloat16 as a GPU does.

The interpreter of triton 3.6 keeps bfloat16 as integers: it truncates where a GPU rounds to the
nearest even value, and multiplies the integers themselves in `tl.dot`. It also cannot use a
runtime integer as the bound of a loop with NumPy 2.4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def to_bfloat16(values: Any) -> Any:
    """float32 to the bits of bfloat16."""
    rounded = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def to_float32(bits: Any) -> Any:
    """The bits of bfloat16 to float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def install() -> None:
    """Replace the interpreter's conversions and products in this process."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_exactly(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bfloat16(values.view(np.float32)).reshape(values.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            return to_float32(values.view(np.uint16)).view(np.uint32).reshape(values.shape)
        return convert(values, source, target, mode)

    def dot_of_floats(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle(to_float32(side.data).reshape(side.data.shape), tl.float32)
                for side in (a, b)
            )
        elif a.dtype.scalar == tl.float16:
            a, b = (
                interpreter.TensorHandle(side.data.astype(np.float32), tl.float32)
                for side in (a, b)
            )
        return dot(self, a, b, *rest)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_exactly
    interpreter.InterpreterBuilder.create_dot = dot_of_floats
