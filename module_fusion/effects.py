"""Whether running a module has an effect besides its output, as far as its code tells.

A member whose call is captured runs later or not at all. That must not be seen: so a member
is captured only if its code, read down to the operations of torch, draws no random numbers
and writes to no tensor. What cannot be read counts as an effect.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bytecode import (
    WRITING_KEYWORDS,
    Load,
    Store,
    function_of,
    is_of_torch,
    layers_of,
    loads_in,
    methods_of,
    resolved,
    self_of,
    stores_in,
    uses_super,
)
from .deferred import IMMUTABLE
from .originals import original_of
from .returns import may_return_none

_RANDOM_PREFIXES = ("rand", "bernoulli", "gumbel", "fractional_max_pool", "manual_seed")
_RANDOM_NAMES = frozenset(
    (
        "multinomial", "normal", "uniform", "exponential", "poisson", "binomial", "cauchy",
        "geometric", "log_normal", "sample", "rsample", "seed", "initial_seed", "get_rng_state",
        "svd_lowrank", "pca_lowrank", "lobpcg", "make_tensor", "fork_rng",
    )
)  # fmt: skip
# Functions that draw or update only when they are told that they train.
_TRAINED = ("dropout", "rrelu", "batch_norm", "instance_norm")
# They drop at random, depend on settings, call what they are given, or act on the graph.
_UNREADABLE = frozenset(
    (
        "scaled_dot_product_attention", "multi_head_attention_forward", "checkpoint", "compile",
        "mark_dirty", "apply", "call_function", "backward", "register_hook", "retain_grad",
        "numpy", "ops",
        "register_post_accumulate_grad_hook", "embedding_bag", "set_default_dtype",
        "set_default_device", "set_grad_enabled", "save", "load",
        "get_default_dtype", "get_default_device", "get_float32_matmul_precision",
        "are_deterministic_algorithms_enabled", "is_inference_mode_enabled", "is_grad_enabled",
        "is_inference", "grad", "grad_fn", "is_leaf", "_version", "__dict__", "__class__",
        "__getattribute__", "__getstate__", "__reduce__", "__reduce_ex__",
        "fused_moving_avg_obs_fake_quant", "_fused_moving_avg_obs_fq_helper",
    )
)  # fmt: skip
_PURE_BUILTINS = frozenset(
    (
        "len", "range", "int", "float", "bool", "complex", "str", "bytes", "tuple", "list", "dict",
        "set", "frozenset", "isinstance", "issubclass", "type", "min", "max", "sum", "abs", "round",
        "zip", "enumerate", "map", "filter", "any", "all", "hasattr", "super", "slice", "reversed",
        "sorted", "repr", "format", "callable", "divmod", "pow", "property", "NotImplemented",
    )
)  # fmt: skip
_PURE_MODULES = (math.__name__, operator.__name__, "_operator", "typing", "collections.abc")
_WRITING_OPERATORS = frozenset(
    name for name in dir(operator) if name.startswith("i") and hasattr(operator, name[1:])
) | {"iconcat", "setitem", "delitem"}
_WRITING_METHODS = frozenset(
    (
        "__setitem__", "__delitem__", "__setattr__", "__delattr__", "__set__", "__delete__",
        *(f"__{name}__" for name in _WRITING_OPERATORS),
    )
)  # fmt: skip
_READING = frozenset(("get", "items", "keys", "values", "index", "count", "copy"))
_OF_MODULES = frozenset(
    (
        "parameters", "named_parameters", "buffers", "named_buffers", "children", "named_children",
        "modules", "named_modules", "get_parameter", "get_buffer", "get_submodule", "_conv_forward",
    )
)  # fmt: skip
_DATA: tuple[Any, ...] = (*IMMUTABLE, Enum)
# What operators, statements and builtins call, of a class that has it.
_OPERATORS = frozenset(
    (
        *(f"__{name.strip('_')}__" for name in dir(operator) if not name.startswith("__")),
        *(f"__r{name.strip('_')}__" for name in dir(operator) if not name.startswith("__")),
        "__bool__", "__len__", "__iter__", "__next__", "__reversed__", "__enter__", "__exit__",
        "__int__", "__float__", "__complex__", "__round__", "__divmod__", "__format__",
        "__getattr__", "__getattribute__",
    )
) - {"__call__"}  # fmt: skip


# Layers of torch that only compute, whatever their settings are.
_PURE_LAYERS = frozenset(
    (
        nn.Linear, nn.Bilinear, nn.Identity, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
        nn.ConvTranspose2d, nn.ConvTranspose3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.GELU,
        nn.Sigmoid, nn.Tanh, nn.Softmax,
    )
)  # fmt: skip


_COMPARED = (*_DATA, tuple, dict, list, set, types.MethodType)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_SETTINGS = (*_DATA, tuple, *_FUNCTIONS)


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


class _Findings(NamedTuple):
    """What the code of a function and all it calls does, and which code that is.

    `methods` are looked up on a class when it runs, `functions` have it. `taken` are attributes
    of values, of which it is not followed what they are.
    """

    always: str | None
    in_training: str | None
    own: frozenset[tuple[str, ...]]
    stored: frozenset[str]
    shared: frozenset[tuple[types.FunctionType, Load]] = frozenset()
    methods: frozenset[tuple[Any, str]] = frozenset()
    functions: frozenset[types.FunctionType] = frozenset()
    taken: frozenset[str] = frozenset()


_NOT_READ: dict[tuple[Any, str], _Findings] = {}
_READ: ContextVar[dict[tuple[Any, str], _Findings]] = ContextVar("_READ", default=_NOT_READ)
_Known = dict[tuple[types.FunctionType, type | None, bool], _Findings]

# A call that is told whether to train: by its module, or by a caller who is told.
_TOLD = {"self.training", "local training"}
_NOTHING = _Findings(None, None, frozenset(), frozenset())


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
        traced: those of the methods that torch.compile can look up, of modules.
    """

    methods: tuple[tuple[Any, str, Any], ...]
    functions: tuple[tuple[types.FunctionType, types.CodeType, Any, Any], ...]
    traced: tuple[tuple[Any, str, Any], ...] = ()

    def why_not_same(self) -> str | None:
        """Which of it was replaced since, None if nothing was."""
        compiling = torch.compiler.is_dynamo_compiling()
        for owner, name, value in self.traced if compiling else self.methods:
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


