"""What `benchmark` found: as text, Markdown, a dictionary and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import needed
from ..rendering.html import page_fragment, paragraph, table, unbroken
from ..rendering.plain import plain, printable
from ..rendering.tables import markdown_table, text_table, without_empty_columns

_REFERENCE = "reference"
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (0.0, "ns"))
_SCALES = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9}
# Seen well on white and on black.
_COLORS = {"unfused": "#8a94a6", "fused": "#2aa198"}
_OTHER_COLOR = "#b58900"


@dataclass(frozen=True)
class BenchmarkRow:
    """One candidate.

    Attributes:
        name: `"unfused"`, `"fused"`, `"unfused compiled"`, `"fused compiled"` or `"liger"`.
        median_s: seconds from a call to its result, the median of the rounds.
        interval_s: the median's confidence interval.
        ratio: time in units of the unfused model's, the median of the rounds' ratios.
        ratio_interval: the ratio's confidence interval, None for the unfused model.
        tokens_per_second: tokens read, or for `generate` written, None where there are none.
        host_s: seconds until the call returned to Python, None on a CPU.
        device_s: seconds the GPU works when all is enqueued before, None where not known.
        peak_memory_bytes: what one call allocates at most, None without CUDA.
        kernel_calls: calls in which a fused kernel ran, over all groups and timed calls; None
            where they cannot be counted, in compiled graphs.
        member_calls: calls in which the members of a group ran themselves, likewise.
        note: what else there is to know, such as why a kernel did not run.
    """

    name: str
    median_s: float
    interval_s: tuple[float, float]
    ratio: float = 1.0
    ratio_interval: tuple[float, float] | None = None
    tokens_per_second: float | None = None
    host_s: float | None = None
    device_s: float | None = None
    peak_memory_bytes: int | None = None
    kernel_calls: int | None = None
    member_calls: int | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Faster or slower only where the interval leaves no doubt about which."""
        if self.ratio_interval is None:
            return _REFERENCE
        low, high = self.ratio_interval
        if low <= 1 <= high:
            return "no difference shown"
        if high < 1:
            return f"{1 / self.ratio:.2f} times as fast"
        return f"takes {self.ratio:.2f} times as long"


