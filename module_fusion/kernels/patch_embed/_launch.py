"""Launches of the Triton kernels: tiles, memory of the results, and which product to take.

Shapes as in `_triton`. Nothing here autotunes, synchronises or depends on values, so that a
warm call can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import _triton

INTERPRETED = not isinstance(_triton.output_kernel, triton.JITFunction)
"""Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1)."""


class _Gather(NamedTuple):
    """Where the values of the patches lie: the arguments of `_rows_M` and `_columns_K`."""

    tensor: Tensor
    grid: tuple[int, int, int]
    strides: tuple[int, ...]
    patch: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        return math.prod(self.grid), self.grid[1], self.grid[2], *self.strides


def output(
    x: Tensor, weight: Tensor, bias: Tensor | None, patch: Sequence[int], channels_last: bool
) -> Tensor:
    """`(batch, channels, *size)` → `(batch, embed_dim, *grid)`."""
    grid = [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
    count, columns = math.prod(grid), weight.size(0)
    rows = x.size(0) * count
    weight_NK = weight.view(columns, -1)
    with _on(x.device):
        gather, width = _readable(_image(x, patch), weight_NK.size(1))
        token_major = channels_last or count == 1
        if token_major and _suits_cublas(gather, width, weight_NK):
            y_MN = F.linear(gather.tensor.view(rows, width), weight_NK, bias)
            return _in_grid(y_MN, grid, channels_last)
        if token_major:
            y = _in_grid(x.new_empty(rows, columns), grid, channels_last)
            y_strides = count * columns, 1, columns
        else:
            y = x.new_empty(x.size(0), columns, *grid)
            y_strides = count * columns, count, 1
        block = _block(x, rows, columns)
        tiles = triton.cdiv(rows, block["BM"]) * triton.cdiv(columns, block["BN"])
        _triton.output_kernel[(tiles,)](
            gather.tensor, weight, bias, y, rows, columns, *gather.numbers, count, *y_strides,
            weight_NK.size(1), width, *gather.patch,
            HAS_BIAS=bias is not None, V=math.gcd(count, 8),
            WIDE=_wide(gather.tensor, weight, y), **_precision(x), **block,
        )  # fmt: skip
    return y


def input_grad(grad: Tensor, weight: Tensor, size: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Gradient `(batch, channels, *size)`; zeros where the convolution drops a remainder."""
    whole = all(n % p == 0 for n, p in zip(size[2:], patch, strict=True))
    dx = grad.new_empty(size) if whole else grad.new_zeros(size)
    with _on(grad.device):
        dy_MN = _as_rows(grad)
        rows, columns = dy_MN.shape
        gather, width = _image(dx, patch), weight.numel() // columns
        block = _block(grad, rows, width, inner="BN", outer="BK")
        tiles = triton.cdiv(rows, block["BM"]) * triton.cdiv(width, block["BK"])
        _triton.input_grad_kernel[(tiles,)](
            dy_MN, weight, dx, rows, *gather.numbers, columns, width, *gather.patch,
            WIDE=_wide(dx, dy_MN, weight), **_precision(grad), **block,
        )  # fmt: skip
    return dx


