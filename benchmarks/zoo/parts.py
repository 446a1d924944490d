"""A tower as the part of a larger model: with the sizes and the inputs that it has there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .classes import classes_of, named

Inputs = dict[str, Any]


def around(model_type: str) -> list[str]:
    """The model types that may have this one inside: those of the same package."""
    package = CONFIG_MAPPING[model_type].__module__.rpartition(".")[0]
    return [
        name
        for name in CONFIG_MAPPING
        if name != model_type and CONFIG_MAPPING[name].__module__.rpartition(".")[0] == package
    ]


def called_inside(
    model: nn.Module, model_type: str, run: Any
) -> Iterator[tuple[nn.Module, Inputs]]:
    """The modules of a type's classes that a run of the model calls, with what they are given."""
    classes = tuple(filter(None, (named(model_type, name) for name in classes_of(model_type))))
    calls: dict[nn.Module, Inputs] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        given = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
        calls.setdefault(module, copy.deepcopy(given))

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, classes)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    yield from calls.items()
