"""Members, seats and the error measure for the tests of the RMSNormMLP kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from module_fusion.kernels.rms_norm_mlp import reference
from module_fusion.kernels.rms_norm_mlp.layers import RMSNormMLP

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "early": LlamaRMSNorm,
    "late": Olmo2RMSNorm,
    "one_plus": GemmaRMSNorm,
    "weightless": lambda size: nn.RMSNorm(size, eps=1e-5, elementwise_affine=False),
}
HIDDEN_ACTS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


class Seat(nn.Module):
    """Stands in for the library's seat: members by role, prepared, the kernel's forward."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        prepared = RMSNormMLP.forward.prepare(norm, mlp)  # type: ignore[attr-defined]
        self.__dict__.update(norm=norm, mlp=mlp, prepared=prepared)
        self.forward = MethodType(RMSNormMLP.forward, self)

    def weights(self) -> reference.Weights:
        return self.prepared.weights(self.norm, self.mlp)

    def truth(self, x: Tensor, weights: reference.Weights) -> Tensor:
        return reference.rms_norm_mlp(x, weights, self.prepared.options(self.norm))


class UpFirstMLP(Phi3MLP):
    """As Phi3MLP, with the halves of the merged projection the other way round."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        output: Tensor = self.down_proj(up * self.activation_fn(gate))
        return output


def mlp_of(hidden: int, intermediate: int, **options: Any) -> nn.Module:
    """A LlamaMLP, with `merged=True` a Phi3MLP, with `merged="up first"` an UpFirstMLP."""
    config = SimpleNamespace(
        hidden_size=hidden,
        intermediate_size=intermediate,
        mlp_bias=options.get("bias", False),
        hidden_act=HIDDEN_ACTS[options.get("activation", "silu")],
    )
    classes = {False: LlamaMLP, True: Phi3MLP, "up first": UpFirstMLP}
    return classes[options.get("merged", False)](config)


def members(
    hidden: int, intermediate: int, dtype: torch.dtype, device: str, norm: str = "early",
    scale: float = 1.0, **options: Any,
) -> tuple[nn.Module, nn.Module]:  # fmt: skip
    """A norm and an MLP with random weights; `scale` multiplies those of the projections."""
    first, second = NORMS[norm](hidden), mlp_of(hidden, intermediate, **options)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn(hidden) * 0.3)
        for parameter in second.parameters():
            parameter.mul_(scale)
    return first.to(device, dtype), second.to(device, dtype)


def assert_as_exact(
    name: str, value: Tensor, other: Tensor, truth: Tensor, independent: int
) -> None:
    """`value` is at most 1.1 times as far from `truth` as `other` is.

    Distances are relative L2 norms over the tensor: single elements are a matter of luck, and
    the whole is what the next layer sees. An error that comes from n independent roundings is
    known only to some parts in sqrt(n), and `other` can be exact by chance, so a part of a unit
    in the last place that shrinks with n is granted beside the factor. A tensor of few values,
    as the gradient of a bias, shows no more errors than it has values, whatever was summed.

    Args:
        independent: the number n, at least as many values as the narrowest layer gave.
    """
    assert value.shape == truth.shape, name
    assert value.dtype == other.dtype, name
    if not torch.isfinite(other).all() or truth.numel() == 0:
        return
    norm = truth.norm()
    if norm == 0:
        assert torch.equal(value, other), name
        return
    ours, theirs = ((tensor.double() - truth).norm() / norm for tensor in (value, other))
    limits = torch.finfo(value.dtype)
    floor = limits.eps * (0.02 + 8 / min(independent, truth.numel()) ** 0.5)
    # Values below the smallest normal one have a fixed spacing instead of a relative one.
    floor += limits.tiny * limits.eps * truth.numel() ** 0.5 / norm
    assert ours <= 1.1 * theirs + floor, f"{name}: error {ours:.3e}, members {theirs:.3e}"


def independent(seat: Seat, x: Tensor) -> int:
    """Values in the narrowest layer, tokens that are the same counted once."""
    tokens = len(torch.unique(x.detach().reshape(-1, x.shape[-1]), dim=0))
    return max(tokens, 1) * min(seat.weights().down.shape)


def assert_forward(seat: Seat, x: Tensor) -> None:
    """Forward without gradients: as exact as the members."""
    with torch.no_grad():
        wide = reference.Weights(*(w if w is None else w.double() for w in seat.weights()))
        truth = seat.truth(x.double(), wide)
        theirs = seat.mlp(seat.norm(x))
        assert_as_exact("output", seat(x), theirs, truth, independent(seat, x))


def outputs_and_gradients(
    seat: Seat, x: Tensor, dy: Tensor, run: Callable[[Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What `run` gives, what the members give, and the exact value: output and gradients."""
    weights = seat.weights()
    wide = reference.Weights(
        *(w if w is None else w.detach().double().requires_grad_(w.requires_grad) for w in weights)
    )
    names = [
        name
        for name, weight in zip(weights._fields, weights, strict=True)
        if weight is not None and weight.requires_grad
    ]

    def gradients(
        function: Callable[[Tensor], Tensor], tensors: reference.Weights, x: Tensor, dy: Tensor
    ) -> list[Tensor]:
        x = x.detach().requires_grad_()
        output = function(x)
        wanted = [x, *(getattr(tensors, name) for name in names)]
        return [output.detach(), *torch.autograd.grad(output, wanted, dy)]

    truth = gradients(lambda z: seat.truth(z, wide), wide, x.double(), dy.double())
    theirs = gradients(lambda z: seat.mlp(seat.norm(z)), weights, x, dy)
    ours = gradients(run, weights, x, dy)
    values = zip(ours, theirs, truth, strict=True)
    return dict(zip(["output", "x", *names], values, strict=True))


def assert_gradients(seat: Seat, x: Tensor, dy: Tensor, run: Callable[[Tensor], Tensor]) -> None:
    """Output and every gradient: as exact as the members."""
    for name, tensors in outputs_and_gradients(seat, x, dy, run).items():
        assert_as_exact(name, *tensors, independent(seat, x))
