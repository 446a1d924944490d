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
    """Paths of children of which the first's output goes straight to the second.

    A child is named as in `self.norm(x)`, or taken from a container by a constant or a variable,
    as in `self.norms[0](x)` and `self.norms[i](x)`. Variables stand for every index.
    """
    if isinstance(module, nn.Sequential):
        names = [name for name, child in module._modules.items() if child is not None]
        return list(itertools.pairwise(names))
    cls: Any = type(module)
    return [pair for names in _pairs_of(cls) for pair in _expanded(module, *names)]


def _expanded(module: nn.Module, first: str, second: str) -> list[tuple[str, str]]:
    """The paths that two names stand for, which may have the same variable as index."""
    producers, consumers = _children(module, first), _children(module, second)
    if _variable(first) and _variable(first) == _variable(second):
        return [(producers[key], consumers[key]) for key in producers if key in consumers]
    return list(itertools.product(producers.values(), consumers.values()))


def _children(module: nn.Module, name: str) -> dict[str, str]:
    """The paths of the children that a name stands for, by their index."""
    name, bracket, index = name.partition("[")
    child = module._modules.get(name)
    if child is None:
        return {}
    if not bracket:
        return {"": name}
    if _variable(f"{name}[{index}"):
        return {key: f"{name}.{key}" for key in child._modules}
    key = str(ast.literal_eval(index[:-1]))
    return {key: f"{name}.{key}"} if key in child._modules else {}


def _variable(name: str) -> str:
    index = name.partition("[")[2][:-1]
    return index if index.isidentifier() else ""


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
        child = self._child(function)
        if child is None:
            if isinstance(function, ast.Attribute):
                self._origin(function.value, sources)
            return frozenset()
        self.pairs += [(name, child) for names in given for name in sorted(names)]
        return frozenset([child])

    def _child(self, function: ast.expr) -> str | None:
        """`norm` for `self.norm`, `norms[i]` for `self.norms[i]`, None for anything else."""
        index = ""
        if isinstance(function, ast.Subscript):
            taken = function.slice
            is_constant = isinstance(taken, ast.Constant) and type(taken.value) in (int, str)
            if not is_constant and not isinstance(taken, ast.Name):
                return None
            function, index = function.value, f"[{ast.unparse(taken)}]"
        if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name):
            return None
        return function.attr + index if function.value.id == self.me else None
