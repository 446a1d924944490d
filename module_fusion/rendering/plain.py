"""Values as JSON has them."""

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