class _Place(NamedTuple):
    """A module, or one below it.

    Attributes:
        path: names of the children that lead there.
        names: attributes of the instance, and of its class other than from torch.
    """

    path: tuple[str, ...]
    module: nn.Module
    cls: Any
    names: frozenset[str]


def _names_of(module: nn.Module, cls: type) -> frozenset[str]:
    names: set[str] = set()
    for base in reversed(cls.__mro__):
        if base is object or is_of_torch(base):
            names -= base.__dict__.keys()
        else:
            names |= base.__dict__.keys()
    return frozenset(names.union(module.__dict__))


class Reach:
    """The methods that run when a module does, and what they take of it and of those below it.

    What is taken of a value (a variable, an item, an argument) is taken of every one of these
    modules that has it. What a module below does at its own call is in `below`.

    Args:
        module: it.
        cls: the class that it counts as an instance of.

    Attributes:
        runs: what each method does, with the module that it is called on.
        uses: attributes that are taken of a module, one after the other.
        below: what each child reaches.
        places: the module and those below it, by their paths.
    """

    def __init__(self, module: nn.Module, cls: Any) -> None:
        children = {name: child for name, child in module._modules.items() if child is not None}
        self.below = {n: Reach(child, original_of(type(child))) for n, child in children.items()}
        top = _Place((), module, cls, _names_of(module, cls))
        self.places: dict[tuple[str, ...], _Place] = {(): top}
        for name, reach in self.below.items():
            for path, place in reach.places.items():
                self.places[(name, *path)] = place._replace(path=(name, *path))
        self.runs: list[tuple[_Place, _Findings]] = []
        self.uses: list[tuple[_Place, tuple[str, ...]]] = []
        self._known: set[tuple[tuple[str, ...], tuple[str, ...] | str]] = set()
        self.taken: set[str] = set()
        forward = function_of(cls.forward)
        if forward is not None and not is_of_torch(forward):
            self._run(top, functools.partial(_of_method, cls, "forward"))
        self._take(_OPERATORS.union(*(reach.taken for reach in self.below.values())))

    def _run(self, place: _Place, read: Callable[[], _Findings]) -> None:
        try:
            found = read()
        except RecursionError:
            what = "calls functions that call each other too deeply to be read"
            found = _NOTHING._replace(always=what)
        self.runs.append((place, found))
        for names in sorted(found.own):
            self._use(place, names)
        self._take(found.taken)

    def _use(self, place: _Place, names: tuple[str, ...]) -> None:
        while names and names[0] not in place.module.__dict__:
            child = self.places.get((*place.path, names[0]))
            if child is None:
                break
            place, names = child, names[1:]
        # The `forward` of a child is its own call, that of the module runs anyway.
        if not names or names[0] == "forward" or (place.path, names) in self._known:
            return
        self._known.add((place.path, names))
        self.uses.append((place, names))
        if method := _method_of(place, names[0]):
            self._run(place, functools.partial(_of_method, place.cls, method))
        elif function := _function_of(place, names[0]):
            text = "its " + ".".join((*place.path, names[0]))
            self._run(place, functools.partial(_of_value, function, text, False, {}))
        self._take(names[1:])

    def _take(self, names: Iterable[str]) -> None:
        new = frozenset(names) - self.taken
        self.taken |= new
        for place in self.places.values() if new else ():
            for name in sorted(new & place.names):
                self._use(place, (name,))

    def own_uses(self) -> list[tuple[str, ...]]:
        return [names for place, names in self.uses if not place.path]

    def own_stores(self) -> frozenset[str]:
        return frozenset().union(*(found.stored for place, found in self.runs if not place.path))

    def counted(self) -> str | None:
        """What is stored by one of these modules and read by one of them, None if nothing."""
        reaches = [self]
        for reach in reaches:
            reaches += reach.below.values()
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


