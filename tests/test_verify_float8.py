"""`verify` where weights or outputs are kept in float8."""

from __future__ import annotations

import pytest
import torch
from support import PATHS, Model, Norm, WeightKernel, mapped
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import FusionError, fuse_modules, verify
from module_fusion.verifying.differences import difference

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


class _InFloat8(nn.Module):
    """A linear layer whose weight, and on request whose output, is kept in float8."""

    def __init__(self, dtype: torch.dtype, returns: bool) -> None:
        super().__init__()
        values = torch.randn(16, 16).to(dtype)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.returned = dtype if returns else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float()).to(self.returned)


class _BlockInFloat8(nn.Module):
    def __init__(self, dtype: torch.dtype, returns: bool) -> None:
        super().__init__()
        self.norm = Norm(16)
        self.norm.weight.requires_grad_(False)
        self.mlp = _InFloat8(dtype, returns)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


def _kernel_in_float8(factor: float) -> type[nn.Module]:
    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.double()
            h = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            h = F.linear(h * self.norm.weight.double(), self.mlp.weight.double())
            return (factor * h).float().to(self.mlp.returned)

    return Kernel


def _block_in_float8(dtype: torch.dtype, returns: bool, factor: float) -> nn.Module:
    torch.manual_seed(0)
    block = _BlockInFloat8(dtype, returns)
    with mapped(K=_kernel_in_float8(factor)):
        fuse_modules(nn.Sequential(block), {"norm": "0.norm", "mlp": "0.mlp"}, kernel="K")
    return block


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("returns", [False, True], ids=["weights", "and outputs"])
def test_a_kernel_of_float8_weights_is_judged_in_units_of_what_it_computes_in(
    dtype: torch.dtype, returns: bool
):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    right = verify(_block_in_float8(dtype, returns, 1.0), x)
    assert right.passed, str(right)
    assert right.groups[0].kernel_calls == 1
    # An eighth shows in numbers of three bits too; without their rounding, a thousandth does.
    wrong = verify(_block_in_float8(dtype, returns, 1.125 if returns else 1.001), x)
    assert "the kernel is less accurate than the modules" in str(wrong.problems)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_outputs_that_differ_are_compared_as_the_numbers_they_are(dtype: torch.dtype):
    theirs = torch.tensor([[1.0, 2.0], [3.0, -0.5]]).to(dtype)
    ours = torch.tensor([[1.0, 2.0], [3.5, -0.5]]).to(dtype)
    found = difference(ours, theirs)
    assert (found.max_abs, found.argmax, found.problem) == (0.5, 1.0, None)
    assert found.max_ulp == (2 if dtype is torch.float8_e4m3fn else 1)
    assert difference(theirs.float().flip(-1).to(dtype), theirs).argmax == 0.0
    assert difference(theirs.clone(), theirs).argmax == 1.0
    ours = torch.tensor([[1.0, float("nan")], [3.0, -0.5]]).to(dtype)
    found = difference(ours, theirs)
    assert found.nonfinite == (1, 0)
    assert "NaN or infinite at other places" in str(found.problem)
    assert difference(ours.clone(), ours).nonfinite == (1, 1)


def test_to_run_in_float8_is_refused_with_what_to_ask_for(model: Model, x: Tensor):
    with mapped(K=WeightKernel):
        fuse_modules(model, PATHS, kernel="K")
    with pytest.raises(FusionError, match=r"dtypes has torch\.float8_e5m2, in which modules keep"):
        verify(model, x, dtypes=[torch.float32, torch.float8_e5m2])
