"""What running a module reaches: methods of it and of those below it, and what they take."""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any, NamedTuple

from torch import nn

from .bytecode import function_of, is_of_torch, methods_of
from .findings import FUNCTIONS, NOTHING, Findings, findings_of_method, findings_of_value
from .originals import original_of
from .stack import asks_super_first

# Of torch's modules: what gives modules, and what else only reads.
_GIVING = frozenset(
    (
        "children", "named_children", "modules", "named_modules", "get_submodule", "items",
        "values",
    )
)  # fmt: skip
ONLY_READING = _GIVING | {
    "parameters", "named_parameters", "buffers", "named_buffers", "get_parameter", "get_buffer",
    "keys", "_conv_forward",
}  # fmt: skip


class Place(NamedTuple):
    """A module, or one below it.

    Attributes:
        path: names of the children that lead there.
        names: attributes of the instance, and of its class: of those from torch its methods.
    """

    path: tuple[str, ...]
    module: nn.Module
    cls: Any
    names: frozenset[str]

    @property
    def tensors(self) -> set[str]:
        """Names of its parameters, buffers and children."""
        own = self.module.__dict__
        return {*own["_parameters"], *own["_buffers"], *own["_modules"]}


def _names_of(cls: type) -> frozenset[str]:
    names: set[str] = set()
    for base in reversed(cls.__mro__):
        if base is object or is_of_torch(base):
            names -= base.__dict__.keys()
            names |= {name for name, value in base.__dict__.items() if _is_shown(name, value)}
        else:
            names |= base.__dict__.keys()
    return frozenset(names)


def _is_shown(name: str, value: Any) -> bool:
    """Whether a value of a class is a method of torch that anyone may call."""
    if name.startswith("_") or name == "extra_repr" or not isinstance(value, types.FunctionType):
        return False
    return is_of_torch(value)


