"""Whether a member is plain at this very call, so that a kernel may read its weights.

A kernel that reads `member.weight` bypasses the member's own call, and with it every hook,
adapter, parametrization, quantized or sharded weight that someone put there, before fusing
or after. So the form of a member is recorded when the kernel takes its seat and compared
at each call: the same classes with the same `forward`, no hook, no instance-level
`forward`, the same children, parameters of exactly the type `Parameter` with the same
device and dtype, and nothing that draws random numbers or updates a buffer at this call.
"""

from __future__ import annotations

import inspect
import operator
import weakref
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .context import Context
from .effects import (
    Code,
    Effect,
    Read,
    code_of,
    effect_of,
    is_other,
    reads_of,
    settings_of,
)
from .originals import original_of
from .reach import Reach
from .replaced import WatchedCode

# What `calling_context` gives outside of every mode, transform and trace.
_USUAL = (True, False, False, False, True, None, 0, 0, False, False, False)
_USUAL_WITHOUT_GRAD = (False, *_USUAL[1:])


class _Part(NamedTuple):
    """One module of a member: the member itself or one below it.

    `absent` are names by which its own `__dict__` would hide a method, a parameter or a child.
    """

    name: str
    parent: int
    key: str
    cls: type
    effect: Effect | None
    settings: tuple[tuple[str, Any], ...]
    reads: tuple[Read, ...]
    absent: tuple[str, ...]
    children: int
    parameters: tuple[tuple[str, torch.dtype | None, torch.device | None], ...]


# The form of the member of each class that was looked at last.
_LAST: weakref.WeakValueDictionary[type, MemberForm] = weakref.WeakValueDictionary()


def _are_alike(parts: list[_Part], others: list[_Part]) -> bool:
    """Whether two members are in the same form, down to the types of what they are set to."""
    if len(parts) != len(others):
        return False
    for part, other in zip(parts, others, strict=True):
        # Values may be arrays, which have an equality of their own.
        if part._replace(settings=(), reads=()) != other._replace(settings=(), reads=()):
            return False
        if len(part.settings) != len(other.settings) or part.reads or other.reads:
            return False
        for (name, value), (other_name, other_value) in zip(
            part.settings, other.settings, strict=True
        ):
            if name != other_name or is_other(value, other_value):
                return False
    return True


