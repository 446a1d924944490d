"""What a family says about the layout its kernel wants, and packing weights into it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..chain import Chain
from ..inventory import chains_in
from ..packing import Packing, WeightView, alias_of

# A view starts where a tensor of its own could: PyTorch aligns those to 64 bytes on the CPU,
# and where a matrix starts can decide which instructions multiply it.
_ALIGNMENT = 64


def concatenate(weights: Sequence[Tensor]) -> Tensor:
    """The default `pack`: one after the other along the first dimension."""
    return torch.cat(list(weights))


def split(packed: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
    """The default `unpack`: the views that `concatenate` was made of."""
    parts: Sequence[Tensor] = torch.split(packed, [shape[0] for shape in shapes])
    return parts


@dataclass(frozen=True)
class WeightLayout:
    """How a kernel wants some weights of a group: packed into one tensor.

    The parameters stay the objects they are; their data move into the packed tensor's memory,
    and the kernel reads it as `self.packed[name]`. It never is older than the parameters: at a
    call where one of them is elsewhere (after `model.to(dtype)`, `param.data = ...`,
    `load_state_dict(assign=True)`) the members run, until `fuse` packs them again.

    The packed tensor requires no gradient. Gradients belong to the parameters: a kernel with a
    backward is an `autograd.Function` that takes the members' parameters as inputs, computes
    with the packed tensor, and returns a gradient for each parameter, such as
    `grad_packed.split([w.shape[0] for w in weights])`. It gives the *parameters* to
    `ctx.save_for_backward`, because only they notice an optimizer's step in between.

    Args:
        name: the name by which the kernel reads the packed tensor.
        weights: paths of the parameters, each starting with a role: `"mlp.gate_proj.weight"`.
        pack: makes the packed tensor of the weights, in that order; no other element is in it.
        unpack: takes the packed tensor and the weights' shapes and gives the weights as views of
            it, each contiguous and with the very same bits. What gives anything else is refused.

    Examples:
        >>> layout = WeightLayout("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"))
        >>> gate, up = torch.zeros(2, 3), torch.ones(2, 3)
        >>> packed = layout.pack([gate, up])
        >>> packed.shape
        torch.Size([4, 3])
        >>> torch.equal(layout.unpack(packed, [gate.shape, up.shape])[1], up)
        True
    """

    name: str
    weights: tuple[str, ...]
    pack: Callable[[Sequence[Tensor]], Tensor] = concatenate
    unpack: Callable[[Tensor, Sequence[torch.Size]], Sequence[Tensor]] = split


class Packer:
    """Packs the weights of chains, and gives them their old storage back.

    The old storage is kept until the packer is gone, so that a failure cannot lose anything.

    Args:
        model: the model, in which no other parameter or buffer may share a packed weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # By address, which nobody else gets while the old storage is kept.
        self._holders: dict[int, int] | None = None
        self._packings: list[Packing] = []
        self._undo: dict[int, tuple[Chain, tuple[Packing, ...], list[tuple[Tensor, Tensor]]]] = {}

    def pack(
        self, chain: Chain, members: Sequence[nn.Module], layouts: Sequence[WeightLayout]
    ) -> str | None:
        """Pack the weights of one chain, unless they are.

        Returns:
            The reason why they cannot be packed, None if they are now. Nothing has changed then.
        """
        current = {p.name for p in chain.packings if p.is_current(members)}
        if not layouts or current == {layout.name for layout in layouts}:
            return None
        if self._holders is None:
            self._holders = _holders(self._model)
            self._packings = _packings_in(self._model)
        before: list[tuple[Tensor, Tensor]] = []
        had = chain.packings
        self._undo[id(chain)] = (chain, had, before)
        try:
            for packing in chain.packings:
                before += [(p, p.data) for member in members for p in member.parameters()]
                packing.separate(members)
            packings = []
            for layout in layouts:
                views = _find(layout, chain.roles, members)
                self._check(views, chain.packings)
                packings.append(_pack(layout, views, before))
            chain.set_packings(tuple(packings))
            self._packings += packings
        except _Refused as refused:
            self.give_back(chain)
            self._undo[id(chain)] = (chain, had, [])
            chain.set_packings(tuple(p.refused_for(str(refused), members) for p in had))
            return str(refused)
        return None

    def give_back(self, chain: Chain) -> None:
        """Undo what this packer did to a chain's weights."""
        _, packings, before = self._undo.pop(id(chain), (chain, chain.packings, []))
        for parameter, data in reversed(before):
            parameter.data = data
        chain.set_packings(packings)

    def give_all_back(self) -> None:
        """Undo all that this packer did."""
        for chain, *_ in list(self._undo.values()):
            self.give_back(chain)

    def _check(self, weights: Sequence[_Weight], own: Sequence[Packing]) -> None:
        """Refuse weights that cannot be moved without a trace."""
        first = weights[0].parameter
        holders = self._holders or {}
        for weight in weights:
            parameter, what = weight.parameter, f"{weight.path} cannot be packed: it"
            if type(parameter) is not nn.Parameter:
                raise _Refused(f"{what} is a {type(parameter).__name__}")
            if parameter.device.type == "meta" or parameter.layout is not torch.strided:
                raise _Refused(f"{what} is on {parameter.device}, {parameter.layout}")
            if parameter.is_inference():
                raise _Refused(f"{what} was made in inference mode")
            if parameter.device.type == "cpu" and parameter.is_shared():  # type: ignore[no-untyped-call]
                raise _Refused(f"{what} is in memory that other processes share")
            if parameter.device.type == "cpu" and parameter.is_pinned():
                raise _Refused(f"{what} is in pinned memory")
            if parameter.dtype is not first.dtype or parameter.device != first.device:
                raise _Refused(
                    f"{what} is in {parameter.dtype} on {parameter.device}, {weights[0].path} in "
                    f"{first.dtype} on {first.device}"
                )
            if not parameter.dim() or not parameter.numel() or not parameter.is_contiguous():
                raise _Refused(f"{what} is empty, a single number, or not contiguous")
            storage = parameter.untyped_storage()
            if storage.nbytes() != parameter.nbytes:
                raise _Refused(f"{what} is a view of a larger storage")
            if any(p.holds(parameter) for p in self._packings if p not in own):
                raise _Refused(f"{what} is packed for another group")
            if holders.get(storage.data_ptr(), 0) > 1:
                raise _Refused(f"{what} is shared with another parameter or buffer")


