"""A family whose kernel wants gate and up in one matrix: RMSNorm and a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import FusionFamily
from module_fusion.families import WeightLayout


class _GateUp(torch.autograd.Function):
    """`silu(x @ gate.T) * (x @ up.T)` as one product with the packed matrix.

    Takes the parameters too, because the gradients are theirs, and saves them, because only
    they notice that they were modified before the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, packed: Tensor) -> Tensor:
        product = F.linear(x, packed)
        ctx.save_for_backward(x, gate, up, product)
        ctx.packed = packed
        left, right = product.chunk(2, dim=-1)
        return F.silu(left) * right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, gate, up, product = ctx.saved_tensors
        left, right = product.chunk(2, dim=-1)
        sigmoid = left.sigmoid()
        of_left = grads[0] * right * (sigmoid * (1 + left * (1 - sigmoid)))
        of_product = torch.cat([of_left, grads[0] * left * sigmoid], dim=-1)
        of_packed = of_product.flatten(0, -2).T @ x.flatten(0, -2)
        of_gate, of_up = of_packed.split([gate.shape[0], up.shape[0]])
        return of_product @ ctx.packed, of_gate, of_up, None


# A test makes the kernel wrong by as much.
ERROR = 0.0


class PackedNormMLP(nn.Module):
    """The kernel: RMSNorm, one product for gate and up, and the product down."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self.norm
        mlp: Any = self.mlp
        eps = getattr(norm, "variance_epsilon", 1e-6)
        x = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        hidden = _GateUp.apply(x, gate, up, self.packed["gate_up"])  # type: ignore[attr-defined]
        return F.linear(hidden, mlp.down_proj.weight) * (1 + ERROR)


class PackedNormMLPFamily(FusionFamily):
    """Blocks of a norm and an MLP with a gate, as in `support.Model` and in Llama."""

    name = "packed_norm_mlp"
    kernel = "PackedNormMLP"
    roles = ("norm", "mlp")
    paths = (
        ("layers.*.norm", "layers.*.mlp"),
        ("model.layers.*.post_attention_layernorm", "model.layers.*.mlp"),
    )
    layouts = (WeightLayout("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),)

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        hidden = next(members[0].parameters()).shape[0]
        return [(torch.randn(32, hidden, generator=generator),)]
