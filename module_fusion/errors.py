"""Typed errors: one base class, which is also a `ValueError`.

Every message says what is wrong, at which module path, the two values that
disagree where there are two, and the call that fixes it.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "AlreadyFusedError",
    "DeferredUseError",
    "FusionError",
    "MissingPackageError",
    "NotFusableError",
    "PathNotFoundError",
    "SpecMismatchError",
    "UnfuseError",
]


class FusionError(ValueError):
    """Base class of every error this library raises on purpose."""


class PathNotFoundError(FusionError):
    """A path matches no module, or matches some parents but not all of them."""


class SpecMismatchError(FusionError):
    """The specs do not describe the members: count, arity, names or wiring."""


class AlreadyFusedError(FusionError):
    """A member belongs to another chain already."""


class NotFusableError(FusionError):
    """A module, a kernel or a family refuses to be fused; the message says why.

    Attributes:
        reason: why, without the place, where a kernel could not take over; else None.
        was_loaded: whether that kernel was there at all.
    """

    reason: str | None = None
    was_loaded: bool = True


class DeferredUseError(FusionError):
    """A captured call can no longer give the value the unfused model would have had."""


class UnfuseError(FusionError):
    """The class of a fused module was changed by someone else since it was fused."""


class MissingPackageError(FusionError):
    """A package that the call needs is not installed; the message says which."""


def needed(module: str, what: str, install: str) -> Any:
    """Import a module that is no dependency, or say what has to be installed for `what`.

    Raises:
        MissingPackageError: the module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f"pip install {install}"
        ) from error


def add_note(error: BaseException, text: str) -> None:
    """Say more about an error that goes on its way as it is.

    Python 3.10 has no notes; there the text of an error that is nothing but a text gets it.
    """
    if hasattr(error, "add_note"):
        error.add_note(text)
    elif len(error.args) == 1 and type(error.args[0]) is str:
        error.args = (f"{error.args[0]}\n{text}",)


def text_of(error: BaseException) -> str:
    """What an error says, with its class where the text alone says little: `KeyError: 'x'`."""
    text = str(error).strip().rstrip(".")
    plain = isinstance(error, (ValueError, RuntimeError, ImportError, OSError))
    return text if plain and text else f"{type(error).__name__}: {text}".rstrip(": ")
