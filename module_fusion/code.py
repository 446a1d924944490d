"""What a function does, as far as the names in its code tell."""

from __future__ import annotations

import dis
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
def names_in(code: CodeType) -> frozenset[str]:
    """Globals, attributes and keywords that a function and the functions in it use."""
    keywords = {
        item for constant in code.co_consts if isinstance(constant, tuple) for item in constant
    }
    inner = (names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union({k for k in keywords if isinstance(k, str)}, *inner)


@lru_cache(maxsize=4096)
def asks_for_types(code: CodeType) -> bool:
    """Whether the code may ask if something is a tensor.

    `type(x)` cannot be intercepted, and torch.compile answers `isinstance` without asking
    the object, so a value that only stands for a tensor must not be seen by such code.
    """
    loads = [i for i in dis.get_instructions(code) if i.opname.startswith("LOAD_")]
    names = {i.argval for i in loads if isinstance(i.argval, str)}
    loaded_globally = {i.argval for i in loads if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return (
        "type" in loaded_globally
        or "is_tensor" in names
        or ("isinstance" in names and "Tensor" in names)
        or any(asks_for_types(inner) for inner in code.co_consts if isinstance(inner, CodeType))
    )
