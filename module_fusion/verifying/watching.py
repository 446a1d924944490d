"""What the chains do in one run, without a hook on a member that could run its kernel."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import Parameter
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..deferred import IMMUTABLE
from ..inventory import Found, members_of
from ..originals import ORIGINAL, original_of
from ..spec import External, Wire
from .structures import Leaf, leaves, same_bits, snapshot, strides_of, tensors_in

UNKNOWN = object()
WROTE = "the kernel wrote to its input"
_OTHER_INPUTS = "the kernel was given other inputs than the modules are"
_CHANGED = (
    "the code around {!r} gives it something else than the output of {!r}, and the kernel does "
    "not know"
)


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
            for index, member in enumerate(item.chain.collectors):
                stack.callback(member.register_forward_hook(follower.note_output_of(index)).remove)
            stack.callback(item.last.register_forward_hook(follower.replace).remove)
        yield


@dataclass
class MemberCall:
    """One call of a member in the unfused run that follows.

    Attributes:
        inputs: those from outside the chain, by position in its signature.
        givers: the calls that returned what this one is given, by their member.
        output: what it returned.
        tensors: those that it returned, while anyone may be given them.
    """

    inputs: dict[int, Any] = field(default_factory=dict)
    givers: dict[int, list[MemberCall]] = field(default_factory=dict)
    output: Any = None
    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)

    def returned(self, output: Any) -> None:
        self.output = snapshot(output)
        self.tensors = [weakref.ref(tensor) for tensor in tensors_in(output)]

    def has_returned(self, value: Any, wire: Wire) -> bool:
        return equal(self.output[wire.output] if wire.arity > 1 else self.output, value)

    def is_alive(self) -> bool:
        return any(tensor() is not None for tensor in self.tensors)


class _Follower:
    """Follows the calls of one chain."""

    def __init__(self, found: Found, queue: deque[Call]) -> None:
        self.plan = found.chain.plan
        self.roles = found.chain.roles
        self.queue = queue
        self.running: dict[int, MemberCall] = {}
        self.ended: dict[int, list[MemberCall]] = {}

    def note_inputs_of(self, index: int) -> Any:
        wiring = self.plan.members[index]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = wiring.bind(args, kwargs)
            self.running.pop(index, None)
            if isinstance(values, str):
                return
            call = self.running[index] = MemberCall()
            for value, source, default in zip(values, wiring.sources, wiring.defaults, strict=True):
                if isinstance(source, External):
                    value = default if value is Parameter.empty else value
                    call.inputs[source.position] = snapshot(value)
                elif isinstance(source, Wire):
                    known = call.givers.get(source.member, self.ended.get(source.member, []))
                    givers = [giver for giver in known if giver.has_returned(value, source)]
                    call.givers[source.member] = givers

        return hook

    def note_output_of(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            call = self.running.pop(index, None)
            if call is not None:
                call.returned(output)
                alive = [earlier for earlier in self.ended.get(index, []) if earlier.is_alive()]
                self.ended[index] = [*alive, call]

        return hook

    def _why_unlike(self, index: int, call: MemberCall, inputs: list[Any]) -> str | None:
        """Why a kernel that was given these inputs does not stand for the call of a member."""
        if not all(equal(inputs[position], value) for position, value in call.inputs.items()):
            return _OTHER_INPUTS
        for member, givers in call.givers.items():
            reasons = [self._why_unlike(member, giver, inputs) for giver in givers]
            if all(reasons):
                changed = _CHANGED.format(self.roles[index], self.roles[member])
                return next(iter(reasons), changed)
        return None

    def replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        last = len(self.plan.members) - 1
        ours = self.running.pop(last, None)
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
        problem = _OTHER_INPUTS if ours is None else self._why_unlike(last, ours, call.inputs)
        call.problem = problem or call.problem
        return snapshot(call.output)


def equal(a: Any, b: Any) -> bool:
    """Whether two values have the same tensors, to the bit, with the same strides, and numbers."""
    ours, theirs = leaves(a), leaves(b)
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _same(ours: Leaf, theirs: Leaf) -> bool:
    a, b = ours.value, theirs.value
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_bits(a, b) and strides_of(a) == strides_of(b)
    if type(a) in IMMUTABLE and type(b) in IMMUTABLE:
        return type(a) is type(b) and (a == b or (a != a and b != b))
    return isinstance(a, Tensor) is isinstance(b, Tensor)
