"""Many paths as one: rows for repeated blocks are folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# As a list numbers its modules: "01" and other digits are names, not other ways to write a number.
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")


class Modules(str):
    """Where the members of a chain are, in one line.

    Args:
        paths: the path of each member.

    Attributes:
        paths: as given.
        place: what the paths share, with a colon; empty where they share nothing.
        members: the rest of each.
    """

    paths: tuple[str, ...]
    place: str
    members: str

    def __new__(cls, paths: Sequence[str]) -> Modules:
        place, members = place_and_rest(paths)
        made = super().__new__(cls, f"{place} {members}" if place else members)
        made.paths, made.place, made.members = tuple(paths), place, members
        return made

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:  # type: ignore[override]
        """What copies and pickles are made of: a text is otherwise made again of its own text."""
        return (self.paths,)


def pattern_of(paths: Iterable[str]) -> tuple[tuple[str | None, ...], ...]:
    """The names in each path, with None for the number of a block."""
    found = []
    for path in paths:
        *above, last = path.split(".")
        found.append((*(None if _NUMBER.fullmatch(name) else name for name in above), last))
    return tuple(found)


def span(paths: Sequence[str]) -> str:
    """One path for many: `layers.[0-3,7].mlp` for blocks 0 to 3 and 7."""
    if len(paths) == 1:
        return paths[0]
    columns = list(zip(*(path.split(".") for path in paths), strict=True))
    return ".".join(c[0] if len(set(c)) == 1 else f"[{_ranges(c)}]" for c in columns)


def place_and_rest(paths: Sequence[str]) -> tuple[str, str]:
    """What the members' paths share, and the rest of each: `layers.3:` and `norm -> mlp`."""
    parts = [path.split(".") for path in paths]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 for p in parts):
        if len({p[shared] for p in parts}) > 1:
            break
        shared += 1
    place = ".".join(parts[0][:shared]) + ":" if shared else ""
    return place, " -> ".join(".".join(p[shared:]) for p in parts)


def _ranges(texts: Sequence[str]) -> str:
    runs: list[list[int]] = []
    for number in sorted({int(text) for text in texts}):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
