"""Whether running a module has an effect besides its output, as far as its code tells.

A member whose call is captured runs later or not at all. That must not be seen: so a member
is captured only if its code, read down to the operations of torch, draws no random numbers
and writes to no tensor. What cannot be read counts as an effect.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bytecode import Load, function_of, is_of_torch, loads_in, resolved, self_of
from .findings import DATA, FUNCTIONS, Findings, findings_of_attribute, findings_of_value, merged
from .reach import ONLY_READING, Place, Reach, attribute_of, function_taken, method_taken
from .returns import may_return_none

_READING = frozenset(("get", "items", "keys", "values", "index", "count", "copy"))
_COMPARED = (*DATA, tuple, dict, list, set, types.MethodType)
_WRITING: dict[type, frozenset[str]] = {
    list: frozenset(["append", "extend", "insert", "pop", "remove", "clear", "sort", "reverse"]),
    dict: frozenset(["pop", "popitem", "clear", "update", "setdefault"]),
    set: frozenset(name for name in dir(set) if name not in dir(frozenset) and name[0] != "_"),
}
_SETTINGS = (*DATA, tuple, *FUNCTIONS)


class Effect(NamedTuple):
    """An effect: what it is, for the report, and whether it happens at a module's next call."""

    what: str
    happens: Callable[[Any], bool]

    @property
    def is_certain(self) -> bool:
        """Whether it happens at every call, whatever the settings of the module are."""
        return self.happens is _always


def is_other(now: Any, value: Any) -> bool:
    """Whether a value is another one; of things that only they know how to compare, the object."""
    if now is value:
        return False
    if type(now) is not type(value) or not isinstance(value, _COMPARED):
        return True
    try:
        return bool(now != value)
    except Exception:  # Of what is in a container, such as arrays.
        return True


class Read(NamedTuple):
    """A value that the code of a module reads elsewhere than in the module, as it is now."""

    what: str
    value: Any
    now: Callable[[nn.Module], Any]

    def differs(self, module: nn.Module) -> bool:
        """Whether the module would read something else now."""
        return is_other(self.now(module), self.value)


def effect_of(reach: Reach) -> Effect | None:
    """The effect of running a module, None if there is none."""
    _, module, cls, _ = reach.places[()]
    forward = function_of(cls.forward)
    if forward is None:
        return Effect("runs code that is not Python", _always)
    if is_of_torch(forward):
        return _effect_in_torch(module, cls, forward)
    if may_return_none(forward):
        # No value can stand for None: `is` asks nobody.
        return Effect("may return None", _always)
    _, found = reach.runs[0]
    what = found.always or _what_happens(reach)
    if what is not None:
        return Effect(what, _always)
    return Effect(found.in_training, _trains) if found.in_training else None


def settings_of(reach: Reach) -> tuple[tuple[str, Any], ...]:
    """Attributes that the module's code reads, and that someone may set to another value.

    Numbers, names and functions; those that the code itself stores are its state.
    """
    _, module, cls, _ = reach.places[()]
    forward = function_of(cls.forward)
    own = module.__dict__
    if forward is None:
        return ()
    if is_of_torch(forward):
        names = {name for name in own if not name.startswith("_")} - {"training"}
    else:
        names = {names[0] for names in reach.own_uses() if names[0] in own} - reach.own_stores()
    return tuple((n, own[n]) for n in sorted(names) if isinstance(own[n], _SETTINGS))


class Code(NamedTuple):
    """The code that runs when a module does.

    Attributes:
        methods: classes, the name of an attribute that is looked up on each, and what it is now.
        functions: Python functions, with what may be exchanged in each.
    """

    methods: tuple[tuple[Any, str, Any], ...]
    functions: tuple[tuple[types.FunctionType, types.CodeType, Any, Any], ...]


