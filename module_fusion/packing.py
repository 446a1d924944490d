"""Weights that lie side by side in one packed tensor, as some kernels want them.

The members' parameters stay the same objects; their data are views of the packed tensor.
Nobody holds that tensor: it is what lies under the parameters, and is found there anew at
every call. So it cannot be older than they are, and costs no memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import NotFusableError


class WeightView(NamedTuple):
    """Where a parameter is in the packed tensor, and in the members."""

    member: int
    modules: tuple[str, ...]
    key: str
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def path(self) -> str:
        """The parameter's path, relative to its member."""
        return ".".join((*self.modules, self.key))

    def owner(self, members: Sequence[nn.Module]) -> nn.Module | None:
        """The module that has the parameter, None if it is no longer there."""
        module: nn.Module | None = members[self.member]
        for name in self.modules:
            module = None if module is None else module._modules.get(name)
        return module


@dataclass(frozen=True)
class Packing:
    """How the weights of one group are packed: plain data, the same in every copy.

    Attributes:
        name: the name by which a kernel reads the packed tensor.
        views: the parameters, in the order of the layout.
        shape: of the packed tensor.
        stride: of the packed tensor.
        offset: of the packed tensor in its storage.
        dtype: of all of them.
        nbytes: size of the storage, which the parameters fill.
    """

    name: str
    views: tuple[WeightView, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    nbytes: int

    def tensor(self, members: Sequence[nn.Module]) -> Tensor | None:
        """The packed tensor, without gradient; None where a weight is no longer a view of it."""
        base = storage = None
        for view in self.views:
            owner = view.owner(members)
            parameter = None if owner is None else owner._parameters.get(view.key)
            if type(parameter) is not nn.Parameter or not self._fits(parameter, view):
                return None
            address = parameter.untyped_storage().data_ptr()
            if base is None:
                base, storage = parameter, address
            elif address != storage:
                return None
        assert base is not None
        return base.detach().as_strided(self.shape, self.stride, self.offset)

    def separate(self, members: Sequence[nn.Module]) -> None:
        """Give every parameter that is in the packed storage a storage of its own.

        An adapter may have put a parameter elsewhere in its member, so all are looked at.
        """
        places = {(view.offset, view.shape, view.stride) for view in self.views}
        with torch.inference_mode(False), torch.no_grad():
            for member in members:
                for parameter in member.parameters():
                    if type(parameter) is not nn.Parameter or parameter.device.type == "meta":
                        continue
                    place = (parameter.storage_offset(), parameter.shape, parameter.stride())
                    size = parameter.untyped_storage().nbytes()
                    shares = size == self.nbytes != parameter.nbytes
                    if shares and place in places and parameter.dtype is self.dtype:
                        parameter.data = parameter.detach().clone()

    def _fits(self, parameter: Tensor, view: WeightView) -> bool:
        return (
            parameter.shape == view.shape
            and parameter.stride() == view.stride
            and parameter.storage_offset() == view.offset
            and parameter.dtype is self.dtype
            and parameter.untyped_storage().nbytes() == self.nbytes
        )


def why_not_packed(packings: Sequence[Packing], members: Sequence[nn.Module]) -> str | None:
    """The reason why a kernel cannot have its packed weights at this call, or None."""
    if not packings:
        return None
    if torch.compiler.is_dynamo_compiling():
        return "a compiled graph cannot check that the weights are still packed"
    for packing in packings:
        if packing.tensor(members) is None:
            return f"the weights left the packed layout {packing.name!r}; fuse again"
    return None


class PackedWeights(dict[str, Tensor]):
    """The packed tensors of one chain, by the names of their layouts."""

    def __missing__(self, name: str) -> Any:
        raise NotFusableError(
            f"There is no packed tensor {name!r} here: no layout of that name, or a weight left "
            f"it. Layouts belong to families: fuse(model, {{family: True}}) packs the weights, "
            f"fuse_modules does not."
        )


def packed_weights(packings: Sequence[Packing], members: Sequence[nn.Module]) -> PackedWeights:
    """The packed tensors that are current now."""
    found = {packing.name: packing.tensor(members) for packing in packings}
    return PackedWeights({name: value for name, value in found.items() if value is not None})