@dataclass(frozen=True)
class BenchmarkReport:
    """What `benchmark` returns: a row per candidate; prints as a table.

    Attributes:
        rows: the candidates, the unfused model first.
        device: the GPU's or the processor's name.
        torch_version: of this torch.
        method: what was called.
        backward: whether its backward was timed too.
        rounds: how often every candidate was timed.
        calls_per_sample: calls that were timed together, each time.
        confidence: of every interval.
    """

    rows: tuple[BenchmarkRow, ...]
    device: str
    torch_version: str
    method: str
    backward: bool
    rounds: int
    calls_per_sample: int
    confidence: float

    def __getitem__(self, name: str) -> BenchmarkRow:
        """The row of a candidate."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} was not measured; there are {[row.name for row in self.rows]}")

    @property
    def summary(self) -> str:
        """What was found about the fused model, in a sentence."""
        row = self["fused"]
        what = f"{self.method} + backward" if self.backward else self.method
        return f"{what}: fused against unfused, {row.verdict}, {_ratio(row)} of the time"

    @property
    def conditions(self) -> str:
        """How it was measured, in a sentence."""
        calls = f" of {self.calls_per_sample} calls" if self.calls_per_sample > 1 else ""
        return (
            f"{self.rounds} rounds{calls} in turn; medians [{100 * self.confidence:g}% "
            f"confidence intervals]; {self.device}; torch {self.torch_version}"
        )

    @property
    def ratios(self) -> str:
        """What the ratios are, in a sentence."""
        return (
            '"of unfused" is the median of the ratios in each round, and so not exactly the ratio '
            "of the two medians beside it"
        )

    @property
    def expectation(self) -> str:
        """Where nothing got faster, that in plain words, and when something would; else empty."""
        row = self["fused"]
        if row.ratio_interval is None or row.ratio_interval[1] < 1:
            return ""
        if row.kernel_calls == 0:
            return "Nothing got faster: no kernel ran; the table says why."
        if row.host_s is None:
            return (
                "Nothing got faster. On a CPU that is to be expected: the kernels are made for "
                "GPUs, and what decides at each call whether one may run takes some time."
            )
        return (
            "Nothing got faster. To be expected where the fused modules are a small part of the "
            "time, or so small that starting them takes longer than running them: try more tokens."
        )

    def _sentences(self) -> list[str]:
        return [
            sentence for sentence in (self.conditions, self.ratios, self.expectation) if sentence
        ]

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """The header and the rows that text, Markdown and HTML show."""
        header, *rows = zip(*self._columns(), strict=True)
        return without_empty_columns(header, rows)

    def __str__(self) -> str:
        parts = [self.summary, text_table(*self.table()), "\n".join(self._sentences())]
        return printable("\n\n".join(parts))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, rows = self.table()
        short = header.index("note") if "note" in header else len(header)
        cells = [[*map(unbroken, row[:short]), *row[short:]] for row in rows]
        said = map(paragraph, self._sentences())
        return page_fragment(self.summary, [table(header, cells), *said])

    def to_markdown(self) -> str:
        """The same table and sentences in Markdown."""
        parts = [self.summary, markdown_table(*self.table()), *self._sentences()]
        return printable("\n\n".join(parts))

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, numbers and strings, ready for JSON.

        In place of a number that JSON does not have there is `"inf"`, `"-inf"` or `"nan"`.
        """
        return plain(asdict(self))  # type: ignore[no-any-return]

    def plot(self, ax: Any = None) -> Any:
        """Draw the times with their intervals, and each ratio beside its bar.

        Args:
            ax: matplotlib's Axes to draw on, new ones when omitted.

        Returns:
            The Axes.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        if ax is None:
            ax = _new_axes(len(self.rows))
        unit, scale = _unit(min(row.median_s for row in self.rows))
        times = [row.median_s * scale for row in self.rows]
        below = [(row.median_s - row.interval_s[0]) * scale for row in self.rows]
        above = [(row.interval_s[1] - row.median_s) * scale for row in self.rows]
        places = range(len(self.rows))
        colors = [_COLORS.get(row.name, _OTHER_COLOR) for row in self.rows]
        ink = ax.xaxis.label.get_color()
        ax.barh(places, times, xerr=(below, above), color=colors, ecolor=ink, capsize=4)
        ax.set_yticks(places, [row.name for row in self.rows])
        ax.invert_yaxis()
        ax.set_xlabel(f"time per call ({unit}), {100 * self.confidence:g}% confidence interval")
        ax.set_title(f"{self.device}, {self.rounds} rounds", color=ink, fontsize="medium")
        for place, row, time, error in zip(places, self.rows, times, above, strict=True):
            ax.annotate(
                "" if row.ratio_interval is None else f"{_ratio(row)} of unfused",
                (time + error, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                color=ink,
            )
        ax.set_xlim(0, 1.6 * max(map(sum, zip(times, above, strict=True))))
        return ax

    def _columns(self) -> list[tuple[str, ...]]:
        unit, scale = _unit(min(row.median_s for row in self.rows))

        def column(name: str, cell: Callable[[BenchmarkRow], str]) -> tuple[str, ...]:
            return (name, *map(cell, self.rows))

        def time(value: float | None) -> str:
            return "" if value is None else f"{value * scale:.4g} {unit}"

        def time_with_interval(row: BenchmarkRow) -> str:
            low, high = (f"{value * scale:.4g}" for value in row.interval_s)
            return f"{time(row.median_s)} [{low}, {high}]"

        return [
            column("candidate", lambda row: row.name),
            column("time per call", time_with_interval),
            column("of unfused", _ratio),
            column("verdict", lambda row: row.verdict),
            column("tokens/s", lambda row: _tokens(row.tokens_per_second)),
            column("host", lambda row: time(row.host_s)),
            column("device", lambda row: time(row.device_s)),
            column("peak memory", lambda row: _bytes(row.peak_memory_bytes)),
            column("calls", _calls),
            column("note", lambda row: row.note),
        ]


def _unit(seconds: float) -> tuple[str, float]:
    unit = next(unit for least, unit in _UNITS if seconds >= least)
    return unit, _SCALES[unit]


def _ratio(row: BenchmarkRow) -> str:
    if row.ratio_interval is None:
        return "1"
    return f"{row.ratio:.3f} [{row.ratio_interval[0]:.3f}, {row.ratio_interval[1]:.3f}]"


def _tokens(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:,.1f} MiB"


def _calls(row: BenchmarkRow) -> str:
    counts = {"kernel": row.kernel_calls, "members": row.member_calls}
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _new_axes(rows: int) -> Any:
    pyplot = needed("matplotlib.pyplot", "plot()", "'module-fusion[bench]'")
    figure, ax = pyplot.subplots(figsize=(7, 1.2 + 0.5 * rows), layout="constrained")
    # Opaque, because a notebook's own background may be as dark as the ink.
    figure.set_facecolor(ax.get_facecolor())
    return ax
