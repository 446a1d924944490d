"""The path from torch's own operations: CPU tensors, and whatever the GPU kernels do not take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import Options, Weights, gated_mlp


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, norm: str) -> Tensor:
    """RMSNorm of `x`, `(..., hidden)`, in fewer operations than the modules take.

    `F.rms_norm` is called in float32, and without a weight that half precision is multiplied by,
    because where it rounds half precision differs between devices and versions of torch.
    """
    shape = x.shape[-1:]
    if x.dtype == torch.float32 and norm != "one_plus":
        return F.rms_norm(x, shape, weight, eps)
    if weight is None:
        return F.rms_norm(x.float(), shape, None, eps).to(x.dtype)
    if norm == "early":
        return F.rms_norm(x.float(), shape, None, eps).to(x.dtype) * weight
    scale = weight.float() + 1.0 if norm == "one_plus" else weight.float()
    return F.rms_norm(x.float(), shape, scale, eps).to(x.dtype)


def rms_norm_mlp(x: Tensor, weights: Weights, options: Options) -> Tensor:
    """`mlp(norm(x))` for `x` of shape `(..., hidden)`."""
    return gated_mlp(rms_norm(x, weights.norm, options.eps, options.norm), weights, options)
