"""How far two values of any structure are apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from datetime import date, time, timedelta
from enum import Enum
from numbers import Number
from typing import Any, NamedTuple
from uuid import UUID

import torch
from torch import Tensor

from .structures import (
    FLOAT8,
    Kind,
    Leaf,
    bits_of,
    computable,
    has_numbers,
    leaves,
    same_bits,
    strides_of,
)

# Elements that are looked at together in float64.
_CHUNK = 1 << 22
USED_UP = "cannot be compared without using it up"
UNSEEN = "is not compared"
# What is unequal only where its value is.
_VALUES: tuple[type, ...] = (
    Number,
    str,
    bytes,
    bytearray,
    range,
    slice,
    tuple,
    Enum,
    UUID,
    torch.dtype,
)
_VALUES += (torch.device, torch.Size, date, time, timedelta)


class Difference(NamedTuple):
    """A tensor, or another value, of the fused run against that of the unfused run.

    Attributes:
        name: where it is in the output, such as `logits` or `past_key_values.layers.0.keys`.
        shape: of the tensor, None for a value that is none.
        dtype: of the tensor, or the class of the value.
        equal: whether every bit is equal, NaN by payload, 0.0 apart from -0.0; and the strides,
            which a program can see, but for those of gradients.
        max_abs: largest absolute difference where both are finite.
        max_rel: largest difference relative to the unfused value, where that is not 0.
        max_ulp: largest number of floating-point values between the two, in their dtype.
        cosine: cosine similarity of the finite elements.
        argmax: share of rows of the last dimension with the largest element at the same place;
            None where there is no such dimension.
        nonfinite: how many elements are NaN or infinite, fused and unfused.
        problem: why the two cannot be compared, or what must not differ; None where they can.
        run: the dtype of the run, where `verify` was asked for several.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    equal: bool = True
    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: int = 0
    cosine: float = 1.0
    argmax: float | None = None
    nonfinite: tuple[int, int] = (0, 0)
    problem: str | None = None
    run: str | None = None


def differences(fused: Any, unfused: Any) -> list[Difference]:
    """Compare two values leaf by leaf.

    Returns:
        A difference per tensor, and one per place where anything else differs.
    """
    return [d for d in between(leaves(fused), leaves(unfused)) if not is_unseen(d)]


def is_unseen(found: Difference) -> bool:
    """Whether it only says that a value cannot be looked into, as a function cannot."""
    return str(found.problem).endswith(UNSEEN)


def between(fused: Sequence[Leaf], unfused: Sequence[Leaf]) -> list[Difference]:
    """The same of the leaves of two values, and a row for each that is not looked into."""
    ours, theirs = _by_place(fused), _by_place(unfused)
    found: list[Difference] = []
    for place in [*theirs, *(place for place in ours if place not in theirs)]:
        path = place[0]
        if place not in ours or place not in theirs:
            # What has another kind has other parts: one sentence says both.
            if not any(d.name == path for d in found):
                where = "unfused" if place in theirs else "fused"
                found.append(Difference(path, equal=False, problem=f"only the {where} run has it"))
            continue
        a, b = ours[place], theirs[place]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            found.append(difference(a, b, path))
        elif problem := _differing_values(a, b):
            found.append(Difference(path, None, type(b).__name__, equal=False, problem=problem))
    return found


def _by_place(found: Sequence[Leaf]) -> dict[tuple[str, bool, int], Any]:
    """Leaves by path; two of one path, such as the keys 1 and "1", by their order."""
    places: dict[tuple[str, bool, int], Any] = {}
    for leaf in found:
        path, is_kind = leaf.path or "output", type(leaf.value) is Kind
        number = next(n for n in itertools.count() if (path, is_kind, n) not in places)
        places[path, is_kind, number] = leaf.value
    return places


def _differing_values(a: Any, b: Any) -> str | None:
    if type(a) is Kind and type(b) is Kind:
        return None if a == b else f"{a} fused, {b} unfused"
    if type(a) is not type(b):
        return f"a {type(a).__name__} fused, a {type(b).__name__} unfused"
    if a is b or (isinstance(a, float) and a != a and b != b):
        return None
    if isinstance(a, Iterator):
        return f"a {type(a).__name__} {USED_UP}"
    if isinstance(a, float) and a == b and math.copysign(1, a) != math.copysign(1, b):
        return f"{a} fused, {b} unfused"
    if hasattr(a, "tobytes"):
        return None if _as_bytes(a) == _as_bytes(b) else "the arrays differ"
    try:
        if bool(a == b):
            return None
    except Exception:
        return _unseen(a)
    # Others may be unequal because they are two objects, and say nothing of what is in them.
    return f"{a!r} fused, {b!r} unfused" if isinstance(a, _VALUES) else _unseen(a)


def _unseen(value: Any) -> str:
    return f"a {type(value).__name__} {UNSEEN}"


def _as_bytes(array: Any) -> tuple[Any, ...]:
    """Of an array of NumPy or of Python, or a memoryview."""
    names = ("dtype", "typecode", "format", "shape")
    return (*(getattr(array, name, None) for name in names), array.tobytes())


