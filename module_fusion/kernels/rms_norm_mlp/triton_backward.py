"""The backward pass on NVIDIA GPUs.

Shapes: M tokens, H hidden, I intermediate, P programs.

Saved are x, the reciprocal root mean square, gate and up; the normalised rows and the product
are recomputed. Products go to cuBLAS. No tensor that the caller can see is written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Options, Weights
from .triton_common import activation, activation_derivative
from .triton_forward import halves, norm_launch, rms_norm, rows
from .triton_launch import launch

_ACTIVATION_BLOCK = 1024
# Partial sums of the weight's gradient: enough programs to fill a GPU, few enough to add up.
# Independent of the device, so that the result is too.
_PARTIALS = 256


@triton.jit
def _gated_backward(
    dproduct_MI, gate_MI, up_MI, product_MI, dgate_MI, dup_MI,
    stride_gate, stride_up, stride_dgate, stride_dup, I,
    ACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    dproduct = tl.load(dproduct_MI + row * I + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_MI + row * stride_gate + i, mask=inside, other=0.0)
    dtype = gate.dtype
    g = gate.to(tl.float32)
    up = tl.load(up_MI + row * stride_up + i, mask=inside, other=0.0).to(tl.float32)
    activated = activation(g, ACT, dtype == tl.float32).to(dtype).to(tl.float32)
    dactivated = (dproduct * up).to(dtype).to(tl.float32)
    dgate = dactivated * activation_derivative(g, ACT, dtype == tl.float32)
    tl.store(product_MI + row * I + i, (activated * up).to(dtype), mask=inside)
    tl.store(dgate_MI + row * stride_dgate + i, dgate.to(dtype), mask=inside)
    tl.store(dup_MI + row * stride_dup + i, (dproduct * activated).to(dtype), mask=inside)


@triton.jit
def _rms_norm_backward(
    dy_MH, x_MH, w_H, rstd_M, dx_MH, dw_PH, stride_x, M, H,
    HAS_WEIGHT: tl.constexpr, NORM: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes every P-th row, so that the sum over rows has a fixed order."""
    h = tl.arange(0, BLOCK)
    inside = h < H
    dtype = x_MH.dtype.element_ty
    if HAS_WEIGHT:
        weight = tl.load(w_H + h, mask=inside, other=0.0).to(tl.float32)
        if NORM == "one_plus":
            weight += 1.0
    if NEED_DW:
        dw = tl.zeros((BLOCK,), tl.float32)
    for r in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        dy = tl.load(dy_MH + row * H + h, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_MH + row * stride_x + h, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_M + row)
        normalised = x * rstd
        if NEED_DW:
            if NORM == "early":
                dw += dy * normalised.to(dtype).to(tl.float32)
            else:
                dw += dy * normalised
        if NEED_DX:
            dnormalised = dy
            if HAS_WEIGHT:
                dnormalised = dy * weight
                if NORM == "early":
                    dnormalised = dnormalised.to(dtype).to(tl.float32)
            projection = tl.sum(dnormalised * normalised, 0) / H
            dx = (dnormalised - normalised * projection) * rstd
            tl.store(dx_MH + row * H + h, dx.to(dtype), mask=inside)
    if NEED_DW:
        tl.store(dw_PH + tl.program_id(0) * H + h, dw, mask=inside)


