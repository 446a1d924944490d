"""Where values go that code puts on the stack: whether they are called, or asked something."""

from __future__ import annotations

import dis
import inspect
import sys
from functools import lru_cache
from types import CodeType

SILENT = ("CACHE", "COPY", "DUP_TOP", "EXTENDED_ARG", "NOP", "PUSH_NULL", "RESUME")
JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
SUPER = ("LOAD_SUPER_ATTR", "LOAD_SUPER_METHOD", "LOAD_ZERO_SUPER_ATTR")
_CALLS_BEGIN = ("PRECALL", "KW_NAMES", "CACHE", "EXTENDED_ARG", "NOP", "PUSH_NULL")
_CALLING = (
    *SILENT, "LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "PRECALL", "CALL", "SETUP_FINALLY",
    "POP_BLOCK",
)  # fmt: skip
TRUTH = frozenset(("__bool__", "__len__"))
# What builtins call of their first argument, that keep and return nothing of it: not its class.
ASKING = {
    "len": frozenset(["__len__"]),
    **dict.fromkeys(("isinstance", "hasattr", "callable"), frozenset[str]()),
}


def asked_of(instructions: list[dis.Instruction], start: int, after: int) -> frozenset[str] | None:
    """`Load.asked` of what is loaded from `start` on, until before `after`."""
    if _is_method(instructions[after - 1]) or call_of(instructions, after - 1) is not None:
        return frozenset()
    rest = [one for one in instructions[after : after + 20] if one.opname not in _CALLS_BEGIN]
    following = rest[0].opname
    if following in ("STORE_ATTR", "DELETE_ATTR", *SUPER) or following.endswith("NONE"):
        return frozenset()
    if following == "LOAD_CONST" and rest[0].argval is None and rest[1].opname == "IS_OP":
        return frozenset()
    if following.startswith(("POP_JUMP_", "TO_BOOL", "UNARY_NOT")):
        return TRUTH
    while rest[:-1] and rest[0].opname in ("LOAD_CONST", *GLOBAL, "LOAD_ATTR"):
        rest = rest[1:]
    call, is_plain = rest[0], rest[0].opname in ("CALL", "CALL_FUNCTION")
    if not is_plain or isinstance(instructions[start].argval, tuple):
        return None
    before = [at for at in range(max(0, start - 6), start) if instructions[at].opname not in SILENT]
    for at in before[-2:]:
        name, its = instructions[at].argval, call_of(instructions, at)
        if instructions[at].opname in GLOBAL and its is not None and instructions[its] is call:
            if at == before[-1] and name in ASKING:
                return ASKING[name]
            if at != before[-1] and name == "super":
                return frozenset()
    return None


def call_of(instructions: list[dis.Instruction], at: int) -> int | None:
    """Where that is called which the instruction at `at` loads; None if not, or beyond a jump."""
    load, depth = instructions[at], 0
    # Where the NULL that goes with a call is on the stack: below, with the load, or above.
    is_above = sys.version_info >= (3, 13) and not (load.opname == "LOAD_GLOBAL" and load.arg & 1)
    base = 0 if sys.version_info < (3, 11) or is_above else -1
    for index in range(at + 1, len(instructions)):
        one = instructions[index]
        if one.opcode in JUMPS or one.is_jump_target:
            return None
        if one.opname.startswith("CALL") and not one.opname.startswith("CALL_INTRINSIC"):
            depth += dis.stack_effect(one.opcode, one.arg, jump=False)
            if depth <= 0:
                return index if depth == base else None
        elif depth < _taken_by(one):
            return None
        else:
            depth += dis.stack_effect(one.opcode, one.arg, jump=False)
    return None


def _taken_by(instruction: dis.Instruction) -> int:
    """How much an instruction takes off the stack, or looks at, at least."""
    operation, count = instruction.opname, instruction.arg or 0
    if operation in _CALLS_BEGIN or (operation.startswith("LOAD_") and operation not in ATTRIBUTE):
        return 0
    if operation.startswith(("BUILD_", "COPY", "SWAP")):
        return count
    return 2 if operation.startswith(("BINARY_", "INPLACE_", "COMPARE_", "CONTAINS_", "IS_")) else 1


