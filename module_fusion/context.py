"""The context of a call: what a computation depends on besides its inputs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _get_tracing_state as tracing_state
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C import _is_fwd_grad_enabled as is_forward_ad_enabled
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C import _len_torch_function_stack as function_modes
from torch._C._autograd import _top_saved_tensors_default_hooks as top_saved_tensors_hooks
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from .errors import FusionError

Context = tuple[Any, ...]
_FAKE = "torch._subclasses.fake_tensor"
_REAL = "{} has to compute with values: leave the FakeTensorMode, and give a real model"

# The dicts themselves: torch writes to them, and to nothing else.
_FORWARD_PRE_HOOKS: Any = torch_module._global_forward_pre_hooks
_FORWARD_HOOKS: Any = torch_module._global_forward_hooks
_BACKWARD_PRE_HOOKS: Any = torch_module._global_backward_pre_hooks
_BACKWARD_HOOKS: Any = torch_module._global_backward_hooks


def calling_context() -> Context:
    """What a computation depends on besides its inputs.

    Grad mode, autocast, `torch.func` transforms; and where torch.compile is not tracing also
    inference mode, forward-mode AD, saved-tensor hooks, the function and dispatch modes,
    torch.jit.trace, global module hooks and forward-mode levels.
    """
    if torch.compiler.is_dynamo_compiling():
        return (is_grad_enabled(), is_any_autocast_enabled(), are_transforms_active())
    return (
        is_grad_enabled(),
        is_any_autocast_enabled(),
        are_transforms_active(),
        is_inference_mode_enabled(),
        is_forward_ad_enabled(),
        top_saved_tensors_hooks(True),
        function_modes(),
        dispatch_modes(),
        tracing_state() is not None,
        has_global_hooks(),
        forward_ad._current_level >= 0,
    )


def saved_tensors_hooks() -> Any:
    """The hooks for saved tensors that are in force, None if there are none."""
    return top_saved_tensors_hooks(True)


def has_global_hooks() -> bool:
    """Whether a hook is registered for all modules."""
    return bool(_FORWARD_PRE_HOOKS or _FORWARD_HOOKS or _BACKWARD_PRE_HOOKS or _BACKWARD_HOOKS)


class SavedTensorHooks:
    """Puts the saved-tensor hooks of an earlier moment in force."""

    def __init__(self, hooks: tuple[Any, Any] | None) -> None:
        self.hooks = hooks
        self.popped: list[tuple[Any, Any]] = []
        self.pushed = False

    def __enter__(self) -> None:
        autograd = torch._C._autograd
        while (top := autograd._top_saved_tensors_default_hooks(True)) not in (None, self.hooks):
            self.popped.append(top)
            autograd._pop_saved_tensors_default_hooks()
        if top is None and self.hooks is not None:
            autograd._push_saved_tensors_default_hooks(*self.hooks)
            self.pushed = True

    def __exit__(self, *exc_info: object) -> None:
        autograd = torch._C._autograd
        if self.pushed:
            autograd._pop_saved_tensors_default_hooks()
        for hooks in reversed(self.popped):
            autograd._push_saved_tensors_default_hooks(*hooks)


def why_fake(what: str) -> str | None:
    """The reason why what has to compute cannot: a FakeTensorMode is active. None otherwise."""
    if _FAKE not in sys.modules or torch._guards.detect_fake_mode() is None:
        return None
    return f"A FakeTensorMode is active, and {_REAL.format(what)}"


def check_not_fake(model: nn.Module, what: str) -> None:
    """Refuse what has to compute where tensors are fake, without values.

    Raises:
        FusionError: a FakeTensorMode is active, or a parameter or buffer was made under one.
    """
    if reason := why_fake(what):
        raise FusionError(f"{reason}.")
    if _FAKE not in sys.modules:
        return
    fake: Any = sys.modules[_FAKE]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, fake.FakeTensor):
            raise FusionError(f"{name!r} is a FakeTensor, and {_REAL.format(what)}.")


def check_has_values(model: nn.Module, tensors: list[Tensor], what: str) -> None:
    """Refuse outputs of which none has values.

    Raises:
        FusionError: all of them are on the meta device, as weights are.
    """
    if tensors and all(tensor.is_meta for tensor in tensors):
        weights = (*model.named_parameters(), *model.named_buffers())
        for name, tensor in weights:
            if tensor.is_meta:
                raise FusionError(
                    f"{name!r} is on the meta device, and so is the output: there are no values "
                    f"for {what}. Load the weights first."
                )
