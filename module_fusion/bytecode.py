"""What Python functions load, call and store, read from their bytecode."""

from __future__ import annotations

import builtins
import dis
import inspect
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from .stack import ATTRIBUTE, GLOBAL, JUMPS, SILENT, SUPER, aliases_in, asked_of, containers_in

UNKNOWN = object()
_CLOSURE = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_CLOSURE")
WRITING_KEYWORDS = frozenset(("out", "inplace", "max_norm"))
# Several of these load two variables, the second on top; argval is a tuple then.
_VARIABLE = ("LOAD_FAST", "STORE_FAST_LOAD_FAST")


class Load(NamedTuple):
    """A name that code loads, and the attributes it takes of it at once: `F`, `("silu",)`.

    Attributes:
        kind: `"global"`; `"closure"`; `"own"`, for attributes of `self`; `"super"`; `"import"`;
            `"value"`, for attributes of anything else; `"built"`, for those of a container
            that the code builds; `"me"`, for `self` itself as a value.
        name: the global or the variable, "" for the other kinds.
        attributes: taken one after the other.
        given: names that are loaded for the arguments of its call, `self` aside; None where
            it is not called then and there.
        arguments: number of arguments of that call, with keywords; None where it cannot be told.
        asked: special methods that are called of it where it is then gone, none of them where it
            is called or compared with None; None where it may be kept, or be given to anything.
    """

    kind: str
    name: str
    attributes: tuple[str, ...]
    given: frozenset[str] | None
    arguments: int | None
    asked: frozenset[str] | None


class Store(NamedTuple):
    """What code stores in place.

    `kind` is `"own"`, `"attribute"`, `"item"`, `"global"`; `"count"` for a number that is added
    to an own attribute; `"local"` for another augmented assignment; `"keyword"` for an argument
    that says where a function writes to.
    """

    kind: str
    name: str


_ME = Load("me", "", (), None, None, None)


@lru_cache(maxsize=4096)
def loads_in(code: CodeType, me: str) -> tuple[Load, ...]:
    """Everything the code and the functions in it load; `me` is the name of `self`, if any."""
    found: list[Load] = []
    instructions = list(dis.get_instructions(code))
    chain: tuple[str, str, list[str]] | None = None
    start = after = 0
    built, aliases = containers_in(code), aliases_in(code, me) if me else {}
    kept = {at for at, _ in aliases.values()}
    is_joined = False  # Whether something else may be on the stack, that was loaded elsewhere.
    for index, instruction in enumerate([*instructions, None]):
        is_joined = is_joined or (instruction is not None and instruction.is_jump_target)
        if instruction is not None and instruction.opname in SILENT:
            continue
        takes = instruction is not None and instruction.opname in ATTRIBUTE
        if instruction is not None and takes and not is_joined and chain is not None:
            chain[2].append(instruction.argval)
            after = index + 1
            continue
        if chain is not None:
            kind, name, attributes = chain
            asked = asked_of(instructions, start, after) if kind == "own" else None
            asked = frozenset() if start in kept else asked
            if kind == "value" and instructions[start].opname.startswith("LOAD_FAST"):
                kind = "built" if instructions[start].argval in built else kind
            if name or attributes:
                given, count = _given(instructions[after:], me)
                found.append(Load(kind, name, tuple(attributes), given, count, asked))
            elif kind == "own" and asked is None:
                found.append(_ME)
        chain, is_joined = None, False
        if instruction is not None and takes:
            chain = "value", "", [instruction.argval]
        elif instruction is not None and not _makes_a_closure(instruction, code, me):
            chain = _begun(instruction, me, aliases)
            if instruction.opname.startswith("LOAD_FAST") and isinstance(instruction.argval, tuple):
                first = instruction.argval[0]
                path = () if first == me else aliases[first][1] if first in aliases else None
                if path is not None:
                    found.append(_ME._replace(kind="own", attributes=path) if path else _ME)
        start, after = index, index + 1
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += loads_in(constant, _me_inside(constant, me))
    return tuple(found)


def _me_inside(code: CodeType, me: str) -> str:
    """The name of `self` in a function that is defined in a method: not its own variable."""
    return me if me in code.co_freevars else ""


