"""How often code uses the output of a child that it calls, as far as its bytecode tells.

A kernel that takes the place of a captured call leaves the value without a way to the kernel's
output in the graph. So where gradients are recorded, and the value is used by others too, the
members run.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType

from .bytecode import self_of
from .returns import Step, steps_of

_ENDS = ("RETURN_", "RAISE", "RERAISE")


@lru_cache(maxsize=4096)
def is_used_more(function: FunctionType, child: str, uses: int) -> bool:
    """Whether a method may use the output of `self.child(...)` more often than that.

    Outputs that it does not keep in a variable are used once.
    """
    steps = tuple(steps_of(function))
    me = self_of(function)
    return any(
        steps[index].name in ("LOAD_ATTR", "LOAD_METHOD")
        and steps[index].value == child
        and steps[index - 1].name.startswith(("LOAD_FAST", "LOAD_DEREF"))
        and steps[index - 1].value == me
        and _is_kept_for_more(steps, index, uses)
        for index in range(1, len(steps))
    )


def _is_kept_for_more(steps: tuple[Step, ...], index: int, uses: int) -> bool:
    """The same of the call of what the step at `index` loads."""
    depth = 1
    for after in range(index, len(steps)):
        step = steps[after]
        depth += step.effect
        if step.jumps or depth < 1:
            return False
        if step.name.startswith("CALL") and depth == 1:
            break
    else:
        return False
    kept = steps[after + 1]
    if kept.name != "STORE_FAST":  # In several variables, or in one that inner functions have.
        return kept.name in ("COPY", "DUP_TOP", "STORE_DEREF")
    return _is_loaded_more(steps, after + 2, kept.value, uses)


def _is_loaded_more(steps: tuple[Step, ...], start: int, name: str, uses: int) -> bool:
    """Whether some way through the code loads a variable more often before it is another's."""
    places: dict[int, int] = {}
    for index, step in enumerate(steps):
        places.setdefault(step.offset, index)
    pending, seen = [(start, 0)], set()
    while pending:
        index, count = pending.pop()
        if (index, count) in seen or index >= len(steps):
            continue
        seen.add((index, count))
        step = steps[index]
        if step.value == name and step.name.startswith("LOAD_FAST"):
            count += 1
            if count > uses:
                return True
        if step.value == name and step.name in ("STORE_FAST", "DELETE_FAST"):
            continue
        if step.jumps and step.value in places:
            pending.append((places[step.value], count))
        if not step.name.startswith((*_ENDS, "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
            pending.append((index + 1, count))
    return False
