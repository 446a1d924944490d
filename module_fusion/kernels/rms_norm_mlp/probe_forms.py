"""Whether a member does to any number of dimensions, and backwards, what it does to rows.

Also to many rows, to rows that do not follow each other in memory, to rows of special values,
and in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from .stand_in import WrongResult, original_class, relative_error

_LEADING = (
    (1,), (1, 1), (1, 3), (3, 1), (1030,), (2, 9), (7, 2), (9, 12), (1, 2, 3), (1, 1, 2, 3), (2, 3),
)  # fmt: skip


def check(
    make: Callable[[], nn.Module],
    formula: Callable[[nn.Module, Tensor], Tensor],
    hidden: int,
    like: Tensor,
    limit: float,
) -> None:
    """Compare a stand-in with its formula: values and shapes, and once the gradients.

    Where the formula gives no number, the stand-in has to give none either.

    Args:
        make: makes the stand-in.
        formula: what the stand-in should give for an input `(..., hidden)`.
        like: a tensor of the dtype and on the device of the inputs.
        limit: the largest relative error.

    Raises:
        WrongResult: they differ.
    """
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator("cpu").manual_seed(2)
        module = make().requires_grad_(True)
        name = original_class(module).__name__
        compared = None
        for leading, strided in [*((leading, False) for leading in _LEADING), ((2, 3), True)]:
            x = torch.randn((*leading, hidden), generator=generator, device="cpu")
            x = x.transpose(0, 1) if strided else x
            x = x.to(like.device, like.dtype).requires_grad_()
            try:
                output = module(x)
            except Exception:
                continue  # It does not take such an input.
            expected = formula(module, x)
            shape = f"({', '.join(map(str, x.shape[:-1]))}, hidden)"
            shape += ", strided" if strided else ""
            if output.shape != x.shape:
                raise WrongResult(f"{name} gives another shape than that of its input, {shape}")
            if not _are_same(output.detach(), expected.detach(), limit):
                raise WrongResult(f"{name} computes something else for inputs of shape {shape}")
            compared = output, expected, x
        # The gradient of one value's norm is zero but for the epsilon and for rounding.
        if compared is not None and hidden > 1:
            output, expected, x = compared
            _check_gradients(name, output, expected, [x, *module.parameters()], limit)
    for rows, inference in product(_special(hidden), (False, True)):
        with torch.inference_mode(inference), torch.no_grad():
            x = rows.to(like.device, like.dtype, copy=True)
            if not _are_same(module(x), formula(module, x), limit):
                where = ", in inference mode" if inference else ""
                raise WrongResult(f"{name} computes something else for special values{where}")


def _special(hidden: int) -> tuple[Tensor, Tensor]:
    """Rows of zeros, of one value, and with zeros in them; and rows with what is no number."""
    generator = torch.Generator("cpu").manual_seed(5)
    finite, others = torch.randn((2, 6, hidden), generator=generator, device="cpu")
    finite[0], finite[1], finite[2] = 0, 1.5, -1.5
    finite[3, ::3] = 0
    finite[4, 1:] = 0
    others[0, 0], others[1, -1], others[2, 0] = torch.inf, -torch.inf, torch.nan
    others[3] = torch.inf
    return finite, others


def _are_same(value: Tensor, truth: Tensor, limit: float) -> bool:
    """Whether numbers are nearly the same, row by row, and where one is none, so is the other.

    In a row with an infinity, what the others are times its root mean square depends on the order
    of the sum: torch's own norm gives 0 or NaN.
    """
    if value.shape != truth.shape:
        return False
    finite = truth.isfinite()
    alike = finite | ~value.isfinite()
    spoiled = ~finite.all(-1)
    close = (relative_error(value, truth) < limit) | (value == truth).all(-1) | spoiled
    return bool(alike.all() & close.all())


def _check_gradients(
    name: str, output: Tensor, expected: Tensor, leaves: list[Tensor], limit: float
) -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    seed = torch.randn(output.shape, generator=generator, device="cpu")
    gradients = []
    for value in (output, expected):
        if not value.requires_grad:
            raise WrongResult(f"{name} has no gradients")
        cotangent = seed.to(value.device, value.dtype)
        gradients.append(torch.autograd.grad(value, leaves, cotangent, allow_unused=True))
    for ours, theirs in zip(*gradients, strict=True):
        if (ours is None) != (theirs is None):
            raise WrongResult(f"{name} has other gradients than the members known")
        if ours is None or theirs is None:
            continue
        if not (relative_error(ours.flatten(), theirs.flatten()) < limit).all():
            raise WrongResult(f"{name} has other gradients than the members known")
