"""What was fused, what was skipped, which path ran and why: as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .folding import aligned, pattern_of, span

_HEADER = ("modules", "classes", "kernel", "calls", "note")


class GroupReport(NamedTuple):
    """One chain, or one place that was skipped.

    Attributes:
        action: `"fused"`, `"already fused"`, `"unfused"` or `"skipped"`.
        paths: where the members are, in order.
        roles: the names by which a kernel reaches them.
        classes: their original classes.
        kernel: the kernel's layer name, None for a chain without one.
        path: what the next plain call runs, `"kernel"` or `"members"`.
        kernel_calls: calls in which the kernel ran, compiled graphs not counted.
        member_calls: calls in which the members ran themselves, compiled graphs not counted.
        reason: why the members ran the last time they did, or why the place was skipped.
        family: the family that found the group, None for one that was named by paths.
        accuracy: the kernel's error against float64 in units of the members', where a family
            had them compared.
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


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_modules`, `unfuse_modules` and `report` return.

    Prints as a table in which repeated blocks are folded into one row; shows as a table in a
    notebook. `groups` has every chain by itself.
    """

    groups: Sequence[GroupReport] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))

    @property
    def fused(self) -> list[GroupReport]:
        """The groups that are fused after the call."""
        return [group for group in self.groups if group.action in ("fused", "already fused")]

    @property
    def skipped(self) -> list[GroupReport]:
        """The places that were left alone, each with its reason."""
        return [group for group in self.groups if group.action == "skipped"]

    def __str__(self) -> str:
        rows = [_cells(fold) for fold in _folded(self.groups)]
        if not rows:
            return f"{self._summary()}."
        header = ("", *_HEADER)
        return "\n".join([f"{self._summary()}:", *aligned(header, rows)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(_cells(fold), "td") for fold in _folded(self.groups))
        return (
            f"<table><caption>{html.escape(self._summary())}</caption>"
            f"<thead>{row(('', *_HEADER), 'th')}</thead><tbody>{body}</tbody></table>"
        )

    def _summary(self) -> str:
        if not self.groups:
            return "Nothing is fused"
        counts: dict[str, int] = {}
        for group in self.groups:
            counts[group.action] = counts.get(group.action, 0) + 1
        return ", ".join(f"{n} {action}" for action, n in counts.items())


def _folded(groups: Sequence[GroupReport]) -> Iterator[list[GroupReport]]:
    """Groups that differ in block numbers and call counts alone, together."""
    folds: dict[object, list[GroupReport]] = {}
    for group in groups:
        pattern = pattern_of(group.paths)
        key = (group.action, pattern, group.classes, group.kernel, group.path, group.reason)
        folds.setdefault(key, []).append(group)
    yield from folds.values()


def _cells(fold: Sequence[GroupReport]) -> tuple[str, ...]:
    first = fold[0]
    paths = [span([group.paths[i] for group in fold]) for i in range(len(first.paths))]
    return (
        first.action if len(fold) == 1 else f"{first.action} x{len(fold)}",
        " -> ".join(paths),
        " -> ".join(first.classes),
        first.kernel or "-",
        _calls(fold),
        "; ".join(note for note in (first.reason, _accuracy(fold)) if note),
    )


def _accuracy(fold: Sequence[GroupReport]) -> str:
    known = [group.accuracy for group in fold if group.accuracy is not None]
    return f"error {max(known):.2f} x the modules'" if known else ""


def _calls(fold: Sequence[GroupReport]) -> str:
    if fold[0].action == "skipped":
        return ""
    kernel = sum(group.kernel_calls for group in fold)
    members = sum(group.member_calls for group in fold)
    counts = [f"{name} {n}" for name, n in (("kernel", kernel), ("members", members)) if n]
    return ", ".join(counts) or f"{fold[0].path} 0"
