"""Which RMSNorm a module computes, by running it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import probe_forms, reference
from .stand_in import (
    Refused,
    attributes,
    original_class,
    output_of,
    probing,
    relative_error,
    stand_in,
)

# Two implementations in float32 differ by a few units of 6e-8. The nearest thing that is no
# RMSNorm, another epsilon, is looked for with rows as small as the epsilon, where it shows.
_SAME = 1e-5
_SAME_GRADIENTS = 1e-4
# Sums in another order flip the rounding of a value in some thousand; another rounding point
# changes one in four.
_SAME_BITS = 0.98
_CONSTANTS = (1e-5, 1e-6, 1e-8, 1e-12)
_LARGE_EPS = 0.25
_MAX_HIDDEN = 65536


class FoundNorm(NamedTuple):
    """Name of the weight, name or value of the epsilon, and a rounding of `reference.NORMS`."""

    weight: str | None
    eps: str | float
    norm: str


def prove(norm: nn.Module, hidden: int, dtype: torch.dtype, device: torch.device) -> FoundNorm:
    """Find the RMSNorm that a module is, at its real size and on its device.

    The device matters: `nn.RMSNorm` rounds elsewhere on a GPU than on a CPU.
    """
    name = original_class(norm).__name__
    weights = {key: value for key, value in norm._parameters.items() if value is not None}
    if any(True for _ in norm.buffers()) or any(True for _ in norm.children()):
        raise Refused(f"{name} has buffers or modules of its own; an RMSNorm has a weight alone")
    if len(weights) > 1:
        raise Refused(f"{name} has {' and '.join(weights)}; an RMSNorm has a weight alone")
    shapes = [tuple(value.shape) for value in weights.values()]
    if shapes not in ([], [(hidden,)]):
        raise Refused(f"the weight of {name} has shape {shapes[0]}; the MLP takes {hidden} values")
    if hidden > _MAX_HIDDEN:
        raise Refused(f"rows of {hidden} values; the kernel takes at most {_MAX_HIDDEN}")
    with probing(norm):
        return _Probe(norm, next(iter(weights), None), hidden, dtype, device).find()


class _Probe:
    def __init__(
        self,
        norm: nn.Module,
        weight: str | None,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.module, self.weight, self.hidden = norm, weight, hidden
        self.dtype, self.device = dtype, device
        self.name = original_class(norm).__name__
        self.generator = torch.Generator("cpu").manual_seed(0)

    def find(self) -> FoundNorm:
        eps, values = self._find_eps()
        self._check_forms(values)
        norms = ["late"] if self.weight is None or values.plus == 0 else ["one_plus"]
        if self.weight is not None and values.plus == 0:
            norms.append("early")
        if self.dtype == torch.float32:
            return FoundNorm(self.weight, eps, norms[0])
        # torch.nn.RMSNorm(eps=None) takes an epsilon that depends on the dtype.
        candidates = [values.eps]
        if type(eps) is not str:
            candidates.append(torch.finfo(self.dtype).eps)
        for candidate in candidates:
            for norm in norms:
                if self._rounds_like(candidate, norm):
                    return FoundNorm(self.weight, eps if type(eps) is str else candidate, norm)
        raise Refused(f"{self.name} rounds {self.dtype} elsewhere than the RMSNorms known here")

    def _find_eps(self) -> tuple[str | float, _Values]:
        for key, value in attributes(self.module).items():
            if type(value) is not float or value < 0:
                continue
            for plus in (0, 1):
                if self._computes(_Values(value, plus)) and self._computes(
                    _Values(_LARGE_EPS, plus), replaced=key
                ):
                    return key, _Values(value, plus)
        for value in (torch.finfo(torch.float32).eps, torch.finfo(self.dtype).eps, *_CONSTANTS):
            for plus in (0, 1):
                if self._computes(_Values(value, plus)):
                    return value, _Values(value, plus)
        raise Refused(f"{self.name} computes something else than an RMSNorm")

    def _computes(self, values: _Values, replaced: str | None = None) -> bool:
        """Whether the module, in float32, computes an RMSNorm with these values."""
        module, weight = self._stand_in(torch.float32)
        if replaced is not None:
            module.__dict__[replaced] = values.eps
        # At the scale of the epsilon's root both terms under the root count the same.
        x = self._rows((1e-3, 1.0, 30.0, max(values.eps, 1e-30) ** 0.5), torch.float32)
        norm = "one_plus" if values.plus else "late"
        wide = None if weight is None else weight.double()
        truth = reference.rms_norm(x.double(), wide, values.eps, norm)
        return bool((relative_error(output_of(module, x), truth) < _SAME).all())

    def _check_forms(self, values: _Values) -> None:
        def formula(module: nn.Module, x: Tensor) -> Tensor:
            weight = None if self.weight is None else module._parameters[self.weight]
            wide = None if weight is None else weight.double()
            return reference.rms_norm(
                x.double(), wide, values.eps, "one_plus" if values.plus else "late"
            )

        like = torch.empty(0, dtype=torch.float32, device=self.device)
        probe_forms.check(
            lambda: self._stand_in(torch.float32)[0], formula, self.hidden, like, _SAME_GRADIENTS
        )

    def _rounds_like(self, eps: float, norm: str) -> bool:
        """Whether the module, in its dtype, has the bits of the reference."""
        module, weight = self._stand_in(self.dtype)
        x = self._rows((0.01, 1.0, 30.0), self.dtype)
        expected = reference.rms_norm(x, weight, eps, norm)
        output = output_of(module, x)
        if output.dtype != self.dtype or output.shape != expected.shape:
            return False
        same = (output == expected).float().mean()
        close = relative_error(output, expected) < torch.finfo(self.dtype).eps
        return bool((same > _SAME_BITS) & close.all())

    def _stand_in(self, dtype: torch.dtype) -> tuple[nn.Module, Tensor | None]:
        weight = 1 + 0.3 * self._random(self.hidden)
        weight[::3] *= 10  # Some are so large in trained models.
        # Some are negative or zero there, too: a norm may take their size, or zero for no weight.
        signs = self._random(self.hidden).sign()
        signs[:1], signs[2::5] = -1, 0
        weight = (weight * signs).to(self.device, dtype)
        module = stand_in(self.module, lambda path, old: weight)
        return module, None if self.weight is None else weight

    def _rows(self, scales: Iterable[float], dtype: torch.dtype) -> Tensor:
        """Four rows per scale, with a mean that a LayerNorm would subtract."""
        rows = [(self._random(4, self.hidden) + 0.5) * scale for scale in scales]
        return torch.cat(rows).to(self.device, dtype)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu", dtype=torch.float32)


class _Values(NamedTuple):
    """An epsilon, and what is added to the weight."""

    eps: float
    plus: int
