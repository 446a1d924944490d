"""What a family says of itself, looked at when it is registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import FusionError, NotFusableError
from ..paths import check_paths, check_wildcard_counts
from ..seat import check_roles
from .layout import WeightLayout

if TYPE_CHECKING:
    from .family import FusionFamily


def check_family(family: FusionFamily) -> None:
    """Refuse a family whose attributes are none of their kind.

    Raises:
        NotFusableError: with the family, the attribute, its value and what it has to be.
    """
    for attribute in ("name", "kernel", "roles"):
        if not getattr(family, attribute, None):
            raise NotFusableError(
                f"The family {type(family).__name__} has no {attribute}. Set it as a class "
                f"attribute."
            )
    if not isinstance(family.name, str):
        raise _wrong(family, "name", "a text, such as 'norm_linear'")
    if not isinstance(family.kernel, str):
        raise _wrong(family, "kernel", "the layer name in a kernel mapping, such as 'RMSNormMLP'")
    _check_roles(family)
    _check_paths(family)
    inputs: Any = family.inputs
    if inputs is not None and (type(inputs) is not int or inputs < 1):
        raise _wrong(family, "inputs", "a number of tensors from 1 on, or None for any number")
    _check_layouts(family)


def _wrong(family: FusionFamily, attribute: str, wanted: str) -> NotFusableError:
    return NotFusableError(
        f"{attribute} of the family {family.name!r} is {wanted}, not "
        f"{getattr(family, attribute)!r}."
    )


def _are_names(values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(isinstance(name, str) for name in values)


def _check_roles(family: FusionFamily) -> None:
    if not isinstance(family.roles, tuple) or not _are_names(family.roles):
        raise _wrong(family, "roles", "a tuple of names, such as ('norm', 'mlp')")
    try:
        check_roles(family.roles)
    except FusionError as error:
        wrong = str(error).partition(". ")[0]
        raise NotFusableError(f"roles of the family {family.name!r}: {wrong}.") from None


def _check_paths(family: FusionFamily) -> None:
    topologies: Any = family.paths
    if not isinstance(topologies, (tuple, list)) or not all(
        isinstance(paths, (tuple, list)) and len(paths) == len(family.roles) for paths in topologies
    ):
        example = tuple(f"layers.*.{role}" for role in family.roles)
        raise _wrong(
            family,
            "paths",
            f"a tuple of tuples, each with a path for every role ({', '.join(family.roles)}), "
            f"such as {(example,)!r}",
        )
    for paths in topologies:
        try:
            check_wildcard_counts(check_paths(paths))
        except FusionError as error:
            raise NotFusableError(f"paths of the family {family.name!r}: {error}") from None


def _check_layouts(family: FusionFamily) -> None:
    layouts: Any = family.layouts
    are = isinstance(layouts, (tuple, list)) and all(isinstance(x, WeightLayout) for x in layouts)
    names = [layout.name for layout in layouts] if are else [None]
    if not _are_names(names) or len(set(names)) < len(names):
        raise _wrong(family, "layouts", "a tuple of WeightLayout, each with a name of its own")
    for layout in layouts:
        _check_layout(layout, family, [path for other in layouts for path in other.weights])


def _check_layout(layout: WeightLayout, family: FusionFamily, paths: Sequence[str]) -> None:
    if not _are_names(layout.weights):
        raise NotFusableError(
            f"weights of the layout {layout.name!r} of the family {family.name!r} is a tuple of "
            f"paths, not {layout.weights!r}."
        )
    for path in layout.weights:
        if path.partition(".")[0] not in family.roles or "." not in path:
            raise NotFusableError(
                f"{path!r} in the layout {layout.name!r} has to be the path of a parameter, "
                f"starting with a role of the family {family.name!r}: {', '.join(family.roles)}."
            )
    if not layout.weights or any(paths.count(path) > 1 for path in layout.weights):
        raise NotFusableError(
            f"The layout {layout.name!r} of the family {family.name!r} names no weight, or one "
            f"that is packed already."
        )
