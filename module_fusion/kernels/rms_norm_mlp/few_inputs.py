"""Linear layers as wide as a member's own that need no memory for their weights.

A forward can depend on its sizes, and the weights of one MLP can take gigabytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .stand_in import Refused, original_class

_LINEAR = F.linear
_LEAST_INPUTS = 4


def hollow(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A weight of one number in memory, which shows where it is computed with."""
    return torch.full((), torch.nan, dtype=dtype, device="cpu").expand(shape)


class FewInputs(TorchFunctionMode):
    """Layers of a module compute as if few of their weights were not zero.

    Each output sums a few inputs, and every input is in one of the sums.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.name = original_class(module).__name__
        generator = torch.Generator("cpu").manual_seed(4)
        self.layers = {
            id(weight): _draw(weight.shape, generator)
            for weight in module.parameters()
            if weight.dim() == 2
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(id(value) in self.layers for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is _LINEAR:
            return self._linear(*args, **kwargs)
        result = func(*args, **kwargs)
        if any(isinstance(value, Tensor) for value in tree_leaves(result)):
            raise Refused(f"{self.name} takes weights elsewhere than into F.linear")
        return result  # Such as a dtype.

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        indices, factors = self.layers[id(weight)]
        output = (input[..., indices] * factors.to(input.dtype)).sum(-1)
        return output if bias is None else output + bias


def _draw(shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which inputs each output sums, and their factors: both `(outputs, terms)`."""
    outputs, inputs = shape
    terms = max(_LEAST_INPUTS, -(-inputs // outputs))
    order = torch.randperm(inputs, generator=generator, device="cpu")
    indices = order[torch.arange(outputs * terms, device="cpu") % inputs].view(outputs, terms)
    factors = torch.randn((outputs, terms), generator=generator, device="cpu", dtype=torch.float64)
    return indices, factors * 1.5 / terms**0.5