class _Refused(Exception):
    """The weights cannot be packed; caught in this file."""


@dataclass(frozen=True)
class _Weight:
    member: int
    modules: tuple[str, ...]
    key: str
    path: str
    parameter: nn.Parameter


def _find(
    layout: WeightLayout, roles: Sequence[str], members: Sequence[nn.Module]
) -> list[_Weight]:
    found = []
    for path in layout.weights:
        role, *modules, key = path.split(".")
        owner: nn.Module | None = members[roles.index(role)]
        for name in modules:
            owner = None if owner is None else owner._modules.get(name)
        parameter = None if owner is None else owner._parameters.get(key)
        if parameter is None:
            raise _Refused(f"there is no parameter {path}")
        found.append(_Weight(roles.index(role), tuple(modules), key, path, parameter))
    return found


def _pack(
    layout: WeightLayout, weights: Sequence[_Weight], before: list[tuple[Tensor, Tensor]]
) -> Packing:
    """Pack, check, then move the parameters; adds their old data to `before`."""
    with torch.inference_mode(False), torch.no_grad():
        data = [weight.parameter.detach() for weight in weights]
        shapes = [tensor.shape for tensor in data]
        try:
            packed = layout.pack([tensor.detach() for tensor in data])
            views = list(layout.unpack(packed, shapes))
        except Exception as error:
            raise _Refused(f"the layout {layout.name!r} failed: {error!r}") from error
        reason = _why_not_these(packed, views, data)
        if reason is not None:
            raise _Refused(f"the layout {layout.name!r} is refused: {reason}")
        for weight, view in zip(weights, views, strict=True):
            before.append((weight.parameter, weight.parameter.data))
            weight.parameter.data = alias_of(view)
    return Packing(
        layout.name,
        tuple(
            WeightView(w.member, w.modules, w.key, int(v.storage_offset()), v.shape, v.stride())
            for w, v in zip(weights, views, strict=True)
        ),
        packed.shape,
        packed.stride(),
        int(packed.storage_offset()),
        packed.dtype,
        StorageWeakRef(packed.untyped_storage()),  # type: ignore[no-untyped-call]
    )


def _why_not_these(packed: Tensor, views: list[Tensor], data: list[Tensor]) -> str | None:
    """Why the parameters cannot become these views, or None."""
    like = data[0]
    if type(packed) is not Tensor or packed.dtype is not like.dtype or packed.device != like.device:
        return f"pack gave no tensor in {like.dtype} on {like.device}"
    if packed.untyped_storage().nbytes() != sum(tensor.nbytes for tensor in data):
        return "the packed tensor is not of the size of the weights together"
    if len(views) != len(data):
        return f"unpack gave {len(views)} views for {len(data)} weights"
    storage = packed.untyped_storage().data_ptr()
    for view, tensor in zip(views, data, strict=True):
        if type(view) is not Tensor or view.untyped_storage().data_ptr() != storage:
            return "unpack gave a copy, not a view of the packed tensor"
        if (view.shape, view.stride(), view.dtype) != (tensor.shape, tensor.stride(), tensor.dtype):
            return (
                f"unpack gave a view of shape {tuple(view.shape)} with strides {view.stride()} for "
                f"a weight of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        if not torch.equal(_bits(view), _bits(tensor)):
            return "unpack gave other values than the weights"
        if view.storage_offset() * view.element_size() % _ALIGNMENT:
            return f"a view would not start at a multiple of {_ALIGNMENT} bytes"
    spans = sorted((view.storage_offset(), view.numel()) for view in views)
    if any(start + size > following for (start, size), (following, _) in itertools.pairwise(spans)):
        return "unpack gave views that overlap"
    return None


def _packings_in(model: nn.Module) -> list[Packing]:
    return [packing for found in chains_in(model) for packing in found.chain.packings]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _holders(model: nn.Module) -> dict[int, int]:
    """How many parameters and buffers of the model lie in each storage."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if type(tensor) in (nn.Parameter, Tensor) and tensor.layout is torch.strided:  # type: ignore[union-attr]
                address = tensor.untyped_storage().data_ptr()  # type: ignore[union-attr]
                counts[address] = counts.get(address, 0) + 1
    return counts
