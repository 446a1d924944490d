"""What the code of a function does, and all that it calls, read down to the operations of torch."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import operator
import types
from collections.abc import Iterator, Sequence
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
from .specials import OF_OPERATIONS, specials_in, specials_of_builtin, specials_of_method
from .stack import ASKING, advances

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
        "iter", "next",
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
# Layers of torch that only compute, whatever their settings are.
_PURE_LAYERS = frozenset(
    (
        nn.Linear, nn.Bilinear, nn.Identity, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d,
        nn.ConvTranspose2d, nn.ConvTranspose3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.GELU,
        nn.Sigmoid, nn.Tanh, nn.Softmax,
    )
)  # fmt: skip
DATA: tuple[Any, ...] = (*IMMUTABLE, Enum)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class Findings(NamedTuple):
    """What the code of a function and all it calls does, and which code that is.

    `methods` are looked up on a class when it runs, `functions` have it. `taken` are attributes
    of values, and special methods called of them, of which it is not followed what they are.
    `loose` are own attributes, () for `self`, that may be among those values; or of which only
    the special methods are called that come with it.
    """

    always: str | None
    in_training: str | None
    own: frozenset[tuple[str, ...]]
    stored: frozenset[str]
    shared: frozenset[tuple[types.FunctionType, Load]] = frozenset()
    methods: frozenset[tuple[Any, str]] = frozenset()
    functions: frozenset[types.FunctionType] = frozenset()
    taken: frozenset[str] = frozenset()
    loose: frozenset[tuple[tuple[str, ...], frozenset[str] | None]] = frozenset()


NOTHING = Findings(None, None, frozenset(), frozenset())
_ITSELF = NOTHING._replace(loose=frozenset([((), None)]))
_NOT_READ: dict[tuple[Any, str], Findings] = {}
_READ: ContextVar[dict[tuple[Any, str], Findings]] = ContextVar("_READ", default=_NOT_READ)
_Known = dict[tuple[types.FunctionType, type | None, bool], Findings]
# A call that is told whether to train: by its module, or by a caller who is told.
_TOLD = {"self.training", "local training"}


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


def findings_of_method(cls: Any, name: str) -> Findings:
    read = _READ.get()
    if (cls, name) not in read:
        known: _Known = {}
        found = merged(
            [
                NOTHING._replace(methods=frozenset([(cls, name)])),
                *(_of_function(f, cls, True, known) for f in methods_of(cls, name)),
            ]
        )
        if read is _NOT_READ:
            return found
        read[cls, name] = found
    return read[cls, name]


def merged(findings: list[Findings]) -> Findings:
    return Findings(
        next((f.always for f in findings if f.always), None),
        next((f.in_training for f in findings if f.in_training), None),
        frozenset().union(*(f.own for f in findings)),
        frozenset().union(*(f.stored for f in findings)),
        frozenset().union(*(f.shared for f in findings)),
        frozenset().union(*(f.methods for f in findings)),
        frozenset().union(*(f.functions for f in findings)),
        frozenset().union(*(f.taken for f in findings)),
        frozenset().union(*(f.loose for f in findings)),
    )


def _of_function(
    function: types.FunctionType, cls: type | None, is_method: bool, known: _Known
) -> Findings:
    """What a function does, as a method of a class or by itself; once for each in `known`."""
    key = (function, cls, is_method)
    if key in known:
        return known[key]
    known[key] = NOTHING  # What calls itself does nothing more than the rest of it does.
    me = self_of(function) if is_method else ""
    stores = stores_in(function.__code__, me)
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    text = f"a default of {function.__qualname__}"
    found = [
        _of_stores(stores, function),
        NOTHING._replace(functions=frozenset([function]), taken=specials_in(function.__code__)),
        *([_ITSELF] if is_method and not me else []),  # It is among `*args`.
        *(findings_of_value(value, text, False, known) for value in defaults),
    ]
    if function.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        found.append(NOTHING._replace(always=f"runs {function.__qualname__} bit by bit"))
    counted = [store.name for store in stores if store.kind == "count"]
    for load in loads_in(function.__code__, me):
        if load.kind == "own" and load.attributes[0] in counted and len(load.attributes) == 1:
            counted.remove(load.attributes[0])  # To add to it.
        else:
            found.append(_of_load(load, function, cls, known))
    known[key] = merged(found)
    return known[key]


def _of_stores(stores: Sequence[Store], function: types.FunctionType) -> Findings:
    stored = frozenset(store.name for store in stores if store.kind in ("own", "count"))
    what = None
    if any(store.kind not in ("own", "count") for store in stores):
        what = f"may write to a tensor, in {function.__qualname__}"
    elif kept := [store.name for store in stores if store.kind == "own"]:
        # Not how often it is called: that is right when it is not called.
        what = f"sets its {kept[0]}"
    return NOTHING._replace(always=what, stored=stored)


def _of_load(load: Load, function: types.FunctionType, cls: type | None, known: _Known) -> Findings:
    if load.kind == "import":
        return NOTHING._replace(always=f"imports {load.name} when it runs")
    if load.kind == "built":
        found = [findings_of_attribute(name) for name in load.attributes]
        return merged([found[0]._replace(taken=found[0].taken - {load.attributes[0]}), *found[1:]])
    if load.kind == "me":
        return _ITSELF
    if load.kind == "own":
        others = ASKING.keys() & function.__globals__.keys() & {*function.__code__.co_names}
        loose = frozenset([(load.attributes, None if others else load.asked)])
        return merged([NOTHING._replace(loose=loose), _of_own(load, cls, known)])
    bases = cls.__mro__[1:] if cls is not None and uses_super(function) else ()
    if load.kind in ("value", "super"):
        found = []
        for name in load.attributes[:1]:
            for base in bases:
                if name == "forward" and base in _PURE_LAYERS:
                    found.append(NOTHING)
                    break
                methods = layers_of(base.__dict__.get(name))
                if methods:
                    found.append(NOTHING._replace(methods=frozenset([(base, name)])))
                found += [_of_function(method, cls, True, known) for method in methods]
        rest = load.attributes[1:] if found or load.kind == "super" else load.attributes
        return merged([*found, *map(findings_of_attribute, rest)])
    if load.kind == "closure" and load.name == "__class__" and not load.attributes:
        return NOTHING  # Loaded for `super`.
    value, attributes = resolved(load, function)
    text = ".".join((load.name, *load.attributes))
    found = [findings_of_value(value, text, bool(_TOLD & (load.given or set())), known)]
    kept = isinstance(value, (bool, int, float, complex, str, tuple, functools.partial))
    kept = kept or (isinstance(value, types.FunctionType) and not is_of_torch(value))
    if kept and not _is_constant(load, function):
        found.append(NOTHING._replace(shared=frozenset([(function, load)])))
    if value is next and advances(function.__code__):
        found.append(NOTHING._replace(always="may advance an iterator that is kept"))
    if load.given is not None and _is_told_to_write(value, load.arguments):
        found.append(NOTHING._replace(always=f"may write to a tensor, in {text}"))
    return merged([*found, *map(findings_of_attribute, attributes)])


def _is_constant(load: Load, function: types.FunctionType) -> bool:
    """Whether a value is one of a module whose values nobody sets, such as `math.pi`."""
    base = resolved(load._replace(attributes=()), function)[0]
    name = getattr(base, "__name__", "")
    return isinstance(base, types.ModuleType) and name.partition(".")[0] in ("torch", "math")


def _of_own(load: Load, cls: type | None, known: _Known) -> Findings:
    name = load.attributes[0] if load.attributes else ""
    if name == "training":
        return NOTHING._replace(in_training="does something else in training")
    methods = methods_of(cls, name) if cls is not None and name else []
    if methods:
        gets_self = not isinstance(inspect.getattr_static(cls, name), staticmethod)
        found = [_of_function(method, cls, gets_self, known) for method in methods]
        found.append(NOTHING._replace(methods=frozenset([(cls, name)])))
        return merged([*found, *map(findings_of_attribute, load.attributes[1:])])
    return NOTHING._replace(own=frozenset([load.attributes] if name else []))


@functools.lru_cache(maxsize=4096)
def findings_of_attribute(name: str) -> Findings:
    """What it does to take this attribute of a tensor or a container, and to call it."""
    what = _what_by_name(name)
    kinds = (Tensor, dict, list, tuple, str, torch.autograd.function.FunctionCtx, torch.finfo)
    if what is None and not any(hasattr(kind, name) for kind in kinds):
        what = f"uses {name!r} of a value, and it is not known what that does"
    return NOTHING._replace(always=what, taken=specials_of_method(name) | {name})


def _what_by_name(name: str) -> str | None:
    if name.startswith(_RANDOM_PREFIXES) or name.rstrip("_") in _RANDOM_NAMES:
        return f"may draw random numbers, in {name}"
    if name in _WRITING_METHODS or (name.endswith("_") and not name.startswith("__")):
        return f"may write to a tensor, in {name}"
    return f"uses {name}, and it is not known what that does" if name in _UNREADABLE else None


def findings_of_value(value: Any, text: str, training: bool, known: _Known) -> Findings:
    """What it does to use this value, and to call it."""
    name = getattr(value, "__name__", "")
    unknown = NOTHING._replace(always=f"uses {text}, and it is not known what that does")
    if isinstance(value, (*DATA, logging.Logger, types.ModuleType)):
        return NOTHING
    if isinstance(value, functools.partial):
        value = (value.func, *value.args, *value.keywords.values())
    if isinstance(value, tuple):
        return merged([findings_of_value(item, text, training, known) for item in value])
    if _is_operation(value):
        if name.startswith("set_") or (value.__module__ or "").startswith("torch.distributed"):
            return unknown
        if any(part in name for part in _TRAINED):
            what = f"may draw random numbers or update buffers, in {name}"
            return Findings(None if training else what, what, frozenset(), frozenset())
        return NOTHING._replace(always=_what_by_name(name), taken=OF_OPERATIONS)
    owner = getattr(value, "__self__", None)
    if name == "apply" and isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return findings_of_method(owner, "forward")
    if isinstance(value, types.FunctionType):
        found = merged([_of_function(f, None, False, known) for f in layers_of(value)])
        if training and "training" in inspect.signature(value).parameters:
            return found._replace(always=None, in_training=found.in_training or found.always)
        return found._replace(always=found.always or found.in_training)
    if isinstance(value, type):
        pure = issubclass(value, (BaseException, tuple, Tensor)) or is_of_torch(value)
        if issubclass(value, nn.Module):
            pure = value in _PURE_LAYERS
        pure = pure or name in _PURE_BUILTINS
        return NOTHING._replace(taken=specials_of_builtin(name)) if pure else unknown
    if isinstance(value, types.BuiltinFunctionType):
        pure = name in _PURE_BUILTINS or value.__module__ in _PURE_MODULES
        pure = pure and name not in _WRITING_OPERATORS
        return NOTHING._replace(taken=specials_of_builtin(name)) if pure else unknown
    return NOTHING if (type(value).__module__ or "") in ("typing", "types") else unknown


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