class MemberForm:
    """The form of a member and of every module below it.

    Args:
        member: the member as it is now.
    """

    def __init__(self, member: nn.Module) -> None:
        self.parts: list[_Part] = []
        self.home = original_of(type(member)).__module__
        self.foreign: str | None = None
        self._methods: dict[tuple[Any, str, Any], None] = {}
        self._functions: dict[Any, tuple[FunctionType, CodeType, Any, Any]] = {}
        self._add(Reach(member, original_of(type(member))), "", -1, "")
        self.code = WatchedCode(self._methods, self._functions.values())
        parameters = [p for part in self.parts for p in part.parameters]
        self.dtypes = {d for _, d, _ in parameters if d is not None and d.is_floating_point}
        self.devices = {device for _, _, device in parameters if device is not None}
        self.has_buffers = any(True for _ in member.buffers())
        self.has_weights = self.has_buffers or bool(self.devices)
        self._share()

    def _share(self) -> None:
        """Have what equal members have in common once: a call then finds it in the cache."""
        like = _LAST.get(self.parts[0].cls)
        if like is not None and like.code.is_like(self.code) and _are_alike(like.parts, self.parts):
            self.parts, self.code = like.parts, like.code
        _LAST[self.parts[0].cls] = self

    def _add(self, reach: Reach | None, name: str, parent: int, key: str) -> None:
        index = len(self.parts)
        if reach is None:
            self.parts.append(_Part(name, parent, key, type(None), None, (), (), (), 0, ()))
            return
        module = reach.places[()].module
        parameters = tuple(
            (key, None, None) if p is None else (key, p.dtype, p.device)
            for key, p in module._parameters.items()
        )
        cls = type(module)
        effect = effect_of(reach)
        if self.foreign is None:
            self.foreign = _why_foreign(module, name, self.home)
        settings, reads = settings_of(reach), reads_of(reach)
        tensors = {*module._parameters, *module._buffers, *module._modules}
        names = self._note_code(code_of(reach), cls, tensors)
        # A module that was compiled before is one that the kernel was compared with.
        hidden = (tensors | {"_compiled_call_impl"}) - {*module.__dict__}
        absent = tuple(sorted(names | hidden))
        children = len(module._modules)
        self.parts.append(
            _Part(name, parent, key, cls, effect, settings, reads, absent, children, parameters)
        )
        for child_key in module._modules:
            self._add(reach.below.get(child_key), f"{name}.{child_key}", index, child_key)

    def _note_code(self, code: Code, cls: Any, tensors: set[str]) -> set[str]:
        """Add it to that of the member; names of the methods that an instance may replace."""
        self._methods.update(dict.fromkeys(code.methods))
        self._functions.update({entry[0]: entry for entry in code.functions})
        names = {name for owner, name, _ in code.methods if issubclass(cls, owner)} - {"__call__"}
        if original_of(cls) is not cls:  # Anyone may set something on `type(module)` too.
            self._methods.update(dict.fromkeys((cls, name, getattr(cls, name)) for name in names))
        # A property on the class would come before a parameter.
        self._methods.update(dict.fromkeys((cls, n, getattr(cls, n, None)) for n in tensors))
        return names

    def why_never_plain(self) -> str | None:
        """The reason why the member is plain at no call as long as it has this form, or None."""
        name: str = original_of(self.parts[0].cls).__name__
        if self.foreign is not None:
            return name + self.foreign
        for part in self.parts:
            if part.effect is not None and part.effect.is_certain:
                return f"{name}{part.name} {part.effect.what}"
        return None

    def why_not_plain(self, member: nn.Module, role: str, weights: list[Tensor]) -> str | None:
        """The reason why the member is not plain, or None.

        Adds the parameters and buffers of the member to `weights`.
        """
        compiling = torch.compiler.is_dynamo_compiling()
        if not compiling:
            before = len(weights)
            if self._is_plain(member, weights):
                return None
            del weights[before:]
        if self.foreign is not None:
            return role + self.foreign
        if reason := self.code.why_not_same():
            return f"{role} {reason}"
        modules: list[Any] = []
        for part in self.parts:
            name, parent, key, cls, effect, settings, reads, absent, children, parameters = part
            module = modules[parent].__dict__["_modules"].get(key) if modules else member
            modules.append(module)
            if type(module) is not cls and original_of(type(module)) is not original_of(cls):
                return f"{role}{name} is a {_names(type(module), cls)}"
            if module is None:
                continue
            own = module.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                return f"{role}{name} has a hook"
            for attribute in absent:
                if attribute in own:
                    return f"{role}{name} has an instance-level {attribute}"
                if compiling:
                    getattr(module, attribute, None)  # So that the graph is made again with one.
            if effect is not None and effect.happens(module):
                return f"{role}{name} {effect.what}"
            for setting, value in settings:
                if is_other(own.get(setting), value):
                    return (
                        f"{role}{name} has another {setting} than when the kernel was chosen; fuse "
                        f"again"
                    )
            for read in reads:
                if read.differs(module):
                    return (
                        f"{role}{name} reads another {read.what} than when the kernel was chosen; "
                        f"fuse again"
                    )
            own_parameters = own["_parameters"]
            if len(own["_modules"]) != children or len(own_parameters) != len(parameters):
                return f"{role}{name} has other children or parameters than before"
            for parameter_key, dtype, device in parameters:
                parameter = own_parameters.get(parameter_key)
                if parameter is None or dtype is None:
                    if parameter is not None or dtype is not None:
                        return f"{role}{name} has another {parameter_key} than before"
                    continue
                if type(parameter) is not nn.Parameter:
                    kind = type(parameter).__name__
                    return f"{role}{name} has a {parameter_key} of type {kind}"
                if parameter.dtype is not dtype or parameter.device != device:
                    return (
                        f"{role}{name} has a {parameter_key} in {parameter.dtype} on "
                        f"{parameter.device}; the kernel was chosen for {dtype} on {device}, call "
                        f"kernelize again"
                    )
                weights.append(parameter)
            if own["_buffers"]:
                weights.extend(b for b in own["_buffers"].values() if b is not None)
        return None

    def _is_plain(self, member: nn.Module, weights: list[Tensor]) -> bool:
        """What `why_not_plain` finds out, with less Python: it is asked at every eager call."""
        if self.foreign is not None or not self.code.is_same():
            return False
        modules: list[Any] = []
        for part in self.parts:
            _, parent, key, cls, effect, settings, reads, absent, children, parameters = part
            module: Any = modules[parent].__dict__["_modules"].get(key) if modules else member
            modules.append(module)
            kind: Any = type(module)
            if kind is not cls:
                return False
            if module is None:
                continue
            own = module.__dict__
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or not own.keys().isdisjoint(absent)
                or (effect is not None and effect.happens(module))
            ):
                return False
            for setting, value in settings:
                now = own.get(setting)
                if now is not value and is_other(now, value):
                    return False
            for read in reads:
                if read.differs(module):
                    return False
            own_parameters = own["_parameters"]
            if len(own["_modules"]) != children or len(own_parameters) != len(parameters):
                return False
            for parameter_key, dtype, device in parameters:
                parameter = own_parameters.get(parameter_key)
                if parameter is None:
                    if dtype is not None:
                        return False
                    continue
                if (
                    type(parameter) is not nn.Parameter
                    or parameter.dtype is not dtype
                    or parameter.device != device
                ):
                    return False
                weights.append(parameter)
            if own["_buffers"]:
                weights.extend(b for b in own["_buffers"].values() if b is not None)
        return True

    def holds_same_weights(self, member: nn.Module, weights: list[Tensor]) -> bool:
        """Whether the member still has the parameters and buffers it had, the very objects."""
        modules: list[Any] = []
        found: list[Tensor] = []
        for _, parent, key, *_, parameters in self.parts:
            module = modules[parent].__dict__["_modules"].get(key) if modules else member
            modules.append(module)
            if module is not None:
                own = module.__dict__
                # In the order of `why_not_plain`: a parametrization that is taken off changes
                # the order that they have in their module.
                found += [own["_parameters"].get(name) for name, *_ in parameters]
                found += own["_buffers"].values()
        found = [tensor for tensor in found if tensor is not None]
        return len(found) == len(weights) and all(map(operator.is_, found, weights))