def _begun(
    instruction: dis.Instruction, me: str, aliases: Mapping[str, tuple[int, tuple[str, ...]]]
) -> tuple[str, str, list[str]] | None:
    operation, value = instruction.opname, instruction.argval
    if operation in GLOBAL:
        return "global", value, []
    if operation == "IMPORT_NAME":
        return "import", value, []
    if operation in SUPER:
        return "super", "", [value]
    if operation in _CLOSURE or operation.startswith(_VARIABLE):
        name = value[-1] if isinstance(value, tuple) else value
        if name == me:
            return "own", "", []
        if name in aliases:
            return "own", "", [*aliases[name][1]]
        return ("closure", name, []) if operation in _CLOSURE else ("value", "", [])
    return None


def _makes_a_closure(instruction: dis.Instruction, code: CodeType, me: str) -> bool:
    """Whether `self` is loaded for a function that is defined here."""
    if instruction.opname.startswith("LOAD_FAST"):
        return instruction.argval == me and me in code.co_cellvars + code.co_freevars
    return instruction.opname == "LOAD_CLOSURE" and instruction.argval == me


def _given(
    instructions: list[dis.Instruction], me: str
) -> tuple[frozenset[str] | None, int | None]:
    """What is loaded to call what was loaded just before, as `self.training`; how much."""
    depth, names, previous = 0, set(), ""
    for instruction in instructions:
        operation, value = instruction.opname, instruction.argval
        if instruction.opcode in JUMPS:
            break  # What comes next is not what runs next.
        if operation in ATTRIBUTE:
            names.add(f"self.{value}" if previous == me else value)
        elif operation in GLOBAL:
            names.add(value)
        elif operation in _CLOSURE or operation.startswith(_VARIABLE):
            variables = value if isinstance(value, tuple) else (value,)
            names.update(f"local {variable}" for variable in variables if variable != me)
        if operation not in SILENT:
            previous = value[-1] if isinstance(value, tuple) and value else value
        depth += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if operation.startswith("CALL") and depth <= 0:
            return frozenset(names), None if operation == "CALL_FUNCTION_EX" else instruction.arg
        if depth < 0:
            break
    return None, None


@lru_cache(maxsize=4096)
def stores_in(code: CodeType, me: str) -> tuple[Store, ...]:
    """What the code and the functions in it write to, other than their own variables."""
    found: list[Store] = []
    is_me = is_copied = in_place = False  # Of what was loaded just before: `self`, to be added to.
    added_to = ""
    last: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if instruction.is_jump_target:
            is_me, last = False, []  # Something else may be on the stack, loaded before the jump.
        is_copied = is_copied or operation in ("COPY", "DUP_TOP")
        if operation in SILENT:
            continue
        if is_copied and operation in ATTRIBUTE:
            added_to = instruction.argval if is_me else ""
        in_place = in_place or operation.startswith("INPLACE_")
        in_place = in_place or (operation == "BINARY_OP" and instruction.argrepr.endswith("="))
        if operation in ("STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR"):
            found.append(Store("item", ""))
        elif operation in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            operation in ("STORE_DEREF", "DELETE_DEREF") and instruction.argval in code.co_freevars
        ):
            found.append(Store("global", instruction.argval))
        elif operation in ("STORE_ATTR", "DELETE_ATTR"):
            own = is_me or (in_place and instruction.argval == added_to)
            kind = "count" if _adds_a_number(last) else "own"
            found.append(Store(kind if own else "attribute", instruction.argval))
        elif operation.startswith("STORE_") and (in_place or _rebinds(instruction, me)):
            found.append(Store("local", str(instruction.argval)))
        in_place = in_place and not operation.startswith(("STORE_", "DELETE_"))
        if operation not in ("SWAP", "ROT_TWO"):
            last = [*last[-1:], instruction]
        is_me, is_copied = _begun(instruction, me, {}) == ("own", "", []), False
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found += stores_in(constant, _me_inside(constant, me))
        names = constant if isinstance(constant, tuple) else (constant,)
        found += [Store("keyword", str(name)) for name in names if name in WRITING_KEYWORDS]
    return tuple(found)


