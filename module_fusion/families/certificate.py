"""The certificate: a kernel is compared with the members before it takes over a group.

Both are run on the same small random inputs and measured against the members in float64.
The kernel may have at most 1.1 times the members' error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..chain import Chain
from ..modules import KEY, original_class
from ..seat import run_members

LIMIT = 1.1
# Where the members happen to be exact, or nearly so: a quarter of a unit in the last place.
_FLOOR = 0.25
_SEED = 0
_MOST_CERTIFICATES = 1024
_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and value == {})
_CERTIFICATES: dict[Any, Certificate] = {}
_ROUNDED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Certificate:
    """The errors of a kernel and of the members, relative to float64.

    Attributes:
        kernel_error: norm of the kernel's deviation over the norm of the exact output.
        member_error: the same of the members in their own dtype.
        floor: what the kernel's error may be in any case.
    """

    kernel_error: float
    member_error: float
    floor: float

    @property
    def ratio(self) -> float:
        """The kernel's error in units of the members'."""
        return self.kernel_error / max(self.member_error, self.floor)

    @property
    def refusal(self) -> str | None:
        """Why the kernel may not take over, None if it may."""
        if self.kernel_error <= max(LIMIT * self.member_error, self.floor):
            return None
        return (
            f"the kernel is less accurate than the modules: relative error "
            f"{self.kernel_error:.2e} against float64, theirs is {self.member_error:.2e}, and "
            f"{LIMIT} times that is allowed"
        )


def certify(
    chain: Chain, members: Sequence[nn.Module], samples: Callable[[], list[tuple[Tensor, ...]]]
) -> Certificate | None:
    """Compare the kernel in a chain's seat with the members, once per structure.

    Args:
        chain: a chain with a kernel in its seat.
        members: its members, in order.
        samples: makes the inputs.

    Returns:
        None where there are no samples to compare on.
    """
    seat: Any = chain.seat
    key = (seat.kernel, repr(seat.prepared), chain.plan, *map(_structure, members))
    found = _CERTIFICATES.get(key)
    if found is None:
        inputs = samples()
        if not inputs:
            return None
        found = _compare(chain, members, inputs)
        if len(_CERTIFICATES) >= _MOST_CERTIFICATES:
            _CERTIFICATES.clear()
        _CERTIFICATES[key] = found
    return found


def seeded() -> torch.Generator:
    """A generator of its own, so that nobody's random numbers are used up."""
    return torch.Generator().manual_seed(_SEED)


def _compare(
    chain: Chain, members: Sequence[nn.Module], samples: list[tuple[Tensor, ...]]
) -> Certificate:
    weight = next(p for member in members for p in member.parameters() if p.is_floating_point())
    plain = [_copy_of(member, lambda tensor: tensor.detach()) for member in members]
    exact = [_copy_of(member, lambda tensor: _double(tensor.detach())) for member in members]
    kernel_error = member_error = 0.0
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        for sample in samples:
            inputs = [value.to(weight.device, weight.dtype) for value in sample]
            with _InDouble():
                reference = run_members(chain.plan, exact, _call, [_double(x) for x in inputs])
            theirs = run_members(chain.plan, plain, _call, [x.clone() for x in inputs])
            caller = get_ident()
            chain.running.add(caller)
            try:
                ours = chain.seat(*[x.clone() for x in inputs])  # type: ignore[misc]
            finally:
                chain.running.discard(caller)
            kernel_error += _error(ours, reference) ** 2
            member_error += _error(theirs, reference) ** 2
    floor = _FLOOR * torch.finfo(weight.dtype).eps
    count = len(samples)
    return Certificate((kernel_error / count) ** 0.5, (member_error / count) ** 0.5, floor)


def _error(value: Any, exact: Any) -> float:
    """Norm of the deviation, relative to the exact value; infinite if it is not a number."""
    if type(value) is not Tensor or value.shape != exact.shape:
        return float("inf")
    deviation = float((value.double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return deviation if deviation == deviation else float("inf")


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return module(*args, **kwargs)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _copy_of(module: nn.Module, of_tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module as it was before it was fused, without hooks, on other tensors."""
    cls = original_class(module)
    copy = cls.__new__(cls)
    own = {name: value for name, value in module.__dict__.items() if name not in (KEY, "forward")}
    own.update({name: type(own[name])() for name in _HOOKS if name in own})
    own["_parameters"] = {
        name: None if p is None else nn.Parameter(of_tensor(p), requires_grad=False)
        for name, p in module._parameters.items()
    }
    own["_buffers"] = {
        name: None if b is None else of_tensor(b) for name, b in module._buffers.items()
    }
    own["_modules"] = {
        name: None if child is None else _copy_of(child, of_tensor)
        for name, child in module._modules.items()
    }
    copy.__dict__.update(own)
    return copy


class _InDouble(TorchFunctionMode):
    """Casts to a smaller dtype inside a module do not round."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args = tuple(map(_widened, args))
        return func(*args, **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _ROUNDED else value


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes, as far as classes, sizes and settings tell."""
    parts: list[Any] = []
    for name, part in module.named_modules():
        own = {**part._parameters, **part._buffers}
        tensors = [(k, t.shape, t.dtype, t.device) for k, t in own.items() if t is not None]
        settings = [(k, v) for k, v in vars(part).items() if isinstance(v, (bool, int, float, str))]
        parts.append((name, original_class(part), tuple(tensors), tuple(settings)))
    return tuple(parts)
