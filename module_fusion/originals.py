"""What a swapped class stands for, and how it is called."""

from __future__ import annotations

from typing import Any

ORIGINAL = "_fusion_original_class"
SHOWN = "_fusion_shown_name"


def original_of(cls: type) -> Any:
    """The class that a swapped class stands for; any other class itself.

    A class that someone put on top of a swapped one counts as a class of its own.
    """
    return cls.__dict__.get(ORIGINAL, cls)


def shown_name(cls: type) -> str:
    """How a class is called in a `repr` and in messages: `FusedModule[LlamaMLP]`."""
    return str(cls.__dict__.get(SHOWN, cls.__name__))
