"""Whether a kernel is as accurate as the modules it replaced, on what a model gave it.

Kernel and members are measured against the members in float64. How much of an element's error
is to be expected shows in what the exact result does when inputs and weights change by half a
unit in the last place: the element may be the small difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..exact import (
    FLOOR,
    FLOOR_OF_GRADIENTS,
    LIMIT,
    InDouble,
    chain_of,
    copy_of,
    double,
    run_on_copies,
    seeded,
)
from .differences import differences
from .structures import leaves, map_tensors
from .watching import Call, equal

_DRAWS, _DRAWS_OF_FEW_ROWS = 4, 8
# In float32 the order of a sum decides about this many times what half a unit does.
_ORDER = 8.0
# An element may be this many times its expected error off; of many elements one is the worst.
_ELEMENT = 16.0
# As may a row: little more than twice where it is long, about as an element where it is not.
_ROW, _SHORT_ROW = 4.0, 12.0
# Standard errors by which the error has to be over the limit to count: with many rows, with few,
# and where what is luck in one row is the same luck in all.
_SURE, _SURE_OF_FEW, _SURE_TOGETHER = 4.0, 5.0, 2.0
_MANY_ROWS = 32
_LEAST_WIDTH = 16


class Judgement(NamedTuple):
    """How far a kernel and the members are from float64, relative to its norm."""

    kernel_error: float | None = None
    member_error: float | None = None
    problem: str | None = None


Values = dict[str, Tensor]


def judge(
    chain: Chain, members: Sequence[nn.Module], calls: Sequence[Call], gradients: bool
) -> Judgement:
    """Judge the calls in which a chain's kernel ran.

    Args:
        chain: the chain.
        members: its members, in order.
        calls: its calls, with the kernel's inputs and output and what the members return.
        gradients: whether to run the kernel once more, forward and backward, to judge those.
    """
    seat: Any = chain.seat
    backward = gradients and bool(seat._capabilities["has_backward"])
    calls = [call for call in calls if backward or not equal(call.output, call.theirs)]
    for call in calls:
        for found in differences(call.output, call.theirs):
            if found.problem or (not found.equal and not _is_float(found.dtype)):
                what = found.problem or "integers differ"
                return Judgement(problem=f"the kernel's {found.name}: {what}")
    try:
        return _judged(chain, members, calls, backward)
    except torch.OutOfMemoryError:
        return Judgement(problem="there is not enough memory for a copy of the modules in float64")


def _is_float(dtype: str) -> bool:
    return "float" in dtype


def _judged(
    chain: Chain, members: Sequence[nn.Module], calls: Sequence[Call], backward: bool
) -> Judgement:
    run = _Runner(chain, members, backward)
    ours: list[Values] = []
    theirs: list[Values] = []
    for call in calls:
        ours.append(run.of_call(call.output, call, lambda *inputs: chain.run_kernel(list(inputs))))
        theirs.append(run.of_call(call.theirs, call, None))
        if problem := _unlike(ours[-1], theirs[-1]):
            return Judgement(problem=problem)
    try:
        exact = run.in_double(calls, None)
        noise = _noise(run, calls, exact)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Judgement(problem=f"the modules cannot be run in float64 to compare with: {error}")
    tallies: dict[str, _Tally] = {}
    for mine, other, truth, expected in zip(ours, theirs, exact, noise, strict=True):
        for name, value in mine.items():
            tally = tallies.setdefault(name, _Tally(name, value.dtype))
            tally.add(value, other[name], truth[name], expected[name])
    return _worst(tallies.values())


class _Noise:
    """How far one tensor's exact values move when inputs and weights do, by draws."""

    def __init__(self, exact: Tensor, draws: int) -> None:
        self.exact, self.draws = exact, draws
        self.squares = torch.zeros_like(exact)
        self.of_rows: list[Tensor] = []

    def add(self, near: Tensor) -> None:
        squares = (near - self.exact).square()
        self.squares += squares / self.draws
        self.of_rows.append(_rows_of(squares).sum(1))

    def luck(self) -> Tensor:
        """Variance of a row's squared error, relative to its square: 2 where one number decides
        about the row, next to nothing where many do."""
        of_rows = torch.stack(self.of_rows)
        return of_rows.var(0) / of_rows.mean(0).square().clamp_min(1e-300)


def _noise(run: _Runner, calls: Sequence[Call], exact: Sequence[Values]) -> list[dict[str, _Noise]]:
    rows = sum(len(_rows_of(value)) for values in exact for value in values.values())
    draws = _DRAWS if rows >= _MANY_ROWS else _DRAWS_OF_FEW_ROWS
    noise = [{name: _Noise(value, draws) for name, value in v.items()} for v in exact]
    generator = seeded(run.device)
    for _ in range(draws):
        for sums, near in zip(noise, run.in_double(calls, generator), strict=True):
            for name in sums:
                sums[name].add(near[name])
    return noise


