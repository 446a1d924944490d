"""Whether errors are larger than they may be, or only by chance.

A row is the last dimension. How much of an element's error is to be expected shows in what the
exact result does when inputs and weights change by half a unit in the last place: the element
may be the small difference of large numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..exact import FLOOR_OF_GRADIENTS, LIMIT, floor_of, less_accurate, seeded
from .structures import computable

# An element may be this many times its expected error off; of many elements one is the worst.
_ELEMENT = 16.0
# As may a row: little more than twice where it is long, about as an element where it is not.
_ROW, _SHORT_ROW = 4.0, 12.0
# Where most rows are within this, a row or an element is wrong, not the kernel everywhere.
_USUAL = 2.0
# Share of a row's squared error that makes it the error of one element.
_ALONE = 0.9
# In float32 the order of a sum decides about this many times what half a unit does.
_ORDER = 8.0
# Standard errors by which the error has to be over the limit to count: with many rows, with few,
# and where what is luck in one row is the same luck in all.
_SURE, _SURE_OF_FEW, _SURE_TOGETHER = 4.0, 5.0, 2.0
MANY_ROWS = 32
_LEAST_WIDTH = 16
# Directions of the error that rows may have in common.
_SHARED = 4


class Judgement(NamedTuple):
    """How far a kernel and the members are from float64, relative to its norm."""

    kernel_error: float | None = None
    member_error: float | None = None
    problem: str | None = None


def rows_of(tensor: Tensor) -> Tensor:
    """`(rows, width)`: the last dimension, with those before it where it is short."""
    dims = tensor.dim()
    width = 1
    while dims and width < _LEAST_WIDTH:
        dims -= 1
        width *= tensor.size(dims)
    return tensor.reshape(-1, width) if width else tensor.reshape(0, 1)


class Noise:
    """How far one tensor's exact values move when inputs and weights do, by draws."""

    def __init__(self, exact: Tensor, draws: int) -> None:
        self.exact, self.draws = exact, draws
        self.squares = torch.zeros_like(exact)
        self.of_rows: list[Tensor] = []

    def add(self, near: Tensor) -> None:
        squares = (near - self.exact).square()
        self.squares += squares / self.draws
        self.of_rows.append(rows_of(squares).sum(1))

    def luck(self) -> Tensor:
        """Variance of a row's squared error, relative to its square: 2 where one number decides
        about the row, next to nothing where many do."""
        of_rows = torch.stack(self.of_rows)
        return of_rows.var(0) / of_rows.mean(0).square().clamp_min(1e-300)


