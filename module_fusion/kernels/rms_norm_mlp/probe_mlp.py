"""Which gated MLP a module computes, by running small copies of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import probe_forms, reference
from .few_inputs import FewInputs, hollow
from .stand_in import (
    DrawsRandomNumbers,
    Refused,
    WrongResult,
    original_class,
    output_of,
    probing,
    relative_error,
    stand_in,
)

# In float64: above what a cast to float32 inside the module costs (6e-8), and far below what
# exact and tanh GELU differ by (1e-4), the nearest two of the candidates.
_SAME = 2e-6
# Of the values, how many may be finite in one of two sums that overflow.
_FEW = 0.02
_TINY = (8, 12)
_SCALES = (0.1, 1.0, 10.0, 1000.0)
_MOST_REAL_WEIGHTS = 2**25

Path = tuple[str, ...]


class Projections(NamedTuple):
    """One way to tell the Linear layers apart. `up` is None where `gate` holds both."""

    gate: Path
    up: Path | None
    down: Path
    intermediate: int
    hidden: int


class FoundMLP(NamedTuple):
    """The paths of the projections and what is computed with them."""

    gate: Path
    up: Path | None
    down: Path
    gate_first: bool
    activation: str


def candidates(mlp: nn.Module) -> tuple[int, list[Projections]]:
    """The hidden size and every assignment of roles that the shapes allow."""
    name = original_class(mlp).__name__
    linears: dict[Path, tuple[int, int]] = {}
    for key, module in mlp.named_modules():
        if original_class(module) is nn.Linear:
            linears[tuple(key.split("."))] = tuple(module.weight.shape)
        elif any(True for _ in module.parameters(recurse=False)):
            kind = original_class(module).__name__
            raise Refused(f"{name} has weights in a {kind}; the kernel takes nn.Linear alone")
        if any(True for _ in module.buffers(recurse=False)):
            raise Refused(f"{name} has buffers; the kernel computes with its weights alone")
    found = []
    for paths in permutations(linears) if len(linears) in (2, 3) else ():
        shapes = [linears[path] for path in paths]
        if len(shapes) == 3 and shapes[0] == shapes[1] == shapes[2][::-1]:
            found.append(Projections(paths[0], paths[1], paths[2], *shapes[0]))
        elif len(shapes) == 2 and shapes[0] == (2 * shapes[1][1], shapes[1][0]):
            found.append(Projections(paths[0], None, paths[1], shapes[1][1], shapes[1][0]))
    if not found:
        listed = ", ".join(f"{'.'.join(path)} {shape}" for path, shape in linears.items())
        raise Refused(
            f"the Linear layers of {name} form no gate, up and down projection: {listed or 'none'}"
        )
    return found[0].hidden, found


def prove(mlp: nn.Module, projections: list[Projections], dtype: torch.dtype) -> FoundMLP:
    """Find the roles and the activation for which the formula is what the module computes."""
    try:
        with probing(mlp):
            found = _find(mlp, projections, dtype, real=False)
            _check_real_sizes(mlp, projections[0], found)
            return found
    except (WrongResult, DrawsRandomNumbers):
        raise
    except Refused:
        # A forward may name its real sizes, or take its weights elsewhere than into F.linear.
        if sum(parameter.numel() for parameter in mlp.parameters()) > _MOST_REAL_WEIGHTS:
            raise
        with probing(mlp):
            return _find(mlp, projections, dtype, real=True)


def _find(
    mlp: nn.Module, projections: list[Projections], dtype: torch.dtype, *, real: bool
) -> FoundMLP:
    name = original_class(mlp).__name__
    sizes = _sizes(projections[0], real)
    x = _rows(_SCALES, sizes[projections[0].hidden], torch.float64)
    module = _stand_in(mlp, sizes, torch.float64)
    output = output_of(module.eval(), x)
    if type(output) is not Tensor:
        raise WrongResult(f"{name} returns a {type(output).__name__}")
    for roles, gate_first, activation in product(projections, (True, False), reference.ACTIVATIONS):
        if roles.up is not None and not gate_first:
            continue
        found = FoundMLP(roles.gate, roles.up, roles.down, gate_first, activation)
        if (relative_error(output, _formula(module, found, x)) < _SAME).all():
            break
    else:
        raise WrongResult(
            f"{name} computes something else than down(act(gate(x)) * up(x)) with SiLU or GELU"
        )
    if not torch.equal(output_of(module.train(), x), output):
        raise WrongResult(f"{name} computes something else in training mode, such as a dropout")
    hidden = sizes[projections[0].hidden]
    probe_forms.check(
        lambda: _stand_in(mlp, sizes, torch.float64).eval(),
        lambda module, x: _formula(module, found, x),
        hidden,
        x,
        _SAME,
    )
    _check_rounding(name, _stand_in(mlp, sizes, dtype), found, hidden)
    _check_overflow(name, lambda: _stand_in(mlp, sizes, dtype), found, hidden)
    return found


def _check_real_sizes(mlp: nn.Module, roles: Projections, found: FoundMLP) -> None:
    """Refuse a module that computes something else only where it is as wide as it really is."""
    sizes = _sizes(roles, real=True)
    x = _rows(_SCALES, roles.hidden, torch.float64)
    module = _stand_in(mlp, sizes, torch.float64, weightless=True)
    with FewInputs(module):
        expected = _formula(module, found, x)
        for trains in (False, True):
            output = output_of(module.train(trains), x)
            same = type(output) is Tensor and output.shape == expected.shape
            if same:
                # Of few values, all may be zero.
                equal = (output == expected).all(-1)
                same = bool((equal | (relative_error(output, expected) < _SAME)).all())
            if not same:
                raise WrongResult(
                    f"{original_class(mlp).__name__} computes something else at its real sizes, "
                    f"{roles.hidden} and {roles.intermediate}, than at small ones"
                )


def _check_rounding(name: str, module: nn.Module, found: FoundMLP, hidden: int) -> None:
    """Refuse a module that is more exact in its dtype than the formula with its roundings."""
    dtype = next(module.parameters()).dtype
    x = _rows((0.1, 1.0, 3.0), hidden, dtype, count=32)
    output, own = output_of(module.eval(), x), _formula(module, found, x)
    truth = _formula(module.double(), found, x.double())
    error, own_error = ((value.double() - truth).norm() / truth.norm() for value in (output, own))
    if not error <= 3 * own_error + torch.finfo(dtype).eps:
        raise WrongResult(f"{name} computes something else in {dtype} than in float64")
    if output.dtype != dtype or not own_error <= 1.05 * error + 0.05 * torch.finfo(dtype).eps:
        raise WrongResult(f"{name} rounds {dtype} elsewhere, or less often, than the MLPs known")


def _check_overflow(name: str, make: Callable[[], nn.Module], found: FoundMLP, hidden: int) -> None:
    """Refuse a module that gives numbers where the formula in its dtype overflows.

    A norm keeps what comes in small, so it is large weights that lead there. Large rows stand for
    them where the product overflows, at the root of the largest number. For the gate or the
    up projection to overflow alone, its own weights are large, and the other's small.
    """
    dtype = next(make().parameters()).dtype
    largest = torch.finfo(dtype).max
    for large in (None, 0, 1):
        module = make()
        scales = [largest**0.5 * 2.0**power for power in range(-3, 4)]
        if large is not None:
            scales = [1.0, 4.0, 16.0]
            both = _weights_of(module, found)
            both[large].mul_(largest / 8)
            both[1 - large].mul_(2.0**-8)
        x = _rows(tuple(scales), hidden, dtype, count=16)
        output, own = output_of(module.eval(), x), _formula(module, found, x)
        # A sum in another order may overflow now and then where the other just does not.
        if (output.isfinite() & ~own.isfinite()).float().mean() > _FEW:
            raise WrongResult(f"{name} gives numbers where the MLPs known overflow in {dtype}")


def _weights_of(module: nn.Module, found: FoundMLP) -> tuple[Tensor, Tensor]:
    """The weights of gate and up, where one layer gives both as its two halves."""
    gate: Tensor = module.get_submodule(".".join(found.gate)).weight  # type: ignore[assignment]
    if found.up is None:
        first, second = gate.chunk(2)
        return (first, second) if found.gate_first else (second, first)
    return gate, module.get_submodule(".".join(found.up)).weight  # type: ignore[return-value]


def _formula(module: nn.Module, found: FoundMLP, x: Tensor) -> Tensor:
    gate = module.get_submodule(".".join(found.gate))
    down = module.get_submodule(".".join(found.down))
    up = None if found.up is None else module.get_submodule(".".join(found.up))
    weights = reference.Weights(
        None,
        gate.weight,  # type: ignore[arg-type]
        None if up is None else up.weight,  # type: ignore[arg-type]
        down.weight,  # type: ignore[arg-type]
        gate.bias,  # type: ignore[arg-type]
        None if up is None else up.bias,  # type: ignore[arg-type]
        down.bias,  # type: ignore[arg-type]
    )
    options = reference.Options(0.0, "late", found.activation, found.gate_first)
    return reference.gated_mlp(x, weights, options)


def _sizes(roles: Projections, real: bool) -> dict[int, int]:
    """What each size of the module is in its stand-in."""
    hidden, intermediate = roles.hidden, roles.intermediate
    small = (hidden, intermediate) if real else _TINY
    if hidden == intermediate:
        small = (small[0], small[0])
    elif hidden == 2 * intermediate:
        small = (2 * small[1], small[1])
    return {2 * intermediate: 2 * small[1], intermediate: small[1], hidden: small[0]}


def _stand_in(
    mlp: nn.Module, sizes: dict[int, int], dtype: torch.dtype, *, weightless: bool = False
) -> nn.Module:
    generator = torch.Generator("cpu").manual_seed(0)

    def parameter(path: Path, old: Tensor) -> Tensor:
        shape = [sizes[size] for size in old.shape]
        if weightless and len(shape) == 2:
            return hollow(shape, dtype)
        scale = 1.5 / shape[-1] ** 0.5 if len(shape) == 2 else 1.0
        value = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64) * scale
        return value.to(dtype)

    def attribute(value: Any) -> Any:
        return sizes.get(value, value) if type(value) is int else value

    return stand_in(mlp, parameter, attribute)


def _rows(scales: tuple[float, ...], hidden: int, dtype: torch.dtype, count: int = 4) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    rows: Callable[[], Tensor] = lambda: torch.randn(  # noqa: E731
        (count, hidden), generator=generator, device="cpu", dtype=torch.float64
    )
    return torch.cat([rows() * scale for scale in scales]).to(dtype)
