"""Which convolutions the kernel knows, and the shapes of their patches."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import (
    conv1d_input,
    conv1d_weight,
    conv2d_input,
    conv2d_weight,
    conv3d_input,
    conv3d_weight,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class PatchPlan(NamedTuple):
    """What is fixed for one convolution.

    Args:
        patch: kernel size and stride, one to three numbers.
        token_major: whether the output may lie in memory as `(batch, *grid, embed_dim)`
            where the convolution's would not.
    """

    patch: tuple[int, ...]
    token_major: bool


def prepare(proj: Any, token_major: bool = False) -> PatchPlan:
    """Check once that a convolution is one over patches.

    Args:
        proj: the convolution.
        token_major: see `PatchEmbed`. Only for callers that are known to read the output
            through `flatten(2).transpose(1, 2)`.

    Raises:
        ValueError: the reason why not. A 1x1 convolution is refused too: it has no patches,
            is a matrix product already, and nothing can be gained.
    """
    cls = type(proj).__dict__.get("_fusion_original_class", type(proj))
    if cls not in _CONVOLUTIONS:
        raise ValueError(f"a {cls.__name__} is not exactly nn.Conv1d, nn.Conv2d or nn.Conv3d")
    _check_methods(proj, cls)
    patch = tuple(proj.kernel_size)
    if tuple(proj.stride) != patch:
        raise ValueError(f"its stride {tuple(proj.stride)} is not its kernel size {patch}")
    # "valid" is no padding; torch allows "same" only for a stride of 1.
    if proj.padding != "valid" and any(proj.padding):
        raise ValueError(f"its padding is {proj.padding}, not 0")
    if any(step != 1 for step in proj.dilation):
        raise ValueError(f"its dilation is {tuple(proj.dilation)}, not 1")
    if proj.groups != 1:
        raise ValueError(f"it has {proj.groups} groups, not 1")
    if math.prod(patch) == 1:
        raise ValueError("its kernel size is 1: there are no patches, only a matrix product")
    if proj.weight.dtype not in DTYPES:
        raise ValueError(f"its weight is in {proj.weight.dtype}, not float32, bfloat16 or float16")
    return PatchPlan(patch, token_major)


def _check_methods(proj: Any, cls: Any) -> None:
    """Refuse a convolution that was taught to compute something else, such as to wrap around."""
    for name in ("forward", "_conv_forward"):
        if name in proj.__dict__:
            raise ValueError(f"the {cls.__name__} has a {name} of its own")
        # What a wrapper takes over from what it wraps are names, not globals.
        if getattr(getattr(cls, name), "__globals__", None) is not vars(torch.nn.modules.conv):
            raise ValueError(f"{name} of {cls.__name__} is not torch's")
    function = cls.__name__.lower()
    if getattr(F, function) is not _CONVOLUTIONS[cls]:
        raise ValueError(f"torch.nn.functional.{function} was replaced")


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, plan: PatchPlan) -> Tensor:
    """The convolution itself."""
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(plan.patch) - 1]
    return convolution(x, weight, bias, plan.patch)


def convolution_input_grad(
    grad: Tensor, weight: Tensor, size: Sequence[int], patch: Sequence[int]
) -> Tensor:
    """The convolution's own gradient, `(batch, channels, *size)`, which has derivatives."""
    gradient: Any = (conv1d_input, conv2d_input, conv3d_input)[len(patch) - 1]
    return gradient(size, weight, grad, stride=patch)  # type: ignore[no-any-return]


def convolution_weight_grad(grad: Tensor, x: Tensor, patch: Sequence[int]) -> Tensor:
    """The convolution's own gradient, `(embed_dim, channels, *patch)`, which has derivatives."""
    gradient: Any = (conv1d_weight, conv2d_weight, conv3d_weight)[len(patch) - 1]
    size = grad.size(1), x.size(1), *patch
    return gradient(x, size, grad, stride=patch)  # type: ignore[no-any-return]


def is_known(x: Tensor, weight: Tensor, plan: PatchPlan) -> bool:
    """Whether the matrix product applies. All else, errors too, is left to the convolution."""
    dims = len(plan.patch)
    shape, filters, dtype = x.shape, weight.shape, x.dtype
    return (
        len(shape) in (dims + 1, dims + 2)
        and dtype == weight.dtype
        and dtype in DTYPES
        and x.device == weight.device
        and x.layout == torch.strided
        and shape[-dims - 1] == filters[1]
        and filters[2:] == plan.patch
        and x.numel() > 0
        and weight.numel() > 0
        and all(map(operator.ge, shape[-dims:], plan.patch))
        # A weight in channels_last memory has no view as a matrix of flattened patches.
        and weight.is_contiguous()
        # One channel has both forms; a convolution answers in that of its weight.
        and (filters[1] > 1 or not is_channels_last(weight))
    )


def grid_of(x: Tensor, plan: PatchPlan) -> list[int]:
    """Number of whole patches along each dimension of `(batch, channels, *size)`."""
    return [n // p for n, p in zip(x.shape[2:], plan.patch, strict=True)]


def is_channels_last(x: Tensor) -> bool:
    """Whether a convolution of `(batch, channels, *size)` keeps channels last in memory.

    This is torch's `is_channels_last_strides` (c10/core/MemoryFormat.h), which goes by
    strides alone, also for slices. For `nn.Conv1d` torch does not look at it.
    """
    if x.dim() == 3 or x.stride(1) == 0:
        return False
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        stride = x.stride(dim)
        if stride < least or (dim == 0 and least == x.stride(1)):
            return False
        least = stride * max(x.size(dim), 1)
    return True
