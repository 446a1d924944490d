"""Captured calls while torch.compile traces.

Tracing cannot count modifications of a tensor, answers `isinstance` and `type` from the
class alone, and swaps the operands of some operators. So it does what torch.compile itself
does when it is not sure: it speculates, and traces again when it was wrong.
"""

from __future__ import annotations

import os
from types import CodeType
from typing import Any

import torch

from .bytecode import function_of
from .code import asks_for_tensors

_HERE = os.path.dirname(__file__)
_TORCH = os.path.dirname(torch.__file__)
# Their code asks for tensors, but not about what passes through a parent.
_TRUSTED = (_HERE, *(os.path.join(_TORCH, part) for part in ("nn", "_dynamo", "_tensor.py")))


class Speculation:
    """Whether captured calls are worth trying while torch.compile traces.

    Like torch.compile's own speculation: trace with the calls captured, and where anything but
    the fused module turns out to use a captured value, start again with nothing captured. So
    a graph holds either the kernel or what the unfused model has. Blocks of the same classes
    that are fused by one call share one.

    In eager mode it does not hold either once a captured value went into compiled code: there
    the same trace is for all of those blocks; nor, where gradients are recorded, once the
    gradient of a captured value itself was asked for.
    """

    def __init__(self) -> None:
        self.holds = True
        self.used_in_compiled_code = False
        self.needs_gradient = False


def trace_again(call: Any) -> None:
    """Start the trace again without captured calls, unless the call is from before it."""
    from torch._dynamo.comptime import comptime

    speculation = call.origin.speculation  # noqa: F841  (read by name)
    comptime(_give_up_own)


def look_at_trace(call: Any) -> None:
    """Look at the weights, and at the code, that torch.compile traces."""
    from torch._dynamo.comptime import comptime

    speculation = call.origin.speculation  # noqa: F841  (read by name)
    boundary = call.origin.boundary  # noqa: F841  (read by name)
    comptime(_check_place)
    for tensor in call.tensors:  # noqa: B007  (read by name)
        comptime(_check_traced)


def _give_up_own(ctx: Any) -> None:
    if _variable(ctx, "call").source is None:
        _give_up(ctx)


def _give_up(ctx: Any) -> None:
    from torch._dynamo.exc import RestartAnalysis

    speculation = _variable(ctx, "speculation").value
    if speculation.holds:
        speculation.holds = False
        ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator().speculation_log.clear()
        raise RestartAnalysis(restart_reason="the output of a fused module is used elsewhere")


def _check_place(ctx: Any) -> None:
    """Captured calls stay in the forward of the module around them, and out of the kernel.

    What runs between that forward and the call must not ask for tensors later, and a kernel
    that calls the members is traced as the members.
    """
    forward = function_of(_variable(ctx, "boundary").value.original.forward)
    tx = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    if getattr(getattr(tx, "symbolic_torch_function_state", None), "mode_stack", None):
        _give_up(ctx)
    inside = False
    while tx is not None:
        code = tx.f_code
        if code.co_name == "run_kernel" and code.co_filename.startswith(_HERE):
            _give_up(ctx)
        if not inside and asks_for_tensors(code) and not code.co_filename.startswith(_TRUSTED):
            _give_up(ctx)
        # After a graph break the rest of a function is traced as a function of its own.
        inside = inside or forward is None or _is_part_of(code, forward.__code__)
        tx = getattr(tx, "parent", None)
    if not inside:
        _give_up(ctx)


def _is_part_of(code: CodeType, whole: CodeType) -> bool:
    return (code.co_filename, code.co_firstlineno) == (whole.co_filename, whole.co_firstlineno)


def _check_traced(ctx: Any) -> None:
    """Compare a weight, and the code traced since, with the first time it was looked at.

    torch.compile answers `isinstance` and `type` from the class alone, so code that asks for
    tensors must not have seen the deferred value.
    """
    fake = ctx.get_local("tensor").as_fake()
    traced = torch._guards.TracingContext.get_traced_code() or []
    version = None if fake.is_inference() else fake._version
    seen, first = fake.__dict__.setdefault("_when_captured", (len(traced), version))
    asking = any(
        asks_for_tensors(code) and not code.co_filename.startswith(_TRUSTED)
        for code in traced[seen:]
    )
    if version != first or asking:
        _give_up(ctx)


def _variable(ctx: Any, name: str) -> Any:
    variable = ctx.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker()
    return variable.realize() if hasattr(variable, "realize") else variable
