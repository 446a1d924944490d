"""What functions do and ask, as far as their code tells."""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.overrides import get_ignored_functions

from .bytecode import Load, callees_of, function_of, is_of_torch, layers_of, loads_in, self_of
from .originals import original_of

# An `isinstance` with these alone is false of a tensor and of a value that stands for one.
_NOT_TENSORS = frozenset(
    ("tuple", "list", "dict", "set", "int", "float", "bool", "str", "bytes", "complex", "slice")
)

_WAYS_TO_ANY_CHILD = {
    "_modules", "modules", "named_modules", "children", "named_children", "get_submodule",
    "__dict__", "vars", "getattr",
}  # fmt: skip
# Where torch keeps its operations. What else is built in, such as the `apply` of an
# `autograd.Function`, believes the answer.
_OPERATIONS = tuple(f"torch._C._{name}" for name in ("nn", "special", "linalg", "fft"))


@lru_cache(maxsize=4096)
def asks_for_tensors(code: CodeType) -> bool:
    """Whether the code may ask if something is a tensor, in whatever way."""
    if any(instruction.opname == "MATCH_CLASS" for instruction in dis.get_instructions(code)):
        return True
    for load in loads_in(code, "self" if code.co_varnames[:1] == ("self",) else ""):
        names = {load.name, *load.attributes}
        if {"is_tensor", "issubclass"} & names or "__class__" in load.attributes:
            return True
        if _asks_for_type(load):
            return True
        if load.name == "isinstance":
            classes = {name for name in load.given or () if not name.startswith("local ")}
            if not classes or classes - _NOT_TENSORS:
                return True
    return False


def _asks_for_type(load: Load) -> bool:
    """Whether it is `type`, but for `type(self)`."""
    return load.kind == "global" and load.name == "type" and load.given != frozenset()


def _asks_for_torch_function(load: Load) -> bool:
    return any("has_torch_function" in name for name in (load.name, *load.attributes))


def code_that_asks_for_type(
    module: nn.Module, members: set[int], known: dict[type, str | None]
) -> str | None:
    """What code around the members asks: `type(...)` or `has_torch_function`; None if nothing.

    Looks at the `forward` of the module and of everything below it but the members, and at
    the functions that those name, as far as they are Python and outside of torch and of
    Python's own library. `known` keeps what was found for a class.
    """
    pending: list[Any] = [module]
    seen = set()
    while pending:
        current = pending.pop()
        pending.extend(child for child in current.children() if id(child) not in members)
        if type(current) not in seen:
            seen.add(type(current))
            cls: Any = original_of(type(current))
            if cls not in known:
                known[cls] = _what_asks_for_type(cls)
            asking = known[cls]
            if asking is not None:
                return asking
    return None


def _what_asks_for_type(cls: Any) -> str | None:
    for function, owner in _reached_from(cls):
        me = self_of(function) if owner is not None else ""
        loads = loads_in(function.__code__, me)
        if any(map(_asks_for_type, loads)):
            return f"{function.__qualname__} asks for type(...)"
        if any(map(_asks_for_torch_function, loads)):
            return f"{function.__qualname__} asks has_torch_function(...)"
    return None


def _reached_from(cls: Any) -> Iterator[tuple[FunctionType, type | None]]:
    """The functions that a class's `forward` may run, but those of torch and of Python's library.

    Yields:
        A function, and for methods the class they are called on.
    """
    pending: list[tuple[FunctionType, type | None]] = [(f, cls) for f in layers_of(cls.forward)]
    seen: set[FunctionType] = set()
    while pending:
        function, owner = pending.pop()
        package = (function.__module__ or "").partition(".")[0]
        if function not in seen and package not in sys.stdlib_module_names:
            seen.add(function)
            yield function, owner
            pending += callees_of(function, owner)


def module_with_a_way_of_its_own(module: nn.Module, members: Sequence[nn.Module]) -> str | None:
    """The name of a module that may get a captured output and treats it in another way.

    Attention and its layers in torch ask `has_torch_function`, and what has one goes a slower
    way, which rounds differently and fills padding differently. A compiled module is compiled
    once more for it. A module that the code calls before any member whose output is captured
    gets none.
    """
    ids, collectors = set(map(id, members)), set(map(id, members[:-1]))
    asking: dict[str, str] = {}
    capturing = set()
    for name, child in module._modules.items():
        pending = [] if child is None else [child]
        while pending:
            current = pending.pop()
            if id(current) in collectors:
                capturing.add(name)
            if id(current) not in ids:
                pending.extend(current.children())
                if any(map(_has_a_way_of_its_own, type(current).__mro__)):
                    asking[name] = type(current).__name__
                elif is_compiled(current):
                    asking[name] = f"a compiled {type(current).__name__}"
    order = _order_of_calls(original_of(type(module))) if asking else {}
    first = min((order.get(name, -1) for name in capturing), default=-1)
    late = (cls for name, cls in asking.items() if not order.get(name, first) < first)
    return next(late, None)


