"""What the chains do in one run, without a hook on a member that could run its kernel."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..inventory import Found, members_of
from ..originals import ORIGINAL, original_of
from ..spec import External, Wire
from .structures import leaves, same_bits, snapshot, strides_of

UNKNOWN = object()
WROTE = "the kernel wrote to its input"


@dataclass
class Call:
    """One call of a chain, on memory of its own.

    Attributes:
        chain: the number of the chain.
        path: `"kernel"` or `"members"`.
        reason: why the members ran.
        inputs: the chain's inputs, where the kernel ran.
        output: what the last member returned.
        theirs: what the members return in its place, where the kernel ran and that is known.
        grad: whether gradients were recorded.
        thread: which thread called.
        cotangents: what arrived in a backward of the run at the output's tensors that require a
            gradient, by their places in it; None where nothing did.
        left: the inputs as the kernel left them, where it changed them.
        problem: what else differs at this call.
    """

    chain: int
    path: str | None = None
    reason: str | None = None
    inputs: list[Any] = field(default_factory=list)
    output: Any = None
    theirs: Any = UNKNOWN
    grad: bool = False
    thread: int = 0
    cotangents: dict[str, Tensor | None] = field(default_factory=dict)
    left: list[Any] | None = None
    problem: str | None = None

    def is_rounded(self) -> bool:
        """Whether the kernel gave other bits than the members do."""
        return self.path == "kernel" and not equal(self.output, self.theirs)


@contextmanager
def watched(found: Sequence[Found]) -> Iterator[list[Call]]:
    """Inside, the calls of fused chains are noted, in the order in which they end.

    The last members get a class that looks on, for that long. A hook would make them step
    aside, and a function on the instance too.
    """
    calls: list[Call] = []
    local = threading.local()
    with ExitStack() as stack:
        for number, item in enumerate(found):
            stack.enter_context(_chain_watched(item.chain, local))
            stack.enter_context(_member_watched(item.last, number, local, calls))
        yield calls


@contextmanager
def _chain_watched(chain: Chain, local: threading.local) -> Iterator[None]:
    def run_kernel(self: Chain, inputs: list[Any]) -> Any:
        call = local.calls[-1]
        call.path, call.inputs = "kernel", [snapshot(value) for value in inputs]
        output = Chain.run_kernel(self, inputs)
        if not equal(call.inputs, inputs):
            call.left = [snapshot(value) for value in inputs]
        return output

    def count_members_run(self: Chain, reason: str | None = None) -> None:
        Chain.count_members_run(self, reason)
        local.calls[-1].path, local.calls[-1].reason = "members", self.reason

    own: Any = chain.__dict__
    own["run_kernel"] = MethodType(run_kernel, chain)
    own["count_members_run"] = MethodType(count_members_run, chain)
    try:
        yield
    finally:
        del own["run_kernel"], own["count_members_run"]


@contextmanager
def _member_watched(
    module: nn.Module, number: int, local: threading.local, calls: list[Call]
) -> Iterator[None]:
    base: Any = type(module)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = Call(number, grad=torch.is_grad_enabled(), thread=threading.get_ident())
        pending = local.__dict__.setdefault("calls", [])
        pending.append(call)
        try:
            output = base.__call__(self, *args, **kwargs)
        finally:
            pending.pop()
        # Without a path it was called by a kernel, as itself.
        if call.path is not None:
            call.output = snapshot(output)
            call.cotangents = arriving_at(output)
            calls.append(call)
        return output

    namespace = {
        "__call__": __call__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        ORIGINAL: original_of(base),
    }
    cls = type(base)(base.__name__, (base,), namespace)
    object.__setattr__(module, "__class__", cls)
    try:
        yield
    finally:
        if type(module) is cls:
            object.__setattr__(module, "__class__", base)


def arriving_at(output: Any) -> dict[str, Tensor | None]:
    """What a backward brings to the tensors that require it; filled once there is one."""
    arrived: dict[str, Tensor | None] = {}
    for leaf in leaves(output):
        if isinstance(leaf.value, Tensor) and leaf.value.requires_grad:

            def keep(gradient: Tensor, path: str = leaf.path) -> None:
                arrived[path] = snapshot(gradient)

            arrived[leaf.path] = None
            leaf.value.register_hook(keep)  # type: ignore[no-untyped-call]
    return arrived


class Returned(NamedTuple):
    """What the last member of a chain returned in the unfused run, and what came back to it."""

    output: Any
    cotangents: dict[str, Tensor | None]


@contextmanager
def noted(found: Sequence[Found]) -> Iterator[dict[int, list[Returned]]]:
    """Inside, what the last member of each chain returns is noted; for unfused models."""
    outputs: dict[int, list[Returned]] = {number: [] for number in range(len(found))}
    with ExitStack() as stack:
        for number, item in enumerate(found):

            def note(module: Any, args: Any, output: Any, number: int = number) -> None:
                outputs[number].append(Returned(snapshot(output), arriving_at(output)))

            stack.callback(item.last.register_forward_hook(note).remove)
        yield outputs


@contextmanager
def following(found: Sequence[Found], calls: Sequence[Call]) -> Iterator[None]:
    """Inside, an unfused model continues with what the kernels returned in an earlier run.

    So the two runs may not differ in anything else, not in one bit: a kernel's inputs, the
    output of members that ran themselves, the model's output. What differs is the `problem` of
    its call. What the members return in a kernel's place becomes the call's `theirs`.
    """
    with ExitStack() as stack:
        for number, item in enumerate(found):
            queue = deque(call for call in calls if call.chain == number)
            follower = _Follower(item, queue)
            for index, member in enumerate(members_of(item)):
                hook = follower.note_inputs_of(index)
                handle = member.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(member.register_forward_hook(follower.note_output_of(index)).remove)
            stack.callback(item.last.register_forward_hook(follower.replace).remove)
        yield


class _Follower:
    """Follows the calls of one chain."""

    def __init__(self, found: Found, queue: deque[Call]) -> None:
        self.plan = found.chain.plan
        self.roles = found.chain.roles
        self.queue = queue
        self.inputs: list[Any] = [None] * self.plan.inputs
        self.outputs: dict[int, Any] = {}
        self.changed: dict[int, str] = {}

    def note_inputs_of(self, index: int) -> Any:
        wiring = self.plan.members[index]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = wiring.bind(args, kwargs)
            self.changed.pop(index, None)
            if isinstance(values, str):
                return
            for value, source in zip(values, wiring.sources, strict=True):
                if isinstance(source, External):
                    self.inputs[source.position] = snapshot(value)
                elif isinstance(source, Wire) and not self._is_output(source, value):
                    self.changed[index] = (
                        f"the code around {self.roles[index]!r} gives it something else than the "
                        f"output of {self.roles[source.member]!r}, and the kernel does not know"
                    )

        return hook

    def note_output_of(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[index] = snapshot(output)

        return hook

    def _is_output(self, wire: Wire, value: Any) -> bool:
        """Whether a member is given what another returned in the same run."""
        output: Any = self.outputs.get(wire.member)
        return equal(output[wire.output] if wire.arity > 1 else output, value)

    def replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        changed = next(iter(self.changed.values()), None)
        self.changed.clear()
        if not self.queue:
            return output
        call = self.queue.popleft()
        if call.path == "members":
            if not equal(call.output, output):
                call.problem = (
                    "the modules ran themselves, and their output is not that of the unfused run"
                )
            return output
        call.theirs = snapshot(output)
        if changed is not None:
            call.problem = changed
        elif not equal(call.inputs, self.inputs):
            call.problem = "the kernel was given other inputs than the modules are"
        return snapshot(call.output)


def equal(a: Any, b: Any) -> bool:
    """Whether two values have the same tensors, to the bit, with the same strides."""
    ours, theirs = leaves(a), leaves(b)
    return len(ours) == len(theirs) and all(
        same_bits(p.value, q.value) and strides_of(p.value) == strides_of(q.value)
        for p, q in zip(ours, theirs, strict=True)
        if isinstance(p.value, Tensor) and isinstance(q.value, Tensor)
    )
