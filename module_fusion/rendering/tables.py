"""Tables as aligned text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def text_table(header: Row, rows: Sequence[Row]) -> str:
    """Columns aligned to the left, a line under the header, no trailing spaces.

    A cell of several lines, as a reason may be, becomes one.
    """
    header, *rows = map(_in_one_line, [header, *rows])
    widths = _widths(header, rows)
    lines = [_aligned(row, widths, "  ").rstrip() for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(header: Row, rows: Sequence[Row]) -> str:
    """The same cells, with what Markdown would read as the end of a cell escaped."""
    cells = [[c.replace("|", "\\|") for c in _in_one_line(row)] for row in [header, *rows]]
    widths = _widths(cells[0], cells[1:])
    lines = [f"| {_aligned(row, widths, ' | ')} |" for row in cells]
    lines.insert(1, f"| {' | '.join('-' * max(width, 3) for width in widths)} |")
    return "\n".join(lines)


def _in_one_line(row: Row) -> Row:
    return [" ".join(line.strip() for line in c.splitlines()) if "\n" in c else c for c in row]


def without_empty_columns(header: Row, rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """The table without the columns in which no row has anything."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _widths(header: Row, rows: Sequence[Row]) -> list[int]:
    return [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]


def _aligned(row: Row, widths: Sequence[int], between: str) -> str:
    return between.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
