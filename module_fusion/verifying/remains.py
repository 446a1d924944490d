"""What a run leaves behind besides its output."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..exact import seeded
from .structures import bits_of, is_plain

# Elements that are summed together.
_CHUNK = 1 << 18


def left_in(model: nn.Module) -> dict[str, Any]:
    """Random state, parameters and buffers, whether gradients are asked for and which are there.

    Tensors are told apart by a sum of their bits in which every place has its own weight: there
    is no copy of them.
    """
    parameters = list(model.named_parameters())
    gradients = [(f"{name}.grad", p.grad) for name, p in parameters if p.grad is not None]
    return {
        "the random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "NumPy's random state": _state_of_numpy(),
        **{f"{name}.requires_grad": p.requires_grad for name, p in parameters},
        **{f"{name}.grad": None for name, _ in parameters},
        **sums_of((*parameters, *model.named_buffers(), *gradients)),
    }


def _state_of_numpy() -> Any:
    numpy: Any = sys.modules.get("numpy")
    return None if numpy is None else repr(numpy.random.get_state(legacy=False))


def sums_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """A number for each tensor, which another order of its values changes too."""
    return {
        name: _sum_of(tensor) for name, tensor in tensors if is_plain(tensor) and not tensor.is_meta
    }


def _sum_of(tensor: Tensor) -> int:
    bits = bits_of(tensor).reshape(-1)
    whole = bits.numel() * bits.element_size() % 4 == 0 and bits.dtype is not torch.bool
    bits = bits.contiguous().view(torch.int32) if whole else bits.to(torch.int32)
    weights, total = _weights(bits.device), 0
    for part in torch.split(bits, _CHUNK):
        product = part * weights[: part.numel()]
        total = (total * 31 + int(product.sum(dtype=torch.int64))) % (1 << 61)
    return total


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """A number for each place; odd, so that no bit of a value is lost in the product."""
    drawn = torch.randint(1 << 30, (_CHUNK,), generator=seeded(), device="cpu")
    return (2 * drawn + 1).to(device, torch.int32)
