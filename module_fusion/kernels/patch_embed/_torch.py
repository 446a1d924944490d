"""The path of torch operations: CPU tensors, in eager and in compiled graphs.

B batch, C input channels, G grid positions, M = B * G patches, N output channels,
K = C * (values of a patch in one channel).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._geometry import PatchPlan, convolve, grid_of, is_channels_last

_LEAST_K = 512
_LEAST_WIDTH = 14


def patch_embed_torch(x: Tensor, weight: Tensor, bias: Tensor | None, plan: PatchPlan) -> Tensor:
    """Embed `(batch, channels, *size)` by a view or a copy of the patches and `F.linear`."""
    grid = grid_of(x, plan)
    batch, channels_out = x.size(0), weight.size(0)
    weight_NK = weight.view(channels_out, -1)
    one_patch, channels_last = all(_holds(n == 1) for n in grid), is_channels_last(x)
    if _sums_better(x, weight) or not (one_patch or _gains(x, weight_NK, plan)):
        return convolve(x, weight, bias, plan)
    x_MK = _crop(x, plan).reshape(batch, -1) if one_patch else patches(x, plan)
    y_MN = F.linear(x_MK, weight_NK, bias)
    # Not as views: whoever gets what a convolution gave may modify and detach it in place.
    if one_patch and not channels_last:
        return torch.ops.aten._unsafe_view(y_MN, [batch, channels_out, *grid])  # type: ignore[no-any-return]
    y = y_MN.view(batch, *grid, channels_out).movedim(-1, 1)
    y = y if plan.token_major or channels_last else y.contiguous()
    return torch.unsafe_chunk(y, 1)[0]


def patches(x: Tensor, plan: PatchPlan) -> Tensor:
    """The patches of `(batch, channels, *size)` as rows `(M, K)`, a copy unless they are rows."""
    dims = len(plan.patch)
    for dim, size in enumerate(plan.patch, 2):
        x = x.unfold(dim, size, size)
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    return x.permute(order).flatten(dims + 1).flatten(0, dims)


def _crop(x: Tensor, plan: PatchPlan) -> Tensor:
    """Drop the remainder that fills no patch, as the convolution does."""
    for dim, size in enumerate(plan.patch, 2):
        if not _holds(x.size(dim) % size == 0):
            x = x.narrow(dim, 0, x.size(dim) // size * size)
    return x


def _holds(condition: bool | torch.SymBool) -> bool:
    """Whether it does, in a graph for every size: no size makes a graph of its own."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    # Imports sympy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _sums_better(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution is more exact: it is in the gradients of float32.

    Relative to float64 its error in the input's gradient was 1.5e-7 to 1.8e-7 for 768 to 1280
    output channels, the product's 2.5e-7, and 6e-7 with one or two patches. In the weight's it
    sums per thread: with 2, 4 and 16 threads the product's was up to 1.3, 1.6 and 1.8 times as
    large. Calls for inference are those in which the speed counts.
    """
    if x.dtype != torch.float32 or not torch.is_grad_enabled():
        return False
    return x.requires_grad or weight.requires_grad


def _gains(x: Tensor, weight_NK: Tensor, plan: PatchPlan) -> bool:
    """Whether patches that lie in a grid are faster as a matrix product on a CPU.

    Time of the convolution over that of the product, copies included; one core with AVX-512,
    torch 2.13, `benchmarks/patch_embed.py`; fp16 on two:

    | | fp32 | bf16 | fp16 |
    |---|---|---|---|
    | Conv2d ViT-B/16, batch 4 (K 768) | 0.53 | 1.29 | 4.75 |
    | Conv2d SigLIP/14, batch 2 (K 588) | 0.49 | 1.20 | 7.9 |
    | Conv3d video, 8 x 112 x 112 (K 1176) | 0.55 | 1.49 | 18 |
    | Conv2d 2 x 2 on 128 channels (K 512) | | 0.29 | |
    | Conv2d 4 x 4 on 3 channels (K 48) | 0.31 | 0.42 | 0.87 |
    | Conv1d 10 on 80 channels (K 800) | 0.51 | 0.97 | 4.9 |

    oneDNN's convolutions are good in fp32, and poor at wide patches in 16 bits. Where every
    image is one patch, as in Qwen2-VL, the product won by 2.5 to 6 for every shape tried.
    """
    if x.dtype == torch.float32 or len(plan.patch) == 1:
        return False
    if plan.patch[-1] < _LEAST_WIDTH or weight_NK.size(1) < _LEAST_K:
        return False
    # Which format the convolution answers in for channels_last_3d depends on sizes and dtype.
    return not (len(plan.patch) == 3 and is_channels_last(x))
