"""Values of any structure: what is in them, and copies of the tensors in them.

An object is what its class and its `__dict__` say: that covers dataclasses, model outputs and
caches without knowing one of them by name.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import deque
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sized, ValuesView
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import FusionError

# What is the same object in both runs, or stands for itself; nothing in it is looked at.
_OPAQUE = (nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# For keeping numbers, not for computing with them.
FLOAT8 = frozenset(
    value
    for name, value in vars(torch).items()
    if name.startswith("float8") and isinstance(value, torch.dtype)
)


class Leaf(NamedTuple):
    """A value without parts and the place it is at, such as `past_key_values.layers.0.keys`."""

    path: str
    value: Any


class Kind(NamedTuple):
    """What a container is, as a leaf of its own, so that another one is another value."""

    name: str
    size: int | None = None

    def __str__(self) -> str:
        return self.name if self.size is None else f"{self.name} of {self.size}"


def leaves(value: Any, path: str = "") -> list[Leaf]:
    """Every leaf of a value, in order; containers are leaves too, by their class and size."""
    return list(_leaves(value, path, set()))


def _leaves(value: Any, path: str, open_: set[int]) -> Iterator[Leaf]:
    parts = _parts(value)
    if parts is None or id(value) in open_:
        yield Leaf(path, value if parts is None else Kind("the same object again"))
        return
    yield Leaf(path, _kind(value, parts))
    open_.add(id(value))
    for name, part in parts:
        yield from _leaves(part, f"{path}.{name}" if path else str(name), open_)
    open_.discard(id(value))


def _kind(value: Any, parts: list[tuple[Any, Any]]) -> Kind:
    name = type(value).__qualname__
    if isinstance(value, Tensor):
        return Kind(f"nested {name}, {value.layout}", len(parts))
    if _is_array_of_objects(value):
        return Kind(f"{name} of objects, {value.shape}", len(parts))
    return Kind(name, len(value) if isinstance(value, Sized) else None)


def _is_array_of_objects(value: Any) -> bool:
    """Whether it is an array of NumPy whose bytes are addresses."""
    return bool(getattr(getattr(value, "dtype", None), "hasobject", False))


def _is_array_of_a_class(value: Any) -> bool:
    """Whether it is an array of NumPy of a class of its own, such as a masked one."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or type(value) is numpy.ndarray:
        return False
    return isinstance(value, numpy.ndarray)


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """The named parts of a container or object, None for a leaf."""
    if isinstance(value, Tensor) and value.is_nested:
        return list(enumerate(value.unbind()))
    if value is None or isinstance(value, (Tensor, bool, int, float, complex, str, bytes)):
        return None
    if _is_array_of_objects(value):
        return list(enumerate(value.ravel().tolist()))
    if isinstance(value, _OPAQUE):
        return None
    if _is_array_of_a_class(value):
        mask = getattr(value, "mask", None)
        array: Any = sys.modules["numpy"].ndarray
        return [("data", value.view(array)), *([] if mask is None else [("mask", mask)])]
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in value]
    if isinstance(value, (KeysView, ValuesView, ItemsView, deque)):
        value = list(value)
    if isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", range(len(value)))
        return list(zip(names, value, strict=False))
    if isinstance(value, (set, frozenset)):
        return list(enumerate(sorted(value, key=repr)))
    names = [*getattr(value, "__dict__", ()), *_slots_of(type(value))]
    parts = [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return parts or None


def _slots_of(cls: type) -> list[str]:
    slots: list[str] = []
    for base in cls.__mro__:
        own = base.__dict__.get("__slots__", ())
        slots += [own] if isinstance(own, str) else own
    return [name for name in slots if name not in ("__dict__", "__weakref__")]


def frozen(value: Any) -> list[Leaf]:
    """The leaves of a value, with tensors and arrays on memory of their own."""
    return [leaf._replace(value=_kept(leaf.value)) for leaf in leaves(value)]


def _kept(value: Any) -> Any:
    if isinstance(value, memoryview):
        return memoryview(value.tobytes())
    is_memory = isinstance(value, bytearray) or hasattr(value, "tobytes")
    return copy.copy(value) if is_memory else snapshot(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a value, each once."""
    found = {id(leaf.value): leaf.value for leaf in leaves(value) if isinstance(leaf.value, Tensor)}
    return list(found.values())


def modules_given(value: Any) -> list[nn.Module]:
    """The modules among inputs, each once; copies of the inputs have the very same ones."""
    found = {id(v.value): v.value for v in leaves(value) if isinstance(v.value, nn.Module)}
    return list(found.values())


def computable(tensor: Tensor) -> Tensor:
    """The tensor; of float8, which hardly any operation takes, the very same numbers in float32."""
    return tensor.float() if tensor.dtype in FLOAT8 else tensor


@functools.cache
def has_numbers(dtype: torch.dtype) -> bool:
    """Whether torch converts it to numbers; some dtypes, such as `bits8`, are for keeping alone.

    Asked of the CPU, which refuses: on a GPU it is an assertion that ends every later call.
    """
    try:
        torch.empty(1, dtype=dtype).to(torch.complex128)
    except RuntimeError:
        return False
    return True


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in every bit: NaN by payload, 0.0 apart from -0.0."""
    if a.is_nested or b.is_nested:
        pairs = list(zip(a.unbind(), b.unbind(), strict=False))
        return a.is_nested is b.is_nested and len(a.unbind()) == len(b.unbind()) == sum(
            same_bits(p, q) for p, q in pairs
        )
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout is b.layout and same_bits(a.to_dense(), b.to_dense())
    if a.is_meta or a.is_quantized:
        return a.is_meta or bool(torch.equal(a, b))
    return bool(torch.equal(bits_of(a), bits_of(b)))


def strides_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides that tell one element from another; None where there are none."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel():
        return None
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    # Where there is one element, no step is taken, and any stride will do.
    return tuple(stride if size > 1 else 0 for size, stride in pairs)


def bits_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor's values as integers."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point() or not has_numbers(tensor.dtype):
        return tensor.view(_BITS[tensor.element_size()])
    return tensor


def stored(tensor: Tensor) -> Tensor:
    """The tensor; of a dtype that is for keeping alone, its bits in the same memory."""
    is_kept_alone = is_plain(tensor) and not has_numbers(tensor.dtype)
    return bits_of(tensor) if is_kept_alone else tensor


def snapshot(value: Any) -> Any:
    """Tensors, and tuples, lists and dicts of them, on memory of their own; the rest as it is."""
    return map_tensors(lambda tensor: _on_own_memory(tensor.detach()), value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in its tuples, lists and dicts replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    if type(value) is dict:
        return {name: map_tensors(function, item) for name, item in value.items()}
    return value if (found := _parts(value)) is None or not found else _mapped(function, value)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An object with tensors in it, such as a model's output, as a copy; others as they are."""
    parts = [leaf.value for leaf in leaves(value)]
    memo: dict[int, Any] = {id(p): p for p in parts if isinstance(p, _OPAQUE)}
    tensors = {id(part): part for part in parts if isinstance(part, Tensor)}
    if not tensors:
        return value
    memo.update({key: function(tensor) for key, tensor in tensors.items()})
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value  # It has a stream, a lock or a generator in it.


def _on_own_memory(tensor: Tensor) -> Tensor:
    """A copy with the same strides: what computes with it may choose its way by them."""
    if not is_plain(tensor):
        return tensor.clone()
    its = stored(tensor)
    if not its.numel() or its.is_contiguous():
        return its.clone(memory_format=torch.preserve_format).view(tensor.dtype)
    size = 1 + sum((n - 1) * stride for n, stride in zip(its.shape, its.stride(), strict=True))
    memory = its.as_strided((size,), (1,)).clone()
    return memory.as_strided(its.shape, its.stride()).view(tensor.dtype)


def fresh(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a user's inputs that a run may modify.

    Modules and functions in them stay the same objects. Tensors that share memory share it in
    the copy.

    Args:
        value: inputs of any structure.
        dtype: what floating tensors are cast to, None to keep theirs.

    Raises:
        FusionError: something in it cannot be copied, such as an open file or an iterator.
    """
    memo: dict[int, Any] = {}
    kept: list[Any] = []
    storages: dict[int, torch.UntypedStorage] = {}
    counts: dict[int, int] = {}
    for tensor in tensors_in(value):
        key = _storage_key(tensor)
        counts[key] = counts.get(key, 0) + 1
    for leaf in leaves(value):
        part = leaf.value
        if isinstance(part, nn.Module):
            memo[id(part)] = part
        elif isinstance(part, torch.Generator):
            memo[id(part)] = part.clone_state()
        elif isinstance(part, Tensor) and id(part) not in memo:
            shared = counts[_storage_key(part)] > 1 and dtype is None
            memo[id(part)] = _fresh_tensor(part, dtype, storages if shared else None)
        kept.append(part)
    try:
        return copy.deepcopy(value, memo)
    except Exception as error:
        raise FusionError(
            f"Every run gets a copy of the inputs, and these cannot be copied: {error}. "
            f"Pass inputs that can be used more than once: tensors, lists, caches; no open file, "
            f"iterator or stream."
        ) from error


def is_plain(tensor: Tensor) -> bool:
    """Whether strides over a storage say where its elements are."""
    is_dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return is_dense and not tensor.is_nested and not tensor.is_quantized


def _storage_key(tensor: Tensor) -> int:
    if not is_plain(tensor):
        return id(tensor)
    return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]


def _fresh_tensor(
    tensor: Tensor, dtype: torch.dtype | None, storages: dict[int, torch.UntypedStorage] | None
) -> Tensor:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if storages is not None:
            key = _storage_key(tensor)
            if key not in storages:
                storages[key] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
            place = (tensor.storage_offset(), tensor.shape, tensor.stride())
            copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            copied = copied.set_(storages[key], *place)
        else:
            copied = _on_own_memory(tensor.detach())
        if dtype is not None and copied.is_floating_point() and has_numbers(copied.dtype):
            copied = copied.to(dtype)
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
    return copied.requires_grad_(tensor.requires_grad)
