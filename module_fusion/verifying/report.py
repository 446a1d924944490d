"""What `verify` found: as text, as rows, and as plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..rendering.folding import Modules, pattern_of, span
from ..rendering.html import (
    Markup,
    arrows,
    code,
    html,
    lines,
    page_fragment,
    paragraph,
    table,
    unbroken,
)
from ..rendering.plain import plain, printable
from ..rendering.tables import text_table, without_empty_columns
from .differences import Difference

_UNCHECKED = (
    "A kernel without a backward does not run where gradients are needed: there the modules were "
    "compared with themselves. To check the kernels: with torch.no_grad(): verify(model, ...), "
    "without gradients=True."
)
_LISTED = 8
_NUMBERS = ("bits", "max abs", "max rel", "ulps", "cosine", "argmax")


class GroupVerification(NamedTuple):
    """How one chain did.

    Attributes:
        paths: where the members are, in order.
        kernel: the kernel's layer name, None for a chain without one.
        path: what ran: `"kernel"`, `"members"`, `"both"`, or `"nothing"`.
        kernel_calls: calls in which the kernel ran.
        member_calls: calls in which the members ran themselves.
        reason: why the members ran the last time they did.
        difference: the group's output against that of the unfused run, the worst of all calls;
            None where there is none to compare. Includes what earlier kernels changed.
        kernel_error: the kernel's error against float64 on the group's own inputs, relative to
            the norm; None where it gave the members' bits or did not run.
        member_error: the same of the members.
        problem: what breaks the promise here, None where nothing does.
        run: the dtype of the run, where `verify` was asked for several.
        unchecked: whether the kernel ran at no call because gradients were needed, for which it
            has no backward. Then the members were compared with themselves.
    """

    paths: tuple[str, ...]
    kernel: str | None = None
    path: str = "nothing"
    kernel_calls: int = 0
    member_calls: int = 0
    reason: str | None = None
    difference: Difference | None = None
    kernel_error: float | None = None
    member_error: float | None = None
    problem: str | None = None
    run: str | None = None
    unchecked: bool = False


class Table(NamedTuple):
    """One table of a report: text and HTML are made from it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` returns: true where fusion kept its promise on these inputs.

    Attributes:
        outputs: every tensor of the output, and of the inputs that the run changed, fused
            against unfused; and every place where something else differs.
        gradients: the same of parameters and inputs, where asked for.
        groups: every chain: which path ran, how often, and how accurate the kernel was.
        first_difference: the first group, in the order of execution, whose output is not that
            of the unfused run, or whose kernel wrote to its input; None where there is none.
        problems: what breaks the promise, each in a sentence.
        notes: what a reader should know besides.
    """

    outputs: tuple[Difference, ...] = ()
    gradients: tuple[Difference, ...] = ()
    groups: tuple[GroupVerification, ...] = ()
    first_difference: GroupVerification | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing breaks the promise."""
        return not self.problems

    @property
    def equal(self) -> bool:
        """Whether every bit of every output and gradient is equal."""
        return all(d.equal for d in (*self.outputs, *self.gradients))

    def __bool__(self) -> bool:
        return self.passed

    @property
    def unchecked(self) -> list[GroupVerification]:
        """The groups whose kernel was not checked, because gradients were needed."""
        return [group for group in self.groups if group.unchecked]

    @property
    def verdict(self) -> str:
        """One line that says how it went."""
        if not self.passed:
            more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
            return f"FAILED: {self.problems[0]}{more}"
        calls = sum(group.kernel_calls for group in self.groups)
        ran = {0: "no kernel ran", 1: "a kernel ran once"}.get(calls, f"kernels ran {calls} times")
        if self.unchecked:
            where = f"in {len(self.unchecked)} of {len(self.groups)} groups"
            how = "gradients were needed, so that their modules ran"
            passed = f"Kernels NOT CHECKED {where}: {how}. Passed otherwise"
        else:
            passed = "Passed"
        if self.equal:
            return f"{passed}, equal to the bit: {ran}"
        what = "each within rounding of the modules it replaced"
        return f"{passed}: {ran}, {what}; not equal to the bit"

    def tables(self) -> list[Table]:
        """The report as rows of text, repeated blocks folded into one."""
        tables = [
            Table(title, ("", "shape", "dtype", *_NUMBERS, "note"), list(_difference_rows(rows)))
            for title, rows in (("outputs", self.outputs), ("gradients", self.gradients))
            if rows
        ]
        headers = ("", "modules", "kernel", "calls", *_NUMBERS, "error / modules'", "note")
        tables.append(Table("groups", headers, list(_group_rows(self.groups))))
        return [Table(t.title, *without_empty_columns(t.headers, t.rows)) for t in tables if t.rows]

    def _sentences(self) -> list[str]:
        """Everything but the verdict and the tables."""
        said = [*self.problems[1:_LISTED]]
        if len(self.problems) > _LISTED:
            said.append(f"... in `problems`: {len(self.problems) - _LISTED} more")
        if self.unchecked:
            said.append(_UNCHECKED)
        said += [f"Note: {note}" for note in self.notes]
        if self.first_difference is not None:
            where = " -> ".join(self.first_difference.paths)
            said.append(f"The first group whose output differs: {where}.")
        return said

    def __str__(self) -> str:
        lines = [f"{self.verdict}.", *self._sentences()]
        for table_ in self.tables():
            title, *headers = table_.headers
            lines += ["", text_table((title or table_.title, *headers), table_.rows)]
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        parts = [paragraph(sentence) for sentence in self._sentences()]
        for table_ in self.tables():
            rows = [
                [_in_html(*column) for column in zip(table_.headers, row, strict=True)]
                for row in table_.rows
            ]
            parts.append(table(table_.headers, rows, table_.title))
        return page_fragment(self.verdict, parts)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, strings, lists and dicts, for JSON.

        In place of a number that JSON does not have there is `"inf"`, `"-inf"` or `"nan"`.
        """
        first = self.first_difference
        found = {
            "verdict": self.verdict,
            "passed": self.passed,
            "equal": self.equal,
            "outputs": [d._asdict() for d in self.outputs],
            "gradients": [d._asdict() for d in self.gradients],
            "groups": [_group_as_dict(group) for group in self.groups],
            "unchecked": [list(group.paths) for group in self.unchecked],
            "first_difference": None if first is None else _group_as_dict(first),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }
        return plain(found)  # type: ignore[no-any-return]


def _group_as_dict(group: GroupVerification) -> dict[str, Any]:
    difference = None if group.difference is None else group.difference._asdict()
    return {**group._asdict(), "difference": difference}


def _folded(items: Iterable[Any], key: Callable[[Any], Any]) -> Iterable[list[Any]]:
    folds: dict[Any, list[Any]] = {}
    for item in items:
        folds.setdefault(key(item), []).append(item)
    return folds.values()


def _difference_rows(found: Sequence[Difference]) -> Iterable[tuple[str, ...]]:
    def key(d: Difference) -> Any:
        return (pattern_of([d.name]), d.shape, d.dtype, d.equal, d.problem, d.run)

    for fold in _folded(found, key):
        first = fold[0]
        yield (
            span([d.name for d in fold]),
            "" if first.shape is None else "x".join(map(str, first.shape)) or "scalar",
            first.dtype,
            *_numbers(fold),
            _note(first.run and f"in {first.run}", first.problem, _nonfinite(fold)),
        )


def _in_html(header: str, text: str) -> Markup:
    if isinstance(text, Modules):
        return lines(text.place and code(text.place), code(arrows(text.members)))
    return html(text) if header == "note" else unbroken(text)


def _group_rows(groups: Sequence[GroupVerification]) -> Iterable[tuple[str, ...]]:
    def key(g: GroupVerification) -> Any:
        equal = None if g.difference is None else g.difference.equal
        return (pattern_of(g.paths), g.kernel, g.path, g.reason, equal, g.problem is None, g.run)

    for fold in _folded(groups, key):
        first = fold[0]
        paths = [span([group.paths[i] for group in fold]) for i in range(len(first.paths))]
        differences = [group.difference for group in fold if group.difference is not None]
        yield (
            first.path if len(fold) == 1 else f"{first.path} x{len(fold)}",
            Modules(paths),
            first.kernel or "-",
            _calls(fold),
            *(_numbers(differences) if differences else [""] * len(_NUMBERS)),
            _errors(fold),
            _note(first.run and f"in {first.run}", first.problem and "FAILED", first.reason),
        )


def _numbers(found: Sequence[Difference]) -> tuple[str, ...]:
    if all(d.equal for d in found):
        return ("equal", "", "", "", "", "")
    measured = [d for d in found if d.shape is not None and d.problem is None]
    if not measured:
        return ("differ", "", "", "", "", "")
    rows = [d.argmax for d in measured if d.argmax is not None]
    return (
        "differ",
        f"{max(d.max_abs for d in measured):.2e}",
        f"{max(d.max_rel for d in measured):.2e}",
        _count(max(d.max_ulp for d in measured)),
        _share(min(d.cosine for d in measured), 8),
        _share(min(rows), 4) if rows else "",
    )


def _count(number: int) -> str:
    return str(number) if number < 10**6 else f"{number:.1e}"


def _share(value: float, digits: int) -> str:
    """A number up to 1, never rounded up to 1."""
    text = f"{value:.{digits}f}"
    return f"<{text}" if value < 1 <= float(text) else text


def _calls(fold: Sequence[GroupVerification]) -> str:
    counts = (
        ("kernel", sum(group.kernel_calls for group in fold)),
        ("members", sum(group.member_calls for group in fold)),
    )
    return ", ".join(f"{name} {count}" for name, count in counts if count) or "0"


def _errors(fold: Sequence[GroupVerification]) -> str:
    known = [
        (group.kernel_error, group.member_error)
        for group in fold
        if group.kernel_error is not None and group.member_error is not None
    ]
    if not known:
        return ""
    ours, theirs = max(known, key=lambda pair: pair[0] / max(pair[1], 1e-300))
    return f"{ours:.2e} / {theirs:.2e}"


def _nonfinite(fold: Sequence[Difference]) -> str:
    ours, theirs = (sum(d.nonfinite[side] for d in fold) for side in (0, 1))
    return f"{ours} NaN or infinite, {theirs} unfused" if ours or theirs else ""


def _note(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)
