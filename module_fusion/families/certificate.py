"""The certificate: a kernel is compared with the members before it takes over a group.

Both are run, forward and backward, on copies of the members with random weights, on small
random inputs, and measured against the copies in float64. In the output and in every gradient
the kernel may have at most 1.1 times the members' error. Vectors of weights are around 1, and
once of both signs, with zeros.

What only happens with weights far beyond the usual size is not seen here, such as a clamp in
float16 behind a norm: a family whose members may do that has to look at them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..exact import (
    FLOOR_OF_GRADIENTS,
    LIMIT,
    InDouble,
    Run,
    chain_of,
    copy_of,
    double,
    floor_of,
    less_accurate,
    run_on_copies,
    seat_on,
    seeded,
)
from ..modules import KEY, original_class

_SETTINGS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_OF_MODULES = frozenset(nn.Module().__dict__) | {KEY, "forward"}
# No dtype rounds that much, and a kernel that computes the same is not that much better.
_ROUNDING = 0.05
_FAR = 16
Samples = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class Certificate:
    """The errors of a kernel and of the members, relative to float64, where they differ most.

    Attributes:
        kernel_error: norm of the kernel's deviation over the norm of the exact value.
        member_error: the same of the members in their own dtype.
        allowed: what the kernel's error may be.
        floor: below this an error is not told from none.
        what: the output, or the gradient of which tensor.
        failure: why there is nothing to compare, None where there is.
    """

    kernel_error: float = 0.0
    member_error: float = 0.0
    allowed: float = 0.0
    floor: float = 0.0
    what: str = "output"
    failure: str | None = None

    @property
    def ratio(self) -> float:
        """The kernel's error in units of the members'."""
        if self.kernel_error <= self.floor and self.member_error <= self.floor:
            return 1.0
        return self.kernel_error / max(self.member_error, self.floor)

    @property
    def refusal(self) -> str | None:
        """Why the kernel may not take over, None if it may."""
        if self.failure is not None or self.kernel_error <= self.allowed:
            return self.failure
        return less_accurate(self.what, self.kernel_error, self.member_error, self.allowed)


class Certificates(dict[Any, Certificate]):
    """The certificates of one `fuse`, by what the members compute. Not kept for longer: the
    functions that a module calls may be replaced meanwhile."""

    def of(
        self, chain: Chain, members: Sequence[nn.Module], samples: Callable[[], Samples]
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
        if key not in self:
            inputs = samples()
            if not inputs:
                return None
            try:
                with torch.inference_mode(False):
                    self[key] = _compare(chain, members, inputs)
            except torch.OutOfMemoryError:
                failure = "there is not enough memory to compare the kernel with the modules"
                self[key] = Certificate(failure=failure)
        return self[key]


class _Errors:
    """Squared errors of one tensor, summed over the samples."""

    def __init__(self) -> None:
        self.kernel = self.members = 0.0
        self.samples = self.elements = 0

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        finite = theirs.isfinite() & exact.isfinite()
        if not torch.equal(ours.isfinite(), theirs.isfinite()):
            self.kernel = float("inf")
        if not finite.any():
            return
        size = exact[finite].norm()
        if not size > 0:
            size = torch.ones_like(size)
        self.kernel += float(((ours.double() - exact)[finite].norm() / size) ** 2)
        self.members += float(((theirs.double() - exact)[finite].norm() / size) ** 2)
        self.samples += 1
        self.elements += int(finite.sum())

    def is_of_something_else(self) -> bool:
        """Whether the members are so far from float64 that no rounding explains it."""
        count = max(self.samples, 1)
        return self.members > count * _ROUNDING**2 and self.members > _FAR**2 * self.kernel

    def certificate(self, what: str, epsilon: float) -> Certificate:
        count = max(self.samples, 1)
        kernel, members = (self.kernel / count) ** 0.5, (self.members / count) ** 0.5
        # Of few elements an error is a matter of luck.
        slack = 1 + 2 / max(self.elements, 1) ** 0.5
        floor = floor_of(epsilon)
        if what.startswith("gradient"):
            floor = max(floor, FLOOR_OF_GRADIENTS)
        return Certificate(kernel, members, max(LIMIT * members, floor) * slack, floor, what)


def _compare(chain: Chain, members: Sequence[nn.Module], samples: Samples) -> Certificate:
    tensors = [t for m in members for t in (*m.parameters(), *m.buffers())]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0, device="cpu"))
    random = seeded(like.device)
    # Packed weights cannot be copied, so there the members' own values are used.
    fresh = Tensor.detach if chain.packings else lambda tensor: _random_like(tensor, random)
    plain = [copy_of(member, fresh) for member in members]
    exact = [copy_of(member, lambda tensor: double(tensor.detach())) for member in plain]
    kernel: Any = chain.seat if chain.packings else seat_on(chain, plain)
    owners = members if chain.packings else plain
    differentiable = bool(chain.seat._capabilities["has_backward"])  # type: ignore[union-attr]
    errors: dict[str, _Errors] = {}
    compared = False
    trials = [(samples[0], True), (samples[0], False), *((sample, True) for sample in samples[1:])]
    usual = len(trials)
    if not chain.packings:
        trials.append((samples[0], True))
    for number, (sample, grad) in enumerate(trials):
        if number == usual:
            _give_signs(plain, exact)
            kernel = seat_on(chain, plain)
        inputs = [value.to(like.device, like.dtype) for value in sample]
        backward = differentiable and all(value.isfinite().all() for value in inputs)
        with torch.set_grad_enabled(grad):
            try:
                with InDouble():
                    wide = [double(x) for x in inputs]
                    truth = run_on_copies(chain_of(chain, exact), exact, chain.roles, wide)
                theirs = run_on_copies(chain_of(chain, plain), plain, chain.roles, inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                continue  # The members do not take such an input.
            compared = True
            try:
                ours = run_on_copies(kernel, owners, chain.roles, inputs)
                found = _differences(ours, theirs, truth, backward and grad)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return Certificate(failure=f"the kernel fails on a small input: {error}")
        if isinstance(found, str):
            return Certificate(failure=found)
        for what, values in found.items():
            errors.setdefault(what, _Errors()).add(*values)
    if not compared:
        return Certificate(failure="the modules take none of the inputs to compare on")
    epsilon = torch.finfo(like.dtype).eps
    if errors["output"].is_of_something_else():
        what = f"the modules compute something else in {like.dtype} than in float64"
        return Certificate(failure=what)
    certificates = [errors[what].certificate(what, epsilon) for what in errors]
    return max(certificates, key=lambda c: c.kernel_error / max(c.allowed, 1e-300))


def _differences(
    ours: Run, theirs: Run, exact: Run, backward: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]] | str:
    """The values to compare, by name, or why they cannot be."""
    outputs = [run[0] for run in (ours, theirs, exact)]
    if type(outputs[0]) is not Tensor or outputs[0].shape != outputs[1].shape:
        return "the kernel's output has another form than the modules'"
    if outputs[0].dtype != outputs[1].dtype:
        return f"the kernel's output is in {outputs[0].dtype}, the modules' in {outputs[1].dtype}"
    ours_, theirs_, exact_ = (output.detach() for output in outputs)
    values = {"output": (ours_, theirs_, exact_)}
    if not backward:
        return values
    cotangent = torch.randn(outputs[0].shape, generator=seeded(), device="cpu")
    cotangent = cotangent.to(outputs[0].device, outputs[0].dtype)
    names = [name for name in theirs[1] if name in ours[1]]
    gradients: list[tuple[Tensor | None, ...]] = []
    for output, leaves in (ours, theirs, exact):
        wanted = [leaves[name] for name in names]
        if output.requires_grad:
            seed = cotangent.to(output.dtype)
            gradients.append(torch.autograd.grad(output, wanted, seed, allow_unused=True))
        else:
            gradients.append((None,) * len(names))
    for name, mine, other, truth in zip(names, *gradients, strict=True):
        if (mine is None) != (other is None):
            return (
                f"the gradient of {name} is {'missing' if mine is None else 'there'}, unlike theirs"
            )
        if mine is not None and other is not None and truth is not None:
            values[f"gradient of {name}"] = (mine, other, truth)
    return values


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights of a usual size: vectors around 1, matrices that keep the size of rows."""
    if not tensor.is_floating_point():
        return tensor.detach()
    values = torch.randn(
        tensor.shape, generator=generator, device=generator.device, dtype=torch.float32
    )
    values = values * tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 1 + values * 0.3
    # In the same memory format: kernels look at strides.
    return torch.empty_like(tensor.detach()).copy_(values)


