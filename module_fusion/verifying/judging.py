"""Whether a kernel is as accurate as the modules it replaced, on what a model gave it.

Kernel and members are measured against the members in float64. How much of an element's error
is to be expected shows in what the exact result does when inputs and weights change by half a
unit in the last place: the element may be the small difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..exact import (
    InDouble,
    chain_of,
    copy_of,
    double,
    has_gradient,
    run_on_copies,
    seeded,
)
from .differences import differences
from .statistics import MANY_ROWS, Judgement, Noise, Tally, rows_of
from .structures import FLOAT8, leaves, map_tensors, snapshot
from .watching import UNKNOWN, Call, equal

_DRAWS, _DRAWS_OF_FEW_ROWS = 4, 8


Values = dict[str, Tensor]


def judge(
    chain: Chain, members: Sequence[nn.Module], calls: Sequence[Call], gradients: bool
) -> Judgement:
    """Judge the calls in which a chain's kernel ran.

    Args:
        chain: the chain.
        members: its members, in order.
        calls: its calls, with the kernel's inputs and output.
        gradients: whether to run the kernel once more, forward and backward, to judge those.
    """
    seat: Any = chain.seat
    backward = gradients and bool(seat._capabilities["has_backward"])
    for call in calls:
        if call.theirs is UNKNOWN:
            call.theirs = snapshot(_members_on(chain, members, snapshot(call.inputs)))
    calls = [call for call in calls if backward or not equal(call.output, call.theirs)]
    for call in calls:
        for found in differences(call.output, call.theirs):
            if found.problem or (not found.equal and not _is_rounded(found.dtype)):
                what = found.problem or f"{found.dtype} values differ"
                return Judgement(problem=f"the kernel's {found.name}: {what}")
    try:
        return _judged(chain, members, calls, backward)
    except torch.OutOfMemoryError:
        return Judgement(problem="there is not enough memory for a copy of the modules in float64")


def is_left_by(chain: Chain, members: Sequence[nn.Module], call: Call) -> bool:
    """Whether members leave their inputs as the kernel left them."""
    inputs = snapshot(call.inputs)
    _members_on(chain, members, inputs)
    return equal(inputs, call.left)


def _members_on(chain: Chain, members: Sequence[nn.Module], inputs: list[Any]) -> Any:
    copies = [copy_of(member, Tensor.detach) for member in members]
    with torch.no_grad():
        return chain_of(chain, copies)(*inputs)


def _is_rounded(dtype: str) -> bool:
    return "float" in dtype or "complex" in dtype


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
    tallies: dict[str, Tally] = {}
    for mine, other, truth, expected in zip(ours, theirs, exact, noise, strict=True):
        for name, value in mine.items():
            tally = tallies.setdefault(name, Tally(name, value.dtype))
            tally.add(value, other[name], truth[name], expected[name])
    return _worst(tallies.values())


def _noise(run: _Runner, calls: Sequence[Call], exact: Sequence[Values]) -> list[dict[str, Noise]]:
    rows = sum(len(rows_of(value)) for values in exact for value in values.values())
    draws = _DRAWS if rows >= MANY_ROWS else _DRAWS_OF_FEW_ROWS
    noise = [{name: Noise(value, draws) for name, value in v.items()} for v in exact]
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
        self.floats = [t.dtype for t in tensors if has_gradient(t)]
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
            if generator is None or not has_gradient(tensor):
                return wide
            if wide.is_complex():
                near = [nearby(part, tensor.dtype) for part in (wide.real, wide.imag)]
                return torch.complex(*near)
            return nearby(wide, tensor.dtype)

        def nearby(wide: Tensor, dtype: torch.dtype) -> Tensor:
            device = None if generator is None else generator.device
            draws = torch.rand(wide.shape, generator=generator, dtype=wide.dtype, device=device)
            return wide * (1 + (draws.to(wide.device) - 0.5) * self._epsilon(dtype))

        members = [copy_of(member, widened) for member in self.members]
        function = chain_of(self.chain, members)
        found = []
        with InDouble():
            for call in calls:
                inputs = map_tensors(widened, call.inputs)
                with torch.no_grad():
                    output = function(*map_tensors(Tensor.clone, inputs))
                    values = _floating(snapshot(output), "output")
                if self.backward and call.grad:
                    values.update(self._gradients(function, members, inputs, call))
                found.append(values)
        return found

    def _epsilon(self, dtype: torch.dtype) -> float:
        # What is kept in float8 is computed with in a wider dtype, float32 if nothing tells.
        units = (torch.float32 if d in FLOAT8 else d for d in (dtype, *self.floats))
        return max(torch.finfo(d).eps for d in units)

    def _gradients(
        self,
        function: Callable[..., Any],
        members: Sequence[nn.Module],
        inputs: list[Any],
        call: Call,
    ) -> Values:
        with torch.enable_grad():
            output, found = run_on_copies(function, members, self.chain.roles, inputs)
        tensors = _floating(output, "output", detach=False)
        tensors = {name: value for name, value in tensors.items() if value.requires_grad}
        if not tensors:
            return {}
        names = [n for n in found if n in self.wanted or n.startswith("input ")]
        cotangents = _cotangents(call)
        seeds = [cotangents[name].to(value.dtype) for name, value in tensors.items()]
        gradients = torch.autograd.grad(
            list(tensors.values()), [found[name] for name in names], seeds, allow_unused=True
        )
        return {
            f"gradient of {name}": _real(gradient)
            for name, gradient in zip(names, gradients, strict=True)
            if gradient is not None
        }


def _cotangents(call: Call) -> Values:
    """What goes into the backward of a call: what arrived at its output in the model's own.

    Where nothing did, as where no gradient depends on the output, numbers of size 1.
    """
    arrived = {
        _name("output", path): _real(value)
        for path, value in call.cotangents.items()
        if value is not None
    }
    generator = seeded()
    found = {}
    for name, value in _floating(call.output, "output").items():
        drawn = torch.randn(value.shape, generator=generator, device="cpu")
        nothing = torch.zeros_like(value) if arrived else drawn.to(value.device, value.dtype)
        here = arrived.get(name, nothing)
        # A call that has another place in the other run may have another shape there.
        found[name] = here if here.shape == value.shape else nothing
    return found


def _name(what: str, path: str) -> str:
    return f"{what} {path}".strip()


def _floating(value: Any, name: str, detach: bool = True) -> Values:
    found = {
        _name(name, leaf.path): leaf.value.detach() if detach else leaf.value
        for leaf in leaves(value)
        if isinstance(leaf.value, Tensor)
    }
    return {where: _real(tensor) for where, tensor in found.items() if has_gradient(tensor)}


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