class _Rows(NamedTuple):
    """Errors of rows of one width, in units of what is to be expected.

    Attributes:
        kernel: `(rows, width)`.
        members: `(rows, width)`.
        free: what the kernel's square may be in any case, `(rows,)`.
        luck: how much squares vary by chance, `(rows,)`.
    """

    kernel: Tensor
    members: Tensor
    free: Tensor
    luck: Tensor

    def excess(self) -> Tensor:
        """How far the kernel is over the limit, `(rows,)`."""
        allowed = LIMIT**2 * self.members.square().sum(1)
        return self.kernel.square().sum(1) - torch.maximum(allowed, self.free)

    def without_shared(self) -> _Rows:
        """The same without what the errors of all rows have in common.

        One large value that all rows have, as some channels of language models do, is rounded
        alike in all of them: a single piece of luck, however many rows there are.
        """
        both = torch.cat([self.kernel, self.members])
        width = both.size(1)
        start = torch.randn(width, min(_SHARED, width // 4), generator=seeded(), device="cpu")
        basis = start.to(both.device, both.dtype)
        for _ in range(4):
            basis = torch.linalg.qr(both.T @ (both @ basis)).Q
        kernel, members = (part - (part @ basis) @ basis.T for part in (self.kernel, self.members))
        return self._replace(kernel=kernel, members=members)


class Tally:
    """The errors of one tensor over all calls.

    Args:
        name: what the tensor is, such as `output` or `gradient of mlp.weight`.
        dtype: its dtype.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.is_output = name.startswith("output")
        epsilon = torch.finfo(dtype).eps
        self.tiny = torch.finfo(dtype).smallest_normal ** 2
        self.floor = floor_of(epsilon)
        if not self.is_output:
            self.floor = max(self.floor, FLOOR_OF_GRADIENTS)
        self.order = _ORDER * min(torch.finfo(torch.float32).eps / epsilon, 1.0)
        self.kernel = self.members = self.size = 0.0
        self.problem: str | None = None
        self.is_local = True
        self.rows: dict[int, list[_Rows]] = {}

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor, noise: Noise) -> None:
        """Add one call: the kernel's values, the members', the exact ones, the expected error."""
        ours, theirs = computable(ours), computable(theirs)
        if not torch.equal(ours.isfinite(), theirs.isfinite()):
            self.problem = f"the kernel's {self.name} is NaN or infinite where the modules' is not"
            return
        usable = theirs.isfinite() & exact.isfinite() & noise.squares.isfinite()
        kernel, members, truth, moved = (
            rows_of(torch.where(usable, value, 0.0))
            for value in (ours.double() - exact, theirs.double() - exact, exact, noise.squares)
        )
        self.kernel += float(kernel.square().sum())
        self.members += float(members.square().sum())
        self.size += float(truth.square().sum())
        of_sums = moved * self.order**2
        floor = truth.square() * self.floor**2
        expected = moved + members.square() + of_sums + floor + self.tiny
        self._look_at_each(kernel.square(), expected)
        scale = expected.sum(1)
        typical = torch.maximum(members.square().sum(1), moved.sum(1)) / scale
        unit = scale.sqrt()[:, None]
        rows = _Rows(
            kernel / unit,
            members / unit,
            torch.maximum(floor.sum(1), of_sums.sum(1)) / scale,
            2 * LIMIT**4 * noise.luck() * typical.square(),
        )
        self.rows.setdefault(kernel.size(1), []).append(rows)

    def _look_at_each(self, kernel: Tensor, expected: Tensor) -> None:
        """Find an element or a row that is wrong by itself."""
        if not kernel.numel() or self.problem:
            return
        of_row = expected.mean(1, keepdim=True)
        of_column = (expected / of_row).mean(0, keepdim=True)
        # The few draws may have missed an element that its row and column tell about.
        likely = torch.stack([expected, of_row * of_column, 0.01 * of_row.expand_as(expected)])
        elements = (kernel / likely.amax(0)).sqrt()
        width = kernel.size(1)
        rows = (kernel.sum(1) / expected.sum(1)).sqrt()
        self.is_local = float(rows.median()) < _USUAL
        row, place = divmod(int(elements.argmax()), width)
        alone = float(kernel[row, place]) > _ALONE * float(kernel[row].sum())
        if float(rows.max()) > _ROW + _SHORT_ROW / width**0.5 and not alone:
            self.problem = (
                f"row {int(rows.argmax())} of {len(rows)} of the kernel's {self.name} is "
                f"{float(rows.max()):.3g} times as far from float64 as rounding explains"
            )
        elif float(elements.max()) > _ELEMENT:
            self.problem = (
                f"one element of the kernel's {self.name}, number {place} of row {row}, is "
                f"{float(elements.max()):.3g} times as far from float64 as rounding explains"
            )

    def judgement(self) -> Judgement:
        """The errors over all calls, and what is wrong with them."""
        size = self.size or 1.0
        ours, theirs = (self.kernel / size) ** 0.5, (self.members / size) ** 0.5
        problem = self.problem
        found_in_place = problem is not None and self.is_local
        allowed = max(LIMIT * theirs, self.floor)
        if ours > allowed and not found_in_place and self._is_sure():
            problem = less_accurate(self.name, ours, theirs, allowed)
        return Judgement(ours, theirs, problem)

    def _is_sure(self) -> bool:
        """Whether it is not by chance that the kernel is over the limit."""
        joined = [
            _Rows(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
            for rows in self.rows.values()
        ]
        if sum(len(rows.kernel) for rows in joined) >= MANY_ROWS:
            many = [r.without_shared().excess() for r in joined if len(r.kernel) >= MANY_ROWS // 2]
            if many and _is_over(torch.cat(many), _SURE):
                return True
        excess = sum(float(rows.excess().sum()) for rows in joined)
        elements = torch.cat(
            [(r.kernel.square() - LIMIT**2 * r.members.square()).reshape(-1) for r in joined]
        )
        alone = max(sum(float(r.luck.sum()) for r in joined), _variance_of_sum(elements))
        together = sum(float(r.luck.sqrt().sum()) for r in joined)
        return bool(excess > max(_SURE_OF_FEW * alone**0.5, _SURE_TOGETHER * together))


def _is_over(excess: Tensor, sure: float) -> bool:
    return bool(float(excess.sum()) > sure * _variance_of_sum(excess) ** 0.5)


def _variance_of_sum(values: Tensor) -> float:
    """Of independent values."""
    return float((values - values.mean()).square().sum()) if values.numel() else 0.0
