"""What a Python function returns, as far as its bytecode tells.

A value that stands for the output of a call cannot stand for None: `is` asks nobody. Nor can
it be known before the call how many values it is, unless every `return` spells that out.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

from .bytecode import returns_none

_NOTHING = ("CACHE", "EXTENDED_ARG", "NOP", "RESUME")
_COPIES = ("COPY", "DUP_TOP", "STORE_FAST")
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
# Of a tensor. Any other attribute may be there for the case that it is None.
_TENSORS = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
_NAMES = ("LOAD_ATTR", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLASSDEREF")


class Step(NamedTuple):
    """One instruction; those that do two things are two."""

    name: str
    value: Any
    effect: int
    offset: int
    jumps: bool
    is_target: bool


@lru_cache(maxsize=4096)
def may_return_none(function: FunctionType) -> bool:
    """Whether the function may return None: as it is, or as what a variable or attribute holds.

    What it calls is taken to return something, and so is an argument without a default.
    """
    if returns_none(function.__code__):
        return True
    steps = list(steps_of(function))
    return any(
        _may_be_none(steps, source, function, set())
        for index, step in enumerate(steps)
        if step.name == "RETURN_VALUE"
        for source in _sources(steps, index)
        if steps[source].name != "LOAD_CONST" or source != index - 1
    )


@lru_cache(maxsize=4096)
def values_returned(function: FunctionType) -> int | None:
    """How many values every `return` puts in a tuple, None where that, or one, may be None."""
    steps = list(steps_of(function))
    returns = [index for index, step in enumerate(steps) if step.name.startswith("RETURN_")]
    counts = {_values_at(steps, index, function) for index in returns}
    return counts.pop() if len(counts) == 1 else None


def _values_at(steps: list[Step], index: int, function: FunctionType) -> int | None:
    built = steps[index - 1]
    if built.name != "BUILD_TUPLE" or steps[index].is_target or built.is_target:
        return None
    end: int | None = index - 1
    for _ in range(built.value):
        assert end is not None
        if _may_be_none(steps, end - 1, function, set()):
            return None
        end = start_of_expression(steps, end - 1)
        if end is None:
            return None
    return int(built.value)


def start_of_expression(steps: list[Step], end: int) -> int | None:
    """Where the code begins that leaves one value on the stack at `end`; None after a jump."""
    depth = 0
    for index in range(end, -1, -1):
        if steps[index].jumps:
            return None
        depth += steps[index].effect
        if depth == 1:
            return index
        if steps[index].is_target:
            return None
    return None


def _may_be_none(steps: list[Step], index: int, function: FunctionType, seen: set[str]) -> bool:
    """Whether what the step leaves on top of the stack may be None."""
    while index > 0 and steps[index].name in _COPIES:
        index -= 1
    name, value = steps[index].name, steps[index].value
    if name == "LOAD_CONST":
        return value is None
    if name.startswith("LOAD_FAST"):
        return _variable_may_be_none(steps, value, function, seen)
    return name in _NAMES and value not in _TENSORS


def _variable_may_be_none(
    steps: list[Step], name: str, function: FunctionType, seen: set[str]
) -> bool:
    if name in seen:
        return False
    seen.add(name)
    parameter = inspect.signature(function, follow_wrapped=False).parameters.get(name)
    return (parameter is not None and parameter.default is None) or any(
        _may_be_none(steps, source, function, seen)
        for index, step in enumerate(steps)
        if step.name == "STORE_FAST" and step.value == name
        for source in _sources(steps, index)
    )


def _sources(steps: list[Step], index: int) -> list[int]:
    """The steps that may have left the value which this one takes."""
    offset = steps[index].offset
    jumps = [i - 1 for i, step in enumerate(steps) if step.jumps and step.value == offset]
    falls = index > 0 and steps[index - 1].name not in ("JUMP_FORWARD", "JUMP_ABSOLUTE")
    return [source for source in (*jumps, *([index - 1] if falls else [])) if source >= 0]


def steps_of(function: FunctionType) -> Iterator[Step]:
    instructions = list(dis.get_instructions(function.__code__))
    # Code may jump to one that does nothing: it goes on with the next that does something.
    goes_on: dict[int, int] = {}
    for one in reversed(instructions):
        is_nothing = one.opname in _NOTHING
        goes_on[one.offset] = goes_on.get(one.offset + 2, 0) if is_nothing else one.offset
    targets = {goes_on[one.offset] for one in instructions if one.is_jump_target}
    for one in instructions:
        if one.opname in _NOTHING:
            continue
        jumps, is_target = one.opcode in _JUMPS, one.offset in targets
        if isinstance(one.argval, tuple) and one.opname.count("_FAST") == 2:
            stores = one.opname.startswith("STORE"), "_STORE" in one.opname
            for store, value in zip(stores, one.argval, strict=True):
                name = "STORE_FAST" if store else "LOAD_FAST"
                effect = -1 if name == "STORE_FAST" else 1
                yield Step(name, value, effect, one.offset, False, is_target)
            continue
        effect = dis.stack_effect(one.opcode, one.arg, jump=False)
        value = goes_on.get(one.argval, one.argval) if jumps else one.argval
        yield Step(one.opname, value, effect, one.offset, jumps, is_target)
