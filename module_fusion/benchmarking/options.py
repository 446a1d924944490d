"""The options of `benchmark`, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import FusionError
from .candidates import ON_REQUEST


def check_options(model: object, options: Mapping[str, Any]) -> None:
    """Refuse a model that is no module, and options of another kind than `benchmark` has.

    Raises:
        FusionError: it says what is allowed.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(f"benchmark takes a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(options["method"], str):
        raise _refused("method", "the name of a method, such as 'generate'", options)
    for name in ("seconds", "precision"):
        if not _is_number(options[name]) or not options[name] >= 0:
            raise _refused(name, "a number that is not negative", options)
    if not _is_number(options["confidence"]) or not 0 < options["confidence"] < 1:
        raise _refused("confidence", "a number between 0 and 1, such as 0.95", options)
    if not isinstance(options["backward"], bool):
        raise _refused("backward", "True or False", options)
    if options["progress"] is not None and not isinstance(options["progress"], bool):
        raise _refused("progress", "True, False or None", options)
    compile_options = options["compile_options"]
    if compile_options is not None and not isinstance(compile_options, Mapping):
        raise _refused("compile_options", "a dict of arguments for torch.compile", options)
    names_in(options["compare"])


def names_in(compare: Any) -> list[str]:
    """The names in `compare`, each once."""
    given = [compare] if isinstance(compare, str) else compare
    known = ", ".join(map(repr, ON_REQUEST))
    if not isinstance(given, Iterable):
        raise FusionError(f"compare is a list with some of {known}, not {compare!r}.")
    names = list(given)
    unknown = [name for name in names if name not in ON_REQUEST]
    if unknown:
        raise FusionError(
            f"compare has {', '.join(map(repr, unknown))}; besides unfused and fused there are "
            f"{known}."
        )
    return list(dict.fromkeys(names))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refused(name: str, allowed: str, options: Mapping[str, Any]) -> FusionError:
    return FusionError(f"{name} is {allowed}, not {options[name]!r}.")
