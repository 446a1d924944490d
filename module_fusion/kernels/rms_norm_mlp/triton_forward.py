"""The forward pass on NVIDIA GPUs.

Shapes: M tokens, H hidden, I intermediate, J either of them; x_MH is a tensor of M rows of H.

Few tokens: two kernels that stream the weights once, the norm inside the first (one token) or
before it. Many tokens, float32, or weights that are not contiguous: a norm kernel, cuBLAS, an
activation kernel, cuBLAS. cuBLAS follows the caller's own TF32 setting, as the modules do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Skinny, skinny
from .reference import Options, Weights, gate_and_up
from .triton_common import activation, reciprocal_root, scaled
from .triton_launch import launch

# One launch covers at most 2^31 - 1 programs, and a program this many values of a row.
_ACTIVATION_BLOCK = 2048


@triton.jit
def _rms_norm(
    x_MH, w_H, y_MH, rstd_M, stride_x, H, eps,
    HAS_WEIGHT: tl.constexpr, NORM: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < H
    x = tl.load(x_MH + row * stride_x + h, mask=inside, other=0.0)
    wide = x.to(tl.float64 if x.dtype == tl.float32 else tl.float32)
    rstd = reciprocal_root(tl.sum(wide * wide, 0), H, eps)
    x = x.to(tl.float32)
    dtype = y_MH.dtype.element_ty
    if HAS_WEIGHT:
        weight = tl.load(w_H + h, mask=inside, other=0.0).to(tl.float32)
        y = scaled(x * rstd, weight, NORM, dtype)
    else:
        y = (x * rstd).to(dtype)
    tl.store(y_MH + row * H + h, y, mask=inside)
    if SAVE:
        tl.store(rstd_M + row, rstd)


@triton.jit
def _gated(gate_MI, up_MI, y_MI, stride_gate, stride_up, I, ACT: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(I, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_MI + row * stride_gate + i, mask=inside, other=0.0)
    up = tl.load(up_MI + row * stride_up + i, mask=inside, other=0.0)
    activated = activation(gate.to(tl.float32), ACT, gate.dtype == tl.float32).to(gate.dtype)
    y = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(y_MI + row * I + i, y.to(gate.dtype), mask=inside)


@triton.jit
def _accumulate(acc, h, w, ONE_ROW: tl.constexpr):
    if ONE_ROW:
        acc += w.to(tl.float32) * h.to(tl.float32)
    else:
        acc = tl.dot(h, tl.trans(w), acc)
    return acc


@triton.jit
def _total(acc, ONE_ROW: tl.constexpr):
    if ONE_ROW:
        total = tl.sum(acc, 1)[None, :]
    else:
        total = acc
    return total


@triton.jit
def _skinny_gate_up(
    x_MH, norm_H, gate_IH, up_IH, gate_bias_I, up_bias_I, y_MI, stride_x, M, H, I, eps,
    HAS_WEIGHT: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Gate, up and activation for all tokens and some columns; with one token the norm too."""
    ONE_ROW: tl.constexpr = BLOCK_M == 1
    dtype = y_MI.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    hs = tl.arange(0, BLOCK_H)
    rstd = 1.0
    if ONE_ROW:
        squares = tl.zeros((BLOCK_H,), tl.float32)
        for start in range(0, H, BLOCK_H):
            x = tl.load(x_MH + start + hs, mask=start + hs < H, other=0.0).to(tl.float32)
            squares += x * x
        rstd = reciprocal_root(tl.sum(squares, 0), H, eps)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(I, BLOCK_I), tl.num_programs(0), flatten=FLATTEN
    ):
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        rows = i.to(tl.int64)[:, None] * H
        if ONE_ROW:
            gate = tl.zeros((BLOCK_I, BLOCK_H), tl.float32)
            up = tl.zeros((BLOCK_I, BLOCK_H), tl.float32)
        else:
            gate = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
        for start in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            h = start + hs
            inside = (i < I)[:, None] & (h < H)[None, :]
            w_gate = tl.load(gate_IH + rows + h[None, :], mask=inside, other=0.0)
            w_up = tl.load(up_IH + rows + h[None, :], mask=inside, other=0.0)
            x = tl.load(
                x_MH + m[:, None] * stride_x + h[None, :],
                mask=(m < M)[:, None] & (h < H)[None, :], other=0.0,
            )  # fmt: skip
            if ONE_ROW:
                normalised = x.to(tl.float32) * rstd
                if HAS_WEIGHT:
                    weight = tl.load(norm_H + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
                    x = scaled(normalised, weight, NORM, dtype)
                else:
                    x = normalised.to(dtype)
            gate = _accumulate(gate, x, w_gate, ONE_ROW)
            up = _accumulate(up, x, w_up, ONE_ROW)
        g, u = _total(gate, ONE_ROW), _total(up, ONE_ROW)
        if HAS_GATE_BIAS:
            g += tl.load(gate_bias_I + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
        if HAS_UP_BIAS:
            u += tl.load(up_bias_I + i, mask=i < I, other=0.0).to(tl.float32)[None, :]
        activated = activation(g.to(dtype).to(tl.float32), ACT, False).to(dtype)
        y = (activated.to(tl.float32) * u.to(dtype).to(tl.float32)).to(dtype)
        tl.store(y_MI + m[:, None] * I + i[None, :], y, mask=(m < M)[:, None] & (i < I)[None, :])


@triton.jit
def _skinny_down(
    x_MI, down_HI, bias_H, y_MH, M, I, H,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The down projection for all tokens and some columns."""
    ONE_ROW: tl.constexpr = BLOCK_M == 1
    m = tl.arange(0, BLOCK_M)
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(H, BLOCK_H), tl.num_programs(0), flatten=FLATTEN
    ):
        h = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        rows = h.to(tl.int64)[:, None] * I
        if ONE_ROW:
            acc = tl.zeros((BLOCK_H, BLOCK_I), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for start in tl.range(0, I, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            w = tl.load(
                down_HI + rows + i[None, :], mask=(h < H)[:, None] & (i < I)[None, :], other=0.0
            )
            x = tl.load(
                x_MI + m[:, None] * I + i[None, :],
                mask=(m < M)[:, None] & (i < I)[None, :], other=0.0,
            )  # fmt: skip
            acc = _accumulate(acc, x, w, ONE_ROW)
        y = _total(acc, ONE_ROW)
        if HAS_BIAS:
            y += tl.load(bias_H + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        tl.store(
            y_MH + m[:, None] * H + h[None, :], y.to(y_MH.dtype.element_ty),
            mask=(m < M)[:, None] & (h < H)[None, :],
        )  # fmt: skip


def norm_launch(hidden: int) -> tuple[int, int]:
    """Block and warps for a program that holds a row."""
    block = triton.next_power_of_2(hidden)
    return block, min(max(block // 512, 1), 16)


def rms_norm(
    x: Tensor, weight: Tensor | None, options: Options, rstd_M: Tensor | None = None
) -> Tensor:
    """RMSNorm of `as_rows(x)`; writes the reciprocal root mean square to `rstd_M`."""
    H = x.shape[-1]
    y = x.new_empty(x.shape)
    block, warps = norm_launch(H)
    launch(
        _rms_norm, x.numel() // H, (x, weight, y, rstd_M), (row_stride(x), H, options.eps),
        (weight is not None, options.norm, rstd_M is not None, block), warps,
    )  # fmt: skip
    return y


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` of projections of `as_rows(x)`."""
    I = gate.shape[-1]
    y = gate.new_empty(gate.shape)
    block = min(triton.next_power_of_2(I), _ACTIVATION_BLOCK)
    launch(
        _gated, gate.numel() // I * triton.cdiv(I, block),
        (gate, up, y), (row_stride(gate), row_stride(up), I), (activation, block),
    )  # fmt: skip
    return y


def rows(x: Tensor) -> Tensor:
    """`x` as a matrix whose rows have unit stride, copied only if it has to be."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """`x` itself where its rows follow each other, `rows(x)` elsewhere: a view costs host time."""
    return x if x.dim() > 1 and x.is_contiguous() else rows(x)


def row_stride(x: Tensor) -> int:
    """From row to row of `as_rows`. The stride of a dimension of one can be anything."""
    return x.shape[-1] if x.is_contiguous() else x.stride(-2)


def forward(x: Tensor, weights: Weights, options: Options) -> Tensor:
    """`mlp(norm(x))` without anything kept for a backward pass.

    Args:
        x: `(..., hidden)`, at least one token.

    Returns:
        `(..., hidden)`, contiguous.
    """
    config = skinny(x, weights)
    if config is not None:
        return _few_tokens(x, weights, options, config)
    h = rms_norm(as_rows(x), weights.norm, options)
    gate, up = gate_and_up(h, weights, options.gate_first)
    product = gated(gate, up, options.activation)
    y = torch.nn.functional.linear(product, weights.down, weights.down_bias)
    return y if y.shape == x.shape else _shaped(y, x)


def forward_for_backward(
    x: Tensor, weights: Weights, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mlp(norm(x))` and what the backward pass needs.

    Returns:
        The output, the reciprocal root mean square `(tokens,)` in float32, and the gate and up
        projections; where one layer gives both, that layer's output and an empty tensor.
    """
    x_MH = rows(x)
    rstd_M = torch.empty(x_MH.shape[0], dtype=torch.float32, device=x.device)
    h_MH = rms_norm(x_MH, weights.norm, options, rstd_M)
    gate = torch.nn.functional.linear(h_MH, weights.gate, weights.gate_bias)
    if weights.up is None:
        up = gate.new_empty(0)
    else:
        up = torch.nn.functional.linear(h_MH, weights.up, weights.up_bias)
    product_MI = gated(*halves(gate, up, options.gate_first), options.activation)
    y_MH = torch.nn.functional.linear(product_MI, weights.down, weights.down_bias)
    return _shaped(y_MH, x), rstd_M, gate, up


def _shaped(y_MH: Tensor, x: Tensor) -> Tensor:
    """The rows in the shape of `x`, and no view, which nobody could modify under autograd."""
    return y_MH.view(x.shape).detach()


def halves(gate: Tensor, up: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gate and up as `forward_for_backward` saves them, apart."""
    if up.numel():
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _few_tokens(x: Tensor, weights: Weights, options: Options, config: Skinny) -> Tensor:
    H = x.shape[-1]
    M = x.numel() // H
    gate_IH, up_IH, gate_bias, up_bias = gate_and_up_rows(weights, options)
    I = gate_IH.shape[0]
    x_MH = as_rows(x)
    if M > 1:
        x_MH = rms_norm(x_MH, weights.norm, options)
    product_MI = x.new_empty((M, I))
    launch(
        _skinny_gate_up, config.gate_up.programs(I),
        (x_MH, weights.norm, gate_IH, up_IH, gate_bias, up_bias, product_MI),
        (row_stride(x_MH), M, H, I, options.eps),
        (
            weights.norm is not None, options.norm, options.activation,
            gate_bias is not None, up_bias is not None,
            config.tokens, config.gate_up.columns, config.gate_up.depth,
            config.gate_up.stages, config.gate_up.flatten,
        ),
        config.gate_up.warps,
    )  # fmt: skip
    y_MH = x.new_empty(x.shape)
    launch(
        _skinny_down, config.down.programs(H),
        (product_MI, weights.down, weights.down_bias, y_MH), (M, I, H),
        (
            weights.down_bias is not None,
            config.tokens, config.down.columns, config.down.depth,
            config.down.stages, config.down.flatten,
        ),
        config.down.warps,
    )  # fmt: skip
    return y_MH


def one_token_in_graph(
    x: Tensor, weights: Weights, options: Options, gate_up: tuple[Any, ...], down: tuple[Any, ...]
) -> Tensor:
    """`_few_tokens` for one token, for torch.compile, which takes the two kernels into the graph.

    Args:
        gate_up, down: what `configs.in_graph` gives.
    """
    H, I = weights.down.shape
    gate_IH, up_IH, gate_bias, up_bias = gate_and_up_rows(weights, options)
    x_H = x.contiguous()
    product_I = x.new_empty(I)
    programs, columns, depth, warps, stages, flatten = gate_up
    _skinny_gate_up[(programs,)](
        x_H, weights.norm, gate_IH, up_IH, gate_bias, up_bias, product_I, H, 1, H, I, options.eps,
        HAS_WEIGHT=weights.norm is not None, NORM=options.norm, ACT=options.activation,
        HAS_GATE_BIAS=gate_bias is not None, HAS_UP_BIAS=up_bias is not None,
        BLOCK_M=1, BLOCK_I=columns, BLOCK_H=depth, STAGES=stages, FLATTEN=flatten,
        num_warps=warps,
    )  # fmt: skip
    y = x_H.new_empty(x_H.shape)
    programs, columns, depth, warps, stages, flatten = down
    _skinny_down[(programs,)](
        product_I, weights.down, weights.down_bias, y, 1, I, H,
        HAS_BIAS=weights.down_bias is not None,
        BLOCK_M=1, BLOCK_H=columns, BLOCK_I=depth, STAGES=stages, FLATTEN=flatten,
        num_warps=warps,
    )  # fmt: skip
    return y


def gate_and_up_rows(
    weights: Weights, options: Options
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The weights and biases of gate and up, as blocks of rows where one layer has both."""
    if weights.up is not None:
        return weights.gate, weights.up, weights.gate_bias, weights.up_bias
    gate, up = halves_of_rows(weights.gate, options.gate_first)
    if weights.gate_bias is None:
        return gate, up, None, None
    return (gate, up, *halves_of_rows(weights.gate_bias, options.gate_first))


def halves_of_rows(merged: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """The two blocks of rows of a merged weight or bias, gate first."""
    first, second = merged.detach().chunk(2, dim=0)
    return (first, second) if gate_first else (second, first)
