"""What a model returns as a flat list, its gradients, and comparing them to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from module_fusion.deferred import DeferredOutput


def flat(value: Any, depth: int = 0) -> list[Any]:
    """Every tensor and plain value in what a model returned, in order; caches are looked into."""
    if issubclass(type(value), DeferredOutput):
        return ["a DeferredOutput"]
    if isinstance(value, Tensor):
        return [value]
    if depth > 8:
        return []
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in flat(item, depth + 1)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item, depth + 1)]
    if dataclasses.is_dataclass(value) or "cache" in type(value).__name__.lower():
        return flat(list(vars(value).values()), depth + 1)
    if type(value).__module__.startswith("transformers.cache_utils"):
        return flat(list(vars(value).values()), depth + 1)
    return [value] if isinstance(value, (bool, int, float, str)) else []


def gradients_of(
    model: nn.Module, inputs: dict[str, Any]
) -> tuple[list[Any], dict[str, Tensor | None]]:
    """The outputs, and the gradient of every parameter; every finite output element counts."""
    model.zero_grad(set_to_none=True)
    outputs = flat(model(**inputs))
    total = torch.zeros(())
    for value in outputs:
        if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
            weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
            total = total + torch.where(value.isfinite(), value * weights, 0).sum()
    if not total.requires_grad:
        raise RuntimeError("no output requires a gradient")
    total.backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


def same_bits(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists hold the same values, tensors to the bit."""
    return len(first) == len(second) and all(map(_same, first, second))


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        both = isinstance(first, float) and isinstance(second, float)
        return bool(first == second) or (both and first != first and second != second)
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    first, second = first.detach(), second.detach()
    if torch.equal(first, second) and not first.is_floating_point():
        return True
    as_bytes = [t.contiguous().view(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*as_bytes)


def relative_error(found: list[Any], exact: list[Any]) -> float:
    """The norm of what differs over the norm of what should be, of all real tensors together."""
    error = size = 0.0
    for ours, truth in zip(found, exact, strict=True):
        if isinstance(truth, Tensor) and truth.is_floating_point():
            finite = truth.isfinite() & ours.isfinite()
            if not torch.equal(truth.isfinite(), ours.isfinite()):
                return float("inf")
            wide = truth[finite].double()
            error += float((ours[finite].double() - wide).square().sum())
            size += float(wide.square().sum())
    return (error / size) ** 0.5 if size else 0.0
