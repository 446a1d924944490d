"""What functions do and ask, as far as their code tells."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import linecache
import textwrap
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

    Attributes of the function's own `self` do not count: a child that is called `dropout` does
    not make its parent random. Only `training` does, as `self.training`.
    """
    names = {name for name, own in _loads(code) if not own}
    names |= {"self.training" for name, own in _loads(code) if own and name == "training"}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
        elif isinstance(constant, tuple):
            names.update(item for item in constant if isinstance(item, str))
    return frozenset(names)


@lru_cache(maxsize=4096)
def own_attributes_in(code: CodeType) -> frozenset[str]:
    """Attributes of its own `self` that a function loads."""
    return frozenset(name for name, own in _loads(code) if own)


def _loads(code: CodeType) -> Iterator[tuple[str, bool]]:
    """The names that code loads or stores, and whether each is an attribute of its `self`."""
    me = code.co_varnames[0] if code.co_varnames else ""
    previous: Any = None
    for instruction in dis.get_instructions(code):
        value = instruction.argval
        if isinstance(value, str) and instruction.opname.startswith(("LOAD_", "STORE_")):
            yield value, instruction.opname in _LOAD_ATTRIBUTE and previous == me
        previous = value[-1] if isinstance(value, tuple) and value else value


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
    asking = {"type", "is_tensor", "__class__", "isinstance", "issubclass"} & names
    matches = any(instruction.opname == "MATCH_CLASS" for instruction in dis.get_instructions(code))
    return matches or bool(asking - {"isinstance"}) or bool(asking and "Tensor" in names)


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


def forward_asks_for_tensors(cls: type[nn.Module]) -> bool:
    """Whether a class's `forward`, or a function it names, may ask if something is a tensor."""
    return any(asks_for_tensors(function.__code__) for function in _reachable(cls.forward))


def _reachable(method: Any) -> Iterator[FunctionType]:
    """The function and those that it names, directly or not."""
    pending, seen = [function_of(method)], set()
    while pending:
        function = pending.pop()
        if function is None or function in seen or _is_of_torch(function):
            continue
        seen.add(function)
        yield function
        for name in globals_in(function.__code__):
            pending.append(function_of(function.__globals__.get(name)))
        for cell in function.__closure__ or ():
            pending.append(function_of(_contents(cell)))


@lru_cache(maxsize=4096)
def call_order(function: FunctionType) -> dict[str, int]:
    """Where a method calls its own attributes, as `self.norm(...)`: position by name.

    Only names for which the source leaves no doubt: mentioned once, in that call, outside of
    loops and inner functions. So of two such names, if both are called, the lower is first.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return {}
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return {}
    visitor = _Calls(definition.args.args[0].arg)
    for statement in definition.body:
        visitor.visit(statement)
    order = visitor.called
    return {name: order.index(name) for name in order if visitor.mentioned.count(name) == 1}


class _Calls(ast.NodeVisitor):
    """Collects the calls of attributes of `self`, in the order in which they run."""

    def __init__(self, me: str) -> None:
        self.me = me
        self.depth = 0
        self.called: list[str] = []
        self.mentioned: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and self._is_own(node.func) and not self.depth:
            self.called.append(node.func.attr)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if self._is_own(node):
            self.mentioned.append(node.attr)

    def visit_Assign(self, node: ast.Assign) -> None:
        for part in (node.value, *node.targets):
            self.visit(part)

    def _visit_many_times(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_For = visit_While = visit_ListComp = visit_SetComp = visit_DictComp = _visit_many_times
    visit_GeneratorExp = visit_Lambda = visit_FunctionDef = visit_ClassDef = _visit_many_times

    def _is_own(self, node: ast.Attribute) -> bool:
        return isinstance(node.value, ast.Name) and node.value.id == self.me


def names_of_forward(cls: type[nn.Module]) -> frozenset[str] | None:
    """Names that a class's `forward` uses, itself or in what it calls.

    Follows functions it names, its own methods, and `super()`. None where there is no Python.
    """
    pending = [function_of(cls.forward)]
    if pending[0] is None:
        return None
    names: set[str] = set(names_in(pending[0].__code__))
    seen: set[FunctionType] = set()
    while pending:
        for function in _reachable(pending.pop()):
            if function in seen:
                continue
            seen.add(function)
            names |= names_in(function.__code__)
            for name in own_attributes_in(function.__code__):
                pending.append(function_of(inspect.getattr_static(cls, name, None)))
            if "super" in globals_in(function.__code__):
                pending += [function_of(base.__dict__.get("forward")) for base in cls.__mro__]
    return frozenset(names)


def _is_of_torch(function: FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "torch"


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
    if first is None or last is None:
        return None
    lines = [
        linecache.getline(frame.f_code.co_filename, n).encode() for n in range(first, last + 1)
    ]
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][start:]
    source = b"".join(lines).decode().strip()
    try:
        call = ast.parse(source, mode="eval").body
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