def _method_of(place: _Place, name: str) -> str | None:
    """The name under which a class has the method that an attribute is, None if it is none."""
    value = place.module.__dict__.get(name)
    if isinstance(value, types.MethodType) and value.__self__ is place.module:
        name = value.__name__
        return name if inspect.getattr_static(place.cls, name, None) is value.__func__ else None
    return name if value is None and methods_of(place.cls, name) else None


def _function_of(place: _Place, name: str) -> Any:
    """The function that an attribute is, or what holds some; None if it is none, or a method."""
    value = _attribute_of(place.module, place.cls, name)
    if isinstance(value, types.FunctionType) and name not in place.module.__dict__:
        return None
    return value if isinstance(value, (*_FUNCTIONS, functools.partial, tuple)) else None


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
        value = _attribute_of(module, cls, name)
        if name in tensors or name in reach.own_stores():
            continue
        if isinstance(value, (dict, list, set)):
            reads.append(Read(name, copy.copy(value), functools.partial(_own_value, (name,))))
        elif isinstance(value, functools.partial):
            reads.append(Read(name, _parts(value), functools.partial(_own_parts, name)))
        elif name not in module.__dict__ and isinstance(value, (*_DATA, tuple)):
            reads.append(Read(name, value, functools.partial(_own_value, (name,))))
        elif rest and rest[0] in vars_of(value) and isinstance(vars_of(value)[rest[0]], _DATA):
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


@contextmanager
def code_read_once() -> Iterator[None]:
    """Inside, the code of a class is read once. Not for longer: anyone may replace a method."""
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


def is_code_read_once() -> bool:
    """Whether what is found out about code is kept, until `code_read_once` is left."""
    return _READ.get() is not _NOT_READ


