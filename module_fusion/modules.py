"""The class swap: `RegistryCollector`, `FusedModule` and the boundary around them.

A member keeps its identity, its children and its state; only its class changes, to one
cached subclass per role and original class, as `torch.distributed.fsdp.fully_shard` does.
The subclass overrides `__call__` alone, and `super().__call__` is the original call with
all its hooks. What a module has to know sits under one key of its `__dict__`.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
import weakref
from collections.abc import Mapping, Set
from contextlib import suppress
from threading import get_ident
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .bytecode import layers_of
from .checkpoints import CAPTURED, checkpointed_call
from .context import Context, calling_context, saved_tensors_hooks
from .deferred import (
    CapturedCall,
    DeferredOutput,
    NotCapturableError,
    captured_in,
    computed,
    holds_deferred,
    materialise,
)
from .errors import FusionError, NotFusableError
from .originals import ORIGINAL, SHOWN, original_of, shown_name
from .plain import MemberForm, has_hooks, why_not_under
from .tracing import Speculation

if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object

KEY = "_fusion"
_MADE = "_fusion_as_made"
_NEWOBJ: Any = getattr(copyreg, "__newobj__")  # noqa: B009


class ModuleState:
    """What one fused module knows, under one key of its `__dict__`.

    Attributes:
        original: the class before fusing.
        module: the module itself, weakly.
        path: where the module was when it was fused; for messages.
        name: its role's name in the chain; for messages.
        role: `RegistryCollector`, `FusedModule`, or None for a mere boundary.
        collects_for: number of chains that the module is a collector of.
        boundary: state of the module around the chains this module collects for.
        holders: modules between that one and a member of the chain, weakly; None in a copy that
            had some.
        boundary_of: number of chains whose deferred values must not leave this module.
        read: the `forward` around these chains, as it was read when the first was fused.
        inside: for each thread that is in this module's forward, the calls captured there.
        outputs: number of values that the spec names, 1 for a value that is no tuple.
        plan: how the parameters of `forward` are fed, on a collector.
        returned: number of values that `forward` certainly returns, None where its code does
            not tell.
        is_given_away: whether the code around a collector returns or keeps its output.
        chain: the chain, on the last member.
        armed: number of kernels that wait for this module's output or sit in it.
        form: the form the kernels were chosen for.
        running: threads that are inside the kernel at the moment; chains fused by one call
            share it.
        speculation: whether to capture while torch.compile traces.
        reason: why the last call was not captured.
    """

    role: type[RegistryCollector] | type[FusedModule] | None = None
    collects_for: int = 0
    boundary: ModuleState | None = None
    holders: tuple[weakref.ref[nn.Module], ...] | None = ()
    boundary_of: int = 0
    read: ReadForward | None = None
    outputs: int = 1
    plan: Any = None
    returned: int | None = None
    is_given_away: bool = False
    chain: Any = None
    armed: int = 0
    form: MemberForm | None = None
    running: Set[int] = frozenset()
    speculation: Speculation
    reason: str | None = None
    inside: dict[int, Inside]

    def __init__(self, module: nn.Module, path: str) -> None:
        self.original = original_class(module)
        self.module: weakref.ref[nn.Module] | None = weakref.ref(module)
        self.path = path
        self.name = path.rpartition(".")[2]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy starts from: it is armed again when its chain is complete."""
        fresh: dict[str, Any] = {
            "module": None,
            "holders": None if self.holders is None or self.holders else (),
            "inside": {},
            "armed": 0,
            "form": None,
            "running": frozenset(),
            "reason": None,
        }
        if self.read is not None:
            # Read again when the copy is joined; one that was replaced before stays so.
            fresh["read"] = None if self.read == read_forward(self.original) else REPLACED
        return {**self.__dict__, **fresh}


class ReadForward(NamedTuple):
    """A class's own `forward`, as it is there, and its code."""

    found: Any
    code: Any


REPLACED = ReadForward(None, None)


def read_forward(original: type[nn.Module]) -> ReadForward:
    """The `forward` that a class has now."""
    found = inspect.getattr_static(original, "forward")
    return ReadForward(found, getattr(found, "__code__", None))


class Inside:
    """One forward of a module around chains, in one thread.

    Attributes:
        calls: that were captured in it, weakly.
        hooks: for saved tensors, as they were when it began.
        backward: in which it runs, by number; -1 for none.
        is_as_read: whether it is the `forward` that was there when the members were fused.
    """

    def __init__(self, is_as_read: bool) -> None:
        self.calls: list[weakref.ref[CapturedCall]] = []
        self.is_as_read = is_as_read
        self.hooks = saved_tensors_hooks()
        self.backward = torch._C._current_graph_task_id()


