"""The composed formulas, with the rounding points of the Hugging Face modules.

RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467. Gated MLP: Shazeer 2020, arXiv 2002.05202.
Half-precision values are computed in float32 and rounded where the modules round; float32
and float64 are computed in themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
NORMS = ("early", "late", "one_plus")


class Weights(NamedTuple):
    """The tensors of the two members.

    `up` is None where `gate` holds both projections, one after the other along its rows.
    """

    norm: Tensor | None  # (hidden,)
    gate: Tensor  # (intermediate, hidden), or (2 * intermediate, hidden) if up is None
    up: Tensor | None  # (intermediate, hidden)
    down: Tensor  # (hidden, intermediate)
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class Options(NamedTuple):
    """What is computed with them.

    Args:
        eps: added to the mean square.
        norm: where the norm rounds. `early`: the normalised value is rounded, then multiplied
            by the weight (Llama). `late`: multiplied in float32, then rounded (OLMo 2).
            `one_plus`: as `late`, by 1 + weight (Gemma).
        activation: one of `ACTIVATIONS`.
        gate_first: whether the gate comes first in a merged projection.
    """

    eps: float
    norm: str
    activation: str
    gate_first: bool = True


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, norm: str) -> Tensor:
    """RMSNorm over the last dimension of `x`, `(..., hidden)`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    normalised = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normalised.to(x.dtype)
    if norm == "early":
        return weight * normalised.to(x.dtype)
    scale = weight.to(wide) + 1.0 if norm == "one_plus" else weight.to(wide)
    return (scale * normalised).to(x.dtype)


def activate(gate: Tensor, activation: str) -> Tensor:
    """The activation, computed in float32 for half precision and rounded, as torch does."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def gate_and_up(h: Tensor, weights: Weights, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Both projections of `h`, each `(..., intermediate)`."""
    gate = F.linear(h, weights.gate, weights.gate_bias)
    if weights.up is not None:
        return gate, F.linear(h, weights.up, weights.up_bias)
    first, second = gate.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def gated_mlp(h: Tensor, weights: Weights, options: Options) -> Tensor:
    """`down(activation(gate(h)) * up(h))` for `h` of shape `(..., hidden)`."""
    return F.linear(_gated(h, weights, options), weights.down, weights.down_bias)


def _gated(h: Tensor, weights: Weights, options: Options) -> Tensor:
    if weights.up is None:
        gate, up = gate_and_up(h, weights, options.gate_first)
        return activate(gate, options.activation) * up
    # In the order of the modules: the gate's memory is free again, and warm, for `up`.
    activated = activate(F.linear(h, weights.gate, weights.gate_bias), options.activation)
    return activated * F.linear(h, weights.up, weights.up_bias)


def rms_norm_mlp(x: Tensor, weights: Weights, options: Options) -> Tensor:
    """`mlp(norm(x))` for `x` of shape `(..., hidden)`."""
    return gated_mlp(rms_norm(x, weights.norm, options.eps, options.norm), weights, options)