def _give_signs(plain: Sequence[nn.Module], exact: Sequence[nn.Module]) -> None:
    """Make vectors of weights negative in some places and zero in others.

    Of matrices the signs are random anyway, and a buffer may be a variance.
    """
    random = seeded()
    with torch.no_grad():
        for member, in_double in zip(plain, exact, strict=True):
            for own, wide in zip(member.parameters(), in_double.parameters(), strict=True):
                if own.dim() != 1 or not own.is_floating_point():
                    continue
                signs = torch.randn(own.shape, generator=random, device="cpu").sign()
                signs[2::5] = 0
                own.copy_(own.to(torch.float32) * signs.to(own.device))
                wide.copy_(own)


class _Same:
    """An object as a key: equal to itself alone, and kept alive, so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _frozen(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(map(_frozen, value))
    # 1, 1.0 and True are equal but not the same to a forward.
    return (type(value), repr(value)) if type(value) in _SETTINGS else _Same(value)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes, as far as classes, sizes and settings tell.

    An object with values of its own, such as a list or a configuration, is the same for two
    modules only if it is one object.
    """
    parts: list[Any] = []
    for name, part in nn.Module.named_modules(module):  # Not the seat.
        own = {**part._parameters, **part._buffers}
        tensors = [(k, t.shape, t.dtype, t.device) for k, t in own.items() if t is not None]
        settings = [(k, _frozen(v)) for k, v in vars(part).items() if k not in _OF_MODULES]
        cls: Any = original_class(part)
        parts.append((name, cls, cls.forward, tuple(tensors), tuple(settings)))
    return tuple(parts)
