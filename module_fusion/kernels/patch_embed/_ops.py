"""Which path a call takes, and the operators that `torch.compile` sees.

Eager calls launch directly: an operator of `torch.library` costs several microseconds a call.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._geometry import (
    PatchPlan,
    convolution_input_grad,
    convolution_weight_grad,
    convolve,
    grid_of,
    is_channels_last,
    is_known,
)
from ._torch import patch_embed_torch

try:
    import triton  # noqa: F401
except ImportError:
    _INTERPRETED = _HAS_TRITON = False
else:
    from . import _launch

    _INTERPRETED = _launch.INTERPRETED
    _HAS_TRITON = True

_FEW_ROWS = 0 if _INTERPRETED else 4096
_FEW_TERMS = 0 if _INTERPRETED else 64
NAMESPACE = re.sub(r"\W", "_", __name__)


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None, plan: PatchPlan) -> Tensor:
    """Embed the patches of an image, a sequence or a video.

    Args:
        x: `(batch, channels, *size)` or `(channels, *size)`.
        weight: `(embed_dim, channels, *patch)`.
        bias: `(embed_dim,)` or None.

    Returns:
        `(batch, embed_dim, *grid)` or `(embed_dim, *grid)`.
    """
    if not is_known(x, weight, plan):
        return convolve(x, weight, bias, plan)
    if x.dim() == len(plan.patch) + 1:
        return patch_embed(x.unsqueeze(0), weight, bias, plan).squeeze(0)
    if x.device.type == "cpu" and not _INTERPRETED:
        return patch_embed_torch(x, weight, bias, plan)
    if not _runs_triton(x.device) or _is_small(x, weight, plan):
        return convolve(x, weight, bias, plan)
    patch, channels_last = list(plan.patch), plan.token_major or is_channels_last(x)
    if torch.compiler.is_compiling():
        op = getattr(torch.ops, NAMESPACE).patch_embed
        return op(x, weight, bias, patch, channels_last)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, bias, patch, channels_last)
    return _launch.output(x, weight, bias, patch, channels_last)


def _is_small(x: Tensor, weight: Tensor, plan: PatchPlan) -> bool:
    """Whether a convolution in fp32 is faster, or sums so little that it is more exact.

    Time of cuDNN's over ours on an H200: 0.2 for 196 patches of 16 x 16, 0.3 for 16 of Qwen2-VL,
    1.8 to 2.6 for 11,664 to 25,088. A product of two numbers, each in two parts of TF32, may be
    off by two units in the last place; in a sum of many that is less than its roundings.
    """
    if x.dtype != torch.float32:
        return False
    embed_dim, values = weight.size(0), weight.numel() // weight.size(0)
    rows = x.size(0) * math.prod(grid_of(x, plan))
    return rows < _FEW_ROWS or min(embed_dim, values) < _FEW_TERMS


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_triton(device: torch.device) -> bool:
    """Whether the kernels run there; a compiled graph asks while it is traced."""
    return _runs_triton_on(device)


@functools.cache
def _runs_triton_on(device: torch.device) -> bool:
    """On an NVIDIA GPU with bf16, or in the interpreter."""
    if not _HAS_TRITON:
        return False
    if device.type == "cpu":
        return _INTERPRETED
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, patch: list[int], last: bool
    ) -> Tensor:
        _setup_context(ctx, (x, weight, bias, patch, last), None)
        return _launch.output(x, weight, bias, patch, last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # create_graph=True: gradients that can be differentiated again.
            return _gradients(ctx, grad, convolution_input_grad, convolution_weight_grad)
        return _gradients(ctx, grad, _launch.input_grad, _launch.weight_grad)


_apply: Callable[..., Tensor] = _PatchEmbed.apply


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, patch, _ = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.size, ctx.patch = x.shape, patch


def _gradients(ctx: Any, grad: Tensor, input_grad: Any, weight_grad: Any) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = input_grad(grad, weight, ctx.size, ctx.patch) if needs_x else None
    dw = weight_grad(grad, x, ctx.patch) if needs_weight else None
    db = grad.sum([0, *range(2, grad.dim())]) if needs_bias else None
    return dx, dw, db, None, None


def _define_operators() -> Any:
    library: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    library.define(
        "patch_embed(Tensor x, Tensor weight, Tensor? bias, SymInt[] patch, bool channels_last)"
        " -> Tensor"
    )
    library.define(
        "input_grad(Tensor grad, Tensor weight, SymInt[] size, SymInt[] patch) -> Tensor"
    )
    library.define("weight_grad(Tensor grad, Tensor x, SymInt[] patch) -> Tensor")
    for key in ("CUDA", "CPU") if _INTERPRETED else ("CUDA",):
        library.impl("patch_embed", _launch.output, key)
        library.impl("input_grad", _launch.input_grad, key)
        library.impl("weight_grad", _launch.weight_grad, key)
    ops = getattr(torch.ops, NAMESPACE)

    def fake_output(
        x: Tensor, weight: Tensor, bias: Tensor | None, patch: list[int], channels_last: bool
    ) -> Tensor:
        grid = grid_of(x, PatchPlan(tuple(patch), channels_last))
        if channels_last:
            return x.new_empty(x.size(0), *grid, weight.size(0)).movedim(-1, 1)
        return x.new_empty(x.size(0), weight.size(0), *grid)

    def fake_input_grad(grad: Tensor, weight: Tensor, size: list[int], patch: list[int]) -> Tensor:
        return grad.new_empty(size)

    def fake_weight_grad(grad: Tensor, x: Tensor, patch: list[int]) -> Tensor:
        return grad.new_empty(grad.size(1), x.size(1), *patch)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _gradients(ctx, grad, ops.input_grad, ops.weight_grad)

    fakes: dict[str, Callable[..., Tensor]] = {
        "patch_embed": fake_output,
        "input_grad": fake_input_grad,
        "weight_grad": fake_weight_grad,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"{NAMESPACE}::patch_embed", backward, setup_context=_setup_context, lib=library
    )
    return library


_LIBRARY = _define_operators() if _HAS_TRITON else None
