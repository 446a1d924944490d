"""What a family is, and the register of families."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import FusionError, NotFusableError, PathNotFoundError
from ..paths import find_groups
from .declarations import check_family
from .layout import WeightLayout

_FAMILIES: dict[str, FusionFamily] = {}
_OPTIONS = ("include", "exclude", "mode")


class FusionFamily:
    """A kind of group that a kernel can take over, and how to find it in a model.

    Subclass it, set the class attributes, and register it with `register_family`.

    Attributes:
        name: the name in `fuse(model, {name: True})`.
        kernel: the layer name for the `kernels` library.
        roles: the names by which the kernel reaches the members, in execution order.
        paths: glob paths, one tuple per topology with a path per role. Those that match
            nothing are passed over.
        inputs: how many inputs the kernel takes, None where any number will do.
        layouts: how the kernel wants weights to lie side by side, if it does.

    Examples:
        >>> class NormLinear(FusionFamily):
        ...     name, kernel, roles = "norm_linear", "NormLinear", ("norm", "linear")
        ...     paths = (("layers.*.norm", "layers.*.linear"),)
        ...
        ...     def is_fusable(self, members):
        ...         norm, linear = members
        ...         return None if type(linear) is nn.Linear else "linear is no nn.Linear"
        >>> NormLinear().is_fusable([nn.LayerNorm(4), nn.ReLU()])
        'linear is no nn.Linear'
    """

    name: str
    kernel: str
    roles: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...] = ()
    inputs: int | None = None
    layouts: tuple[WeightLayout, ...] = ()

    def groups(self, model: nn.Module) -> Iterable[tuple[str, ...]]:
        """Where in the model a group of this family may be: a path per role."""
        for patterns in self.paths:
            try:
                found, _ = find_groups(model, patterns)
            except PathNotFoundError:
                continue
            yield from (group.paths for group in found)

    def is_fusable(self, members: Sequence[nn.Module]) -> str | None:
        """The reason why the kernel cannot have these members, or None."""
        return None

    def forget(self) -> None:
        """Drop what was found out about modules; called before and after each `fuse`."""

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        """Small random inputs on which the kernel is compared with the members.

        Each is a tuple of the chain's inputs, made on the CPU; the comparison moves them to
        the members' device. Those that the members do not take are passed over. No samples, as
        here, means that nothing is compared.
        """
        return []


Family = TypeVar("Family", bound="FusionFamily | type[FusionFamily]")


def register_family(family: Family) -> Family:
    """Add a family to those that `fuse` looks for; usable as a class decorator.

    Args:
        family: an instance, or a class that is made without arguments.

    Raises:
        NotFusableError: it lacks a name, a kernel or roles, an attribute is none of its kind, or
            its name is taken.
    """
    instance: Any = family() if isinstance(family, type) else family
    if not isinstance(instance, FusionFamily):
        raise NotFusableError(
            f"A family is a FusionFamily, not {type(instance).__name__}. Subclass FusionFamily."
        )
    check_family(instance)
    known = _FAMILIES.setdefault(instance.name, instance)
    if known is not instance and _name_of(known) != _name_of(instance):
        raise NotFusableError(
            f"There is a family {instance.name!r} already, {type(known).__name__} of "
            f"{type(known).__module__}. Give this one "
            f"another name."
        )
    _FAMILIES[instance.name] = instance  # A notebook cell may define the same class again.
    return family


def _name_of(family: FusionFamily) -> tuple[str, str]:
    return type(family).__module__, type(family).__qualname__


def family_named(name: str | None) -> FusionFamily | None:
    """The registered family of that name."""
    return _FAMILIES.get(name or "")


def chosen_families(
    families: bool | Mapping[str, Any],
) -> list[tuple[FusionFamily, dict[str, Any]]]:
    """The families that an argument of `fuse` names, with their options."""
    if isinstance(families, bool):
        return [(family, {}) for family in _FAMILIES.values()] if families else []
    if not isinstance(families, Mapping):
        raise FusionError(
            f"families is True or a mapping from names to True, False or options, such as "
            f"{{'rms_norm_mlp': True}}, not {families!r}."
        )
    chosen = []
    for name, options in families.items():
        if name not in _FAMILIES:
            near = difflib.get_close_matches(str(name), _FAMILIES, n=3) or list(_FAMILIES)
            raise NotFusableError(
                f"There is no family {name!r}. Did you mean {' or '.join(map(repr, near))}?"
            )
        if options is False or options is None:
            continue
        chosen.append((_FAMILIES[name], _checked_options(name, options)))
    return chosen


def _checked_options(name: str, options: Any) -> dict[str, Any]:
    if options is True:
        return {}
    if not isinstance(options, Mapping):
        raise FusionError(
            f"The options of {name!r} are True, False or a mapping with {', '.join(_OPTIONS)}, "
            f"not {options!r}."
        )
    unknown = [option for option in options if option not in _OPTIONS]
    if unknown:
        raise FusionError(
            f"{name!r} has no option {unknown[0]!r}. The options are {', '.join(_OPTIONS)}."
        )
    return dict(options)