def _order_of_calls(cls: Any) -> dict[str, int]:
    """`call_order` of a `forward`, without the names that something else may call as well."""
    layers = layers_of(cls.forward)
    if len(layers) != 1:
        return {}  # A decorator may run it twice.
    names = {function: {*_names_in(function.__code__)} for function, _ in _reached_from(cls)}
    if any(found & _WAYS_TO_ANY_CHILD for found in names.values()):
        return {}
    names.pop(layers[0], None)
    elsewhere = set().union(*names.values())
    order = call_order(layers[0].__code__)
    return {name: at for name, at in order.items() if name not in elsewhere}


def _names_in(code: CodeType) -> Iterator[str]:
    """The names that code, and what is defined in it, takes of anything."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module, and of it alone, go through `torch.compile`."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _has_a_way_of_its_own(cls: Any) -> bool:
    function = function_of(cls.__dict__.get("forward"))
    names = () if function is None else function.__code__.co_names
    return is_of_torch(function) and "has_torch_function" in names


@lru_cache(maxsize=4096)
def call_order(code: CodeType) -> dict[str, int]:
    """Where a method calls its own attributes, as `self.norm(...)`: position by name.

    Only names for which the source leaves no doubt: mentioned once, in that call, outside of
    loops and inner functions; none where `self` itself is given to something or called. So of
    two such names, if both are called in one run of the method, the lower is first.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return {}
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return {}
    visitor = _Calls(definition.args.args[0].arg)
    for statement in definition.body:
        visitor.visit(statement)
    order = [] if visitor.gives_itself else visitor.called
    return {name: order.index(name) for name in order if visitor.mentioned.count(name) == 1}


class _Calls(ast.NodeVisitor):
    """Collects the calls of attributes of `self`, in the order in which they run."""

    def __init__(self, me: str) -> None:
        self.me = me
        self.depth = 0
        self.gives_itself = False
        self.called: list[str] = []
        self.mentioned: list[str] = []

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and self._is_own(node.func) and not self.depth:
            self.called.append(node.func.attr)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self._is_own(node):
            self.mentioned.append(node.attr)
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.gives_itself |= node.id == self.me

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


def is_reading_class(frame: FrameType) -> bool:
    """Whether a frame is at `value.__class__`."""
    instructions = dis.get_instructions(frame.f_code)
    at = next((i for i in instructions if i.offset == frame.f_lasti), None)
    return at is not None and at.opname == "LOAD_ATTR" and at.argval == "__class__"


def types_asked_for(frame: FrameType) -> Any:
    """The second argument of the `isinstance` call a frame is at, `None` if it cannot be told."""
    if frame.f_code.co_name == "__instancecheck__":
        # A metaclass in Python, as those of Parameter and of the abstract base classes.
        return frame.f_locals[frame.f_code.co_varnames[0]]
    call = _call_at(frame)
    try:
        if call is not None and _value_of(call.func, frame) is isinstance:
            return _value_of(call.args[1], frame)
    except (LookupError, AttributeError, TypeError):
        pass
    return None


def is_calling_torch(frame: FrameType) -> bool:
    """Whether a frame is at the call of an operation of torch that asks for `__torch_function__`.

    Such an operation may ask first if its argument is a number.
    """
    call = _call_at(frame)
    try:
        function = None if call is None else _value_of(call.func, frame)
    except (LookupError, AttributeError, TypeError):
        return False
    if not isinstance(function, BuiltinFunctionType):
        return False
    if isinstance(function.__self__, Tensor):
        return getattr(Tensor, function.__name__, None) not in get_ignored_functions()
    is_operation = "_VariableFunctions" in function.__qualname__
    is_operation = is_operation or function.__module__ in _OPERATIONS
    return is_operation and function not in get_ignored_functions()


def _call_at(frame: FrameType) -> ast.Call | None:
    """The call a frame is at, None if it cannot be told."""
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
    try:
        call = ast.parse(b"".join(lines).decode().strip(), mode="eval").body
    except SyntaxError:
        return None
    return call if isinstance(call, ast.Call) else None


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