def _is_method(load: dis.Instruction) -> bool:
    """Whether an attribute is loaded to be called."""
    if sys.version_info < (3, 12):
        return load.opname == "LOAD_METHOD"
    return load.opname == "LOAD_ATTR" and bool(load.arg and load.arg & 1)


@lru_cache(maxsize=4096)
def advances(code: CodeType) -> bool:
    """Whether code gives something else to `next` than the result of a call made just then.

    That may be an iterator that is kept elsewhere, and goes on from there the next time.
    """
    instructions = [one for one in dis.get_instructions(code) if one.opname != "EXTENDED_ARG"]
    for at, load in enumerate(instructions):
        if load.opname not in GLOBAL or load.argval != "next":
            continue
        call = call_of(instructions, at)
        if call is None or instructions[call].arg not in (1, 2):
            return True
        given = [one for one in instructions[at + 1 : call] if one.opname not in _CALLS_BEGIN]
        if instructions[call].arg == 2 and given.pop().opname != "LOAD_CONST":
            return True
        if not given[-1].opname.startswith("CALL"):
            return True
    return any(advances(c) for c in code.co_consts if isinstance(c, CodeType))


@lru_cache(maxsize=4096)
def asks_super_first(code: CodeType) -> bool:
    """Whether a `__getattr__` begins with `return super().__getattr__(name)`, in a `try`."""
    names: list[str] = []
    for one in dis.get_instructions(code):
        if one.opname == "RETURN_VALUE":
            return "__getattr__" in names and set(names) <= {"super", "__getattr__"}
        if one.opname in (*GLOBAL, *ATTRIBUTE, *SUPER):
            names.append(one.argval)
        elif not one.opname.startswith(_CALLING):
            return False
    return False


@lru_cache(maxsize=4096)
def aliases_in(code: CodeType, me: str) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Variables that are set once, to `self` or an attribute of it: where that is loaded, and it.

    Of `m = self.proj`, the position of `self` among the instructions, and `("proj",)`.
    """
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    sets = [*code.co_varnames[: _arguments_of(code)], *code.co_cellvars]
    loaded: list[tuple[int, tuple[str, ...]] | None] = []
    for at, one in enumerate(dis.get_instructions(code)):
        operation, value = one.opname, one.argval
        names = value if isinstance(value, tuple) else (value,)
        stores = operation.count("STORE_FAST") if operation.startswith("STORE_FAST") else 0
        if one.is_jump_target:
            loaded.clear()  # It may be something else, that was loaded where the jump is from.
        for name in names[:stores]:
            sets.append(name)
            if loaded and (path := loaded.pop()) is not None:
                found[name] = path
        if operation in ATTRIBUTE and loaded:
            path = loaded.pop()
            loaded.append(path and (path[0], (*path[1], value)))
        elif stores or operation.startswith(("LOAD_FAST", "LOAD_DEREF")):
            loaded += [(at, ()) if name == me else None for name in names[stores:]]
        elif operation in ("LOAD_CONST", *GLOBAL):
            loaded.append(None)
        elif operation in ("ROT_TWO", "SWAP") and one.arg in (None, 2) and len(loaded) > 1:
            loaded[-2:] = reversed(loaded[-2:])
        elif operation == "DELETE_FAST":
            sets += [value, value]
        elif operation not in ("CACHE", "EXTENDED_ARG", "NOP", "RESUME", "MAKE_CELL"):
            loaded.clear()
    return {name: path for name, path in found.items() if sets.count(name) == 1}


@lru_cache(maxsize=4096)
def containers_in(code: CodeType) -> frozenset[str]:
    """Variables that are never anything else than containers that the code itself builds."""
    built, others, previous = set[str](), {*code.co_varnames[: _arguments_of(code)]}, ""
    for one in dis.get_instructions(code):
        if one.is_jump_target:
            previous = ""
        if one.opname in SILENT:
            continue
        if one.opname.startswith("STORE_FAST"):
            first, *rest = one.argval if isinstance(one.argval, tuple) else (one.argval,)
            (built if previous.startswith("BUILD_") else others).add(first)
            others.update(rest if one.opname == "STORE_FAST_STORE_FAST" else ())
        previous = one.opname
    return frozenset(built - others)


def _arguments_of(code: CodeType) -> int:
    flags = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + flags