def _adds_a_number(last: list[dis.Instruction]) -> bool:
    """Whether the last two instructions are `+= 1`, or another number."""
    if len(last) < 2 or type(last[0].argval) not in (int, float):
        return False
    constant, add = last[0].opname, last[1]
    return constant.startswith("LOAD_") and (add.opname == "INPLACE_ADD" or add.argrepr == "+=")


def _rebinds(instruction: dis.Instruction, me: str) -> bool:
    """Whether `self` is made another value."""
    value = instruction.argval
    if instruction.opname == "STORE_FAST_LOAD_FAST":
        value = value[:1]
    return bool(me) and me in (value if isinstance(value, tuple) else (value,))


@lru_cache(maxsize=4096)
def returns_none(code: CodeType) -> bool:
    """Whether the code may return None, by `return` or by reaching its end."""
    before: list[str] = []
    value: Any = UNKNOWN
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if operation in SILENT:
            continue
        if operation == "RETURN_CONST":
            value = instruction.argval
        if operation.startswith("RETURN_") and value is None:
            while before and before[-1] == "LOAD_CONST":
                before.pop()
            # But not where a `with` would go on, had it swallowed an exception.
            popped = len(before)
            while before and before[-1] == "POP_TOP":
                before.pop()
            if len(before) == popped or before[-1:] != ["POP_EXCEPT"]:
                return True
        value = instruction.argval if operation == "LOAD_CONST" else UNKNOWN
        before.append(operation)
    return False


def callees_of(
    function: FunctionType, cls: type | None
) -> Iterator[tuple[FunctionType, type | None]]:
    """The functions that a function names, and for methods the class they are called on."""
    for load in loads_in(function.__code__, self_of(function) if cls is not None else ""):
        name = load.attributes[0] if load.attributes else ""
        if load.kind == "own" and cls is not None:
            yield from ((method, cls) for method in methods_of(cls, name))
        elif load.kind in ("value", "super") and cls is not None and uses_super(function):
            for base in cls.__mro__[1:]:
                yield from ((method, cls) for method in layers_of(base.__dict__.get(name)))
        elif load.kind in ("global", "closure"):
            value, _ = resolved(load, function)
            yield from ((layer, None) for layer in layers_of(value))


def resolved(load: Load, function: FunctionType) -> tuple[Any, tuple[str, ...]]:
    """The value of a global or closure with its attributes taken as far as modules and classes go.

    Returns:
        The value, `UNKNOWN` if there is none, and the attributes that are left.
    """
    if load.kind == "closure":
        value = value_of_closure(function, load.name)
    else:
        value = function.__globals__.get(load.name, getattr(builtins, load.name, UNKNOWN))
    attributes = load.attributes
    while attributes and isinstance(value, (ModuleType, type)):
        value, attributes = getattr(value, attributes[0], UNKNOWN), attributes[1:]
    return value, attributes


def uses_super(function: FunctionType) -> bool:
    return "super" in function.__code__.co_names or "__class__" in function.__code__.co_freevars


def self_of(function: FunctionType) -> str:
    """The name of a method's first parameter."""
    return function.__code__.co_varnames[0] if function.__code__.co_argcount else ""


def function_of(method: Any) -> FunctionType | None:
    """The Python function below decorators, None if there is none."""
    while hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    return method if isinstance(method, FunctionType) else None


def layers_of(method: Any) -> list[FunctionType]:
    """The Python function and those of its decorators that are not torch's."""
    layers: list[FunctionType] = []
    while callable(method) and method not in layers:
        if isinstance(method, FunctionType) and not is_of_torch(method):
            layers.append(method)
        method = getattr(method, "__wrapped__", None)
    return layers


def is_of_torch(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] == "torch"


def value_of_closure(function: FunctionType, name: str) -> Any:
    """What a variable of an enclosing function holds now, None if nothing."""
    names = function.__code__.co_freevars
    if name not in names or function.__closure__ is None:
        return None
    try:
        return function.__closure__[names.index(name)].cell_contents
    except ValueError:
        return None


def methods_of(cls: type, name: str) -> list[FunctionType]:
    """The functions a class may run for `self.name`: a method, or a property's getter."""
    value = inspect.getattr_static(cls, name, None)
    value = value.fget if isinstance(value, property) else value
    value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    return layers_of(value)