def difference(
    ours: Tensor, theirs: Tensor, name: str = "output", strides: bool = True
) -> Difference:
    """Compare two tensors; the second one is the measure.

    Args:
        ours: of the fused run.
        theirs: of the unfused run.
        name: of the difference.
        strides: whether theirs have to be ours. Of gradients they do not: what accumulates
            into `.grad` has the parameter's.
    """
    ours, theirs = ours.detach(), theirs.detach()
    shape, dtype = tuple(theirs.shape), _short(theirs.dtype)
    for what, a, b in (
        ("shape", tuple(ours.shape), shape),
        ("dtype", _short(ours.dtype), dtype),
        ("device", str(ours.device), str(theirs.device)),
        ("layout", str(ours.layout), str(theirs.layout)),
        ("strides", *((strides_of(ours), strides_of(theirs)) if strides else ((), ()))),
    ):
        if a != b:
            problem = f"{what} {a} fused, {b} unfused"
            return Difference(name, shape, dtype, equal=False, problem=problem)
    has_rows = _has_rows(theirs)
    if same_bits(ours, theirs):
        rows = 1.0 if has_rows else None
        bad = _count_nonfinite(theirs)
        return Difference(name, shape, dtype, argmax=rows, nonfinite=(bad, bad))
    if ours.is_quantized:
        ours, theirs = ours.dequantize(), theirs.dequantize()
    if not has_numbers(theirs.dtype):
        ours, theirs = bits_of(ours), bits_of(theirs)
    if ours.layout is not torch.strided:
        ours, theirs = ours.to_dense(), theirs.to_dense()
    if ours.is_complex():
        ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
    numbers = _numbers(ours.reshape(-1), theirs.reshape(-1))
    ours, theirs = computable(ours), computable(theirs)
    argmax = None
    if has_rows:
        argmax = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    unlike = None
    if not torch.equal(_forms(ours), _forms(theirs)):
        unlike = "NaN or infinite at other places than unfused"
    nonfinite = (_count_nonfinite(ours), _count_nonfinite(theirs))
    return Difference(name, shape, dtype, False, *numbers, argmax, nonfinite, unlike)


def combined(found: Sequence[Difference], name: str, run: str | None = None) -> Difference:
    """The worst of several, as one."""
    rows = [d.argmax for d in found if d.argmax is not None]
    return Difference(
        name,
        found[0].shape,
        found[0].dtype,
        all(d.equal for d in found),
        max(d.max_abs for d in found),
        max(d.max_rel for d in found),
        max(d.max_ulp for d in found),
        min(d.cosine for d in found),
        min(rows) if rows else None,
        (sum(d.nonfinite[0] for d in found), sum(d.nonfinite[1] for d in found)),
        next((d.problem for d in found if d.problem), None),
        run,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has_rows(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point()
        and tensor.layout is torch.strided
        and tensor.dim() > 0
        and tensor.numel() > 0
        and tensor.size(-1) > 1
        and (tensor.element_size() > 1 or tensor.dtype in FLOAT8)
    )


def _count_nonfinite(tensor: Tensor) -> int:
    has_forms = tensor.is_floating_point() or tensor.is_complex()
    if not has_forms or tensor.is_meta:
        return 0
    values = computable(tensor.to_dense() if tensor.layout is not torch.strided else tensor)
    return 0 if values.element_size() == 1 else int((~values.isfinite()).sum())


def _forms(tensor: Tensor) -> Tensor:
    """0 for a number, 1 for NaN, 2 and 3 for the infinities."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return torch.zeros((), device=tensor.device)
    forms = tensor.isnan().to(torch.int8)
    return forms + 2 * tensor.isposinf().to(torch.int8) + 3 * tensor.isneginf().to(torch.int8)


def _numbers(ours: Tensor, theirs: Tensor) -> tuple[float, float, int, float]:
    """Largest absolute and relative difference, ULPs, and the cosine."""
    max_abs = max_rel = 0.0
    max_ulp = 0
    products = [0.0, 0.0, 0.0]
    for a, b in zip(torch.split(ours, _CHUNK), torch.split(theirs, _CHUNK), strict=True):
        wide_a, wide_b = a.double(), b.double()
        finite = wide_a.isfinite() & wide_b.isfinite()
        if not finite.any():
            continue
        wide_a, wide_b = wide_a[finite], wide_b[finite]
        apart = (wide_a - wide_b).abs()
        max_abs = max(max_abs, float(apart.max()))
        nonzero = wide_b != 0
        if nonzero.any():
            max_rel = max(max_rel, float((apart[nonzero] / wide_b[nonzero].abs()).max()))
        if a.is_floating_point():
            ulps = (_ordered(a[finite]) - _ordered(b[finite])).abs()
            max_ulp = max(max_ulp, int(ulps.max()))
        for place, (p, q) in enumerate(((wide_a, wide_b), (wide_a, wide_a), (wide_b, wide_b))):
            products[place] += float(p @ q)
    size = (products[1] * products[2]) ** 0.5
    cosine = max(-1.0, min(1.0, products[0] / size)) if size else float(max_abs == 0)
    return max_abs, max_rel, max_ulp, cosine


def _ordered(tensor: Tensor) -> Tensor:
    """Integers that are as far apart as the values are in floating-point numbers."""
    bits = bits_of(tensor).to(torch.int64)
    size = tensor.element_size()
    if tensor.dtype is torch.float8_e8m0fnu:
        return bits  # Powers of two, without a sign.
    if size == 1:
        return torch.where(bits > 127, 128 - bits, bits)
    lowest = -(1 << (8 * size - 1))
    return torch.where(bits < 0, lowest - bits, bits)
