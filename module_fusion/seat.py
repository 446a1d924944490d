"""The kernel's seat.

`FusedKernel` is what the `kernels` library finds and whose `forward` it replaces. It holds
no parameters; a kernel reaches the members by role, `self.norm`, `self.mlp`.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from kernels import use_kernel_forward_from_hub
from torch import Tensor, nn

from .bytecode import function_of, layers_of
from .context import why_fake
from .deferred import DeferredOutput
from .errors import SpecMismatchError
from .findings import is_code_read_once
from .modules import ModuleState, call_as_itself, original_class, state_of
from .packing import PackedWeights, Packing, packed_weights, why_not_packed
from .plain import MemberForm
from .returns import values_returned
from .spec import External, Plan
from .uses import gives_away

# With this begins the reason of a kernel without a backward.
NEEDS_GRADIENTS = "gradients are needed"
# What a kernel's `prepare` runs in: a dry run has a look at the members before and after.
around_prepare: ContextVar[Callable[[Sequence[nn.Module]], AbstractContextManager[None]]] = (
    ContextVar("around_prepare", default=lambda members: nullcontext())
)
_OF_THE_KERNEL = {
    "forward",
    "prepared",
    "_armed",
    "_capabilities",
    "_dtypes",
    "_device",
    "_has_buffers",
    "_why_unprepared",
}


class FusedKernel(nn.Module):
    """The module in the kernel's seat, without parameters.

    Its own `forward` is the chain: the members one after the other. `kernels.kernelize`
    replaces it on the instance; from then on the chain's calls go to the kernel. Members are
    attributes under their roles. Calling a member inside a kernel runs the member itself.

    A kernel's `forward` may have an attribute `prepare`, a function that is called with the
    members, by their roles, when the kernel takes the seat. What it returns is `self.prepared`
    from then on; a `ValueError` it raises is the reason why the kernel cannot have these members.
    If it keeps what it found, it has a `cache_clear`, as `functools.cache` gives; that is called
    when the chains of one call are fused.

    Where its family declares a `WeightLayout`, a kernel reads the packed tensor as
    `self.packed[name]`.
    """

    prepared: Any = None
    _roles: tuple[str, ...] = ()
    _members: tuple[weakref.ref[nn.Module], ...]
    _plan: Plan
    _capabilities: dict[str, bool]
    _dtypes: set[torch.dtype]
    _device: torch.device | None
    _has_buffers: bool
    _why_unprepared: str | None
    _packings: tuple[Packing, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            self._check_parameters(value)
        super().__setattr__(name, value)
        if name == "forward":
            self._arm()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "forward":
            self._arm()

    def members(self) -> list[nn.Module]:
        """The members of the chain, in order."""
        return [member() for member in self._members]  # type: ignore[misc]

    @property
    def packed(self) -> PackedWeights:
        """The packed weights by the names of their layouts, as they are now; no gradients."""
        return packed_weights(self._packings, self.members())

    @property
    def kernel(self) -> Any:
        """The function in the seat, None while it is the chain itself."""
        forward = self.__dict__.get("forward")
        function = getattr(forward, "__func__", forward)
        return None if function is type(self).forward else function

    def _check_parameters(self, forward: Any) -> None:
        """Refuse a kernel for other inputs.

        `kernels` compares the first class only that it serves with a layer, by number and kind.
        """
        function = getattr(forward, "__func__", None)
        found = _parameters(forward) if function is None else _parameters(function)[1:]
        wanted = _parameters(type(self).forward)[1:]
        if [p.kind for p in found] != [p.kind for p in wanted]:
            taken, given = (", ".join(p.name for p in some) for some in (found, wanted))
            raise TypeError(f"its forward takes ({taken}), the chain's inputs are ({given})")
        names = _named_by(getattr(forward, "prepare", None))
        if names is not None and not names.fit(self._roles):
            roles = dict.fromkeys(names.required or names.all, "path.of.its.module")
            raise TypeError(
                f"its prepare takes ({', '.join(names.all)}), the roles are "
                f"({', '.join(self._roles)}). Give the modules the roles it knows: "
                f"fuse_modules(model, {roles}, ...)"
            )

    def _arm(self) -> None:
        """Tell the members whether a kernel waits for them, and record their form for it."""
        states = [state_of(member) for member in self.members()]
        armed = None not in states and self.kernel is not None and not self.__dict__["_refusal"]
        forms = [MemberForm(member) for member in self.members()] if armed else []
        self.__dict__["_why_unprepared"] = self._prepare(forms) if armed else None
        armed = armed and self._why_unprepared is None
        for index, state in enumerate(states):
            if state is None:
                continue
            state.running = self.__dict__["_running"]
            state.armed += int(armed) - int(self.__dict__["_armed"])
            if armed:
                state.form = forms[index]
                if index < len(states) - 1:
                    state.returned = _values_returned(state.original)
                    state.is_given_away = _is_given_away(state)
                    state.speculation.used_in_compiled_code = False
                    state.speculation.needs_gradient = False
        self.__dict__["_armed"] = armed
        chain = None if states[-1] is None else states[-1].chain
        if chain is not None:
            chain.reason = None  # It was about what sat here before.
        if armed:
            self.__dict__.update(
                _capabilities=_capabilities(self.kernel),
                _dtypes=set().union(*(form.dtypes for form in forms)),
                _device=_only(set().union(*(form.devices for form in forms))),
                _has_buffers=any(form.has_buffers for form in forms),
            )

    def restorer(self) -> Callable[[], None]:
        """How to have back what sits here now, as it is now: nothing is prepared again."""
        before = dict(self.__dict__)
        members = self.members()
        states = list(map(state_of, members))
        forms = [None if state is None else state.form for state in states]
        learned = [
            (
                state.speculation,
                state.speculation.used_in_compiled_code,
                state.speculation.needs_gradient,
            )
            for state in states[:-1]
            if state is not None
        ]

        def restore() -> None:
            if list(map(state_of, members)) != states:
                return  # The chain is gone.
            now = dict(self.__dict__)
            self.__dict__.clear()
            for name in (*before, *now):
                values = before if name in _OF_THE_KERNEL else now
                if name in values:
                    self.__dict__[name] = values[name]
            for state, form in zip(states, forms, strict=True):
                if state is not None:
                    state.armed += int(before["_armed"]) - int(now["_armed"])
                    state.form = form
            for speculation, used_in_compiled_code, needs_gradient in learned:
                speculation.used_in_compiled_code |= used_in_compiled_code
                speculation.needs_gradient |= needs_gradient

        return restore

    def _prepare(self, forms: Sequence[MemberForm]) -> str | None:
        """Let the kernel look at its members; the reason why it cannot have them, or None.

        It may run them as a trial, so it sees none that draws random numbers or writes somewhere.
        """
        self.__dict__.pop("prepared", None)
        if getattr(self.kernel, "prepare", None) is None:
            return None
        if reason := why_fake("a kernel that is prepared"):
            return f"{reason}, and fuse again"
        reason = next((why for form in forms if (why := form.why_never_plain())), None)
        if reason is not None:
            return reason
        try:
            with around_prepare.get()(self.members()):
                self.__dict__["prepared"] = prepared_by(self.kernel, self._roles, self.members())
        except ValueError as error:
            return f"the kernel refuses: {error}"
        return None

    def why_not_these(self, inputs: list[Any], weights: list[Tensor]) -> str | None:
        """The reason why the kernel may not have these inputs, or None.

        The weights are those of plain members: in the dtypes and on the devices that the
        parameters had when the kernel took the seat.
        """
        can = self._capabilities
        if torch.compiler.is_dynamo_compiling() and not can["can_torch_compile"]:
            return "the kernel does not support torch.compile"
        if self._packings and (reason := why_not_packed(self._packings, self.members())):
            return reason
        tensors: list[Tensor] = []
        for value in inputs:
            reason = _why_not_input(value, tensors)
            if reason is not None:
                return reason
        dtypes, device = self._dtypes, self._device
        for tensor in tensors:
            dtype = tensor.dtype
            if dtype not in dtypes and dtypes and dtype.is_floating_point:
                return f"an input is in {dtype}, the weights are not"
        apart = any(device is None or tensor.device != device for tensor in tensors)
        if apart or self._has_buffers:
            reason = _why_not_together([*tensors, *weights])
            if reason is not None:
                return reason
        needs_backward = not can["has_backward"] and torch.is_grad_enabled()
        if needs_backward and any(tensor.requires_grad for tensor in (*tensors, *weights)):
            what = "has no backward" if can["is_known"] else "is not known to have a backward"
            return f"{NEEDS_GRADIENTS} and the kernel {what}"
        return None

    def extra_repr(self) -> str:
        return "" if self.__dict__["_armed"] else "no kernel"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a kernel's seat is copied with its FusedModule")


def _values_returned(cls: Any) -> int | None:
    layers = layers_of(cls.forward)
    return values_returned(layers[0]) if len(layers) == 1 else None


def _is_given_away(state: ModuleState) -> bool:
    """Whether the module around a collector returns or keeps its output."""
    parent, member = (_module_of(known) for known in (state.boundary, state))
    if parent is None:  # In a copy, it may not be made yet.
        return state.is_given_away
    forward = function_of(original_class(parent).forward)
    if forward is None:
        return False
    names = [name for name, child in parent._modules.items() if child is member]
    return any(gives_away(forward, name) for name in names)


def _module_of(state: ModuleState | None) -> nn.Module | None:
    return None if state is None or state.module is None else state.module()


@functools.lru_cache(maxsize=1024)
def _parameters(function: Any) -> tuple[Parameter, ...]:
    return tuple(inspect.signature(function).parameters.values())


def _only(devices: set[torch.device]) -> torch.device | None:
    """The one device, None where there are several or none."""
    return next(iter(devices)) if len(devices) == 1 else None


def _why_not_together(tensors: list[Tensor]) -> str | None:
    devices = sorted({str(tensor.device) for tensor in tensors})
    return f"inputs and weights are on {' and '.join(devices)}" if len(devices) > 1 else None


def _why_not_input(value: Any, tensors: list[Tensor]) -> str | None:
    """Why a kernel may not have an input, or None. Adds its tensors to `tensors`."""
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        tensors.append(value)
    elif kind is DeferredOutput:
        return "an input is itself the deferred output of a fused module"
    elif kind in (tuple, list, dict):
        for item in value.values() if kind is dict else value:
            reason = _why_not_input(item, tensors)
            if reason is not None:
                return reason
    elif isinstance(value, Tensor):
        return f"an input is a {kind.__name__}"
    return None


class _Names(NamedTuple):
    """What a kernel's `prepare` calls the members."""

    all: tuple[str, ...]
    required: tuple[str, ...]
    any_other: bool

    def fit(self, roles: Sequence[str]) -> bool:
        known = self.any_other or set(roles) <= set(self.all)
        return known and set(self.required) <= set(roles)