def why_foreign(member: nn.Module) -> str | None:
    """Why a kernel that knows the member may not know a part of it, None if it may.

    Adapters and wrappers may be there already when the kernel takes its seat.
    """
    home = original_of(type(member)).__module__
    for name, module in nn.Module.named_modules(member):  # Not the seat.
        reason = _why_foreign(module, f".{name}" if name else "", home)
        if reason is not None:
            return reason
    return None


def _why_foreign(module: nn.Module, name: str, home: str) -> str | None:
    """The same for one module of a member that is of the package `home`.

    What foreign parts have in common: a weight that is computed, a layer inside, a class of
    another library, a torch layer whose `forward` was overridden, or generated code.
    """
    cls = original_of(type(module))
    if isinstance(module, torch.fx.GraphModule):
        return f"{name} is a graph, made by torch.fx or torch.export, which runs generated code"
    if is_parametrized(module):
        computed = " and ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"{name} has a parametrization, which computes its {computed} at each use"
    holds_tensors = next(module.parameters(), None) is not None
    holds_tensors = holds_tensors or next(module.buffers(), None) is not None
    known = True
    if (
        isinstance(inspect.getattr_static(cls, "weight", None), property)
        or "base_layer" in module._modules
    ):
        known = False
    elif name and holds_tensors and not cls.__module__.startswith("torch.nn.modules."):
        known = _library(cls.__module__) == _library(home) != "torch"
        if _overrides_layer_of_torch(cls):
            known = known and _package(cls.__module__) == _package(home)
    if known and cls.__call__ is nn.Module.__call__:
        return None
    what = "calls in a way of its own" if known else "a kernel for the member may not know"
    return f"{name} is a {cls.__module__}.{cls.__qualname__}, which {what}"


def _library(module: str) -> str:
    return module.partition(".")[0]


def _package(module: str) -> str:
    return module.rpartition(".")[0] or module


def _overrides_layer_of_torch(cls: Any) -> bool:
    layers = [base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules.")]
    return layers[0] is not nn.Module and cls.forward is not layers[0].forward


def has_hooks(module: nn.Module) -> bool:
    """Whether the module's own call runs forward or backward hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_not_under(context: Context) -> str | None:
    """The reason why no kernel may run in a context, or None."""
    if context in (_USUAL, _USUAL_WITHOUT_GRAD):
        return None
    _, autocast, transforms, *rest = context
    if autocast:
        return "autocast is on"
    if transforms:
        return "a torch.func transform is active"
    if not rest:
        return None
    *_, function_modes, dispatch_modes, tracing, global_hooks, forward_ad = rest
    if function_modes or dispatch_modes:
        # What touches a captured value runs with the innermost mode taken away.
        return "a TorchFunctionMode or TorchDispatchMode is active"
    if tracing:
        return "torch.jit is tracing"
    if global_hooks:
        return "a global module hook is registered"
    return "forward-mode AD is active" if forward_ad else None


def _names(now: type, before: type) -> str:
    now, before = original_of(now), original_of(before)
    if now.__name__ != before.__name__:
        return f"{now.__name__}, was a {before.__name__}"
    return f"{now.__module__}.{now.__name__}, was a {before.__module__}.{before.__name__}"