def weight_grad(grad: Tensor, x: Tensor, patch: Sequence[int]) -> Tensor:
    """Gradient `(embed_dim, channels, *patch)`, from parts summed in a fixed order in fp32."""
    with _on(grad.device):
        dy_MN = _as_rows(grad)
        rows, columns = dy_MN.shape
        shape = columns, x.size(1), *patch
        width = math.prod(shape[1:])
        gather, _ = _readable(_image(x, patch), width)
        block = _block(grad, columns, width, inner="BM", outer="BK", first="BN")
        tiles = triton.cdiv(columns, block["BN"]) * triton.cdiv(width, block["BK"])
        wanted = max(1, 2 * _processors(x.device) // tiles)
        # A power of two, so that other batch sizes need few other compilations.
        part = max(block["BM"], triton.next_power_of_2(triton.cdiv(rows, wanted)))
        parts = triton.cdiv(rows, part)
        dw = grad.new_empty(parts, *shape, dtype=torch.float32)
        _triton.weight_grad_kernel[(tiles, parts)](
            dy_MN, gather.tensor, dw, rows, columns, *gather.numbers, part, width, *gather.patch,
            WIDE=_wide(gather.tensor, dy_MN, dw[0]), **_precision(grad), **block,
        )  # fmt: skip
        return dw.sum(0).to(grad.dtype)


def _image(x: Tensor, patch: Sequence[int]) -> _Gather:
    """Patches in an image with one to three dimensions."""
    missing = 5 - x.dim()
    grid = [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
    if math.prod(grid) == 1 and x.is_contiguous() and list(x.shape[2:]) == list(patch):
        return _Gather(x, (1, 1, 1), (x.stride(0), 1, 0, 0, 0), (1, 1, 1))
    ones, zeros = (1,) * missing, (0,) * missing
    strides = x.stride(0), x.stride(1), *zeros, *x.stride()[2:]
    return _Gather(x, (*ones, *grid), strides, (*ones, *patch))  # type: ignore[arg-type]


def _readable(gather: _Gather, width: int) -> tuple[_Gather, int]:
    """The patches where they are if 16 bytes can be read at a time, else copied into rows.

    Rows are padded by zeros to 16 bytes: a patch of 14 x 14 on three channels has 588
    values, rows of 592. One copy is read by every tile of output channels.

    Returns:
        the patches, and how many values of each can be read.
    """
    x = gather.tensor
    step = 16 // x.element_size()
    in_rows = gather.patch == (1, 1, 1)
    run, strides = (width, gather.strides[:1]) if in_rows else (gather.patch[2], gather.strides)
    contiguous = in_rows or strides[-1] == 1
    others = strides if in_rows else strides[:-1]
    if contiguous and run % step == 0 and not any(n % step for n in others):
        return gather, width
    padded = triton.cdiv(width, step) * step
    count = x.size(0) * math.prod(gather.grid)
    rows = x.new_empty(count, padded)
    block_M, block_K = 32, 128
    _triton.rows_kernel[(triton.cdiv(count, block_M), triton.cdiv(padded, block_K))](
        x, rows, count, *gather.numbers, width, padded, *gather.patch,
        WIDE=_wide(x, rows), BM=block_M, BK=block_K,
    )  # fmt: skip
    return _Gather(rows, (1, 1, 1), (padded, 1, 0, 0, 0), (1, 1, 1)), padded


def _suits_cublas(gather: _Gather, width: int, weight_NK: Tensor) -> bool:
    """Whether the patches are rows that cuBLAS multiplies well, and with one rounding.

    With fewer tiles than processors it may split K and add the parts in 16 bits, unless
    `torch.backends.cuda.matmul` forbids that. In fp32 it is slower or less accurate.
    """
    columns, inner = weight_NK.shape
    tiles = triton.cdiv(gather.tensor.size(0), 128) * triton.cdiv(columns, 128)
    return (
        gather.patch == (1, 1, 1)
        and gather.tensor.is_cuda
        and gather.tensor.dtype != torch.float32
        and width == inner
        and inner % 8 == 0
        and columns % 8 == 0
        and tiles >= _processors(gather.tensor.device)
    )


def _in_grid(y_MN: Tensor, grid: Sequence[int], channels_last: bool) -> Tensor:
    """Rows as `(batch, embed_dim, *grid)`; no view, which nobody could modify under autograd."""
    if not channels_last:
        return y_MN.view(-1, y_MN.size(1), *grid).detach()
    return y_MN.view(-1, *grid, y_MN.size(1)).movedim(-1, 1).detach()


def _as_rows(grad: Tensor) -> Tensor:
    """`(batch, embed_dim, *grid)` as contiguous rows; no copy where tokens lie so already."""
    return grad.movedim(1, -1).reshape(-1, grad.size(1)).contiguous()


def _precision(x: Tensor) -> dict[str, Any]:
    """How fp32 is multiplied: on tensor cores, each factor as a sum of two TF32 numbers.

    Relative to float64 the error is 1.6e-7 for patches of 588 to 1176 values, a third of cuDNN's
    in fp32. cuDNN takes TF32, at 3e-4, where it is allowed, but not for every size, and not
    for every one of output and gradients, so TF32 would be less accurate than it.
    """
    precision = "tf32x3" if x.dtype == torch.float32 else "ieee"
    return {"PRECISION": precision, "OPERAND": "fp32" if INTERPRETED else "as it is"}


def _block(
    x: Tensor, rows: int, columns: int, inner: str = "BK", outer: str = "BN", first: str = "BM"
) -> dict[str, int]:
    """Tile and warps of a product of `(rows, inner) @ (inner, columns)`."""
    depth = 32 if x.dtype == torch.float32 else 64
    large = triton.cdiv(rows, 128) * triton.cdiv(columns, 128) >= _processors(x.device)
    sizes, warps = ((128, 128, depth), 8) if large else ((64, 64, depth), 4)
    stages = 3 if large or x.dtype == torch.float32 else 4
    return dict(zip((first, outer, inner), sizes, strict=True), num_warps=warps, num_stages=stages)


def _wide(*tensors: Tensor) -> bool:
    """Whether an offset needs 64 bits."""
    return any(
        sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31 - 1
        for t in tensors
    )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
