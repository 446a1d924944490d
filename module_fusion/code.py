"""What a function does, as far as the names in its code tell."""

from __future__ import annotations

from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn


def code_of_forward(cls: type[nn.Module]) -> CodeType | None:
    """The code of a class's `forward` below its decorators, None if it is not in Python."""
    function: Any = cls.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__code__", None)


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Global names, attributes and keywords that a function and the functions in it use."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.extend(names_in(constant))
        elif isinstance(constant, tuple):
            names.extend(item for item in constant if isinstance(item, str))
    return tuple(names)


def asks_for_types(code: CodeType) -> bool:
    """Whether the code may ask if something is a tensor.

    `type(x)` cannot be intercepted, and torch.compile answers `isinstance` without asking
    the object, so a value that only stands for a tensor must not be seen by such code.
    """
    return any(name in ("type", "is_tensor", "Tensor") for name in names_in(code))