def _unlike(ours: Values, theirs: Values) -> str | None:
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            return f"the {name} is {'there' if name in ours else 'missing'}, unlike the modules'"
    return None


def _worst(tallies: Any) -> Judgement:
    judgements = [tally.judgement() for tally in tallies]
    output = next((j for t, j in zip(tallies, judgements, strict=True) if t.is_output), Judgement())
    problem = next((j.problem for j in judgements if j.problem), None)
    return output._replace(problem=problem)


class _Runner:
    """Runs a chain on the inputs of its calls."""

    def __init__(self, chain: Chain, members: Sequence[nn.Module], backward: bool) -> None:
        self.chain, self.members, self.backward = chain, members, backward
        tensors = [t for m in members for t in (*m.parameters(), *m.buffers())]
        self.floats = [t.dtype for t in tensors if t.is_floating_point()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.wanted = {
            f"{role}.{name}"
            for role, member in zip(chain.roles, members, strict=True)
            for name, parameter in member.named_parameters()
            if parameter.requires_grad
        }

    def of_call(self, output: Any, call: Call, kernel: Callable[..., Any] | None) -> Values:
        """Output and gradients of the kernel, or of the members for None."""
        values = _floating(output, "output")
        if self.backward and call.grad:
            members = self.members
            if kernel is None:
                members = [copy_of(member, Tensor.detach) for member in members]
                kernel = chain_of(self.chain, members)
            values.update(self._gradients(kernel, members, call.inputs, call))
        return values

    def in_double(self, calls: Sequence[Call], generator: torch.Generator | None) -> list[Values]:
        """The same of the members in float64; with a generator, on inputs and weights nearby."""

        def widened(tensor: Tensor) -> Tensor:
            wide = double(tensor.detach())
            if generator is None or not tensor.is_floating_point():
                return wide
            draws = torch.rand(
                wide.shape, generator=generator, dtype=wide.dtype, device=generator.device
            )
            return wide * (1 + (draws.to(wide.device) - 0.5) * self._epsilon(tensor.dtype))

        members = [copy_of(member, widened) for member in self.members]
        function = chain_of(self.chain, members)
        found = []
        with InDouble():
            for call in calls:
                inputs = map_tensors(widened, call.inputs)
                with torch.no_grad():
                    values = _floating(function(*map_tensors(Tensor.clone, inputs)), "output")
                if self.backward and call.grad:
                    values.update(self._gradients(function, members, inputs, call))
                found.append(values)
        return found

    def _epsilon(self, dtype: torch.dtype) -> float:
        return max(torch.finfo(d).eps for d in (dtype, *self.floats))

    def _gradients(
        self,
        function: Callable[..., Any],
        members: Sequence[nn.Module],
        inputs: list[Any],
        call: Call,
    ) -> Values:
        dtypes = {n: value.dtype for n, value in _floating(call.output, "output").items()}
        with torch.enable_grad():
            output, found = run_on_copies(function, members, self.chain.roles, inputs)
        tensors = _floating(output, "output", detach=False)
        tensors = {name: value for name, value in tensors.items() if value.requires_grad}
        if not tensors:
            return {}
        names = [n for n in found if n in self.wanted or n.startswith("input ")]
        generator = seeded()
        seeds = [
            # Rounded as for the kernel, whatever this run computes in.
            torch.randn(value.shape, generator=generator, device="cpu")
            .to(value.device, dtypes[name])
            .to(value.dtype)
            for name, value in tensors.items()
        ]
        gradients = torch.autograd.grad(
            list(tensors.values()), [found[name] for name in names], seeds, allow_unused=True
        )
        return {
            f"gradient of {name}": gradient
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None
        }


def _floating(value: Any, name: str, detach: bool = True) -> Values:
    return {
        f"{name} {leaf.path}".strip(): leaf.value.detach() if detach else leaf.value
        for leaf in leaves(value)
        if isinstance(leaf.value, Tensor) and leaf.value.is_floating_point()
    }


def _rows_of(tensor: Tensor) -> Tensor:
    """`(rows, width)`: the last dimension, with those before it where it is short."""
    dims = tensor.dim()
    width = 1
    while dims and width < _LEAST_WIDTH:
        dims -= 1
        width *= tensor.size(dims)
    return tensor.reshape(-1, width) if width else tensor.reshape(0, 1)


class _Tally:
    """The squared errors of one tensor over all calls."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.is_output = name.startswith("output")
        self.epsilon = torch.finfo(dtype).eps
        self.tiny = torch.finfo(dtype).smallest_normal ** 2
        self.floor = FLOOR * self.epsilon
        if not self.is_output:
            self.floor = max(self.floor, FLOOR_OF_GRADIENTS)
        self.kernel = self.members = self.size = 0.0
        self.problem: str | None = None
        self.order = _ORDER * min(torch.finfo(torch.float32).eps / self.epsilon, 1.0)
        self.rows = _Excess()
        self.elements = _Excess()

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor, noise: _Noise) -> None:
        """Add one call: the kernel's values, the members', the exact ones, the expected error."""
        if not torch.equal(ours.isfinite(), theirs.isfinite()):
            self.problem = f"the kernel's {self.name} is NaN or infinite where the modules' is not"
            return
        usable = theirs.isfinite() & exact.isfinite() & noise.squares.isfinite()
        kernel, members, exact, moved = (
            _rows_of(torch.where(usable, value, 0.0))
            for value in (
                (ours.double() - exact).square(),
                (theirs.double() - exact).square(),
                exact.square(),
                noise.squares,
            )
        )
        self.kernel += float(kernel.sum())
        self.members += float(members.sum())
        self.size += float(exact.sum())
        of_sums = moved * self.order**2
        expected = moved + members + of_sums + exact * self.floor**2 + self.tiny
        self._look_at_each(kernel, expected)
        scale = expected.sum(1)
        allowed = torch.maximum(LIMIT**2 * members.sum(1), self.floor**2 * exact.sum(1))
        allowed = torch.maximum(allowed, of_sums.sum(1))
        typical = torch.maximum(members.sum(1), moved.sum(1)) / scale
        luck = 2 * LIMIT**4 * noise.luck() * typical.square()
        self.rows.add((kernel.sum(1) - allowed) / scale, luck)
        excess = kernel - torch.maximum(LIMIT**2 * members, of_sums)
        self.elements.add((excess / scale[:, None]).reshape(-1))

    def _look_at_each(self, kernel: Tensor, expected: Tensor) -> None:
        if not kernel.numel() or self.problem:
            return
        of_row = expected.mean(1, keepdim=True)
        of_column = (expected / of_row).mean(0, keepdim=True)
        # The few draws may have missed an element that its row and column tell about.
        likely = torch.stack([expected, of_row * of_column, 0.01 * of_row.expand_as(expected)])
        elements = (kernel / likely.amax(0)).sqrt()
        width = kernel.size(1)
        rows = (kernel.sum(1) / expected.sum(1)).sqrt()
        if float(elements.max()) > _ELEMENT:
            place = divmod(int(elements.argmax()), width)
            self.problem = (
                f"one element of the kernel's {self.name}, number {place[1]} of row {place[0]}, is "
                f"{float(elements.max()):.3g} times as far from float64 as rounding explains"
            )
        elif float(rows.max()) > _ROW + _SHORT_ROW / width**0.5:
            self.problem = (
                f"row {int(rows.argmax())} of {len(rows)} of the kernel's {self.name} is "
                f"{float(rows.max()):.3g} times as far from float64 as rounding explains"
            )

    def judgement(self) -> Judgement:
        if not self.size and not self.kernel and not self.members:
            return Judgement(0.0, 0.0, self.problem)
        size = self.size or 1.0
        ours, theirs = (self.kernel / size) ** 0.5, (self.members / size) ** 0.5
        over = ours > max(LIMIT * theirs, self.floor)
        problem = self.problem
        if over and self._is_sure():
            # Everywhere, not in one place.
            problem = (
                f"the kernel is less accurate than the modules: relative error {ours:.2e} of the "
                f"{self.name} against float64, theirs is {theirs:.2e}, and {LIMIT} times that is "
                f"allowed"
            )
        return Judgement(ours, theirs, problem)

    def _is_sure(self) -> bool:
        """Whether it is not by chance that the kernel is over the limit."""
        rows = self.rows
        alone = _SURE**2 * rows.variance()
        if rows.count < _MANY_ROWS:
            alone = _SURE_OF_FEW**2 * max(rows.luck, self.elements.variance())
        # One large value that all rows share is rounded alike in all of them.
        together = _SURE_TOGETHER * rows.luck_together
        return bool(rows.sum > max(alone**0.5, together))


class _Excess:
    """A sum, and how far it may be from what it is on average."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = self.luck = self.luck_together = 0.0

    def add(self, values: Tensor, luck: Tensor | None = None) -> None:
        self.count += values.numel()
        self.sum += float(values.sum())
        self.squares += float(values.square().sum())
        if luck is not None:
            self.luck += float(luck.sum())
            self.luck_together += float(luck.sqrt().sum())

    def variance(self) -> float:
        """Of the sum, if the values are independent."""
        mean = self.sum / max(self.count, 1)
        return max(self.squares - self.count * mean**2, 0.0)