def _rms_norm_gradients(
    dy_MH: Tensor,
    x_MH: Tensor,
    rstd_M: Tensor,
    weight: Tensor | None,
    options: Options,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    M, H = x_MH.shape
    programs = min(M, _PARTIALS) if need_dw else M
    dx_MH = torch.empty((M, H), dtype=x_MH.dtype, device=x_MH.device) if need_dx else None
    dw_PH = None
    if need_dw:
        dw_PH = torch.empty((programs, H), dtype=torch.float32, device=x_MH.device)
    block, warps = norm_launch(H)
    launch(
        _rms_norm_backward, programs,
        (dy_MH, x_MH, weight, rstd_M, dx_MH, dw_PH), (x_MH.stride(0), M, H),
        (weight is not None, options.norm, need_dx, need_dw, block), warps,
    )  # fmt: skip
    dw = None if dw_PH is None else dw_PH.sum(0).to(x_MH.dtype)
    return dx_MH, dw


def backward(
    dy: Tensor,
    x: Tensor,
    rstd_M: Tensor,
    gate: Tensor,
    up: Tensor,
    weights: Weights,
    options: Options,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `rms_norm_mlp`.

    Args:
        dy: `(..., hidden)`, of any strides.
        rstd_M, gate, up: as `forward_for_backward` returned them.
        needs: which gradients are wanted: of x, then of each of `weights`.

    Returns:
        One gradient for each of `needs`, None where it is not wanted.
    """
    need_x, need_norm, need_gate, need_up, need_down, need_gate_bias, need_up_bias = needs[:7]
    dy_MH, x_MH = rows(dy), rows(x)
    # A zero stride, as from sum().backward(), is no matrix to cuBLAS: each product would copy it.
    dy_MH = dy_MH if dy_MH.is_contiguous() else dy_MH.contiguous()
    found: list[Tensor | None] = [None] * 8
    if needs[7]:
        found[7] = dy_MH.sum(0)
    if not any(needs[:7]):
        return found
    gate_MI, up_MI = halves(gate, up, options.gate_first)
    product_MI, dgate, dup = _gated_gradients(
        torch.mm(dy_MH, weights.down), gate_MI, up_MI, options, merged=weights.up is None
    )
    if need_down:
        found[4] = torch.mm(dy_MH.t(), product_MI)
    del product_MI
    if need_gate_bias:
        found[5] = dgate.sum(0)
    if need_up_bias:
        found[6] = dup.sum(0)
    if need_gate or need_up:
        h_MH = rms_norm(x_MH, weights.norm, options)
        if need_gate:
            found[2] = torch.mm(dgate.t(), h_MH)
        if need_up:
            found[3] = torch.mm(dup.t(), h_MH)
        del h_MH
    if need_x or need_norm:
        dh_MH = torch.mm(dgate, weights.gate)
        if weights.up is not None:
            dh_MH = _plus_product(dh_MH, dup, weights.up)
        dx_MH, found[1] = _rms_norm_gradients(
            dh_MH, x_MH, rstd_M, weights.norm, options, need_x, need_norm
        )
        found[0] = None if dx_MH is None else dx_MH.view(x.shape)
    return found


def _plus_product(sum_MH: Tensor, a_MI: Tensor, b_IH: Tensor) -> Tensor:
    """`sum + a @ b`, as exact as two products and a sum; `sum` is used up.

    In float32 a product may go on from `sum`, which is then rounded once per term; half
    precision is summed in float32, and rounded once less when the sum is part of the product.
    """
    if sum_MH.dtype == torch.float32:
        return sum_MH.add_(torch.mm(a_MI, b_IH))
    return torch.addmm(sum_MH, a_MI, b_IH)


def _gated_gradients(
    dproduct_MI: Tensor, gate_MI: Tensor, up_MI: Tensor, options: Options, *, merged: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The product again, and the gradients of gate and up; merged, the first is of both."""
    M, I = gate_MI.shape
    product_MI = torch.empty_like(dproduct_MI)
    if merged:
        both = dproduct_MI.new_empty((M, 2 * I))
        dgate_MI, dup_MI = halves(both, both.new_empty(0), options.gate_first)
    else:
        dgate_MI, dup_MI = torch.empty_like(dproduct_MI), torch.empty_like(dproduct_MI)
    block = min(triton.next_power_of_2(I), _ACTIVATION_BLOCK)
    launch(
        _gated_backward, M * triton.cdiv(I, block),
        (dproduct_MI, gate_MI, up_MI, product_MI, dgate_MI, dup_MI),
        (gate_MI.stride(0), up_MI.stride(0), dgate_MI.stride(0), dup_MI.stride(0), I),
        (options.activation, block),
    )  # fmt: skip
    return product_MI, (both if merged else dgate_MI), dup_MI
