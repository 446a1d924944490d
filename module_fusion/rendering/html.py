"""Reports as HTML for notebooks: one fragment, its style, tables and badges.

No script and nothing from elsewhere. Without the style, which some viewers strip, it is a plain
table. Colours follow the notebook's theme where it tells, else the system's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .plain import printable
from .style import STYLE

# A longer text may be broken into lines.
_LONG = 32


class Markup(str):
    """Text that is HTML already; any other string is escaped."""


def page_fragment(title: str, parts: Iterable[Markup]) -> Markup:
    """A whole report: the style, a title and its parts, for `_repr_html_`."""
    markup = (
        f'<div class="mf-report" role="region" aria-label="{escape(title)}">'
        f"<style>{STYLE}</style>"
        f'<p class="mf-title">{escape(title)}</p>{"".join(parts)}</div>'
    )
    return Markup(printable(markup))


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str] | Markup], caption: str = ""
) -> Markup:
    """A table of texts.

    Args:
        headers: the names of the columns.
        rows: the cells of each row; a `Markup` instead of a row belongs to the row above, and
            spans all columns but the first.
        caption: what the table is about.

    Examples:
        >>> table(["a"], [["<1>"]]).partition("<tbody>")[2]
        '<tr class="mf-row"><td>&lt;1&gt;</td></tr></tbody></table>'
    """
    head = "".join(f'<th scope="col">{html(name)}</th>' for name in headers)
    body = ""
    for row in rows:
        if isinstance(row, Markup):
            wide = f'<td class="mf-wide" colspan="{len(headers) - 1}">{row}</td>'
            body += f"<tr><td></td>{wide}</tr>"
        else:
            cells = "".join(f"<td>{html(cell)}</td>" for cell in row)
            body += f'<tr class="mf-row">{cells}</tr>'
    title = f"<caption>{html(caption)}</caption>" if caption else ""
    return Markup(
        f'<table class="mf-table">{title}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )


def paragraph(text: str) -> Markup:
    """A sentence of its own."""
    return Markup(f'<p class="mf-note">{html(text)}</p>')


def html(text: str) -> Markup:
    """The text as HTML."""
    return text if isinstance(text, Markup) else Markup(escape(text))


def badge(text: str, kind: str) -> Markup:
    """A short word of a kind, such as what was done with a group."""
    kind = escape(kind).replace(" ", "-")
    return Markup(f'<span class="mf-badge mf-badge-{kind}">{html(text)}</span>')


def code(text: str) -> Markup:
    """A path or a name."""
    return Markup(f"<code>{unbroken(text)}</code>")


def arrows(text: str) -> str:
    """The text with real arrows, which no line break takes apart."""
    return text.replace("->", "\N{RIGHTWARDS ARROW}")


def muted(text: str) -> Markup:
    """A remark."""
    return Markup(f'<span class="mf-muted">{unbroken(text)}</span>')


def lines(*parts: str) -> Markup:
    """One below the other."""
    return Markup("<br>".join(map(html, filter(None, parts))))


def unbroken(text: str) -> Markup:
    """A text that stays on one line, if it is not too long for that."""
    if len(text) > _LONG:
        return html(text)
    return Markup(f'<span class="mf-unbroken">{html(text)}</span>')