def _of_method(cls: Any, name: str) -> _Findings:
    read = _READ.get()
    if (cls, name) not in read:
        known: _Known = {}
        found = _merged(
            [
                _NOTHING._replace(methods=frozenset([(cls, name)])),
                *(_of_function(f, cls, True, known) for f in methods_of(cls, name)),
            ]
        )
        if read is _NOT_READ:
            return found
        read[cls, name] = found
    return read[cls, name]


def _merged(findings: list[_Findings]) -> _Findings:
    return _Findings(
        next((f.always for f in findings if f.always), None),
        next((f.in_training for f in findings if f.in_training), None),
        frozenset().union(*(f.own for f in findings)),
        frozenset().union(*(f.stored for f in findings)),
        frozenset().union(*(f.shared for f in findings)),
        frozenset().union(*(f.methods for f in findings)),
        frozenset().union(*(f.functions for f in findings)),
        frozenset().union(*(f.taken for f in findings)),
    )


def _of_function(
    function: types.FunctionType, cls: type | None, is_method: bool, known: _Known
) -> _Findings:
    """What a function does, as a method of a class or by itself; once for each in `known`."""
    key = (function, cls, is_method)
    if key in known:
        return known[key]
    known[key] = _NOTHING  # What calls itself does nothing more than the rest of it does.
    me = self_of(function) if is_method else ""
    stores = stores_in(function.__code__, me)
    found = [_of_stores(stores, function), _NOTHING._replace(functions=frozenset([function]))]
    if function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        found.append(_NOTHING._replace(always=f"runs {function.__qualname__} bit by bit"))
    counted = [store.name for store in stores if store.kind == "count"]
    for load in loads_in(function.__code__, me):
        if load.kind == "own" and load.attributes[0] in counted and len(load.attributes) == 1:
            counted.remove(load.attributes[0])  # To add to it.
        else:
            found.append(_of_load(load, function, cls, known))
    known[key] = _merged(found)
    return known[key]


def _of_stores(stores: Sequence[Store], function: types.FunctionType) -> _Findings:
    stored = frozenset(store.name for store in stores if store.kind in ("own", "count"))
    what = None
    if any(store.kind not in ("own", "count") for store in stores):
        what = f"may write to a tensor, in {function.__qualname__}"
    elif kept := [store.name for store in stores if store.kind == "own"]:
        # Not how often it is called: that is right when it is not called.
        what = f"sets its {kept[0]}"
    return _NOTHING._replace(always=what, stored=stored)


def _of_load(
    load: Load, function: types.FunctionType, cls: type | None, known: _Known
) -> _Findings:
    if load.kind == "import":
        return _NOTHING._replace(always=f"imports {load.name} when it runs")
    if load.kind == "own":
        return _of_own(load, cls, known)
    bases = cls.__mro__[1:] if cls is not None and uses_super(function) else ()
    if load.kind in ("value", "super"):
        found = []
        for name in load.attributes[:1]:
            for base in bases:
                if name == "forward" and base in _PURE_LAYERS:
                    found.append(_NOTHING)
                    break
                methods = layers_of(base.__dict__.get(name))
                if methods:
                    found.append(_NOTHING._replace(methods=frozenset([(base, name)])))
                found += [_of_function(method, cls, True, known) for method in methods]
        rest = load.attributes[1:] if found or load.kind == "super" else load.attributes
        return _merged([*found, *map(_of_attribute, rest)])
    if load.kind == "closure" and load.name == "__class__" and not load.attributes:
        return _NOTHING  # Loaded for `super`.
    value, attributes = resolved(load, function)
    text = ".".join((load.name, *load.attributes))
    found = [_of_value(value, text, bool(_TOLD & (load.given or set())), known)]
    kept = isinstance(value, (bool, int, float, complex, str, tuple, functools.partial))
    kept = kept or (isinstance(value, types.FunctionType) and not is_of_torch(value))
    if kept and not _is_constant(load, function):
        found.append(_NOTHING._replace(shared=frozenset([(function, load)])))
    if load.given is not None and _is_told_to_write(value, load.arguments):
        found.append(_NOTHING._replace(always=f"may write to a tensor, in {text}"))
    return _merged([*found, *map(_of_attribute, attributes)])


