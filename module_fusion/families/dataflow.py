"""Which child of a module gets the output of which, as its source tells.

A guess that is wrong costs nothing but a kernel that does not run: whether a value really
goes straight from one member to the next is decided at every call.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeGuard

from torch import nn

from ..bytecode import layers_of, loads_in, methods_of, self_of
from ..modules import original_class

# The way from a module to a child in it: names, and variables as `$name`.
_Steps = tuple[str, ...]
_Sources = dict[str, frozenset[_Steps]]


def feeding_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Paths of children of which the first's output goes straight to the second.

    A child is named as in `self.norm(x)` and `self.inner.norm(x)`, or taken from a container by a
    constant or a variable, as in `self.norms[0](x)`, `self.norms[i](x)` and
    `for norm, mlp in self.layers`. Variables stand for every index.
    """
    if isinstance(module, nn.Sequential):
        names = [name for name, child in module._modules.items() if child is not None]
        return list(itertools.pairwise(names))
    cls: Any = original_class(module)  # A fused one shows the code of when it was fused.
    return [pair for ways in _pairs_of(cls) for pair in _expanded(module, *ways)]


def _expanded(module: nn.Module, first: _Steps, second: _Steps) -> list[tuple[str, str]]:
    """The paths that two ways stand for; a variable in both is the same index."""
    return [
        (producer, consumer)
        for known, producer in _places(module, first)
        for also, consumer in _places(module, second)
        if all(known.get(variable, key) == key for variable, key in also.items())
    ]


def _places(module: nn.Module, steps: _Steps) -> list[tuple[dict[str, str], str]]:
    """The paths of the children that a way leads to, each with what its variables are there."""
    places: list[tuple[dict[str, str], list[str], nn.Module]] = [({}, [], module)]
    for step in steps:
        is_variable = step.startswith("$")
        places = [
            ({**known, step: key} if is_variable else known, [*path, key], child)
            for known, path, here in places
            for key, child in here._modules.items()
            if child is not None and key == (known.get(step, key) if is_variable else step)
        ]
    return [(known, ".".join(path)) for known, path, _ in places]


def forget_sources() -> None:
    """Read the source of every class anew: anyone may replace a method meanwhile."""
    _pairs_of.cache_clear()


@lru_cache(maxsize=4096)
def _pairs_of(cls: Any) -> tuple[tuple[_Steps, _Steps], ...]:
    pairs: dict[tuple[_Steps, _Steps], None] = {}
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
        self.pairs: list[tuple[_Steps, _Steps]] = []
        self.children: dict[str, _Steps] = {}  # Variables that are children.

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
            self._origins(statement, sources)
            if isinstance(statement, ast.For):
                self._bind_each(statement.target, statement.iter)
            merged = dict(sources)
            for block in blocks:
                after = self.run(block, dict(sources))
                for name in {*merged, *after}:
                    merged[name] = merged.get(name, frozenset()) | after.get(name, frozenset())
            return merged
        if isinstance(statement, ast.Assign):
            self._assign_value(statement.targets, statement.value, sources)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            self._assign_value([statement.target], statement.value, sources)
        else:
            self._origins(statement, sources)
            if isinstance(statement, ast.AugAssign):
                self._assign(statement.target, frozenset(), sources)
        return sources

    def _assign_value(
        self, targets: Sequence[ast.expr], value: ast.expr, sources: _Sources
    ) -> None:
        # All is computed before anything is assigned.
        values = [
            (target, self._origin(part, sources), self._child(part))
            for target, part in _paired(targets, value)
        ]
        for target, origin, child in values:
            self._assign(target, origin, sources)
            self._bind(target, child)

    def _bind_each(self, target: ast.expr, iterable: ast.expr) -> None:
        """The variables of a loop over children, also over several in step and with a number."""
        index = f"$line {target.lineno}"
        if _is_call(iterable, "enumerate") and isinstance(target, ast.Tuple):
            index = f"${ast.unparse(target.elts[0])}"
            target, iterable = target.elts[-1], iterable.args[0]
        if _is_call(iterable, "zip") and isinstance(target, ast.Tuple):
            for item, container in zip(target.elts, iterable.args, strict=False):
                self._bind(item, self._child(container), index)
        else:
            self._bind(target, self._child(iterable), index)

    def _bind(self, target: ast.expr, child: _Steps | None, *index: str) -> None:
        """Remember that a variable is a child, or that it is not."""
        steps = None if child is None else (*child, *index)
        if isinstance(target, ast.Name):
            self.children.pop(target.id, None)
            if steps is not None:
                self.children[target.id] = steps
        elif isinstance(target, (ast.Tuple, ast.List)):
            for position, item in enumerate(target.elts):
                self._bind(item, steps, str(position))

    def _assign(self, target: ast.expr, origin: frozenset[_Steps], sources: _Sources) -> None:
        if isinstance(target, ast.Name):
            sources[target.id] = origin
        elif isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self._assign(item, frozenset(), sources)

    def _origins(self, node: ast.AST, sources: _Sources) -> None:
        """Look into the expressions that a statement or an expression is made of."""
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self._origin(part, sources)

    def _origin(self, node: ast.expr, sources: _Sources) -> frozenset[_Steps]:
        """The children whose output an expression may be; notes whom it is given to."""
        if isinstance(node, ast.Name):
            return sources.get(node.id, frozenset())
        if isinstance(node, ast.NamedExpr):
            self._assign_value([node.target], node.value, sources)
            return sources[node.target.id]
        if isinstance(node, ast.IfExp):
            self._origin(node.test, sources)
            return self._origin(node.body, sources) | self._origin(node.orelse, sources)
        if not isinstance(node, ast.Call):
            self._origins(node, sources)
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

    def _child(self, node: ast.expr) -> _Steps | None:
        """The way to `self.norm`, `self.norms[i]` or a variable that is a child, else None."""
        if isinstance(node, ast.Name):
            return self.children.get(node.id)
        if isinstance(node, ast.Attribute):
            is_own = isinstance(node.value, ast.Name) and node.value.id == self.me
            parent = () if is_own else self._child(node.value)
            return None if parent is None else (*parent, node.attr)
        if not isinstance(node, ast.Subscript):
            return None
        around, taken = self._child(node.value), node.slice
        if around is None:
            return None
        if isinstance(taken, ast.Constant) and type(taken.value) in (int, str):
            return (*around, str(taken.value))
        return (*around, f"${taken.id}") if isinstance(taken, ast.Name) else None


def _paired(targets: Sequence[ast.expr], value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each target with its value; tuples of one length part by part."""
    for target in targets:
        parts, values = _parts(target), _parts(value)
        if parts and len(parts) == len(values):
            for item, part in zip(parts, values, strict=True):
                yield from _paired([item], part)
        else:
            yield target, value


def _parts(node: ast.expr) -> list[ast.expr]:
    """What a tuple or a list is made of, nothing where that cannot be counted."""
    if not isinstance(node, (ast.Tuple, ast.List)):
        return []
    return [] if any(isinstance(part, ast.Starred) for part in node.elts) else node.elts


def _is_call(node: ast.expr, name: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name and bool(node.args)