class _Swapped(_Mixin):
    """What every swapped class has: it pickles as its original class and its roles."""

    # An instance that some other code made from the class has no state, and is not fused.
    # No annotation: torch.jit.script reads those of every class.
    _fusion = None  # type: Any

    def __init_subclass__(cls, **options: Any) -> None:
        """Classes that keep a register of their subclasses do not hear of a swapped one."""

    def _get_name(self) -> str:
        return shown_name(type(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        fusion: ModuleState | None = self.__dict__.get(KEY)
        if fusion is None:
            self.__class__ = original_class(self)  # type: ignore[assignment]
        elif fusion.module is None:
            _join(self, fusion)
        else:
            # A shallow copy shares the state of its original, which stays in the chain.
            self.__class__ = fusion.original  # type: ignore[assignment]
            del self.__dict__[KEY]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        function, arguments, *rest = reduced
        state = state_of(self) or ModuleState(self, type(self).__name__)
        if function is not _NEWOBJ or arguments[0] is not type(self):
            raise FusionError(
                f"{state.path!r} cannot be copied or pickled while it is fused, because "
                f"{shown_name(type(self))} has a __reduce__ of its own or changed its class after "
                f"fusing. Copy first, or unfuse first: unfuse_modules(model)."
            )
        roles = (state.role, state.boundary_of > 0)
        return (_new_swapped, (state.original, *roles, *arguments[1:]), *rest)


class RegistryCollector(_Swapped):
    """A member of a chain other than the last: hands its call on to the chain's kernel.

    With a kernel in the chain's seat, a call returns a `DeferredOutput` (or a tuple of them,
    one per name in `ModuleSpec.outputs`) and computes nothing. Otherwise, and whenever the
    module is not plain or its inputs could change unnoticed, it runs as it always did.

    Mixed into a subclass of the member's own class, shown as `RegistryCollector[LlamaRMSNorm]`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = getattr(self, "_fusion", None)
        if not isinstance(self, RegistryCollector):
            return self(*args, **kwargs)  # This method was kept beyond the fusing.
        if state is None or not state.armed:
            if state is not None and not torch.compiler.is_dynamo_compiling():
                _decide_unarmed(self, state, "it waits for no kernel")
            return super().__call__(*args, **kwargs)
        captured = _capture(self, state, args, kwargs)
        if captured is not None:
            return captured
        if holds_deferred(args, kwargs):
            args, kwargs = computed(args), computed(kwargs)
        return super().__call__(*args, **kwargs)


class FusedModule(_Swapped):
    """The last member of a chain: runs the kernel on what the collectors captured.

    Runs as it always did where the chain has no kernel, where a member is not plain at this
    call, or where the values it is given are not the untouched outputs of the collectors.
    `report(model)` tells which, and why.

    Mixed into a subclass of the member's own class, shown as `FusedModule[LlamaMLP]`. With a
    kernel, `fused_kernel` is the module in the kernel's seat: `named_modules()` yields it, as
    `kernels.kernelize` needs, but it is no entry of `_modules`, so that members which go
    through their own children, such as `nn.Sequential`, do not run it.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = getattr(self, "_fusion", None)
        if not isinstance(self, FusedModule):
            return self(*args, **kwargs)  # This method was kept beyond the fusing.
        if state is None:
            return super().__call__(*args, **kwargs)
        chain = state.chain
        if state.running and get_ident() in state.running:
            if not torch.compiler.is_dynamo_compiling():
                chain.reason = "the kernel called the modules itself"
            return super().__call__(*args, **kwargs)
        if not state.armed:
            if not torch.compiler.is_dynamo_compiling():
                chain.count_members_run()
                _decide_unarmed(self, state, chain.reason)
            return super().__call__(*args, **kwargs)
        inputs, reason = chain.kernel_inputs(self, args, kwargs)
        if reason is None:
            return chain.run_kernel(inputs)
        if not torch.compiler.is_dynamo_compiling():
            chain.count_members_run(reason)
        if holds_deferred(args, kwargs):
            args, kwargs = computed(args), computed(kwargs)
        return super().__call__(*args, **kwargs)

    __jit_unused_properties__ = ("fused_kernel",)

    def _seat(self) -> Any:
        return None if self._fusion is None else self._fusion.chain.seat

    @property
    def fused_kernel(self) -> nn.Module:
        """The module in the kernel's seat."""
        seat = self._seat()
        if seat is None:
            raise AttributeError(f"{shown_name(type(self))!r} was fused without a kernel")
        return seat  # type: ignore[no-any-return]

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Any:
        memo = set() if memo is None else memo
        seen = self in memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        seat = self._seat()
        if seat is not None and not (remove_duplicate and seen):
            name = f"{prefix}.fused_kernel" if prefix else "fused_kernel"
            yield from seat.named_modules(memo, name, remove_duplicate)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        seat = self._seat()
        if seat is not None:
            seat.train(mode)
        return self

    def extra_repr(self) -> str:
        own = super().extra_repr()
        seat = self._seat()
        if seat is None:
            return own
        return f"{own}\n(fused_kernel): {seat!r}" if own else f"(fused_kernel): {seat!r}"


class _Boundary(_Swapped):
    """The module around a chain: calls are captured, and their values used, in its `forward`."""


def state_of(module: nn.Module) -> ModuleState | None:
    """The fusion state of a module, None for one that has none."""
    state = module.__dict__.get(KEY)
    if type(state) is not ModuleState:
        return None
    if state.module is None:
        _join(module, state)  # A class with a `__deepcopy__` of its own set no state.
    return state


def _join(module: nn.Module, state: ModuleState) -> None:
    """Make a copied state that of the copied module."""
    state.module = weakref.ref(module)
    if state.boundary_of and state.read is None:
        state.read = read_forward(state.original)
    if state.chain is not None:
        state.chain.reconnect(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before it was fused."""
    return original_of(type(module))  # type: ignore[no-any-return]


def call_as_itself(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a member as if it had never been fused."""
    if isinstance(module, RegistryCollector):
        return super(RegistryCollector, module).__call__(*args, **kwargs)
    if isinstance(module, FusedModule):
        return super(FusedModule, module).__call__(*args, **kwargs)
    return module(*args, **kwargs)


def set_class(module: nn.Module, state: ModuleState) -> None:
    """Give the module the class its state asks for: the original one when it has no role."""
    if state.role is None and not state.boundary_of:
        _warn_of_changes(state, type(module))
        object.__setattr__(module, "__class__", state.original)
        module.__dict__.pop(KEY, None)
        return
    try:
        # Past `Module.__setattr__`, which looks for parameters and modules in every value.
        object.__setattr__(module, "__class__", expected_class(state))
    except Exception as error:
        raise NotFusableError(
            f"{state.path!r} cannot be fused: no subclass of {state.original.__name__} can take "
            f"its place ({error})."
        ) from error
    module.__dict__.setdefault(KEY, state)


def expected_class(state: ModuleState) -> type[nn.Module]:
    """The class a module with this state has, unless someone changed it since."""
    return _swapped_class(state.original, state.role, state.boundary_of > 0)


def has_expected_class(module: nn.Module, state: ModuleState) -> bool:
    """Whether the module has the class its state asks for; someone may have set things on it."""
    made: _Made | None = type(module).__dict__.get(_MADE)
    if made is None:
        return type(module) is expected_class(state)
    return made.key == (state.original, state.role, state.boundary_of > 0)


class _Made(NamedTuple):
    """What a swapped class is for, and what was in it when it was made."""

    key: tuple[type[nn.Module], type | None, bool]
    contents: dict[str, Any]
    forward: Any


def changed_since_made(cls: type) -> list[str]:
    """Names that someone has set on a swapped class, or taken off it, since it was made."""
    made: _Made | None = cls.__dict__.get(_MADE)
    if made is None:
        return []
    names = sorted({*made.contents, *cls.__dict__} - {_MADE})
    return [
        name
        for name in names
        if (name == "__call__" or not name.startswith("__"))
        and _looked_up(name, cls.__dict__, cls) is not _looked_up(name, made.contents, cls)
    ]


def _looked_up(name: str, contents: Mapping[str, Any], cls: type) -> Any:
    """What a class with these contents has by that name, of its own or inherited."""
    places = [contents, *(base.__dict__ for base in cls.__mro__[1:])]
    return next((place[name] for place in places if name in place), None)


def _warn_of_changes(state: ModuleState, cls: type) -> None:
    names = changed_since_made(cls)
    if names:
        original = f"{state.original.__module__}.{state.original.__qualname__}"
        warnings.warn(
            f"{' and '.join(names)} was set on type({state.path!r}) while it was fused. That class "
            f"stands for {original} in fused models alone, so the change ends with the fusing. Set "
            f"it on {original} instead.",
            stacklevel=2,
        )


_CLASSES: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


def _swapped_class(
    original: type[nn.Module], role: type | None, is_boundary: bool
) -> type[nn.Module]:
    key = (original, role, is_boundary)
    cls = _CLASSES.get(key)
    found = inspect.getattr_static(original, "forward")
    if cls is None or changed_since_made(cls) or cls.__dict__[_MADE].forward is not found:
        namespace: dict[str, Any] = {
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            ORIGINAL: original,
            SHOWN: f"{role.__name__}[{original.__name__}]" if role else original.__name__,
        }
        if is_boundary:
            namespace["forward"] = _guarded_forward(original)
        mixins = tuple(mixin for mixin in (role, _Boundary if is_boundary else None) if mixin)
        metaclass: Any = type(original)
        # What goes by the name or the text of a class finds it as before: registries, wrapping
        # policies of FSDP and accelerate, the `architectures` in a config.
        cls = metaclass(original.__name__, (*mixins, original), namespace)
        assert cls is not None
        cls.__qualname__ = original.__qualname__
        _wrap_as_subclasses_are(cls, original)
        type.__setattr__(cls, _MADE, _Made(key, dict(cls.__dict__), found))
        _CLASSES[key] = cls
    return cls


def _wrap_as_subclasses_are(cls: Any, original: type[nn.Module]) -> None:
    """Where a base class wraps the `forward` of every subclass, have it wrap this one's.

    The layers of transformers are checkpointed by such a wrapper, and only by the outermost.
    """
    wrapper = next(iter(layers_of(original.forward)), None)
    for base in original.__mro__:
        hook = getattr(base.__dict__.get("__init_subclass__"), "__func__", None)
        if wrapper is not None and hook is not None and wrapper.__code__ in hook.__code__.co_consts:
            hook(cls)
            return


def _guarded_forward(original: type[nn.Module]) -> Any:
    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The `forward` of the class, bound in the way of what it is: it may be no function."""
        found = inspect.getattr_static(original, "forward")
        bind = getattr(found, "__get__", None)
        return (found if bind is None else bind(self, type(self)))(*args, **kwargs)

    known: Any = original.forward
    is_function = isinstance(inspect.getattr_static(original, "forward"), FunctionType)

    @functools.wraps(known if is_function else bound)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state: ModuleState | None = getattr(self, "_fusion", None)
        own: Any = known
        if not is_function or original.forward is not known:  # Anyone may have replaced it.
            # torch.compile does not trace how that binds itself.
            traced = is_function and torch.compiler.is_dynamo_compiling()
            own = original.forward if traced else bound
        if torch.compiler.is_dynamo_compiling() or state is None or not state.boundary_of:
            # Without chains inside, this method was kept beyond their fusing.
            output = own(self, *args, **kwargs)
            return output if type(output) is Tensor else materialise(output)
        if state.module is None:
            _join(self, state)
        inside, caller = state.inside, get_ident()
        outer = inside.get(caller)
        here = inside[caller] = Inside(_is_as_read(state, own))
        try:
            output = own(self, *args, **kwargs)
        except BaseException:
            if here.hooks is None:  # A checkpoint stops in this way when it has enough.
                with suppress(Exception):
                    _settle_kept(self, here)
            raise
        finally:
            if outer is None:
                del inside[caller]
            else:
                inside[caller] = outer
        if type(output) is not Tensor:
            if here.calls:
                for call in captured_in(output):
                    call.give_away()
            output = materialise(output)
        _settle_kept(self, here)
        return output

    return forward


def _is_as_read(state: ModuleState, own: Any) -> bool:
    """Whether the class around the chains has the `forward`, and the code, that was read."""
    read = state.read
    if read is not None and own is read.found:
        return own.__code__ is read.code
    return read == read_forward(state.original)


def _settle_kept(module: nn.Module, inside: Inside) -> None:
    """Compute what is still held somewhere, such as on an object: nobody may find it uncomputed."""
    kept = [call for reference in inside.calls if (call := reference()) is not None]
    for call in kept:
        call.settle()
    if kept:
        _replace_kept(module)


def _replace_kept(module: nn.Module) -> None:
    """Put the real values where a module has kept captured ones, as buffers or attributes."""
    for inner in module.modules():
        for name, value in list(inner.__dict__.items()):
            if name == KEY:
                continue
            try:
                calls = list(captured_in(value))
            except Exception:
                continue  # It refuses to be looked into.
            for call in calls:
                call.give_away()
            try:
                real = materialise(value)
            except Exception:
                continue  # It is an error where it is used.
            if real is not value:
                inner.__dict__[name] = real


def _new_swapped(
    original: type[nn.Module], role: type | None, is_boundary: bool, *arguments: Any
) -> nn.Module:
    cls = _swapped_class(original, role, is_boundary)
    return cls.__new__(cls, *arguments)


def _capture(
    module: nn.Module, state: ModuleState, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The call's deferred output, or None where the module has to run now."""
    if torch.compiler.is_dynamo_compiling():
        if not state.speculation.holds:
            return None
        call, _ = _captured_call(module, state, args, kwargs, calling_context())
        return _deferred(state, call)
    caller = get_ident()
    if caller in state.running:
        return None
    context = calling_context()
    hooks = context[5]
    checkpointed = None
    if hooks is not None:
        checkpointed = checkpointed_call(module, state.path, state.original, hooks)
    inside = state.boundary.inside.get(caller)  # type: ignore[union-attr]
    # What was learned since does not count where a checkpoint runs the call again.
    is_repeated = checkpointed is not None and checkpointed.is_repeated
    call = None
    reason = _why_not_there(state, inside, hooks)
    if reason is None and state.speculation.used_in_compiled_code and not is_repeated:
        reason = f"the output of {state.name} goes into compiled code"
    if reason is None:
        call, reason = _captured_call(module, state, args, kwargs, context)
    is_given_away = state.speculation.needs_gradient or state.is_given_away
    if call is not None and call.context[0] and is_given_away and not is_repeated:
        # A kernel in its place would leave it without a way to the output in the graph.
        reason = f"gradients are recorded, and the output of {state.name} is given to others"
    if checkpointed is not None:
        reason = checkpointed.decide(CAPTURED, reason)
    state.reason = reason
    if call is None or reason is not None:
        return None
    inside.calls.append(weakref.ref(call))  # type: ignore[union-attr]
    return _deferred(state, call)


def _decide_unarmed(module: nn.Module, state: ModuleState, reason: str) -> None:
    """Tell a checkpoint that the member runs; raise where a kernel ran when it was run first."""
    hooks = saved_tensors_hooks()
    if hooks is None:
        return
    checkpointed = checkpointed_call(module, state.path, state.original, hooks)
    if checkpointed is not None:
        checkpointed.decide(None, reason)


def _deferred(state: ModuleState, call: CapturedCall | None) -> Any:
    if call is None or state.outputs == 1:
        return None if call is None else DeferredOutput(call)
    return tuple([DeferredOutput(call, index) for index in range(state.outputs)])


def _why_not_there(state: ModuleState, inside: Inside | None, hooks: Any) -> str | None:
    """Why nothing is captured at this place, None if it is.

    A checkpoint runs a part of the forward again in the backward, and what is captured has to be
    the same both times. So either all of the forward is in it, or nothing in it is captured.
    """
    if inside is None:
        return f"{state.name} is called outside the forward of the module around it"
    if not inside.is_as_read:
        return f"the class around {state.name} has another forward now: unfuse, and fuse again"
    if inside.hooks != hooks:
        return f"{state.name} is in a checkpoint, or under other hooks for saved tensors, alone"
    if inside.backward != torch._C._current_graph_task_id():
        return f"{state.name} is called in a backward"
    return None


def _captured_call(
    module: nn.Module,
    state: ModuleState,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Context,
) -> tuple[CapturedCall | None, str | None]:
    """The call, or the reason why it cannot wait."""
    form: MemberForm = state.form  # type: ignore[assignment]
    weights: list[Tensor] = []
    reason = why_not_under(context) or form.why_not_plain(module, state.name, weights)
    if reason is not None:
        return None, reason
    if state.holders is None:
        return None, f"{state.name} was copied; fuse the copy again to have its calls captured"
    for reference in state.holders:
        holder = reference()
        if holder is not None and has_hooks(holder):
            return None, f"a module around {state.name} or another member has a hook"
    if (len(args) != 1 or kwargs) and not state.plan.takes(args, kwargs):
        return None, f"{state.name} is called with other arguments than its forward names"
    if state.outputs > 1:
        reason = _why_not_unpacked(state)
        if reason is not None:
            return None, f"{state.name} {reason}"
    try:
        return CapturedCall(call_as_itself, module, state, args, kwargs, weights, context), None
    except NotCapturableError as error:
        return None, f"{state.name} {error}"


def _why_not_unpacked(state: ModuleState) -> str | None:
    """Why it is not certain how many values the call returns."""
    if state.returned is None:
        return "may return None, or another number of values than its spec names outputs"
    if state.returned != state.outputs:
        return f"returns {state.returned} values, its spec names {state.outputs} outputs"
    return None