class Reach:
    """The methods that run when a module does, and what they take of it and of those below it.

    What is taken of a value (a variable, an item, an argument) is taken of every one of these
    modules that may be such a value, and has it. What a module below does at its own call is
    in `below`.

    Args:
        module: it.
        cls: the class that it counts as an instance of.
        known: the names of the classes that were looked at already.

    Attributes:
        runs: what each method does, with the module that it is called on.
        uses: attributes that are taken of a module, one after the other.
        taken: attributes that are taken of values.
        loose: paths of the modules that may be such a value.
        below: what each child reaches.
        places: the module and those below it, by their paths.
    """

    def __init__(
        self, module: nn.Module, cls: Any, known: dict[Any, frozenset[str]] | None = None
    ) -> None:
        known = {} if known is None else known
        children = {name: child for name, child in module._modules.items() if child is not None}
        self.below = {n: Reach(c, original_of(type(c)), known) for n, c in children.items()}
        if cls not in known:
            known[cls] = _names_of(cls)
        top = Place((), module, cls, known[cls].union(module.__dict__))
        self.places: dict[tuple[str, ...], Place] = {(): top}
        for name, reach in self.below.items():
            for path, place in reach.places.items():
                self.places[(name, *path)] = place._replace(path=(name, *path))
        self.runs: list[tuple[Place, Findings]] = []
        self.uses: list[tuple[Place, tuple[str, ...]]] = []
        self._known: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
        self.taken: set[str] = set()
        self.loose: set[tuple[str, ...]] = set()
        forward = function_of(cls.forward)
        if forward is not None and not is_of_torch(forward):
            self._run(top, functools.partial(findings_of_method, cls, "forward"))
        for place in self.places.values():
            if "__getattribute__" in place.names:
                self._use(place, ("__getattribute__",))
        for name, reach in self.below.items():
            # A call may return what was loose in it, and be given what is loose here.
            self._take(reach.taken)
            for path in sorted(reach.loose):
                self._loosen((name, *path))

    def _run(self, place: Place, read: Callable[[], Findings]) -> None:
        try:
            found = read()
        except RecursionError:
            what = "calls functions that call each other too deeply to be read"
            found = NOTHING._replace(always=what)
        self.runs.append((place, found))
        for names in sorted(found.own):
            self._use(place, names)
        for names, asked in sorted(found.loose, key=operator.itemgetter(0)):
            self._let_go(place, names, asked)
        self._take(found.taken)

    def _let_go(self, place: Place, names: tuple[str, ...], asked: frozenset[str] | None) -> None:
        gives = names[-1:] and names[-1] in _GIVING
        there = self.places.get((*place.path, *(names[:-1] if gives else names)))
        if there is None:
            return
        if gives or asked is None:
            self._loosen(there.path)
            return
        for name in sorted(asked & there.names):
            self._use(there, (name,))

    def _use(self, place: Place, names: tuple[str, ...]) -> None:
        while names and names[0] not in place.module.__dict__:
            if not hasattr(place.cls, names[0]):
                self._ask_for(place, names[0])
            child = self.places.get((*place.path, names[0]))
            if child is None:
                break
            place, names = child, names[1:]
        # The `forward` of a child is its own call, that of the module runs anyway.
        if not names or names[0] == "forward" or (place.path, names) in self._known:
            return
        self._known.add((place.path, names))
        self.uses.append((place, names))
        if method := method_taken(place, names[0]):
            self._run(place, functools.partial(findings_of_method, place.cls, method))
        elif function := function_taken(place, names[0]):
            text = "its " + ".".join((*place.path, names[0]))
            self._run(place, functools.partial(findings_of_value, function, text, False, {}))
        self._take(names[1:])

    def _take(self, names: Iterable[str]) -> None:
        new = frozenset(names) - self.taken
        self.taken |= new
        for path in sorted(self.loose) if new else ():
            self._take_of(self.places[path], new)

    def _loosen(self, path: tuple[str, ...]) -> None:
        if path in self.loose:
            return  # With all that is below it.
        for place in self.places.values():
            if place.path[: len(path)] == path and place.path not in self.loose:
                self.loose.add(place.path)
                self._take_of(place, self.taken)

    def _take_of(self, place: Place, names: Set[str]) -> None:
        for name in sorted(names & place.names):
            self._use(place, (name,))
        if "__getattr__" in place.names:
            for name in sorted(names - place.names):
                if not hasattr(place.cls, name):
                    self._ask_for(place, name)

    def _ask_for(self, place: Place, name: str) -> None:
        """Look up a name that is no attribute of the instance's `__dict__` or of its class."""
        if "__getattr__" not in place.names or name.startswith("__"):
            return
        if name not in place.tensors or not _asks_torch_first(place.cls):
            self._use(place, ("__getattr__",))

    def all(self, name: str = "") -> Iterator[tuple[str, Reach]]:
        """It and those below it, by name, in the order of `named_modules`."""
        yield name, self
        for key, reach in self.below.items():
            yield from reach.all(f"{name}.{key}" if name else key)

    def own_uses(self) -> list[tuple[str, ...]]:
        return [names for place, names in self.uses if not place.path]

    def own_stores(self) -> frozenset[str]:
        return frozenset().union(*(found.stored for place, found in self.runs if not place.path))

    def counted(self) -> str | None:
        """What is stored by one of these modules and read by one of them, None if nothing."""
        reaches = [reach for _, reach in self.all()]
        stored = {(id(p.module), n) for r in reaches for p, found in r.runs for n in found.stored}
        read = {(id(p.module), names[0]) for r in reaches for p, names in r.uses}
        counted = stored & read
        for place in self.places.values() if counted else ():
            names = sorted(name for owner, name in counted if owner == id(place.module))
            if names and place.path:
                return f"reads what {place.cls.__name__} counts, its {names[0]}"
            if names:
                return f"counts its {names[0]}, and reads it"
        return None


def _asks_torch_first(cls: type) -> bool:
    """Whether the `__getattr__` of a class does nothing else for what torch's finds."""
    methods = [base.__dict__.get("__getattr__") for base in cls.__mro__]
    its = [method for method in methods if method is not None and not is_of_torch(method)]
    return all(isinstance(m, types.FunctionType) and asks_super_first(m.__code__) for m in its)


def method_taken(place: Place, name: str) -> str | None:
    """The name under which a class has the method that an attribute is, None if it is none."""
    value = place.module.__dict__.get(name)
    if isinstance(value, types.MethodType) and value.__self__ is place.module:
        name = value.__name__
        return name if inspect.getattr_static(place.cls, name, None) is value.__func__ else None
    return name if value is None and methods_of(place.cls, name) else None


def function_taken(place: Place, name: str) -> Any:
    """The function that an attribute is, or what holds some; None if it is none, or a method."""
    value = attribute_of(place.module, place.cls, name)
    if isinstance(value, types.FunctionType) and name not in place.module.__dict__:
        return None
    return value if isinstance(value, (*FUNCTIONS, functools.partial, tuple)) else None


def attribute_of(module: nn.Module, cls: type, name: str) -> Any:
    own = module.__dict__
    for place in (own, own["_parameters"], own["_buffers"], own["_modules"]):
        if name in place:
            return place[name]
    return inspect.getattr_static(cls, name, None)