def _named_by(prepare: Any) -> _Names | None:
    """The names by which it is called, None where it takes the members by position."""
    try:
        signature = inspect.signature(prepare, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    found = list(signature.parameters.values())
    if any(p.kind in (Parameter.VAR_POSITIONAL, Parameter.POSITIONAL_ONLY) for p in found):
        return None
    named = [p for p in found if p.kind is not Parameter.VAR_KEYWORD]
    required = tuple(p.name for p in named if p.default is Parameter.empty)
    return _Names(tuple(p.name for p in named), required, len(named) < len(found))


def prepared_by(kernel: Any, roles: Sequence[str], members: Sequence[nn.Module]) -> Any:
    """What a kernel makes of the members; kept for the next ones only while code is read once."""
    prepare = getattr(kernel, "prepare", None)
    if prepare is None:
        return None
    try:
        if _named_by(prepare) is None:
            return prepare(*members)
        return prepare(**dict(zip(roles, members, strict=True)))
    finally:
        forget = getattr(prepare, "cache_clear", None)
        if forget is not None and not is_code_read_once():
            forget()


_ANY_SEAT = FusedKernel()


def run_members(
    plan: Plan,
    members: Sequence[nn.Module],
    call: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Any],
    inputs: Sequence[Any],
) -> Any:
    """Every member, one after the other, on the chain's inputs; `call` calls one."""
    outputs: list[Any] = []
    for member, wiring in zip(members, plan.members, strict=True):
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        for position, (name, source) in enumerate(
            zip(wiring.parameters, wiring.sources, strict=True)
        ):
            if source is None:
                continue
            if isinstance(source, External):
                value = inputs[source.position]
            else:
                output = outputs[source.member]
                value = output if source.arity == 1 else output[source.output]
            if position < wiring.positional and len(args) == position:
                args += (value,)
            else:
                kwargs[name] = value
        outputs.append(call(member, args, kwargs))
    return outputs[-1]


