"""Captured calls while torch.compile traces.

Tracing cannot count modifications of a tensor, answers `isinstance` and `type` from the
class alone, and swaps the operands of some operators. So it does what torch.compile itself
does when it is not sure: it speculates, and traces again when it was wrong.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from .code import asks_for_tensors

_TORCH_AND_SELF = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


class Speculation:
    """Whether captured calls are worth trying while torch.compile traces.

    Like torch.compile's own speculation: trace with the calls captured, and where anything but
    the fused module turns out to use a captured value, start again with nothing captured. So
    a graph holds either the kernel or what the unfused model has. Blocks of the same classes
    that are fused by one call share one.
    """

    def __init__(self) -> None:
        self.holds = True


def trace_again(call: Any) -> None:  # `call` is read by name
    from torch._dynamo.comptime import comptime

    comptime(_give_up_call)


def _give_up_call(ctx: Any) -> None:
    call = ctx.get_local("call")._i_will_not_complain_if_bc_breaks_VariableTracker()
    if call.source is None:  # Captured in this very trace, not before a graph break.
        _give_up(ctx, call)


def _give_up(ctx: Any, call: Any) -> None:
    """Start the trace again without captured calls."""
    from torch._dynamo.exc import RestartAnalysis

    tx = ctx._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    speculation = call.var_getattr(tx, "origin").var_getattr(tx, "speculation").realize().value
    if speculation.holds:
        speculation.holds = False
        tx.speculation_log.clear()
        raise RestartAnalysis(restart_reason="the output of a fused module is used elsewhere")


def look_at_trace(call: Any) -> None:
    """Look at the weights, and at the code, that torch.compile traces."""
    from torch._dynamo.comptime import comptime

    for tensor in call.tensors:  # noqa: B007
        comptime(_check_traced)


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
        asks_for_tensors(code) and not code.co_filename.startswith(_TORCH_AND_SELF)
        for code in traced[seen:]
    )
    if version != first or asking:
        _give_up(ctx, ctx.get_local("call")._i_will_not_complain_if_bc_breaks_VariableTracker())
