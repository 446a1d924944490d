"""Chooses the path of a call, and what autograd and `torch.compile` see of it.

Eager calls reach the launchers directly or through an `autograd.Function`: dispatching an
operator costs several microseconds. Under `torch.compile` the GPU path is three opaque
operators, or for one token the kernels themselves; torch's own operations are traced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import cpu
from ._triton import HAS_TRITON
from .configs import are_contiguous, in_graph
from .reference import Options, Weights

if HAS_TRITON:
    from . import triton_backward, triton_forward

NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])
_ARGUMENTS = (
    "Tensor? norm, Tensor gate, Tensor? up, Tensor down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, "
    "float eps, str norm_form, str activation, bool gate_first"
)


def rms_norm_mlp(x: Tensor, weights: Weights, options: Options, triton: bool) -> Tensor:
    """`mlp(norm(x))`.

    Args:
        x: `(..., hidden)`.
        triton: whether tensors on this device go through the Triton kernels.

    Returns:
        `(..., hidden)`.
    """
    if not triton:
        return cpu.rms_norm_mlp(x, weights, options)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or any(w is not None and w.requires_grad for w in weights)
    )
    if torch.compiler.is_compiling():
        if not needs_grad:
            launches = _launches_in_graph(x, weights)
            if launches is not None:
                return triton_forward.one_token_in_graph(x, weights, options, *launches)
        operators = getattr(torch.ops, NAMESPACE)
        if needs_grad:
            output: Tensor = operators.forward_for_backward(x, *weights, *options)[0]
        else:
            output = operators.forward(x, *weights, *options)
        return output
    if needs_grad:
        return cast(Tensor, _RMSNormMLP.apply(options, x, *weights))  # type: ignore[no-untyped-call]
    return triton_forward.forward(x, weights, options)


def _launches_in_graph(x: Tensor, weights: Weights) -> Any:
    """How Inductor is to launch the kernels for one token itself; None where an operator runs.

    That takes a third of the host time of an operator, of which decoding is made. What is exported
    keeps the operator.
    """
    if not x.is_cuda or x.dtype == torch.float32 or not torch.compiler.is_dynamo_compiling():
        return None
    # Before 2.13 Dynamo takes `is_exporting()` for true in every trace.
    if torch.compiler._is_exporting_flag or not are_contiguous(weights):
        return None
    # Imports sympy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if not statically_known_true(x.numel() == x.shape[-1]):
        return None
    hidden, intermediate = weights.down.shape
    return in_graph(x.device.index, hidden, intermediate)


class _RMSNormMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: Options, x: Tensor, *tensors: Tensor | None) -> Tensor:
        weights = Weights(*tensors)  # type: ignore[arg-type]
        output, rstd, gate, up = triton_forward.forward_for_backward(x, weights, options)
        ctx.options = options
        ctx.save_for_backward(x, rstd, gate, up, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, gate, up, *tensors = ctx.saved_tensors
        weights = Weights(*tensors)
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            # create_graph=True: gradients that can be differentiated again.
            return (None, *_composed_gradients(dy, x, weights, ctx.options, needs))
        gradients = triton_backward.backward(dy, x, rstd, gate, up, weights, ctx.options, needs)
        return (None, *gradients)


def _composed_gradients(
    dy: Tensor, x: Tensor, weights: Weights, options: Options, needs: Sequence[bool]
) -> list[Tensor | None]:
    # Views, because one tensor may be two of the weights, and each has its own gradient.
    x = x.view_as(x)
    weights = Weights(*[t if t is None else t.view_as(t) for t in weights])  # type: ignore[arg-type]
    wanted = [t for t, need in zip((x, *weights), needs, strict=True) if t is not None and need]
    output = cpu.rms_norm_mlp(x, weights, options)
    gradients = iter(torch.autograd.grad(output, wanted, dy, create_graph=True))
    return [next(gradients) if need else None for need in needs]


def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return triton_forward.forward(x, Weights(*arguments[:7]), Options(*arguments[7:]))


def _forward_for_backward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triton_forward.forward_for_backward(x, Weights(*arguments[:7]), Options(*arguments[7:]))


def _backward(
    dy: Tensor, x: Tensor, rstd: Tensor, gate: Tensor, up: Tensor, *arguments: Any
) -> list[Tensor]:
    """Only the wanted gradients: a list of tensors is what an operator can return."""
    gradients = triton_backward.backward(
        dy, x, rstd, gate, up, Weights(*arguments[:7]), Options(*arguments[7:11]), arguments[11]
    )
    return [gradient for gradient in gradients if gradient is not None]


def _forward_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape)


def _forward_for_backward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = Weights(*arguments[:7])
    tokens = x.numel() // x.shape[-1]
    gate = x.new_empty((tokens, weights.gate.shape[0]))
    up = x.new_empty(0) if weights.up is None else torch.empty_like(gate)
    return x.new_empty(x.shape), x.new_empty(tokens, dtype=torch.float32), gate, up


def _backward_fake(
    dy: Tensor, x: Tensor, rstd: Tensor, gate: Tensor, up: Tensor, *arguments: Any
) -> list[Tensor]:
    inputs = (x, *arguments[:7])
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip(inputs, arguments[11], strict=True)
        if need
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[8:]
    ctx.save_for_backward(inputs[0], *output[1:], *inputs[1:8])


def _autograd_backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:8])
    gradients = iter(
        getattr(torch.ops, NAMESPACE).backward(dy, *ctx.saved_tensors, *ctx.options, needs)
    )
    return (*(next(gradients) if need else None for need in needs), None, None, None, None)


if HAS_TRITON:
    # Whoever holds the library keeps the operators.
    _LIBRARY: Any = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    _LIBRARY.define(f"forward(Tensor x, {_ARGUMENTS}) -> Tensor")
    _LIBRARY.define(
        f"forward_for_backward(Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    _LIBRARY.define(
        f"backward(Tensor dy, Tensor x, Tensor rstd, Tensor gate_output, Tensor up_output, "
        f"{_ARGUMENTS}, bool[] needs) -> Tensor[]"
    )
    for _name, _function, _fake in (
        ("forward", _forward, _forward_fake),
        ("forward_for_backward", _forward_for_backward, _forward_for_backward_fake),
        ("backward", _backward, _backward_fake),
    ):
        # The CPU implementations run under Triton's interpreter alone.
        _LIBRARY.impl(_name, _function, "CUDA")
        _LIBRARY.impl(_name, _function, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::forward_for_backward",
        _autograd_backward,
        setup_context=_setup_context,
        lib=_LIBRARY,
    )
