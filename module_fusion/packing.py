"""Weights that lie side by side in one packed tensor, as some kernels want them.

The members' parameters stay the same objects, and their data lie in the packed tensor's memory.
Nobody but they keeps that memory: the packed tensor is found under them anew at every call. So
it cannot be older than they are, and costs nothing of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

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

    def parameter(self, members: Sequence[nn.Module]) -> nn.Parameter | None:
        """The parameter itself, None if it is no longer there."""
        module: nn.Module | None = members[self.member]
        for name in self.modules:
            module = None if module is None else module._modules.get(name)
        return None if module is None else module._parameters.get(self.key)


@dataclass(frozen=True, eq=False)
class Packing:
    """How the weights of one group are packed.

    A copy, by deepcopy or pickle, has weights of its own that are not packed, and knows it.

    Attributes:
        name: the name by which a kernel reads the packed tensor.
        views: the parameters, in the order of the layout.
        shape: of the packed tensor.
        stride: of the packed tensor.
        offset: of the packed tensor in its storage.
        dtype: of all of them.
        storage: the memory, which the parameters keep alive, and this does not.
        refused: why the weights could not be packed again, and where they were then.
    """

    name: str
    views: tuple[WeightView, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage: StorageWeakRef | None
    refused: tuple[str, list[int | None]] | None = None

    def is_current(self, members: Sequence[nn.Module]) -> bool:
        """Whether every weight is in its place in the packed tensor."""
        storage = self._memory()
        if storage is None:
            return False
        start, size = storage.data_ptr(), self.dtype.itemsize
        for view in self.views:
            parameter = view.parameter(members)
            if (
                type(parameter) is not nn.Parameter
                or parameter.data_ptr() != start + view.offset * size
                or parameter.shape != view.shape
                or parameter.stride() != view.stride
                or parameter.dtype is not self.dtype
                or parameter.device != storage.device
            ):
                return False
        return True

    def tensor(self, members: Sequence[nn.Module]) -> Tensor | None:
        """The packed tensor, without gradient; None where a weight is elsewhere."""
        storage = self._memory()
        if storage is None or not self.is_current(members):
            return None
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)

    def refused_for(self, reason: str, members: Sequence[nn.Module]) -> Packing:
        """The same, with the reason why these weights could not be packed again."""
        return replace(self, refused=(reason, self._places(members)))

    def why_not_current(self, members: Sequence[nn.Module]) -> str | None:
        """Why there is no packed tensor, None if there is one."""
        if self.is_current(members):
            return None
        left = f"the weights left the packed layout {self.name!r}"
        if self.refused is not None and self.refused[1] == self._places(members):
            return f"{left}, and when fuse was called: {self.refused[0]}"
        return f"{left}; fuse again"

    def _places(self, members: Sequence[nn.Module]) -> list[int | None]:
        parameters = [view.parameter(members) for view in self.views]
        return [
            p.data_ptr() if type(p) is nn.Parameter and p.layout is torch.strided else None
            for p in parameters
        ]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the packed memory."""
        storage = self._memory()
        if storage is None or tensor.device != storage.device:
            return False
        return 0 <= tensor.data_ptr() - storage.data_ptr() < storage.nbytes()

    def separate(self, members: Sequence[nn.Module]) -> None:
        """Give every parameter in the packed memory memory of its own.

        An adapter may have put a parameter elsewhere in its member, so all are looked at.
        """
        if len(self.views) == 1:
            return
        with torch.inference_mode(False), torch.no_grad():
            for member in members:
                for parameter in member.parameters():
                    if type(parameter) is nn.Parameter and self.holds(parameter):
                        parameter.data = parameter.detach().clone()

    def _memory(self) -> torch.UntypedStorage | None:
        if self.storage is None:
            return None
        # As torch.multiprocessing does: nothing else gives a storage for a weak reference.
        found: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(
            self.storage.cdata
        )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "storage": None}


def alias_of(view: Tensor) -> Tensor:
    """The same memory as a contiguous view, in a storage object of its own.

    Savers look at storages: accelerate drops all tensors but one that share a storage.
    """
    start = view.storage_offset() * view.element_size()
    storage = view.untyped_storage()[start : start + view.nbytes]
    empty = torch.empty(0, dtype=view.dtype, device=view.device)
    return empty.set_(storage, 0, view.shape, view.stride())


def why_not_packed(packings: Sequence[Packing], members: Sequence[nn.Module]) -> str | None:
    """The reason why a kernel cannot have its packed weights at this call, or None."""
    if not packings:
        return None
    if torch.compiler.is_dynamo_compiling():
        return "a compiled graph cannot check that the weights are still packed"
    for packing in packings:
        reason = packing.why_not_current(members)
        if reason is not None:
            return reason
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
