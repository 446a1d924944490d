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
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .code import names_of_forward
from .context import Context

ORIGINAL = "_fusion_original_class"
_RANDOM_PREFIXES = ("rand", "bernoulli", "gumbel", "fractional_max_pool", "rrelu")
_RANDOM_NAMES = frozenset(
    f"{name}{in_place}"
    for name in (
        "multinomial", "normal", "uniform", "exponential", "poisson", "binomial", "cauchy",
        "geometric", "log_normal", "sample", "rsample",
    )
    for in_place in ("", "_")
)  # fmt: skip

# What `calling_context` gives outside of every mode, transform and trace.
_USUAL = (True, False, False, False, True, None, 0, 0, False, False, False)
_USUAL_WITHOUT_GRAD = (False, *_USUAL[1:])

Effects = Callable[[Any], bool]


class _Part(NamedTuple):
    """One module of a member: the member itself or one below it."""

    name: str
    parent: int
    key: str
    cls: type
    effects: Effects | None
    children: int
    parameters: tuple[tuple[str, torch.dtype | None, torch.device | None], ...]


class MemberForm:
    """The form of a member and of every module below it.

    Args:
        member: the member as it is now.
    """

    def __init__(self, member: nn.Module) -> None:
        self.parts: list[_Part] = []
        self.home = original_of(type(member)).__module__.partition(".")[0]
        self.foreign: str | None = None
        self._add(member, "", -1, "")
        classes = {original_of(part.cls) for part in self.parts if part.cls is not type(None)}
        self.forwards = [(cls, cls.forward, cls.__call__) for cls in classes]
        parameters = [p for part in self.parts for p in part.parameters]
        self.dtypes = {d for _, d, _ in parameters if d is not None and d.is_floating_point}
        self.devices = {device for _, _, device in parameters if device is not None}
        self.has_buffers = any(True for _ in member.buffers())

    def _add(self, module: nn.Module | None, name: str, parent: int, key: str) -> None:
        index = len(self.parts)
        if module is None:
            self.parts.append(_Part(name, parent, key, type(None), None, 0, ()))
            return
        parameters = tuple(
            (key, None, None) if p is None else (key, p.dtype, p.device)
            for key, p in module._parameters.items()
        )
        cls = type(module)
        effects = _effects(original_of(cls))
        if effects is None and module._buffers and _writes(original_of(cls)):
            effects = _always
        if parent >= 0 and self.foreign is None:
            self.foreign = self._why_foreign(module, name)
        self.parts.append(_Part(name, parent, key, cls, effects, len(module._modules), parameters))
        for child_key, child in module._modules.items():
            self._add(child, f"{name}.{child_key}", index, child_key)

    def _why_foreign(self, module: nn.Module, name: str) -> str | None:
        """Why a kernel that knows the member may not know a module in it.

        Adapters and wrappers may be there already when the kernel takes its seat. Their classes
        are neither torch's own layers nor from the library that the member is from.
        """
        cls = original_of(type(module))
        if cls.__module__.startswith("torch.nn.modules."):
            known = True
        elif isinstance(inspect.getattr_static(cls, "weight", None), property):
            known = False
        elif any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            known = cls.__module__.partition(".")[0] == self.home != "torch"
        else:
            known = True
        if known and cls.__call__ is nn.Module.__call__:
            return None
        what = "calls in a way of its own" if known else "a kernel for the member may not know"
        return f"{name} is a {cls.__module__}.{cls.__qualname__}, which {what}"

    def why_not_plain(self, member: nn.Module, role: str, weights: list[Tensor]) -> str | None:
        """The reason why the member is not plain, or None.

        Adds the parameters and buffers of the member to `weights`.
        """
        if self.foreign is not None:
            return role + self.foreign
        for owner, forward, call in self.forwards:
            if owner.forward is not forward or owner.__call__ is not call:
                return f"{role} has a class whose forward was replaced, {owner.__name__}"
        modules: list[Any] = []
        for name, parent, key, cls, effects, children, parameters in self.parts:
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
            if "forward" in own:
                return f"{role}{name} has an instance-level forward"
            if effects is not None and effects(module):
                return f"{role}{name} may draw random numbers or update buffers when it runs"
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

    def holds_same_weights(self, member: nn.Module, weights: list[Tensor]) -> bool:
        """Whether the member still has the parameters and buffers it had, the very objects."""
        modules: list[Any] = []
        found: list[Tensor] = []
        for _, parent, key, *_ in self.parts:
            module = modules[parent].__dict__["_modules"].get(key) if modules else member
            modules.append(module)
            if module is not None:
                own = module.__dict__
                found += own["_parameters"].values()
                found += own["_buffers"].values()
        found = [tensor for tensor in found if tensor is not None]
        return len(found) == len(weights) and all(map(operator.is_, found, weights))


def has_hooks(module: nn.Module) -> bool:
    """Whether the module's own call runs forward or backward hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def original_of(cls: type) -> Any:
    """The class that a swapped class stands for; any other class itself.

    A class that someone put on top of a swapped one counts as a class of its own.
    """
    return cls.__dict__.get(ORIGINAL, cls)


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


def _effects(cls: type[nn.Module]) -> Effects | None:
    """Tells of a module of this class whether running it has an effect besides its output."""
    if issubclass(cls, nn.modules.dropout._DropoutNd):
        return _drops
    if issubclass(cls, nn.modules.batchnorm._NormBase):
        return _tracks
    names = names_of_forward(cls)
    return _always if names is None else _effects_of(names)


@lru_cache(maxsize=4096)
def _effects_of(names: frozenset[str]) -> Effects | None:
    draws = any(name.startswith(_RANDOM_PREFIXES) for name in names) or names & _RANDOM_NAMES
    drops = any("dropout" in name or "drop_path" in name for name in names)
    if draws or (drops and "self.training" not in names):
        return _always
    # What asks whether it is training does something then that it does not do otherwise.
    return _trains if "self.training" in names else None


def _writes(cls: type[nn.Module]) -> bool:
    """Whether the class's `forward` may write to a buffer: it calls something like `add_`."""
    names = names_of_forward(cls) or frozenset()
    return any(name.endswith("_") and not name.startswith("_") for name in names)


def _always(module: Any) -> bool:
    return True


def _trains(module: Any) -> bool:
    return bool(module.training)


def _drops(module: Any) -> bool:
    return bool(module.training and module.p > 0)


def _tracks(module: Any) -> bool:
    return bool(module.training and module.track_running_stats)


def _names(now: type, before: type) -> str:
    now, before = original_of(now), original_of(before)
    if now.__name__ != before.__name__:
        return f"{now.__name__}, was a {before.__name__}"
    return f"{now.__module__}.{now.__name__}, was a {before.__module__}.{before.__name__}"
