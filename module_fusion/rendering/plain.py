"""Values as JSON has them, and texts that any output takes."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """The value with lists for tuples, and a text for a number that JSON does not have.

    Args:
        value: dicts, lists and tuples of numbers, texts and None.

    Examples:
        >>> plain({"error": float("inf"), "shape": (2, 3)})
        {'error': 'inf', 'shape': [2, 3]}
    """
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def printable(text: str) -> str:
    """The text with an escape for what UTF-8 has no form of, as names may have it.

    Examples:
        >>> printable("blocks.\\ud800")
        'blocks.\\\\ud800'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
