"""Whether a member is plain at this very call, so that a kernel may read its weights.

A kernel that reads `member.weight` bypasses the member's own call, and with it every hook,
adapter, parametrization, quantized or sharded weight that someone put there, before fusing
or after. So the form of a member is recorded when the kernel takes its seat and compared
at each call: the same classes with the same `forward`, no hook, no instance-level
`forward`, the same children, parameters of exactly the type `Parameter` with the same
device and dtype, and nothing that draws random numbers or updates a buffer at this call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .code import code_of_forward, names_in

_GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in (
        "_global_forward_pre_hooks",
        "_global_forward_hooks",
        "_global_backward_pre_hooks",
        "_global_backward_hooks",
    )
)
_RANDOM_NAMES = ("rand", "bernoulli", "multinomial", "normal_", "uniform_", "exponential_")


class MemberForm:
    """The form of one module and, below it, of its children.

    Args:
        module: the module as it is now.
        class_of: the class that counts as the module's own.
    """

    def __init__(self, module: nn.Module, class_of: Callable[[nn.Module], type[nn.Module]]) -> None:
        self.cls: type[nn.Module] = type(module)
        self.own_cls = class_of(module)
        self.class_of = class_of
        self.forward = self.own_cls.forward
        self.effects = _effects(self.own_cls)
        self.children = tuple(
            (name, MemberForm(child, class_of) if child is not None else None)
            for name, child in module._modules.items()
        )
        self.parameters = tuple(
            (name, (p.dtype, p.device) if p is not None else None)
            for name, p in module._parameters.items()
        )

    def why_not_plain(self, module: Any, name: str, weights: list[Tensor]) -> str | None:
        """The reason why the module, called `name`, is not plain, or None.

        Adds the module's parameters and buffers to `weights`.
        """
        if type(module) is not self.cls and (
            module is None or self.class_of(module) is not self.own_cls
        ):
            return f"{name} is a {type(module).__name__}, was a {self.own_cls.__name__}"
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return f"{name} has a hook"
        if "forward" in module.__dict__:
            return f"{name} has an instance-level forward"
        if self.own_cls.forward is not self.forward:
            return f"{name} has a class whose forward was replaced, {self.own_cls.__name__}"
        if self.effects is not None and self.effects(module):
            return f"{name} draws random numbers or updates buffers when it runs"
        parameters = module._parameters
        if len(parameters) != len(self.parameters):
            return f"{name} has other parameters than before"
        for key, expected in self.parameters:
            parameter = parameters.get(key)
            if parameter is None or expected is None:
                if parameter is not expected:
                    return f"{name} has another {key} than before"
                continue
            if type(parameter) is not nn.Parameter:
                return f"{name} has a {key} of type {type(parameter).__name__}"
            dtype, device = expected
            if parameter.dtype != dtype or parameter.device != device:
                return (
                    f"{name} has a {key} in {parameter.dtype} on {parameter.device}; the kernel "
                    f"was chosen for {dtype} on {device}, call kernelize again"
                )
            weights.append(parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                weights.append(buffer)
        if len(module._modules) != len(self.children):
            return f"{name} has other children than before"
        for key, form in self.children:
            child = module._modules.get(key)
            if form is None:
                if child is not None:
                    return f"{name} has another {key} than before"
                continue
            reason = form.why_not_plain(child, f"{name}.{key}", weights)
            if reason is not None:
                return reason
        return None


def why_not_here() -> str | None:
    """The reason why no kernel may run in the present context, or None."""
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.compiler.is_dynamo_compiling():
        return None
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if any(_GLOBAL_HOOKS):
        return "a global module hook is registered"
    return None


def _effects(cls: type[nn.Module]) -> Callable[[nn.Module], bool] | None:
    """Tells of a module of this class whether running it has an effect besides its output."""
    if issubclass(cls, nn.modules.dropout._DropoutNd):
        return lambda module: module.training and module.p > 0  # type: ignore[operator, return-value]
    if issubclass(cls, nn.modules.batchnorm._NormBase):
        return lambda module: module.training and bool(module.track_running_stats)
    code = code_of_forward(cls)
    if code is None:
        return lambda module: True
    names = names_in(code)
    draws = any(name.startswith(_RANDOM_NAMES) for name in names)
    drops = any("dropout" in name or "drop_path" in name for name in names)
    if draws or (drops and "training" not in names):
        return lambda module: True
    # What asks whether it is training does something then that it does not do otherwise.
    return (lambda module: module.training) if "training" in names else None