def _is_constant(load: Load, function: types.FunctionType) -> bool:
    """Whether a value is one of a module whose values nobody sets, such as `math.pi`."""
    base = resolved(load._replace(attributes=()), function)[0]
    name = getattr(base, "__name__", "")
    return isinstance(base, types.ModuleType) and name.partition(".")[0] in ("torch", "math")


def _of_own(load: Load, cls: type | None, known: _Known) -> _Findings:
    name = load.attributes[0] if load.attributes else ""
    if name == "training":
        return _NOTHING._replace(in_training="does something else in training")
    methods = methods_of(cls, name) if cls is not None and name else []
    if methods:
        found = [_of_function(method, cls, True, known) for method in methods]
        found.append(_NOTHING._replace(methods=frozenset([(cls, name)])))
        return _merged([*found, *map(_of_attribute, load.attributes[1:])])
    return _NOTHING._replace(own=frozenset([load.attributes] if name else []))


@functools.lru_cache(maxsize=4096)
def _of_attribute(name: str) -> _Findings:
    """What it does to take this attribute of a tensor or a container, and to call it."""
    what = _what_by_name(name)
    kinds = (Tensor, dict, list, tuple, str, torch.autograd.function.FunctionCtx, torch.finfo)
    if what is None and not any(hasattr(kind, name) for kind in kinds):
        what = f"uses {name!r} of a value, and it is not known what that does"
    return _NOTHING._replace(always=what, taken=frozenset([name]))


def _what_by_name(name: str) -> str | None:
    if name.startswith(_RANDOM_PREFIXES) or name.rstrip("_") in _RANDOM_NAMES:
        return f"may draw random numbers, in {name}"
    if name in _WRITING_METHODS or (name.endswith("_") and not name.startswith("__")):
        return f"may write to a tensor, in {name}"
    return f"uses {name}, and it is not known what that does" if name in _UNREADABLE else None


def _of_value(value: Any, text: str, training: bool, known: _Known) -> _Findings:
    """What it does to use this value, and to call it."""
    name = getattr(value, "__name__", "")
    unknown = _NOTHING._replace(always=f"uses {text}, and it is not known what that does")
    if isinstance(value, (*_DATA, logging.Logger, types.ModuleType)):
        return _NOTHING
    if isinstance(value, functools.partial):
        value = (value.func, *value.args, *value.keywords.values())
    if isinstance(value, tuple):
        return _merged([_of_value(item, text, training, known) for item in value])
    if _is_operation(value):
        if name.startswith("set_") or (value.__module__ or "").startswith("torch.distributed"):
            return unknown
        if any(part in name for part in _TRAINED):
            what = f"may draw random numbers or update buffers, in {name}"
            return _Findings(None if training else what, what, frozenset(), frozenset())
        return _NOTHING._replace(always=_what_by_name(name))
    owner = getattr(value, "__self__", None)
    if name == "apply" and isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return _of_method(owner, "forward")
    if isinstance(value, types.FunctionType):
        found = _merged([_of_function(f, None, False, known) for f in layers_of(value)])
        if training and "training" in inspect.signature(value).parameters:
            return found._replace(always=None, in_training=found.in_training or found.always)
        return found._replace(always=found.always or found.in_training)
    if isinstance(value, type):
        pure = issubclass(value, (BaseException, tuple, Tensor)) or is_of_torch(value)
        if issubclass(value, nn.Module):
            pure = value in _PURE_LAYERS
        return _NOTHING if pure or value.__name__ in _PURE_BUILTINS else unknown
    if isinstance(value, types.BuiltinFunctionType):
        pure = name in _PURE_BUILTINS or value.__module__ in _PURE_MODULES
        pure = pure and name not in _WRITING_OPERATORS
        return _NOTHING if pure else unknown
    return _NOTHING if (type(value).__module__ or "") in ("typing", "types") else unknown