_SEATS: weakref.WeakValueDictionary[Any, type[FusedKernel]] = weakref.WeakValueDictionary()


def seat_class(kernel: str, roles: tuple[str, ...], plan: Plan) -> type[FusedKernel]:
    """One class per kernel name, roles and signature, so that blocks share it."""
    key = (
        kernel,
        roles,
        tuple((p.name, repr(p.default)) for p in plan.signature.parameters.values()),
    )
    cls = _SEATS.get(key)
    if cls is None:
        count = len(plan.signature.parameters)

        def forward(self: FusedKernel, *args: Any, **kwargs: Any) -> Any:
            """The chain itself: every member, one after the other, as itself."""
            inputs = list(args)
            if kwargs or len(args) != count:
                # torch.compile does not trace this where the model has written to a dict.
                bound = self._plan.signature.bind(*args, **kwargs)
                bound.apply_defaults()
                inputs = list(bound.arguments.values())
            return run_members(self._plan, self.members(), call_as_itself, inputs)

        first = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = plan.signature.replace(  # type: ignore[attr-defined]
            parameters=[first, *plan.signature.parameters.values()]
        )
        namespace: dict[str, Any] = {"__module__": __name__, "forward": forward, "_roles": roles}
        for index, role in enumerate(roles):
            namespace[role] = _role(index)
        cls = use_kernel_forward_from_hub(kernel)(type(kernel, (FusedKernel,), namespace))
        cls = _SEATS.setdefault(key, cls)
    return cls


