"""What functions do and ask, as far as their code tells."""

from __future__ import annotations

import ast
import builtins
import dis
import linecache
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType, FunctionType
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


def types_asked_for(frame: FrameType) -> Any:
    """The second argument of the `isinstance` call a frame is at, `None` if it cannot be told."""
    if frame.f_code.co_name == "__instancecheck__":
        # A metaclass in Python, as those of Parameter and of the abstract base classes.
        return frame.f_locals[frame.f_code.co_varnames[0]]
    if not hasattr(frame.f_code, "co_positions"):
        return None
    first, last, start, end = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    if first is None or first != last:
        return None
    line = linecache.getline(frame.f_code.co_filename, first).encode()
    try:
        call = ast.parse(line[start:end].decode().strip(), mode="eval").body
        if isinstance(call, ast.Call) and _value_of(call.func, frame) is isinstance:
            return _value_of(call.args[1], frame)
    except (SyntaxError, LookupError, AttributeError, TypeError):
        pass
    return None


def _value_of(node: ast.expr, frame: FrameType) -> Any:
    """The value of a name, an attribute, a tuple or a union of them."""
    if isinstance(node, ast.Name):
        for scope in (frame.f_locals, frame.f_globals, vars(builtins)):
            if node.id in scope:
                return scope[node.id]
    elif isinstance(node, ast.Attribute):
        return getattr(_value_of(node.value, frame), node.attr)
    elif isinstance(node, ast.Tuple):
        return tuple(_value_of(item, frame) for item in node.elts)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _value_of(node.left, frame) | _value_of(node.right, frame)
    raise LookupError(ast.dump(node))