def _is_told_to_write(function: Any, count: int | None) -> bool:
    """Whether a function of torch gets an argument by position that has it write."""
    if not isinstance(function, types.FunctionType) or not is_of_torch(function):
        return False
    parameters = list(inspect.signature(function).parameters)
    told = [parameters.index(name) for name in WRITING_KEYWORDS if name in parameters]
    return any(count is None or count > position for position in told)


def _is_operation(value: Any) -> bool:
    """Whether it is a function of torch."""
    if isinstance(value, types.FunctionType):
        return is_of_torch(value)
    if not isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType)):
        return False
    return is_of_torch(value) or "_VariableFunctions" in value.__qualname__


def _what_happens(reach: Reach) -> str | None:
    """What running a module does besides its output, other than by the code of its `forward`."""
    for index, (place, found) in enumerate(reach.runs):
        what = _what_is_written(place, found)
        if index > 0:
            what = what or found.always or found.in_training
        if what is not None:
            return what
    what = reach.counted()
    for place, names in reach.uses if what is None else ():
        what = what or (_what_child_does if place.path else _what_own_does)(place, *names)
    return what


def _what_is_written(place: _Place, found: _Findings) -> str | None:
    own = place.module.__dict__
    tensors = own["_parameters"].keys() | own["_buffers"].keys() | own["_modules"].keys()
    for name in sorted(found.stored):
        if name in tensors or isinstance(inspect.getattr_static(place.cls, name, None), property):
            return f"may write to its {name}"
    return None


def _what_own_does(place: _Place, name: str, *rest: str) -> str | None:
    """What it does to take an attribute of this very module."""
    own, value = place.module.__dict__, _attribute_of(place.module, place.cls, name)
    unknown = f"uses its {name}, and it is not known what that does"
    if _method_of(place, name) is not None:
        return _merged([*map(_of_attribute, rest)]).always
    if name not in own and isinstance(value, types.FunctionType):
        return None if name in _OF_MODULES else unknown  # A method of torch.
    if isinstance(value, nn.Module):
        return unknown  # It is no child: nobody looks at what its call does.
    if isinstance(value, Tensor):
        if name not in own["_parameters"] and name not in own["_buffers"]:
            return f"reads its {name}, a tensor that is no parameter and no buffer of it"
        return _merged([*map(_of_attribute, rest)]).always
    if isinstance(value, (dict, list, set)):
        items = value.values() if isinstance(value, dict) else value
        readable = set(rest) <= _READING and all(isinstance(item, _DATA) for item in items)
        return None if readable else unknown
    if not rest and _function_of(place, name):
        return None  # What it does is among the findings.
    if rest and not isinstance(value, (*_DATA, types.ModuleType, type)):
        held = vars_of(value)
        plain = len(rest) == 1 and rest[0] in held and isinstance(held[rest[0]], _DATA)
        return None if plain else unknown
    return _of_value(value, f"its {name}", False, {}).always


def _what_child_does(place: _Place, name: str, *rest: str) -> str | None:
    """What it does to take an attribute of a module below; its own call is looked at with it."""
    child, value = place.module, _attribute_of(place.module, place.cls, name)
    known = isinstance(value, property) or name in _OF_MODULES
    if isinstance(value, Tensor):
        known = name in child._parameters or name in child._buffers
    elif isinstance(value, _SETTINGS):  # What a function does is among the findings.
        known = isinstance(value, _DATA) or _function_of(place, name) is not None
    if not known and _method_of(place, name) is None:
        return f"uses {name!r} of a module, and it is not known what that does"
    return _merged([*map(_of_attribute, rest)]).always


def _attribute_of(module: nn.Module, cls: type, name: str) -> Any:
    own = module.__dict__
    for place in (own, own["_parameters"], own["_buffers"], own["_modules"]):
        if name in place:
            return place[name]
    return inspect.getattr_static(cls, name, None)


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
