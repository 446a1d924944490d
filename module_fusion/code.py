"""What functions do, as far as the names in their code tell."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_LOAD_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")


def function_of(method: Any) -> FunctionType | None:
    """The Python function below decorators, None if there is none."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method if isinstance(method, FunctionType) else None


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> frozenset[str]:
    """Globals, attributes and keywords that a function and the functions in it use.

    Attributes of the function's own `self` do not count, but for `training`: a child that is
    called `dropout` does not make its parent random.
    """
    me = code.co_varnames[0] if code.co_varnames else ""
    names: set[str] = set()
    previous: Any = None
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        if isinstance(value, str) and instruction.opname.startswith(("LOAD_", "STORE_")):
            own = instruction.opname in _LOAD_ATTRIBUTE and previous == me
            if value == "training" or not own:
                names.add(value)
        previous = value[-1] if isinstance(value, tuple) and value else value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
        elif isinstance(constant, tuple):
            names.update(item for item in constant if isinstance(item, str))
    return frozenset(names)


@lru_cache(maxsize=4096)
def globals_in(code: CodeType) -> frozenset[str]:
    """Globals and builtins that a function and the functions in it load."""
    own = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    inner = (globals_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(own.union(*inner))


@lru_cache(maxsize=4096)
def asks_for_tensors(code: CodeType) -> bool:
    """Whether the code may ask if something is a tensor, in whatever way."""
    names = names_in(code)
    return "type" in globals_in(code) or "is_tensor" in names or {"isinstance", "Tensor"} <= names


def code_that_asks_for_type(module: nn.Module, members: set[int]) -> str | None:
    """The name of code around the members that calls `type(...)`, None if there is none.

    Looks at the `forward` of the module and of everything below it but the members, and at
    the functions that those name, as far as they are Python and outside of torch.
    """
    pending, seen = [module], set()
    while pending:
        current = pending.pop()
        pending.extend(child for child in current.children() if id(child) not in members)
        if type(current) in seen:
            continue
        seen.add(type(current))
        for function in _reachable(type(current).forward):
            if "type" in globals_in(function.__code__):
                return function.__qualname__
    return None


def _reachable(method: Any) -> Iterator[FunctionType]:
    """The function and those that it names, directly or not."""
    pending, seen = [function_of(method)], set()
    while pending:
        function = pending.pop()
        if function is None or function in seen or function.__module__.startswith("torch"):
            continue
        seen.add(function)
        yield function
        for name in globals_in(function.__code__):
            pending.append(function_of(function.__globals__.get(name)))
        for cell in function.__closure__ or ():
            pending.append(function_of(_contents(cell)))


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
