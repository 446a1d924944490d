"""Comparing with the unfused model up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compare import Expected, Fault, kind_of
from .flat import relative_error, same_bits, same_kind

LIMIT = 1.1
# Of its own largest element, by how much a gradient may differ: one summed in another order by
# some units, one of a family's kernels by float32 rounding through a deep model.
ANOTHER_ORDER = 100 * torch.finfo(torch.float32).eps
ANOTHER_KERNEL = 2e-5
NOISE = 10  # How many times its own error against float64 a gradient may differ in any case.
ALONE = 100  # How many times that of all outputs the error of one may be: by cancellation.


def check_gradients(
    found: dict[str, Tensor | None], expected: Expected, within: float, how: str
) -> float:
    """Each gradient is what it was, up to rounding; the model must be unfused.

    Args:
        found: by the name of the parameter, and of the input where inputs have gradients too.
        expected: of the unfused model, with gradients.
        within: the share of its own largest element by which a gradient may differ.
        how: the model was fused, for the fault.

    Returns:
        By how much of its own largest element a gradient differs most, of those that differ by more
        than the rounding of what was summed.

    Raises:
        Fault: a gradient differs by more, is missing, or should not be there.
    """
    most = 0.0
    backward = expected.backward(any(name.startswith("input ") for name in found))
    theirs = {} if backward is None else backward.gradients
    if list(found) != list(theirs):
        raise Fault(f"the parameters differ {how}")
    sizes = [_largest(gradient) for gradient in theirs.values() if gradient is not None]
    largest = max(sizes, default=0.0)
    for name, gradient in theirs.items():
        other = found[name]
        if gradient is None or other is None:
            if gradient is not other:
                state = "there" if gradient is None else "missing"
                raise Fault(f"the gradient of {name} is {state} {how}")
            continue
        if not same_kind(other, gradient):
            raise Fault(f"the gradient of {name} is a {kind_of(other)} {how}")
        if not gradient.numel() or same_bits([other], [gradient]):
            continue
        own = _largest(gradient)
        finite = gradient.isfinite()
        if not same_bits([other[~finite]], [gradient[~finite]]):
            raise Fault(f"the gradient of {name} differs {how} where it is not finite")
        error = float((other - gradient)[finite].abs().max()) if finite.any() else 0.0
        if error <= _floor(name, gradient.dtype, largest, expected):
            continue
        if not error <= within * own:
            raise Fault(f"the gradient of {name} differs {how} by {error:.1e} of {own:.1e}")
        most = max(most, error / own)
    return most


def _largest(gradient: Tensor) -> float:
    """The largest finite magnitude."""
    finite = gradient[gradient.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _floor(name: str, dtype: torch.dtype, largest: float, expected: Expected) -> float:
    """By how much a gradient may differ however small it is: the rounding of what was summed.

    The bias of a key, for one, has terms that cancel, and only rounding is left. How much that
    is, the unfused model's own error against float64 tells; but it is no less than a unit of the
    largest gradient of the model, for what cancels by luck, and never more than some of those, or
    than twice that error.
    """
    unit = torch.finfo(dtype).eps * largest
    noise = unit if expected.exact is None else expected.exact.noise.get(name, unit)
    return min(max(NOISE * noise, unit), max(100 * unit, 2 * noise))


def check_accuracy(
    found: list[Any],
    before: list[Any],
    exact_outputs: Callable[[], list[Any] | None],
    how: str = "of `fuse`",
) -> str:
    """The fused outputs are as close to float64 as the unfused ones.

    Args:
        found: of the fused model.
        before: of the unfused one.
        exact_outputs: gives those of a twin in float64, None if there is none; the model must be
            unfused.
        how: the model was fused and run, for the fault.

    Returns:
        What they were compared with: `"same bits"`, `"float64"` or, without a twin, `"unfused"`.

    Raises:
        Fault: they are not.
    """
    if same_bits(found, before):
        return "same bits"
    exact = exact_outputs()
    truths = before if exact is None else exact
    # Without a twin both are within rounding of each other.
    theirs = 1e-6 if exact is None else relative_error(before, exact)
    ours = relative_error(found, truths)
    # The errors of a whole model are a matter of luck by some tens of percent.
    count = sum(v.numel() for v in found if isinstance(v, Tensor) and v.is_floating_point())
    allowed = max(LIMIT * theirs, 2e-7) * (1 + 2 / max(count, 1) ** 0.5)
    if not ours <= allowed:
        raise Fault(f"accuracy {how}: error {ours:.2e}, of the modules {theirs:.2e}")
    for number, (mine, other, truth) in enumerate(zip(found, before, truths, strict=True)):
        one, its = relative_error([mine], [truth]), relative_error([other], [truth])
        if not one <= ALONE * max(its, allowed):
            raise Fault(
                f"accuracy {how}: error {one:.2e} of output {number} alone, of the modules "
                f"{its:.2e}"
            )
    return "unfused" if exact is None else "float64"
