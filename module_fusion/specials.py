"""Special methods that operators, statements and builtins of Python call, such as `__len__`."""

from __future__ import annotations

import dis
import operator
from functools import lru_cache
from types import CodeType

from .stack import TRUTH

_ITEMS = frozenset(("__iter__", "__next__", "__reversed__", "__getitem__", "__len__"))
_ITEMS |= {"__length_hint__", "__contains__", "__missing__", "__index__"}
_MAPPED = _ITEMS | {"keys"}
_COMPARED = frozenset(("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"))
_TEXT = frozenset(("__str__", "__repr__", "__format__", "__bytes__", "extra_repr", "_get_name"))
_WITH = frozenset(("__enter__", "__exit__"))
_OPERATORS = [name.strip("_") for name in dir(operator) if not name.startswith("__")]
_NUMBERS = frozenset(f"__{prefix}{name}__" for name in _OPERATORS for prefix in ("", "r", "i"))
_NUMBERS |= {"__int__", "__float__", "__complex__", "__round__", "__divmod__", "__rdivmod__"}
_NUMBERS |= {"__trunc__", "__floor__", "__ceil__"}
_NUMBERS -= {"__call__", "__repr__"} | TRUTH | _ITEMS | _COMPARED
SPECIALS = TRUTH | _MAPPED | _COMPARED | _TEXT | _WITH | _NUMBERS
# What operations of torch may call of what they are given.
OF_OPERATIONS = TRUTH | _ITEMS | _COMPARED | _NUMBERS

# What instructions call, by how their names begin; the first that fits counts.
_INSTRUCTIONS = {
    ("GET_ITER", "FOR_ITER", "UNPACK_", "LIST_EXTEND"): _ITEMS,
    ("CALL_FUNCTION_EX", "DICT_MERGE"): _MAPPED,
    ("BINARY_SUBSCR", "BINARY_SLICE", "CONTAINS_OP"): _ITEMS | _COMPARED,
    ("COMPARE_OP",): _COMPARED,
    ("BUILD_SET", "BUILD_MAP", "SET_ADD", "MAP_ADD"): _COMPARED,
    ("SET_UPDATE", "DICT_UPDATE"): _MAPPED | _COMPARED,
    ("POP_JUMP_IF_NO", "POP_JUMP_FORWARD_IF_NO", "POP_JUMP_BACKWARD_IF_NO"): frozenset(),
    ("POP_JUMP_", "JUMP_IF_", "TO_BOOL", "UNARY_NOT"): TRUTH,
    ("BINARY_MODULO", "INPLACE_MODULO"): _NUMBERS | _TEXT,
    ("BINARY_", "INPLACE_", "UNARY_"): _NUMBERS,
    ("FORMAT_", "CONVERT_VALUE"): _TEXT,
    ("SETUP_WITH", "BEFORE_WITH", "WITH_EXCEPT_START", "LOAD_SPECIAL"): _WITH,
    (
        "LOAD_", "STORE_FAST", "STORE_DEREF", "STORE_ATTR", "DELETE_FAST", "DELETE_DEREF",
        "CACHE", "NOP", "RESUME", "EXTENDED_ARG", "COPY", "SWAP", "ROT_", "DUP_", "POP_", "PUSH_",
        "MAKE_", "SET_FUNCTION", "PRECALL", "KW_NAMES", "CALL_FUNCTION", "CALL_METHOD", "CALL_KW",
        "RETURN_", "RAISE_", "RERAISE", "JUMP_", "SETUP_FINALLY", "IS_OP", "END_FOR",
        "BUILD_LIST", "BUILD_TUPLE", "BUILD_SLICE", "BUILD_STRING", "BUILD_CONST_KEY_MAP",
        "LIST_APPEND", "LIST_TO_TUPLE", "GEN_START", "RETURN_GENERATOR", "YIELD_", "CHECK_EXC",
    ): frozenset(),
}  # fmt: skip
_BUILTINS = {
    "len": frozenset(["__len__"]),
    "bool": TRUTH,
    **dict.fromkeys(("str", "repr", "format"), _TEXT),
    **dict.fromkeys(("tuple", "list", "iter", "next", "zip", "enumerate", "map"), _ITEMS),
    **dict.fromkeys(("any", "all", "filter", "reversed"), _ITEMS | TRUTH),
    **dict.fromkeys(("int", "float", "complex", "abs", "round", "range", "divmod"), _NUMBERS),
    **dict.fromkeys(("isinstance", "issubclass", "type", "hasattr", "callable"), frozenset()),
    **dict.fromkeys(("super", "property", "slice", "NotImplemented"), frozenset()),
}
# Methods of containers and strings that ask nothing of what they are given.
_QUIET = frozenset(("append", "items", "keys", "values", "copy"))


@lru_cache(maxsize=4096)
def specials_in(code: CodeType) -> frozenset[str]:
    """The special methods that code, and what is defined in it, may call of a value."""
    found = frozenset[str]().union(*map(_of_instruction, dis.get_instructions(code)))
    return found.union(*(specials_in(c) for c in code.co_consts if isinstance(c, CodeType)))


def _of_instruction(instruction: dis.Instruction) -> frozenset[str]:
    operation = instruction.opname
    if operation == "CALL":
        return frozenset()
    if operation == "BINARY_OP":
        if instruction.argrepr.startswith("["):
            return _ITEMS | _COMPARED
        return _NUMBERS | _TEXT if instruction.argrepr.startswith("%") else _NUMBERS
    for begins, found in _INSTRUCTIONS.items():
        if operation.startswith(begins):
            return found
    return SPECIALS


def specials_of_builtin(name: str) -> frozenset[str]:
    """Those that a builtin may call of what it is given."""
    return _BUILTINS.get(name, SPECIALS)


@lru_cache(maxsize=4096)
def specials_of_method(name: str) -> frozenset[str]:
    """Those that a method of this name, of a container or a string, may call."""
    kinds = (list, dict, tuple, str, set)
    is_known = name not in _QUIET and any(hasattr(kind, name) for kind in kinds)
    return SPECIALS if is_known or name == "new_tensor" else frozenset()
