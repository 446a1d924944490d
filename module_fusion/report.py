"""What was fused, what was skipped, which path ran and why: as text and as HTML."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .rendering.drawing import chain_drawing
from .rendering.folding import Modules, pattern_of, span
from .rendering.html import (
    Markup,
    arrows,
    badge,
    code,
    lines,
    muted,
    page_fragment,
    table,
    unbroken,
)
from .rendering.plain import plain, printable
from .rendering.tables import text_table

_HEADER = ("modules", "classes", "kernel", "calls", "note")
# A wider table has its notes below.
_WIDTH = 100


class Feed(NamedTuple):
    """One wire of a chain.

    Attributes:
        source: the position of the member whose output it carries, None for an input of the
            chain.
        member: the position of the member that takes it.
        name: the parameter it becomes; for an input of the chain, its name there.
        optional: whether callers may leave it out.
    """

    source: int | None
    member: int
    name: str
    optional: bool = False


class GroupReport(NamedTuple):
    """One chain, or one place that was skipped.

    Attributes:
        action: `"fused"`, `"already fused"`, `"unfused"` or `"skipped"`; `"would fuse"` in a dry
            run.
        paths: where the members are, in order.
        roles: the names by which a kernel reaches them.
        classes: their original classes.
        kernel: the kernel's layer name, None for a chain without one.
        path: what the next plain call runs, `"kernel"` or `"members"`.
        kernel_calls: calls in which the kernel ran, compiled graphs not counted.
        member_calls: calls in which the members ran themselves, compiled graphs not counted.
        reason: why the members ran the last time they did, whose cause may be gone since; why
            they would run, or why the place was skipped.
        family: the family that found the group, None for one that was named by paths.
        accuracy: the kernel's error against float64 in units of the members', where a family
            had them compared.
        wires: what feeds each member, empty for a place that was skipped.
    """

    action: str
    paths: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    kernel: str | None = None
    path: str = "members"
    kernel_calls: int = 0
    member_calls: int = 0
    reason: str | None = None
    family: str | None = None
    accuracy: float | None = None
    wires: tuple[Feed, ...] = ()


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_modules`, `unfuse_modules` and `report` return.

    Prints as a table in which repeated blocks are folded into one row; in a notebook each row
    has a drawing of the chain. `groups` has every chain by itself.
    """

    groups: Sequence[GroupReport] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def fused(self) -> list[GroupReport]:
        """The groups that are fused after the call."""
        return [group for group in self.groups if group.action in ("fused", "already fused")]

    @property
    def would_fuse(self) -> list[GroupReport]:
        """The groups that the call would fuse, had it not been a dry run."""
        return [group for group in self.groups if group.action == "would fuse"]

    @property
    def skipped(self) -> list[GroupReport]:
        """The places that were left alone, each with its reason."""
        return [group for group in self.groups if group.action == "skipped"]

    def __str__(self) -> str:
        folds = list(_folded(self.groups))
        if not folds:
            return f"{self._summary()}."
        rows = [(_action(fold), _modules(fold), *_cells(fold)) for fold in folds]
        return printable("\n".join([f"{self._summary()}:", *_lines(rows)]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows: list[Sequence[str] | Markup] = []
        for fold in _folded(self.groups):
            classes, kernel, calls, note = _cells(fold)
            paths = _modules(fold)
            members = code(arrows(paths.members))
            where = lines(paths.place and code(paths.place), members, muted(arrows(classes)))
            action = badge(_action(fold), fold[0].action)
            rows.append((action, where, unbroken(kernel), unbroken(calls), note))
            if fold[0].wires:
                rows.append(chain_drawing(_together(fold)))
        header = ("", "modules", "kernel", "calls", "note")
        return page_fragment(self._summary(), [table(header, rows)] if rows else [])

    def to_dict(self) -> dict[str, Any]:
        """Every group by itself, for JSON.

        In place of a number that JSON does not have there is `"inf"`, `"-inf"` or `"nan"`.
        """
        groups = [{**g._asdict(), "wires": [w._asdict() for w in g.wires]} for g in self.groups]
        return plain({"summary": self._summary(), "groups": groups})  # type: ignore[no-any-return]

    def _summary(self) -> str:
        if not self.groups:
            return "Nothing is fused"
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.action] = counts.get(group.action, 0) + 1
        return ", ".join(f"{n} {action}" for action, n in counts.items())


def _lines(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The table; where it would be too wide, with numbers for notes and the notes below."""
    lines = text_table(("", *_HEADER), rows).splitlines()
    notes = list(dict.fromkeys(row[-1] for row in rows if row[-1]))
    if not notes or max(map(len, lines)) <= _WIDTH:
        return lines
    numbers = {note: f"[{number}]" for number, note in enumerate(notes, 1)}
    lines = text_table(
        ("", *_HEADER), [(*row[:-1], numbers.get(row[-1], "")) for row in rows]
    ).splitlines()
    for note, number in numbers.items():
        lines += textwrap.wrap(
            f"{number} {note}",
            _WIDTH,
            subsequent_indent=" " * (len(number) + 1),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _folded(groups: Sequence[GroupReport]) -> Iterator[list[GroupReport]]:
    """Groups that differ in block numbers and call counts alone, together."""
    folds: dict[object, list[GroupReport]] = {}
    for group in groups:
        pattern = pattern_of(group.paths)
        key = (group.action, pattern, group.classes, group.kernel, group.path, group.reason)
        folds.setdefault((*key, group.roles, group.wires), []).append(group)
    yield from folds.values()


def _together(fold: Sequence[GroupReport]) -> GroupReport:
    """One group for all of them, with the calls of all."""
    return fold[0]._replace(
        kernel_calls=sum(group.kernel_calls for group in fold),
        member_calls=sum(group.member_calls for group in fold),
    )


def _action(fold: Sequence[GroupReport]) -> str:
    action = fold[0].action
    return action if len(fold) == 1 else f"{action} x{len(fold)}"


def _modules(fold: Sequence[GroupReport]) -> Modules:
    return Modules([span([g.paths[i] for g in fold]) for i in range(len(fold[0].paths))])


def _cells(fold: Sequence[GroupReport]) -> tuple[str, ...]:
    first = fold[0]
    notes = (_reason(fold), _accuracy(fold), *_wiring(first))
    return (
        " -> ".join(first.classes),
        first.kernel or "-",
        _calls(_together(fold)),
        "; ".join(note for note in notes if note),
    )


def _reason(fold: Sequence[GroupReport]) -> str | None:
    """Why the members run; where a kernel may run now, the cause may be gone since."""
    group = _together(fold)
    is_past = group.reason is not None and group.path == "kernel" and group.member_calls > 0
    return f"when the members ran last: {group.reason}" if is_past else group.reason


def _accuracy(fold: Sequence[GroupReport]) -> str:
    known = [group.accuracy for group in fold if group.accuracy is not None]
    return f"error {max(known):.2f} x the modules'" if known else ""


def _wiring(group: GroupReport) -> Iterator[str]:
    """The wires that are not from one member straight to the next, in words."""
    first = next((wire for wire in group.wires if wire.source is None), None)
    for wire in group.wires:
        if wire is first or wire.optional or wire.source == wire.member - 1:
            continue
        source = "outside" if wire.source is None else group.roles[wire.source]
        yield f"{group.roles[wire.member]} takes {wire.name} from {source}"


def _calls(group: GroupReport) -> str:
    if group.action == "skipped":
        return ""
    counts = (("kernel", group.kernel_calls), ("members", group.member_calls))
    return ", ".join(f"{name} {n}" for name, n in counts if n) or f"{group.path} 0"
