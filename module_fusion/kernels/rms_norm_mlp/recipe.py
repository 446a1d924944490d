"""What a norm and an MLP compute, proved by running stand-ins of them.

Class and attribute names are not evidence: two hundred classes in transformers are called
RMSNorm. So shapes give the candidates, and a candidate is taken only if copies of the member,
with random weights, small and as wide as it is, give what the formula gives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import probe_mlp, probe_norm
from ._triton import can_run_triton
from .reference import Options, Weights
from .stand_in import Refused, structure

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_RECIPES = 512
_RECIPES: dict[Any, Recipe | str] = {}


class Recipe(NamedTuple):
    """Where the weights are and what is computed with them.

    Args:
        norm_weight: name of the norm's parameter, None for a norm without one.
        eps: name of the norm's attribute, or the value where no attribute holds it.
        gate, up, down: paths of the Linear layers in the MLP. `up` is None where `gate` is
            one layer for both.
        triton: whether tensors on the members' device go through the Triton kernels.
    """

    hidden: int
    dtype: torch.dtype
    norm_weight: str | None
    eps: str | float
    norm: str
    gate: tuple[str, ...]
    up: tuple[str, ...] | None
    down: tuple[str, ...]
    gate_first: bool
    activation: str
    triton: bool

    def weights(self, norm: nn.Module, mlp: nn.Module) -> Weights:
        """The members' parameters as they are now."""
        gate, down = _parameters(mlp, self.gate), _parameters(mlp, self.down)
        up = {} if self.up is None else _parameters(mlp, self.up)
        return Weights(
            norm=None if self.norm_weight is None else norm._parameters[self.norm_weight],
            gate=gate["weight"],  # type: ignore[arg-type]
            up=up.get("weight"),
            down=down["weight"],  # type: ignore[arg-type]
            gate_bias=gate["bias"],
            up_bias=up.get("bias"),
            down_bias=down["bias"],
        )

    def options(self, norm: nn.Module) -> Options:
        """What is computed, with the epsilon that the norm has now."""
        eps = getattr(norm, self.eps) if isinstance(self.eps, str) else self.eps
        return Options(eps, self.norm, self.activation, self.gate_first)


def _parameters(module: nn.Module, path: tuple[str, ...]) -> dict[str, nn.Parameter | None]:
    child: Any = module
    for name in path:
        child = child._modules[name]
    parameters: dict[str, nn.Parameter | None] = child._parameters
    return parameters


def prepare(norm: nn.Module, mlp: nn.Module) -> Recipe:
    """Find out what two members compute. Members of the same structure are probed once.

    Args:
        norm: an RMSNorm over the last dimension.
        mlp: a gated MLP of two or three `nn.Linear` layers.

    Raises:
        ValueError: the members are not what this kernel computes; the text says why.
    """
    key = (structure(norm), structure(mlp))
    found = _RECIPES.get(key)
    if found is None:
        try:
            found = _prove(norm, mlp)
        except Refused as error:
            found = str(error)
        if len(_RECIPES) >= _MAX_RECIPES:
            _RECIPES.clear()
        _RECIPES[key] = found
    if isinstance(found, str):
        raise Refused(found)
    return found


# What a module's code names may be replaced meanwhile, so the library clears this after it fused.
setattr(prepare, "cache_clear", _RECIPES.clear)


def _prove(norm: nn.Module, mlp: nn.Module) -> Recipe:
    tensors: list[Tensor] = [*norm.parameters(), *mlp.parameters()]
    dtypes = {tensor.dtype for tensor in tensors}
    devices = {tensor.device for tensor in tensors}
    if len(dtypes) > 1 or len(devices) > 1:
        raise Refused(
            f"the weights are in {_listed(dtypes)} on {_listed(devices)}; the kernel takes one "
            f"dtype on one device"
        )
    dtype, device = next(iter(dtypes), None), next(iter(devices), None)
    if dtype not in DTYPES or device is None:
        raise Refused(f"the weights are in {dtype}; the kernel takes {_listed(DTYPES)}")
    if device.type == "meta":
        raise Refused("the weights are on the meta device and cannot be probed")
    hidden, projections = probe_mlp.candidates(mlp)
    found_norm = probe_norm.prove(norm, hidden, dtype, device)
    found_mlp = probe_mlp.prove(mlp, projections, dtype)
    return Recipe(
        hidden=hidden,
        dtype=dtype,
        norm_weight=found_norm.weight,
        eps=found_norm.eps,
        norm=found_norm.norm,
        gate=found_mlp.gate,
        up=found_mlp.up,
        down=found_mlp.down,
        gate_first=found_mlp.gate_first,
        activation=found_mlp.activation,
        triton=can_run_triton(device),
    )


def _listed(things: Any) -> str:
    return ", ".join(sorted(str(thing) for thing in things))
