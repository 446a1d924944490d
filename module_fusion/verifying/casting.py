"""A model in another dtype for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..inventory import Found, modules_in, states_of

_CAST = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def in_dtype(model: nn.Module, found: list[Found], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, floating parameters and buffers are in a dtype, and kernels were chosen for it.

    The modules have other parameters meanwhile. Outside they have the very objects they had,
    tied and shared as they were, because those were never written to. Inside, there has to be
    room for both.

    Args:
        model: the model.
        found: its chains.
        dtype: the dtype; None leaves everything as it is.
    """
    if dtype is None:
        yield
        return
    cast: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    kernels = _kernels_as_they_are(found)
    try:
        for module in modules_in(model):
            for own in (module._parameters, module._buffers):
                before.append((own, dict(own)))
                for name, tensor in own.items():
                    if tensor is not None and tensor.dtype in _CAST and tensor.dtype != dtype:
                        own[name] = _cast(tensor, dtype, cast)
        for item in found:
            if item.chain.armed:
                item.chain.seat._arm()  # type: ignore[union-attr]
        yield
    finally:
        for own, entries in before:
            own.clear()
            own.update(entries)
        for own, entries in kernels:
            own.clear()
            own.update(entries)


def _cast(tensor: Tensor, dtype: torch.dtype, known: dict[int, Tensor]) -> Any:
    if id(tensor) not in known:
        value = tensor.detach().to(dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        known[id(tensor)] = (
            nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        )
    return known[id(tensor)]


def _kernels_as_they_are(found: list[Found]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What taking a seat anew changes: the seats, and what their members know of them."""
    owners: list[Any] = [item.chain.seat for item in found if item.chain.seat is not None]
    owners += [state for item in found for state in states_of(item)]
    return [(owner.__dict__, dict(owner.__dict__)) for owner in owners]
