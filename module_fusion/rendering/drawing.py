"""The drawing of one chain, as inline SVG: members, wires, inputs, kernel, and what ran.

Text is set in a monospaced font and told its length, so it fits its box in any browser. A wire
ends exactly at the edge of a box.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .html import Markup, arrows, html

if TYPE_CHECKING:
    from ..report import Feed, GroupReport

# In pixels: the width of a character in both sizes of text, and distances.
_BOLD, _SMALL = 7.8, 6.6
_BOX, _ROW, _GAP, _PAD, _HEAD = 44, 18, 34, 14, 30

# A wider drawing scrolls in its place, and leaves the table around it as it is.
_WIDTH = 620


class _Box(NamedTuple):
    left: float
    right: float


def chain_drawing(group: GroupReport) -> Markup:
    """A chain as a picture, with its content in words for those who do not see it.

    Args:
        group: the chain, with its `wires`.

    Returns:
        An `<svg>` element in a `<div>`; the style of `page_fragment` colours it.
    """
    return _Drawing(group).markup()


class _Drawing:
    """Where everything is: boxes from left to right, inputs from below, long wires above."""

    def __init__(self, group: GroupReport) -> None:
        self.group = group
        inputs = [wire for wire in group.wires if wire.source is None]
        self.entry = next((w for w in inputs if w.member == 0 and not w.optional), None)
        self.below = list(_bundled([wire for wire in inputs if wire is not self.entry]))
        inner = [(wire, wire.source) for wire in group.wires if wire.source is not None]
        self.between = [
            [wire for wire, source in inner if wire.member == source + 1 == member]
            for member in range(1, len(group.roles))
        ]
        self.above = [(wire, source) for wire, source in inner if wire.member > source + 1]
        is_plain = not self.below and not self.above and all(len(w) == 1 for w in self.between)
        self.names_wires = not is_plain

        self.kernel = group.kernel or "no kernel"
        self.state, self.ran = _what_ran(group)
        widths = [self._width(member) for member in range(len(group.roles))]
        gaps = [self._gap(wires) for wires in self.between]
        header = (len(self.kernel) * _BOLD + len(self.ran) * _SMALL) + 2 * _PAD
        slack = max(0.0, header - sum(widths) - sum(gaps))
        self.left = len(self.entry.name) * _SMALL + 10 if self.entry else 1.0
        x = self.left + _PAD + (8 if self.entry else 0) + slack / 2
        self.boxes: list[_Box] = []
        for width, gap in zip(widths, [*gaps, 0], strict=True):
            self.boxes.append(_Box(x, x + width))
            x += width + gap
        self.right = x + _PAD + slack / 2
        self.top = 1 + _HEAD + _ROW * len(self.above)
        self.bottom = self.top + _BOX + _ROW * (max([1, *map(len, self.between)]) - 1)
        self.floor = self.bottom + _PAD
        self.extent = 0.0

    def markup(self) -> Markup:
        shapes = "".join([*self._frame(), *self._members(), *self._wires()])
        width = max(self.right + 28, self.extent)
        height = self.floor + 2 + (_ROW * len(self.below) + 6 if self.below else 0)
        title = f"{arrows(' -> '.join(self.group.roles))}: {self.kernel}, {self.ran}"
        return Markup(
            f'<div class="mf-scroll" style="min-width: {min(width, _WIDTH):g}px">'
            f'<svg class="mf-chain mf-{self.state}" role="img" width="{width:g}" '
            f'height="{height:g}" viewBox="0 0 {width:g} {height:g}">'
            f"<title>{html(title)}</title><desc>{html(_in_words(self.group))}</desc>{shapes}"
            f"</svg></div>"
        )

    def _width(self, member: int) -> float:
        role, name = self.group.roles[member], self.group.classes[member]
        text = max(len(role) * _BOLD, len(name) * _SMALL)
        below = [wire.member for wire in self.below].count(member)
        arriving = [wire.member for wire, _ in self.above].count(member)
        leaving = [source for _, source in self.above].count(member)
        return max(text + 24, 16 * (below + 1), 24 * (max(arriving, leaving) + 1))

    def _gap(self, wires: list[Feed]) -> float:
        labels = [len(wire.name) * _SMALL for wire in wires if self.names_wires]
        return max([_GAP, *(length + 20 for length in labels)])

    def _frame(self) -> Iterator[str]:
        yield (
            f'<rect class="mf-frame" x="{self.left:g}" y="1" width="{self.right - self.left:g}" '
            f'height="{self.floor - 1:g}" rx="8"/>'
        )
        yield _text(self.kernel, self.left + _PAD, 20, _BOLD, "mf-kernel-name")
        x = self.right - _PAD - len(self.ran) * _SMALL
        yield _text(self.ran, x, 20, _SMALL, "mf-state")

    def _members(self) -> Iterator[str]:
        middle = (self.top + self.bottom) / 2
        for box, role, name in zip(self.boxes, self.group.roles, self.group.classes, strict=True):
            yield (
                f'<rect class="mf-box" x="{box.left:g}" y="{self.top:g}" '
                f'width="{box.right - box.left:g}" height="{self.bottom - self.top:g}" rx="5"/>'
            )
            center = (box.left + box.right) / 2
            yield _text(role, center - len(role) * _BOLD / 2, middle - 4, _BOLD, "mf-role")
            yield _text(name, center - len(name) * _SMALL / 2, middle + 13, _SMALL, "mf-class")

    def _wires(self) -> Iterator[str]:
        first, last = self.boxes[0], self.boxes[-1]
        middle = (self.top + self.bottom) / 2
        if self.entry:
            yield _wire(f"M0 {middle:g}H{first.left:g}", "", "0")
            yield _right(first.left, middle)
            yield self._label(self.entry.name, 2, middle - 6)
        for member, wires in enumerate(self.between):
            yield from self._straight(member, wires)
        yield from self._over()
        yield from self._from_below()
        yield _wire(f"M{last.right:g} {middle:g}H{self.right + 27:g}", str(len(self.boxes) - 1), "")
        yield _right(self.right + 27, middle)

    def _straight(self, member: int, wires: list[Feed]) -> Iterator[str]:
        """The wires from one member to the next."""
        start, end = self.boxes[member].right, self.boxes[member + 1].left
        for number, wire in enumerate(wires):
            y = _between(self.top, self.bottom, number, len(wires))
            yield _wire(f"M{start:g} {y:g}H{end:g}", str(member), str(member + 1))
            yield _right(end, y)
            if self.names_wires:
                x = (start + end - 6 - len(wire.name) * _SMALL) / 2
                yield self._label(wire.name, x, y - 5)

    def _over(self) -> Iterator[str]:
        """The wires over the heads of members in between, each at a height of its own."""
        ends = [wire.member for wire, _ in self.above]
        starts = [source for _, source in self.above]
        for number, (wire, source) in enumerate(self.above):
            y = self.top - 10 - _ROW * number
            arriving, leaving = ends[:number].count(wire.member), starts[:number].count(source)
            box, count = self.boxes[source], starts.count(source)
            x = _between((box.left + box.right) / 2, box.right, count - 1 - leaving, count)
            box, count = self.boxes[wire.member], ends.count(wire.member)
            end = _between(box.left, (box.left + box.right) / 2, arriving, count)
            path = f"M{x:g} {self.top:g}V{y:g}H{end:g}V{self.top:g}"
            yield _wire(path, str(source), str(wire.member))
            yield f'<path class="mf-head" d="M{end:g} {self.top:g}l-3.5 -6h7z"/>'
            yield self._label(wire.name, x + 6, y - 4)

    def _from_below(self) -> Iterator[str]:
        """Inputs besides the first: the leftmost goes down furthest, so no label is crossed."""
        members = [input_.member for input_ in self.below]
        for number, input_ in enumerate(self.below):
            box, count = self.boxes[input_.member], members.count(input_.member)
            x = _between(box.left, box.right, members[:number].count(input_.member), count)
            y = self.floor + _ROW * (len(self.below) - number)
            optional = " mf-optional" if input_.optional else ""
            yield _wire(f"M{x:g} {y:g}V{self.bottom:g}", "", str(input_.member), optional)
            yield f'<path class="mf-head" d="M{x:g} {self.bottom:g}l-3.5 6h7z"/>'
            yield self._label(input_.name, x + 6, y)

    def _label(self, name: str, x: float, y: float) -> str:
        self.extent = max(self.extent, x + len(name) * _SMALL + 2)
        return _text(name, x, y, _SMALL, "mf-label")


def _bundled(inputs: list[Feed]) -> Iterator[Feed]:
    """By member, what callers may leave out as one wire, its number instead of names."""
    for member in sorted({wire.member for wire in inputs}):
        own = [wire for wire in inputs if wire.member == member]
        yield from (wire for wire in own if not wire.optional)
        optional = [wire for wire in own if wire.optional]
        if len(optional) > 1:
            yield optional[0]._replace(name=f"{len(optional)} optional")
        else:
            yield from optional


def _what_ran(group: GroupReport) -> tuple[str, str]:
    """The name of a state, and the words for it."""
    kernel, members = group.kernel_calls, group.member_calls
    if group.action == "unfused":
        return "off", "unfused"
    if kernel and members:
        return "mixed", f"kernel {kernel}, members {members}"
    if kernel:
        return "kernel", f"kernel ran {kernel}\N{MULTIPLICATION SIGN}"
    state = "off" if group.kernel is None else "members"
    if members:
        return state, f"members ran {members}\N{MULTIPLICATION SIGN}"
    will = "would" if group.action == "would fuse" else "will"
    if group.path == "kernel":
        return "kernel", f"kernel {will} run"
    return state, f"members {will} run"


def _in_words(group: GroupReport) -> str:
    wires = []
    for wire in group.wires:
        source = "outside" if wire.source is None else group.roles[wire.source]
        optional = ", optional" if wire.optional else ""
        wires.append(f"{wire.name} of {group.roles[wire.member]} from {source}{optional}")
    members = ", ".join(map("{} ({})".format, group.roles, group.classes))
    reason = f" {group.reason}." if group.reason else ""
    return f"Members: {members}. Wires: {'; '.join(wires)}.{reason}"


def _between(low: float, high: float, number: int, count: int) -> float:
    return low + (number + 1) * (high - low) / (count + 1)


def _wire(path: str, source: str, member: str, kind: str = "") -> str:
    return f'<path class="mf-wire{kind}" data-from="{source}" data-to="{member}" d="{path}"/>'


def _right(x: float, y: float) -> str:
    return f'<path class="mf-head" d="M{x:g} {y:g}l-6 -3.5v7z"/>'


def _text(text: str, x: float, y: float, character: float, kind: str) -> str:
    length = len(text) * character
    return (
        f'<text class="{kind}" x="{x:g}" y="{y:g}" textLength="{length:g}" '
        f'lengthAdjust="spacingAndGlyphs">{html(text)}</text>'
    )
