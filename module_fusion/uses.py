"""Whether code gives away the output of a child that it calls, as far as its bytecode tells.

A kernel that takes the place of a captured call leaves the call's value without a way to the
kernel's output in the graph. Who adds it to something gets the right gradients all the same; who
gets the value itself may ask for its own. So where gradients are recorded, and the value is
returned or kept beside its use, the members run.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType

from .bytecode import self_of
from .returns import Step, start_of_expression, steps_of

_Steps = tuple[Step, ...]
_ENDS = ("RETURN_", "RAISE", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")
_KEEPS = (
    "RETURN_VALUE", "YIELD_VALUE", "STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF",
    "LIST_APPEND", "LIST_EXTEND", "DICT_", "MAP_ADD", "SET_",
)  # fmt: skip
_TAKES_NOTHING = ("LOAD_", "KW_NAMES", "PUSH_NULL", "COPY", "DUP_TOP", "SWAP", "ROT_")
# What is asked for the gradient of a value that is no leaf.
OF_GRADIENT = ("register_hook", "retain_grad", "register_post_accumulate_grad_hook", "grad_fn")


@lru_cache(maxsize=4096)
def gives_away(function: FunctionType, child: str) -> bool:
    """Whether a method may return, or keep, the output of `self.child(...)` itself.

    Read is what it keeps in a variable; what it returns at once goes nowhere else.
    """
    steps = tuple(steps_of(function))
    me = self_of(function)
    return any(
        steps[index].name in ("LOAD_ATTR", "LOAD_METHOD")
        and steps[index].value == child
        and steps[index - 1].name.startswith(("LOAD_FAST", "LOAD_DEREF"))
        and steps[index - 1].value == me
        and (end := _end_of_call(steps, index)) is not None
        and _is_kept(steps, end, set())
        for index in range(1, len(steps))
    )


def _end_of_call(steps: _Steps, index: int) -> int | None:
    """The step after the call of what the step at `index` loads."""
    depth = 1
    for after in range(index, len(steps)):
        step = steps[after]
        depth += step.effect
        if step.jumps or depth < 1:
            return None
        if step.name.startswith("CALL") and depth == 1:
            return after + 1
    return None


def _is_kept(steps: _Steps, index: int, seen: set[str]) -> bool:
    """Whether a value is put somewhere by the steps from here on, and is given away from there."""
    copies, top = 1, index - 1
    if steps[index].name == "UNPACK_SEQUENCE":
        copies, top = int(steps[index].value), index
    while copies > 0:
        while steps[top + 1].name in ("COPY", "DUP_TOP"):
            copies, top = copies + 1, top + 1
        taker, _ = _taker(steps, top)
        if not steps[taker].name.startswith("STORE_"):
            return False
        if _leaves(steps, top, seen):
            return True
        copies, top = copies - 1, taker
    return False


def _is_given_away(steps: _Steps, stored: int, seen: set[str]) -> bool:
    """Whether what a step puts into a variable is given away before that has another value."""
    name = str(steps[stored].value)
    if name in seen:
        return False
    seen.add(name)
    return any(_leaves(steps, load, seen) for load in _loads(steps, stored, name))


def _loads(steps: _Steps, stored: int, name: str) -> list[int]:
    places: dict[int, int] = {}
    for index, step in enumerate(steps):
        places.setdefault(step.offset, index)
    found, pending, visited = [], [stored + 1], {stored}
    while pending:
        index = pending.pop()
        if index in visited or index >= len(steps):
            continue
        visited.add(index)
        step = steps[index]
        if step.value == name and step.name in ("STORE_FAST", "DELETE_FAST"):
            continue
        if step.value == name and step.name.startswith("LOAD_FAST"):
            found.append(index)
        if step.jumps and step.value in places:
            pending.append(places[step.value])
        if not step.name.startswith(_ENDS):
            pending.append(index + 1)
    return found


def _leaves(steps: _Steps, index: int, seen: set[str]) -> bool:
    """Whether the value that a step leaves on top of the stack is given away by its consumer."""
    taker, above = _taker(steps, index)
    step = steps[taker]
    if step.jumps:
        return above > 0  # It is tested, or where it goes cannot be told.
    if step.name.startswith("BUILD_"):
        return _leaves(steps, taker, seen)
    if steps[index].name.startswith("BUILD_") and step.name.startswith(("BINARY_", "INPLACE_")):
        return True  # Two lists, or two tuples, as one.
    if step.name == "STORE_FAST":
        return _is_given_away(steps, taker, seen)
    if step.name in ("LOAD_ATTR", "LOAD_METHOD"):
        return step.value in OF_GRADIENT
    if step.name.startswith(("PRECALL", "CALL")):
        end = taker + 1 if step.name == "PRECALL" else taker
        return _is_returned_by_a_global(steps, end)
    return step.name.startswith(_KEEPS)


def _taker(steps: _Steps, index: int) -> tuple[int, int]:
    """The step that takes the value which a step leaves on top, or jumps, and what is above it."""
    above = 0
    for taker in range(index + 1, len(steps)):
        step = steps[taker]
        if step.jumps or _taken(step) > above:
            return taker, above
        if step.name in ("SWAP", "ROT_TWO"):  # As for a `return` in a `with`.
            depth = (step.value or 2) - 1
            above = {0: depth, depth: 0}.get(above, above)
        above += step.effect
    return len(steps) - 1, above


def _is_returned_by_a_global(steps: _Steps, call: int) -> bool:
    """Whether the result of a call of anything but a variable, such as a class, is returned."""
    if not steps[call + 1].name.startswith("RETURN_"):
        return False
    start = start_of_expression(list(steps), call)
    return start is None or not steps[start].name.startswith(("LOAD_FAST", "LOAD_DEREF"))


def _taken(step: Step) -> int:
    """How many values a step takes off the stack."""
    if step.name in ("LOAD_ATTR", "LOAD_METHOD"):
        return 1
    if step.name.startswith(_TAKES_NOTHING):
        return 0
    leaves_one = not step.name.startswith(("STORE_", "RETURN_", "POP_", "PRECALL", "YIELD_"))
    return max(0, int(leaves_one) - step.effect)