def _role(index: int) -> property:
    return property(lambda self: self._members[index]())


def check_roles(roles: tuple[str, ...]) -> None:
    """Refuse names by which a kernel could not reach the members."""
    for role in roles:
        usable = role.isidentifier() and not keyword.iskeyword(role)
        if not usable or role.startswith("_") or hasattr(_ANY_SEAT, role) or roles.count(role) > 1:
            raise SpecMismatchError(
                f"{role!r} cannot be the name by which a kernel reaches a member: it must be an "
                f"identifier, used once, and no attribute of nn.Module. Give the roles yourself: "
                f"fuse_modules(model, {{'norm': 'path.of.first', 'mlp': 'path.of.second'}}, ...)."
            )


def _all_declare(layers: list[type[nn.Module]], name: str, default: bool) -> bool:
    return bool(layers) and all(getattr(layer, name, default) for layer in layers)


def _capabilities(function: Any) -> dict[str, bool]:
    """What the layer class declares that `kernels.kernelize` took the function from.

    The seat gets the function alone. Where several classes share it, all have to agree; a
    function that none has is not known to support anything.
    """
    from kernels.layer.layer import _CACHED_LAYER

    layers = [c for c in _CACHED_LAYER.values() if getattr(c, "forward", None) is function]
    return {
        "is_known": bool(layers),
        "has_backward": _all_declare(layers, "has_backward", True),
        "can_torch_compile": _all_declare(layers, "can_torch_compile", False),
    }
