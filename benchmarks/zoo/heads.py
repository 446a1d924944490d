"""The other model classes of an architecture: `fuse`, and the pairs that no class before had."""

from __future__ import annotations

import time
from typing import Any

from .build import Built, Unbuildable, build
from .check import check_fuse, check_pairs
from .classes import all_classes_of
from .compare import NotComparable, expectation, noted
from .pairs import pairs_of

SECONDS = 5  # Of processor time to build one class.
NOT_REACHED = "not reached: time"
NOT_COMPARABLE = "not comparable"


def check_others(
    architecture: str, first: Built, seen: set[Any], deadline: float
) -> list[dict[str, Any]]:
    """A row for each model class but that of `first`.

    Args:
        architecture: a model type.
        first: the model of it that was checked whole; the others are made as small.
        seen: the pairs that it had, by `check.kind_of_pair`; new ones are added.
        deadline: seconds of processor time of the process; no class is begun after it.
    """
    rows = []
    for name in all_classes_of(architecture):
        if name == type(first.model).__name__:
            continue
        if time.process_time() > deadline:
            rows.append({"class": name, "error": NOT_REACHED})
            continue
        row: dict[str, Any] = {"class": name}
        rows.append(row)
        try:
            built = build(architecture, name, first.shrunk, SECONDS)
        except Unbuildable as error:
            row["error"] = error.failures[0] if error.failures else str(error)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            row.update(_checked(built, seen, deadline))
            for fault in row["faults"]:
                fault["what"] = f"{name}: {fault['what']}"
    return rows


def _checked(built: Built, seen: set[Any], deadline: float) -> dict[str, Any]:
    result: dict[str, Any] = {"groups": [], "pairs": [], "of_pairs": 0, "faults": []}
    with noted("model", result):
        try:
            expected = expectation(built)
        except NotComparable as error:
            return {"error": f"{NOT_COMPARABLE}: {error}", "faults": []}
        with noted("fuse", result):
            result.update(check_fuse(built, expected))
        now_seen = set(seen)
        pairs = pairs_of(built, now_seen)
        if pairs:
            check_pairs(built, expected, pairs, deadline, result)
            seen |= now_seen
    return result
