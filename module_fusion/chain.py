"""The chain: decides at each call whether its kernel may run, and gathers the inputs."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Sequence
from inspect import Parameter
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import checkpointed_call
from .context import Context, calling_context
from .deferred import CapturedCall, DeferredOutput
from .errors import add_note
from .modules import KEY, REPLACED, ModuleState, read_forward, state_of
from .packing import Packing
from .plain import why_not_under
from .seat import FusedKernel, seat_class
from .spec import External, Plan, Wire

_MISSING = object()


class Chain:
    """One group of fused members and how its calls went.

    Args:
        collectors: every member but the last. The last one holds the chain, so the chain
            does not hold the last.
        roles: a name for each member.
        kernel: the layer name for the `kernels` library, None for a chain without a kernel.
        refusal: why this chain never captures, None if it does.
        running: threads inside a kernel of this chain, or of one that shares a collector.

    Attributes:
        family: the family that found the group, None for one that was named by paths.
        accuracy: the kernel's error in units of the members', where they were compared.
        packings: the members' weights that lie side by side, as the kernel wants them.
    """

    def __init__(
        self,
        collectors: Sequence[nn.Module],
        roles: tuple[str, ...],
        plan: Plan,
        kernel: str | None,
        refusal: str | None,
        running: set[int],
    ) -> None:
        self.collectors = tuple(collectors)
        self.states = tuple(state_of(collector) for collector in collectors)
        self.roles = roles
        self.plan = plan
        self.kernel = kernel
        self.refusal = refusal
        self.boundary: ModuleState | None = None
        self.seat: FusedKernel | None = None
        self.running = running
        self.family: str | None = None
        self.accuracy: float | None = None
        self.packings: tuple[Packing, ...] = ()
        self.kernel_calls = 0
        self.member_calls = 0
        self.reason: str | None = None

    def take_seat(self, last: nn.Module) -> None:
        """Make the seat, if the chain has a kernel's name."""
        if self.kernel is None:
            return
        seat = seat_class(self.kernel, self.roles, self.plan)()
        seat.__dict__.update(
            _members=tuple(weakref.ref(member) for member in (*self.collectors, last)),
            _plan=self.plan,
            _armed=False,
            _running=self.running,
            _capabilities={},
            _dtypes=set(),
            _device=None,
            _has_buffers=False,
            _refusal=self.refusal,
            _why_unprepared=None,
            _packings=self.packings,
        )
        seat.training = last.training
        self.seat = seat

    def set_packings(self, packings: tuple[Packing, ...]) -> None:
        """Say how the weights are packed now."""
        self.packings = packings
        if self.seat is not None:
            self.seat.__dict__["_packings"] = packings

    def refuse(self, refusal: str | None, is_read: bool) -> Callable[[], None]:
        """Say why the chain never captures, None if it does, by the code around it as it is now.

        Args:
            is_read: whether that code was read again for every chain that it is around.

        Returns:
            How to take that back.
        """
        boundary = self.boundary
        before, read = self.refusal, None if boundary is None else boundary.read
        self._set_refusal(refusal)
        if boundary is not None and read != (now := read_forward(boundary.original)):
            boundary.read = now if is_read else REPLACED

        def take_back() -> None:
            self._set_refusal(before)
            if boundary is not None:
                boundary.read = read

        return take_back

    def _set_refusal(self, refusal: str | None) -> None:
        self.refusal = refusal
        if self.seat is not None:
            self.seat.__dict__["_refusal"] = refusal

    @property
    def armed(self) -> bool:
        """Whether a kernel is in the seat and may be used."""
        return self.seat is not None and bool(self.seat.__dict__["_armed"])

    def take_kernel_out(self, reason: str) -> None:
        """Have the members run from now on, until a kernel is put in the seat again."""
        seat: FusedKernel = self.seat  # type: ignore[assignment]
        del seat.forward
        seat.__dict__["_why_unprepared"] = reason
        self.accuracy = None

    def why_not_running(self) -> str:
        """Why no kernel is in the seat."""
        if self.kernel is None:
            return "no kernel"
        refused = None if self.seat is None else self.seat.__dict__.get("_why_unprepared")
        return self.refusal or refused or f"no kernel was loaded for {self.kernel!r}"

    def why_not_compiled(self) -> str | None:
        """Why compiled graphs hold the members instead of the kernel, None if they do not."""
        if self.packings:
            return "compiled graphs cannot check that the weights are packed: they run the members"
        for role, state in zip(self.roles, self.states, strict=False):
            if state is None:
                continue
            if not state.speculation.holds:
                return f"the output of {role} is used elsewhere: compiled graphs run the members"
            if state.form is not None and not state.form.has_weights:
                return f"{role} has no weights, so it may return its input: compiled graphs run it"
        return None

    def count_members_run(self, reason: str | None = None) -> None:
        self.member_calls += 1
        self.reason = reason or self.why_not_running()

    def run_kernel(self, inputs: list[Any]) -> Any:
        """Run the kernel; members called inside it run as themselves."""
        seat: FusedKernel = self.seat  # type: ignore[assignment]
        if torch.compiler.is_dynamo_compiling():
            return seat(*inputs)
        self.kernel_calls += 1
        caller, running = get_ident(), self.running
        running.add(caller)
        try:
            return seat(*inputs)
        except Exception as error:
            add_note(error, self._about_kernel())
            raise
        finally:
            running.discard(caller)

    def _about_kernel(self) -> str:
        members: Sequence[Any] = [] if self.seat is None else self.seat.members()
        states = [None if member is None else state_of(member) for member in members]
        where = " -> ".join(state.path for state in states if state is not None)
        return (
            f"This was in the kernel {self.kernel!r}, in the place of {where}. "
            f"unfuse_modules(model, [...]) with one of these paths has the modules run instead."
        )

    def kernel_inputs(
        self, last: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], str | None]:
        """The chain's inputs, and the reason why the kernel may not have them."""
        now = calling_context()
        inputs, calls, reason = self._inputs_and_calls(last, args, kwargs, now)
        if torch.compiler.is_dynamo_compiling():
            return inputs, reason
        if now[5] is not None:
            state, seat = last.__dict__[KEY], self.seat
            checkpointed = checkpointed_call(last, state.path, state.original, now[5])
            if checkpointed is not None:
                reason = checkpointed.decide(None if seat is None else seat.kernel, reason)
        if reason is None and now[0]:
            for call in calls:
                call.replaced_in_graph = True
        return inputs, reason

    def _inputs_and_calls(
        self, last: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], now: Context
    ) -> tuple[list[Any], list[CapturedCall], str | None]:
        """The chain's inputs, the captured calls, and the reason why a kernel may not run."""
        seat: FusedKernel = self.seat  # type: ignore[assignment]
        if seat._members[-1]() is not last:
            return [], [], "the module is a copy that shares the kernel of its original"
        weights: list[Tensor] = []
        reason = last.__dict__[KEY].form.why_not_plain(last, self.roles[-1], weights)
        if reason is None and not self.collectors:
            reason = why_not_under(now)
        if reason is not None:
            return [], [], reason
        inputs, calls, reason = self._gather(args, kwargs)
        if reason is not None:
            return [], [], reason
        # A captured call has a context that a kernel may run in.
        for call in calls:
            if call.context != now:
                return [], [], "the members are called under different grad modes, hooks or graphs"
            call.check_unmodified()
            weights.extend(call.tensors[: call.weights])
        return inputs, calls, seat.why_not_these(inputs, weights)

    def reconnect(self, last: nn.Module) -> None:
        """Join a copied chain to its copied members."""
        function, is_method, capabilities = self.__dict__.pop("_copied_kernel", (None, None, None))
        self.take_seat(last)
        if isinstance(function, tuple):
            function = _imported(*function)
        if self.seat is not None and function is not None:
            self.seat.forward = MethodType(function, self.seat) if is_method else function
            if capabilities:  # None were asked for if the original had no use for the kernel.
                self.seat.__dict__["_capabilities"] = capabilities

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        from copy import deepcopy

        copied = Chain.__new__(Chain)
        memo[id(self)] = copied
        kept = {name: value for name, value in self.__dict__.items() if name != "seat"}
        copied.__dict__.update(deepcopy(kept, memo), seat=None)
        if self.seat is not None:
            copied.__dict__["_copied_kernel"] = self._kernel_to_copy(self.seat.kernel)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "seat": None}
        if self.seat is not None and self.seat.kernel is not None:
            # By name: where there is no such kernel, the file still opens, and the members run.
            kernel = self.seat.kernel
            name = getattr(kernel, "__module__", None), getattr(kernel, "__qualname__", None)
            state["_copied_kernel"] = self._kernel_to_copy(name)
        return state

    def _kernel_to_copy(self, function: Any) -> tuple[Any, bool, dict[str, bool]]:
        seat: FusedKernel = self.seat  # type: ignore[assignment]
        return function, isinstance(seat.__dict__.get("forward"), MethodType), seat._capabilities

    def _gather(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], list[CapturedCall], str | None]:
        """Follow the wires from the last member back to the captured calls."""
        if self.plan.is_straight and len(args) == 1 and not kwargs:
            captured = self._gather_straight(args[0])
            if captured is not None:
                return [captured[-1].args[0] if captured else args[0]], captured, None
        inputs: list[Any] = [_MISSING] * self.plan.inputs
        calls: list[Any] = [None] * len(self.collectors)
        for index in range(len(calls), -1, -1):
            member = self.plan.members[index]
            if index < len(calls):
                call = calls[index]
                if call is None:
                    return [], [], f"the output of {self.roles[index]!r} was not used"
                args, kwargs = call.args, call.kwargs
            pairs: list[tuple[Any, Any, int]]
            if member.only is not None and len(args) == 1 and not kwargs:
                pairs = [(args[0], member.only, 0)]
            else:
                values = member.bind(args, kwargs)
                if isinstance(values, str):
                    return (
                        [],
                        [],
                        f"{self.roles[index]!r} got {values!r}, which its spec leaves out",
                    )
                pairs = list(zip(values, member.sources, range(len(values))))  # noqa: B905
            for value, source, position in pairs:
                if type(source) is Wire:
                    reason = self._follow(source, value, calls)
                else:
                    reason = self._take(source, value, inputs, member.defaults[position])
                if reason is not None:
                    name = member.parameters[position]
                    return [], [], reason.format(what=f"{name!r} of {self.roles[index]!r}")
        return inputs, calls, None

    def _gather_straight(self, value: Any) -> list[CapturedCall] | None:
        """The captured calls of a chain whose members feed each other, last one first.

        None where anything is not as usual; following the wires one by one tells what it is.
        """
        calls = []
        for producer in reversed(self.collectors):
            if type(value) is not DeferredOutput:
                return None
            call: CapturedCall = value.__dict__["_captured_call"]
            if call.module is not producer or value.__dict__["_output_index"] is not None:
                return None
            if call.done or len(call.args) != 1 or call.kwargs:
                return None
            calls.append(call)
            value = call.args[0]
        return calls

    def _take(
        self, source: External | None, value: Any, inputs: list[Any], default: Any
    ) -> str | None:
        """Note an input from outside, or say why it cannot be one."""
        if source is None:
            return None if value is Parameter.empty else "{what} was passed; its spec leaves it out"
        if value is Parameter.empty:
            value = default
            if value is Parameter.empty:
                return "{what} was not passed"
        known = inputs[source.position]
        if known is not _MISSING and known is not value:
            return "another member got another value for {what}"
        inputs[source.position] = value
        return None

    def _follow(self, wire: Wire, value: Any, calls: list[Any]) -> str | None:
        """Note the captured call at the other end of a wire, or say why it is not there."""
        producer = self.collectors[wire.member]
        role = self.roles[wire.member]
        if type(value) is not DeferredOutput:
            fusion = state_of(producer)
            if not torch.compiler.is_dynamo_compiling() and fusion and fusion.reason:
                return f"{fusion.reason}; it gave no deferred value for {{what}}"
            return f"the output of {role!r} was changed or replaced before it became {{what}}"
        call: CapturedCall = value.__dict__["_captured_call"]
        index = value.__dict__["_output_index"]
        if call.module is not producer or (index or 0) != wire.output:
            return "the output of another module or call came as {what}"
        if call.done:
            return f"the output of {role!r} was used by something else before it became {{what}}"
        if calls[wire.member] is None:
            calls[wire.member] = call
        elif calls[wire.member] is not call:
            return f"the output of another call of {role!r} came as {{what}}"
        return None


def _imported(module: str | None, qualified_name: str | None) -> Any:
    """The function of that name, None if there is none."""
    if not module or not qualified_name:
        return None
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    for name in qualified_name.split("."):
        found = getattr(found, name, None)
    return found
