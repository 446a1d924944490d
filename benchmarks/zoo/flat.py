"""What a model returns as a flat list, its gradients, and comparing them to the bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from module_fusion.deferred import DeferredOutput

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_NAMED = (type, FunctionType, MethodType, BuiltinFunctionType)


def flat(value: Any) -> list[Any]:
    """Every tensor and plain value in what a model returned, in order, and what holds them.

    Containers and objects are looked into, however deep; each is told by its class and its keys.
    """
    leaves: list[Any] = []
    _add(value, leaves, {})
    return leaves


def _add(value: Any, leaves: list[Any], seen: dict[int, int]) -> None:
    if issubclass(type(value), DeferredOutput):
        leaves.append("a DeferredOutput")
    elif isinstance(value, (Tensor, *_PLAIN)):
        leaves.append(value)
    elif isinstance(value, numpy.generic):
        leaves += [type(value).__name__, value.item()]
    elif isinstance(value, _NAMED):
        leaves.append(value.__qualname__)
    elif isinstance(value, nn.Module):
        leaves.append("a module")  # Of the model, which is compared by itself.
    elif id(value) in seen:
        leaves.append(f"again number {seen[id(value)]}")
    else:
        seen[id(value)] = len(seen)
        leaves.append(type(value).__qualname__)
        for item in _items(value):
            _add(item, leaves, seen)
        leaves.append("end")


def _items(value: Any) -> list[Any]:
    """What is in a container or an object."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, (list, tuple, deque)):
        return list(value)
    if isinstance(value, AbstractSet):
        return sorted(value, key=repr)
    if isinstance(value, numpy.ndarray):
        if value.dtype.kind in "biufc":
            return [str(value.dtype), torch.from_numpy(numpy.array(value))]
        return [str(value.dtype), *value.shape, *value.ravel().tolist()]
    own = [(name, item) for name, item in getattr(value, "__dict__", {}).items()]
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    own += [(name, getattr(value, name)) for name in slots]
    return [part for item in own for part in item]


def _slots(cls: type) -> list[str]:
    names = cls.__dict__.get("__slots__", ())
    names = [names] if isinstance(names, str) else names
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def gradients_of(
    model: nn.Module, inputs: dict[str, Any], of_inputs: bool = False
) -> tuple[list[Any], dict[str, Tensor | None]]:
    """The outputs, and the gradients; every finite output element counts.

    Args:
        model: it is run once.
        inputs: by name.
        of_inputs: whether the floating tensors among them have gradients too.

    Returns:
        The outputs, and the gradients of the parameters, and of inputs as `input NAME`.
    """
    model.zero_grad(set_to_none=True)
    leaves = {}
    if of_inputs:
        leaves = {
            name: value.detach().clone().requires_grad_()
            for name, value in inputs.items()
            if is_floating(value)
        }
        inputs = {**inputs, **leaves}
    outputs = flat(model(**inputs))
    total = torch.zeros(())
    for value in outputs:
        if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
            weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
            total = total + torch.where(value.isfinite(), value * weights, 0).sum()
    if not total.requires_grad:
        raise RuntimeError("no output requires a gradient")
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients.update((f"input {name}", leaf.grad) for name, leaf in leaves.items())
    return outputs, gradients


def is_floating(value: Any) -> bool:
    """Whether it is a tensor that may have a gradient."""
    return isinstance(value, Tensor) and value.is_floating_point()


def same_bits(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists hold the same values, tensors to the bit and with the same strides."""
    return len(first) == len(second) and all(map(_same, first, second))


def same_kind(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors differ in nothing but values and strides."""
    kinds = [(type(t), t.dtype, t.shape, t.requires_grad) for t in (first, second)]
    return kinds[0] == kinds[1]


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        both = isinstance(first, float) and isinstance(second, float)
        equal = type(first) is type(second) and bool(first == second)
        return equal or (both and first != first and second != second)
    if not same_kind(first, second) or _strides(first) != _strides(second):
        return False
    numbers = [
        t.detach().resolve_conj().resolve_neg().contiguous().view(-1) for t in (first, second)
    ]
    # Eight bytes at once are compared ten times as fast as one.
    starts = [t.storage_offset() * t.element_size() for t in numbers]
    is_wide = not any(where % 8 for where in (*starts, numbers[0].nbytes))
    return torch.equal(*(t.view(torch.int64 if is_wide else torch.uint8) for t in numbers))


def _strides(tensor: Tensor) -> list[int]:
    """The strides that mean something."""
    if not tensor.numel():
        return []
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def relative_error(found: list[Any], exact: list[Any]) -> float:
    """The norm of what differs over the norm of what should be, of all real tensors together."""
    error = size = 0.0
    for ours, truth in zip(found, exact, strict=True):
        if isinstance(truth, Tensor) and truth.is_floating_point():
            ours, truth = ours.detach(), truth.detach()
            finite = truth.isfinite() & ours.isfinite()
            if not torch.equal(truth.isfinite(), ours.isfinite()):
                return float("inf")
            wide = truth[finite].double()
            error += float((ours[finite].double() - wide).square().sum())
            size += float(wide.square().sum())
    return (error / size) ** 0.5 if size else 0.0