def code_of(reach: Reach) -> Code:
    """The code of a module: its methods and what they call.

    Functions of torch itself are not among it.
    """
    cls = reach.places[()].cls
    forward = function_of(cls.forward)
    methods: set[tuple[Any, str]] = {(cls, n) for n in ("forward", "__call__", "_call_impl")}
    functions: set[types.FunctionType] = set()
    if forward is not None and is_of_torch(forward):
        for load in loads_in(forward.__code__, self_of(forward)):
            name = load.attributes[0] if load.kind == "own" and load.attributes else ""
            if function_of(inspect.getattr_static(cls, name, None)) is not None:
                methods.add((cls, name))
    for _, found in reach.runs:
        methods |= found.methods
        functions |= found.functions
    return Code(
        tuple((owner, name, getattr(owner, name, None)) for owner, name in methods),
        tuple((f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions),
    )


def reads_of(reach: Reach) -> tuple[Read, ...]:
    """Values that the module's code reads of globals, of its class and of objects it holds."""
    _, module, cls, _ = reach.places[()]
    if not reach.runs:
        return ()
    shared = set().union(*(found.shared for _, found in reach.runs))
    reads = [
        Read(".".join((load.name, *load.attributes)), now(module), now)
        for function, load in sorted(shared, key=lambda item: item[1].name)
        for now in [functools.partial(_shared_value, function, load)]
    ]
    for path, name in _read_below(reach):
        value_now = functools.partial(_value_below, path, name)
        reads.append(Read(".".join((*path, name)), value_now(module), value_now))
    tensors = {**module._parameters, **module._buffers, **module._modules}
    for name, *rest in reach.own_uses():
        value = attribute_of(module, cls, name)
        if name in tensors or name in reach.own_stores():
            continue
        if isinstance(value, (dict, list, set)):
            reads.append(Read(name, copy.copy(value), functools.partial(_own_value, (name,))))
        elif isinstance(value, functools.partial):
            reads.append(Read(name, _parts(value), functools.partial(_own_parts, name)))
        elif name not in module.__dict__ and isinstance(value, (*DATA, tuple)):
            reads.append(Read(name, value, functools.partial(_own_value, (name,))))
        elif rest and rest[0] in vars_of(value) and isinstance(vars_of(value)[rest[0]], DATA):
            path = (name, rest[0])
            held = vars_of(value)[rest[0]]
            reads.append(Read(".".join(path), held, functools.partial(_own_value, path)))
    return tuple(reads)


def _parts(value: Any) -> Any:
    """What a `functools.partial` is made of, whose keywords anyone may change."""
    if not isinstance(value, functools.partial):
        return value
    return value.func, value.args, value.keywords.copy()


def _own_parts(name: str, module: nn.Module) -> Any:
    return _parts(module.__dict__.get(name))


def _read_below(reach: Reach) -> list[tuple[tuple[str, ...], str]]:
    """What is taken of modules below, other than tensors: numbers, and methods that run."""
    found = {(p.path, n[0]): p.module for p, n in reach.uses if p.path}
    for place, its in reach.runs:
        for owner, name in its.methods if place.path else ():
            if issubclass(place.cls, owner):
                found[place.path, name] = place.module
    return sorted(
        (path, name)
        for (path, name), child in found.items()
        if name not in child._parameters and name not in child._buffers
    )


def _value_below(path: tuple[str, ...], name: str, module: nn.Module) -> Any:
    for key in path:
        child = module._modules.get(key)
        if child is None:
            return None
        module = child
    own = module.__dict__
    if torch.compiler.is_dynamo_compiling():
        getattr(module, name, None)  # So that the graph is made again when it is replaced.
    return own[name] if name in own else getattr(type(module), name, None)


def _shared_value(function: types.FunctionType, load: Load, module: nn.Module) -> Any:
    return resolved(load, function)[0]


def _own_value(path: tuple[str, ...], module: Any) -> Any:
    for name in path:
        # Past a `__getattr__` of its own, which may do anything.
        is_set = torch.compiler.is_dynamo_compiling() or name in vars_of(module)
        module = getattr(module if is_set else type(module), name, None)
    return module


def _effect_in_torch(
    module: nn.Module, cls: type[nn.Module], forward: types.FunctionType
) -> Effect | None:
    if getattr(module, "inplace", False) is not False:
        return Effect("writes to its input", _always)
    if issubclass(cls, nn.modules.dropout._DropoutNd):
        return Effect("draws random numbers", _drops)
    if issubclass(cls, nn.modules.batchnorm._NormBase):
        return Effect("updates its buffers", _tracks)
    if not (forward.__module__ or "").startswith("torch.nn.modules."):
        return Effect(f"runs {forward.__qualname__}, which it is not known what it does", _always)
    if getattr(module, "max_norm", None) is not None:
        return Effect("writes to its weight", _always)
    name = forward.__qualname__.partition(".")[0]
    if name.startswith(("RReLU", "Transformer", "MultiheadAttention", "RNN", "LSTM", "GRU")):
        return Effect("draws random numbers", _trains)
    return Effect("draws random numbers", _always) if name.startswith("Fractional") else None


def _what_happens(reach: Reach) -> str | None:
    """What running a module does besides its output, other than by the code of its `forward`."""
    for index, (place, found) in enumerate(reach.runs):
        what = _what_is_written(place, found, reach.taken)
        if index > 0:
            what = what or found.always or found.in_training
        if what is not None:
            return what
    what = reach.counted()
    for place, names in reach.uses if what is None else ():
        what = what or (_what_child_does if place.path else _what_own_does)(place, *names)
    return what


def _what_is_written(place: Place, found: Findings, taken: set[str]) -> str | None:
    own = place.module.__dict__
    tensors = own["_parameters"].keys() | own["_buffers"].keys() | own["_modules"].keys()
    for name in sorted(found.stored):
        if name in tensors or isinstance(inspect.getattr_static(place.cls, name, None), property):
            return f"may write to its {name}"
    for name in sorted(names[0] for names, asked in found.loose if names and asked is None):
        value = attribute_of(place.module, place.cls, name)
        if any(isinstance(value, kind) and names & taken for kind, names in _WRITING.items()):
            return f"may write to its {name}"
    return None


def _what_own_does(place: Place, name: str, *rest: str) -> str | None:
    """What it does to take an attribute of this very module."""
    own, value = place.module.__dict__, attribute_of(place.module, place.cls, name)
    unknown = f"uses its {name}, and it is not known what that does"
    if method_taken(place, name) is not None:
        return merged([*map(findings_of_attribute, rest)]).always
    if name not in own and isinstance(value, types.FunctionType):
        return None if name in ONLY_READING else unknown  # A method of torch.
    if isinstance(value, nn.Module):
        return unknown  # It is no child: nobody looks at what its call does.
    if isinstance(value, Tensor):
        if name not in own["_parameters"] and name not in own["_buffers"]:
            return f"reads its {name}, a tensor that is no parameter and no buffer of it"
        return merged([*map(findings_of_attribute, rest)]).always
    if isinstance(value, (dict, list, set)):
        items = value.values() if isinstance(value, dict) else value
        readable = set(rest) <= _READING and all(isinstance(item, DATA) for item in items)
        return None if readable else unknown
    if not rest and function_taken(place, name):
        return None  # What it does is among the findings.
    if rest and not isinstance(value, (*DATA, types.ModuleType, type)):
        held = vars_of(value)
        plain = len(rest) == 1 and rest[0] in held and isinstance(held[rest[0]], DATA)
        return None if plain else unknown
    return findings_of_value(value, f"its {name}", False, {}).always


def _what_child_does(place: Place, name: str, *rest: str) -> str | None:
    """What it does to take an attribute of a module below; its own call is looked at with it."""
    child, value = place.module, attribute_of(place.module, place.cls, name)
    known = isinstance(value, property) or name in ONLY_READING
    if isinstance(value, Tensor):
        known = name in child._parameters or name in child._buffers
    elif not known and isinstance(value, _SETTINGS):  # What a function does is among the findings.
        known = isinstance(value, DATA) or function_taken(place, name) is not None
    if not known and method_taken(place, name) is None:
        return f"uses {name!r} of a module, and it is not known what that does"
    return merged([*map(findings_of_attribute, rest)]).always


def vars_of(value: Any) -> dict[str, Any]:
    """The instance attributes of an object, {} where it has none."""
    own = getattr(value, "__dict__", {})
    return own if isinstance(own, dict) else {}


def _always(module: Any) -> bool:
    return True


def _trains(module: Any) -> bool:
    return bool(module.training)


def _drops(module: Any) -> bool:
    return bool(module.training and module.p > 0)


def _tracks(module: Any) -> bool:
    return bool(module.training and module.track_running_stats)
