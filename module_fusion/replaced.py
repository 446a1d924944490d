"""Whether the code that runs in a member was replaced since its kernel was chosen."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn


class WatchedCode:
    """The code of a member, as it was when the kernel took its seat.

    Args:
        methods: classes, the name of an attribute that is looked up on each, and what it is now.
        functions: Python functions, with what may be exchanged in each.
    """

    def __init__(
        self,
        methods: Iterable[tuple[Any, str, Any]],
        functions: Iterable[tuple[FunctionType, CodeType, Any, Any]],
    ) -> None:
        self.methods = tuple(methods)
        self.functions = tuple(functions)
        # Those that torch.compile can look up, of modules.
        self._traced = tuple(
            entry
            for entry in self.methods
            if issubclass(entry[0], nn.Module) and isinstance(entry[2], FunctionType)
        )
        self._found: list[tuple[Any, Callable[[Any], Any], Any]] = []
        self._absent: list[tuple[Any, str]] = []
        for owner in dict.fromkeys(owner for owner, _, _ in self.methods):
            names = [name for cls, name, _ in self.methods if cls is owner]
            present = [name for name in names if hasattr(owner, name)]
            self._absent += [(owner, name) for name in names if name not in present]
            if present:
                # Two at least, so that it gives a tuple: those are compared by identity first.
                look_up = operator.attrgetter(*present, present[0])
                self._found.append((owner, look_up, look_up(owner)))

    def is_like(self, other: WatchedCode) -> bool:
        """Whether it is the very same code."""
        return self.methods == other.methods and self.functions == other.functions

    def is_same(self) -> bool:
        """Whether none of it was replaced. For eager calls; `why_not_same` tells what was."""
        try:
            for owner, look_up, values in self._found:
                if look_up(owner) != values:
                    return False
        except AttributeError:  # It was taken off.
            return False
        for owner, name in self._absent:
            if getattr(owner, name, None) is not None:
                return False
        for function, code, defaults, keywords in self.functions:
            if (
                function.__code__ is not code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not keywords
            ):
                return False
        return True

    def why_not_same(self) -> str | None:
        """Which of it was replaced since, None if nothing was."""
        compiling = torch.compiler.is_dynamo_compiling()
        for owner, name, value in self._traced if compiling else self.methods:
            now = getattr(owner, name, None)
            if now is not value and (compiling or now != value):
                return f"has a class whose {name} was replaced, {owner.__name__}"
        for function, code, defaults, keywords in self.functions:
            if (
                function.__code__ is not code
                or _are_others(function.__defaults__, defaults, compiling)
                or (function.__kwdefaults__ is not keywords and not compiling)
            ):
                return f"runs {function.__qualname__}, whose code was replaced"
        return None


def _are_others(now: Any, defaults: Any, compiling: bool) -> bool:
    """Whether a function has other defaults; torch.compile makes a tuple of its own of them."""
    if not compiling:
        return now is not defaults
    if now is None or defaults is None or len(now) != len(defaults):
        return now is not None or defaults is not None
    for index in range(len(defaults)):
        if now[index] is not defaults[index] and now[index] != defaults[index]:
            return True
    return False
