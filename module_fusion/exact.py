"""A chain on other tensors than its members': copies of the members, in float64 for instance.

`certificate.py` compares a kernel with its members on random weights, `verify` on the model's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .chain import Chain
from .modules import KEY, original_class
from .seat import prepared_by, run_members
from .verifying.structures import FLOAT8, has_numbers, leaves, map_tensors

LIMIT = 1.1
# Where the members happen to be exact, or nearly so: a quarter of a unit in the last place.
_FLOOR = 0.25
# Of a gradient in float32 the order of summation, on a GPU another one each time, decides about
# some units in the last place.
FLOOR_OF_GRADIENTS = 6 * torch.finfo(torch.float32).eps
# In float64 the measure is no finer than what is measured: the order of summation decides.
_FLOOR_OF_DOUBLE = 16 * torch.finfo(torch.float64).eps
_SEED = 0
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and value == {})
_WIDER = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys(FLOAT8, torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}


def less_accurate(what: str, error: float, of_modules: float, allowed: float) -> str:
    """What is said of a kernel whose relative error against float64 is more than is allowed."""
    return (
        f"the kernel is less accurate than the modules: relative error {error:.2e} of the {what} "
        f"against float64, theirs is {of_modules:.2e}, and {allowed:.2e} is allowed: {LIMIT} times "
        f"that, or a few units in the last place"
    )


def floor_of(epsilon: float) -> float:
    """The relative error below which nothing is told from none, by a dtype's epsilon."""
    return max(_FLOOR * epsilon, _FLOOR_OF_DOUBLE)


def seeded(device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of its own, so that nobody's random numbers are used up."""
    return torch.Generator(device).manual_seed(_SEED)


Run = tuple[Any, dict[str, Tensor]]


def run_on_copies(
    function: Callable[..., Any],
    members: Sequence[nn.Module],
    roles: Sequence[str],
    inputs: Sequence[Any],
) -> Run:
    """The output on copies of the inputs, and what it may have gradients of."""
    inputs = map_tensors(lambda x: x.clone().requires_grad_(has_gradient(x)), list(inputs))
    return function(*inputs), _leaves(members, roles, inputs)


def _leaves(
    members: Sequence[nn.Module], roles: Sequence[str], inputs: Sequence[Any]
) -> dict[str, Tensor]:
    given = [leaf for leaf in leaves(inputs) if isinstance(leaf.value, Tensor)]
    found = {f"input {leaf.path}": leaf.value for leaf in given if leaf.value.requires_grad}
    for role, member in zip(roles, members, strict=True):
        named = member.named_parameters()
        found.update({f"{role}.{name}": p for name, p in named if p.requires_grad})
    return found


def seat_on(chain: Chain, members: Sequence[nn.Module]) -> nn.Module:
    """The kernel of a chain in a seat by itself, on other members."""
    seat: Any = chain.seat
    bench: Any = type(seat)()
    bench.__dict__.update(seat.__dict__)
    is_method = isinstance(seat.__dict__["forward"], MethodType)
    bench.__dict__.update(
        _members=tuple(map(weakref.ref, members)),
        forward=MethodType(seat.kernel, bench) if is_method else seat.kernel,
        prepared=prepared_by(seat.kernel, seat._roles, members),
    )
    return bench  # type: ignore[no-any-return]


def chain_of(chain: Chain, members: Sequence[nn.Module]) -> Callable[..., Any]:
    """The chain on other members."""
    return lambda *inputs: run_members(chain.plan, members, _call, inputs)


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return module(*args, **kwargs)


def has_gradient(tensor: Tensor) -> bool:
    """Whether a tensor of this dtype may have one."""
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return is_number and has_numbers(tensor.dtype)


def double(tensor: Tensor) -> Tensor:
    if not has_gradient(tensor):
        return tensor
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


def copy_of(module: nn.Module, of_tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module as it was before it was fused, without hooks, on other tensors."""
    cls = original_class(module)
    copy = cls.__new__(cls)
    own = {name: value for name, value in module.__dict__.items() if name not in (KEY, "forward")}
    own.update({name: type(own[name])() for name in _HOOKS if name in own})
    own["_parameters"] = {
        name: None if p is None else nn.Parameter(of_tensor(p), requires_grad=has_gradient(p))
        for name, p in module._parameters.items()
    }
    own["_buffers"] = {
        name: None if b is None else of_tensor(b) for name, b in module._buffers.items()
    }
    own["_modules"] = {
        name: None if child is None else copy_of(child, of_tensor)
        for name, child in module._modules.items()
    }
    copy.__dict__.update(own)
    return copy


class InDouble(TorchFunctionMode):
    """Casts to a smaller dtype inside a module do not round."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args = tuple(map(_widened, args))
        return func(*args, **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
