"""The results of other libraries than transformers as Markdown, and as JSON beside it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from common import machine

from . import others, table
from .subset import LIBRARIES
from .table import Row

COMMAND = "python benchmarks/zoo --library others --table"


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `zoo-others.md` and `zoo-others.json`."""
    reached = {row["architecture"] for row in rows}
    names = [name for library in LIBRARIES for name in others.names(library)]
    missing: Row = {"status": "not reached", "error": "the sweep was ended before"}
    rows = [*rows, *({"architecture": n, **missing} for n in names if n not in reached)]
    rows = sorted(rows, key=lambda row: row["architecture"])
    (folder / "zoo-others.md").write_text(_markdown(rows))
    lines = ",\n".join(json.dumps(table._compact(row)) for row in rows)
    (folder / "zoo-others.json").write_text(f"[\n{lines}\n]\n")


def _markdown(rows: Sequence[Row]) -> str:
    checked = [row for row in rows if row["status"] == "checked"]
    rest = [row for row in rows if row["status"] != "checked"]
    parts = [
        "# Models of timm, torchvision and diffusers\n",
        f"`{COMMAND}`, {datetime.date.today():%Y-%m-%d}, {others.versions()}, {machine()}. "
        "Those of transformers, and what a pair is and how it is checked: [zoo.md](zoo.md).\n",
        "Random weights, float32, eval mode. Of timm and torchvision the model of each module "
        "whose name tells that it is the smallest, on small images, with two layers where it takes "
        "their number. Of diffusers every model class, where its own tests have a tiny config.\n",
        table.ON_THE_KERNEL,
        _totals(rows),
        *table.sections(checked, rest),
    ]
    return "\n".join(parts)


def _totals(rows: Sequence[Row]) -> str:
    """The totals of each library side by side."""
    columns = {}
    for library in LIBRARIES:
        own = [row for row in rows if row["architecture"].startswith(f"{library}/")]
        checked = [row for row in own if row["status"] == "checked"]
        columns[library] = dict(table._totals(own, checked))
    labels = dict.fromkeys(label for column in columns.values() for label in column)
    lines = [(label, *(c.get(label, 0) for c in columns.values())) for label in labels]
    return table._table(("", *columns), lines)
