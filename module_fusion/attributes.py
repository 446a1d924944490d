"""What modules keep in their attributes, such as caches and counters, and how to put it back.

Containers and objects are followed a few steps, so that a cache is found that is an object with
a list of layers with tensors. Each is made what it was in place, because others may have it too.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .inventory import modules_in
from .modules import KEY
from .verifying.structures import is_plain, same_bits, stored

# What `nn.Module` itself has in every instance, or puts there when it is compiled.
_OF_EVERY_MODULE = (frozenset(vars(nn.Module())) - {"training"}) | {"_compiled_call_impl"}
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_OPAQUE = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, Mapping)
# A cache in an attribute has its tensors at 3: an object, a list in it, a layer in that.
_STEPS = 4

Step = Callable[[], Any]


def attributes_of(model: nn.Module) -> Iterator[Step]:
    """Functions that put back what the attributes of modules are now, and what is in them.

    Not followed: modules, parameters, functions, mappings that are no dicts, and objects of
    classes of Python's own library and of torch.
    """
    known = {memory_of(parameter) for parameter in model.parameters()}
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = []
    for module in modules_in(model):
        own = {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE}
        yield partial(_put_attributes_back, module, own)
        pending += [(value, 0) for name, value in own.items() if name != KEY]
    while pending:
        value, depth = pending.pop()
        if id(value) in seen or depth > _STEPS:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if memory_of(value) not in known:
                yield value_of(value)
            continue
        if step := _generator(value) or _items(value):
            yield step
        pending += [(part, depth + 1) for part in _parts(value)]


def _put_attributes_back(module: nn.Module, before: dict[str, Any]) -> None:
    own = module.__dict__
    for name in [name for name in own if name not in before and name not in _OF_EVERY_MODULE]:
        del own[name]
    own.update(before)


def _parts(value: Any) -> Iterable[Any]:
    if type(value) in _DICTS:
        return list(value.values())
    if type(value) in (list, tuple, set, deque):
        return list(value)
    return list(vars(value).values()) if _is_followed(value) else ()


def _is_followed(value: Any) -> bool:
    if isinstance(value, _OPAQUE) or not hasattr(value, "__dict__"):
        return False
    package = type(value).__module__.partition(".")[0]
    ours = __name__.partition(".")[0]
    is_of_others = package not in sys.stdlib_module_names and package not in ("torch", ours)
    return is_of_others or type(value) is SimpleNamespace


def _items(value: Any) -> Step | None:
    """A function that puts the items of a container, or attributes of an object, back."""
    if type(value) in _DICTS:
        return partial(_put_entries_back, value, list(value.items()))
    if type(value) in (list, set, deque):
        return partial(_put_items_back, value, list(value))
    if _is_followed(value):
        return partial(_put_entries_back, vars(value), list(vars(value).items()))
    return None


def _put_entries_back(owner: dict[Any, Any], before: list[tuple[Any, Any]]) -> None:
    now = list(owner.items())
    if [(id(k), id(v)) for k, v in now] != [(id(k), id(v)) for k, v in before]:
        owner.clear()
        for name, value in before:
            owner[name] = value


def _put_items_back(owner: Any, before: list[Any]) -> None:
    if list(map(id, owner)) != list(map(id, before)):
        owner.clear()
        (owner.update if type(owner) is set else owner.extend)(before)


def value_of(tensor: Tensor) -> Step:
    """A function that writes what is in a tensor now into it again."""
    its = stored(tensor)
    value = its.detach().clone()

    def put_back() -> None:
        if not same_bits(its, value):
            with torch.inference_mode(its.is_inference()), torch.no_grad():
                its.copy_(value)

    return put_back


def memory_of(tensor: Tensor) -> int:
    """What is the same number for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata) if is_plain(tensor) else id(tensor)


def _generator(value: Any) -> Step | None:
    """A function that puts back the state of a random generator, None for another value."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if "numpy" not in sys.modules:
        return None
    kinds: Any = sys.modules["numpy"].random
    if isinstance(value, kinds.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, kinds.Generator):
        bits = value.bit_generator
        return partial(setattr, bits, "state", copy.deepcopy(bits.state))
    return None
