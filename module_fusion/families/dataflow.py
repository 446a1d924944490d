"""Which child of a module gets the output of which, as its source tells.

A guess that is wrong costs nothing but a kernel that does not run: whether a value really
goes straight from one member to the next is decided at every call.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from functools import lru_cache
from typing import Any

from torch import nn

from ..bytecode import layers_of, loads_in, methods_of, self_of

_Sources = dict[str, frozenset[str]]


def feeding_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of children of which the first's output goes straight to the second."""
    if isinstance(module, nn.Sequential):
        names = list(module._modules)
        return list(itertools.pairwise(names))
    cls: Any = type(module)
    return [pair for pair in _pairs_of(cls) if all(name in module._modules for name in pair)]


def forget_sources() -> None:
    """Read the source of every class anew: anyone may replace a method meanwhile."""
    _pairs_of.cache_clear()


@lru_cache(maxsize=4096)
def _pairs_of(cls: Any) -> tuple[tuple[str, str], ...]:
    pairs: dict[tuple[str, str], None] = {}
    pending, seen = layers_of(cls.forward), set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        for load in loads_in(function.__code__, self_of(function)):
            if load.kind == "own" and load.attributes:
                pending += methods_of(cls, load.attributes[0])
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.args.args:
                flow = _Flow(node.args.args[0].arg)
                flow.run(node.body, {})
                pairs.update(dict.fromkeys(flow.pairs))
    return tuple(pairs)


class _Flow:
    """Follows the outputs of children through the variables of one method."""

    def __init__(self, me: str) -> None:
        self.me = me
        self.pairs: list[tuple[str, str]] = []

    def run(self, body: list[ast.stmt], sources: _Sources) -> _Sources:
        for statement in body:
            sources = self._run_one(statement, sources)
        return sources

    def _run_one(self, statement: ast.stmt, sources: _Sources) -> _Sources:
        blocks = [
            block
            for name in ("body", "orelse", "finalbody")
            if isinstance(block := getattr(statement, name, None), list)
        ]
        blocks += [handler.body for handler in getattr(statement, "handlers", [])]
        if blocks:
            merged = dict(sources)
            for block in blocks:
                after = self.run(block, dict(sources))
                for name in {*merged, *after}:
                    merged[name] = merged.get(name, frozenset()) | after.get(name, frozenset())
            return merged
        if isinstance(statement, ast.Assign):
            origin = self._origin(statement.value, sources)
            for target in statement.targets:
                self._assign(target, origin, sources)
        else:
            for node in ast.iter_child_nodes(statement):
                if isinstance(node, ast.expr):
                    self._origin(node, sources)
            if isinstance(statement, (ast.AugAssign, ast.AnnAssign)):
                self._assign(statement.target, frozenset(), sources)
        return sources

    def _assign(self, target: ast.expr, origin: frozenset[str], sources: _Sources) -> None:
        if isinstance(target, ast.Name):
            sources[target.id] = origin
        elif isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._assign(item, frozenset(), sources)

    def _origin(self, node: ast.expr, sources: _Sources) -> frozenset[str]:
        """The children whose output an expression may be; notes whom it is given to."""
        if isinstance(node, ast.Name):
            return sources.get(node.id, frozenset())
        if not isinstance(node, ast.Call):
            for part in ast.iter_child_nodes(node):
                if isinstance(part, ast.expr):
                    self._origin(part, sources)
            return frozenset()
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        given = [self._origin(value, sources) for value in values]
        function = node.func
        if not isinstance(function, ast.Attribute):
            return frozenset()
        self._origin(function.value, sources)
        if not isinstance(function.value, ast.Name) or function.value.id != self.me:
            return frozenset()
        self.pairs += [(name, function.attr) for names in given for name in sorted(names)]
        return frozenset([function.attr])
