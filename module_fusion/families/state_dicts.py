"""State dicts in the packed format and back: what a model's packed weights are called in files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FusionError
from ..inventory import chains_in
from .family import family_named
from .layout import WeightLayout, split


def packed_layouts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How the weights of a fused model are packed, as plain data that JSON can hold.

    Args:
        model: a model that `fuse` packed weights in.

    Returns:
        For each packed tensor its key in a packed state dict, with the family, the layout's name
        and the keys and shapes of the weights in it. Nothing for a model without layouts.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in chains_in(model):
        for packing in group.chain.packings:
            weights = [
                [f"{group.paths[view.member]}.{view.path}", list(view.shape)]
                for view in packing.views
            ]
            key = f"{group.paths[-1]}.fused_kernel.{packing.name}"
            found[key] = {
                "family": group.chain.family,
                "layout": packing.name,
                "weights": weights,
                "is_split": _layout(group.chain.family, packing.name, key).unpack is split,
            }
    return found


def pack_state_dict(
    state_dict: Mapping[str, Tensor], layouts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Convert a state dict to the packed format.

    Args:
        state_dict: in the original format, as `model.state_dict()` always is.
        layouts: what `packed_layouts(model)` returned.

    Returns:
        A new state dict with a packed tensor in the place of the first of its weights. Weights
        that are not all there stay as they are.

    Raises:
        FusionError: the family of a layout is not registered.

    Examples:
        >>> layouts = {
        ...     "mlp.fused_kernel.gate_up": {
        ...         "weights": [["mlp.gate.weight", [2, 3]], ["mlp.up.weight", [2, 3]]],
        ...         "is_split": True,
        ...     }
        ... }
        >>> original = {"mlp.gate.weight": torch.zeros(2, 3), "mlp.up.weight": torch.ones(2, 3)}
        >>> packed = pack_state_dict(original, layouts)
        >>> packed["mlp.fused_kernel.gate_up"].shape
        torch.Size([4, 3])
        >>> list(unpack_state_dict(packed, layouts))
        ['mlp.gate.weight', 'mlp.up.weight']
    """
    packed_of: dict[str, str] = {}
    for key, entry in layouts.items():
        keys = [weight for weight, _ in entry["weights"]]
        if all(weight in state_dict for weight in keys):
            packed_of.update(dict.fromkeys(keys, key))
    converted: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        key = packed_of.get(name, name)
        if name not in packed_of:
            converted[name] = value
        elif key not in converted:
            entry = layouts[key]
            weights = [state_dict[weight].detach() for weight, _ in entry["weights"]]
            converted[key] = _layout_of(entry, key).pack(weights)
    return converted


def unpack_state_dict(
    state_dict: Mapping[str, Tensor], layouts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Convert a state dict back to the original format.

    Args:
        state_dict: in the packed format, the original one, or a part of either.
        layouts: what `packed_layouts(model)` returned when it was packed.

    Returns:
        A new state dict in the original format, each weight in a storage of its own.

    Raises:
        FusionError: the family of a layout is not registered, or a weight has another shape.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        entry = layouts.get(key)
        if entry is None:
            converted[key] = value
            continue
        shapes = [torch.Size(shape) for _, shape in entry["weights"]]
        if sum(shape.numel() for shape in shapes) != value.numel():
            raise FusionError(
                f"{key!r} has shape {tuple(value.shape)}, which are not the weights of shapes "
                f"{', '.join(str(tuple(shape)) for shape in shapes)}. The file and its layouts "
                f"are of different models."
            )
        parts = _layout_of(entry, key).unpack(value.detach(), shapes)
        for (weight, _), part in zip(entry["weights"], parts, strict=True):
            converted[weight] = part.clone(memory_format=torch.contiguous_format)
    return converted


def _layout_of(entry: Mapping[str, Any], key: str) -> WeightLayout:
    if entry.get("is_split"):
        return WeightLayout(key, tuple(weight for weight, _ in entry["weights"]))
    return _layout(entry.get("family"), entry.get("layout"), key)


def _layout(family: str | None, name: str | None, key: str) -> WeightLayout:
    known = family_named(family)
    for layout in () if known is None else known.layouts:
        if layout.name == name:
            return layout
    raise FusionError(
        f"{key!r} is packed in the layout {name!r} of the family {family!r}, which is not "
        f"registered here. Register it first: register_family(...)."
    )
