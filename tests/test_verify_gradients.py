"""`verify(gradients=True)`: gradients are judged at the size that they have in the model."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from support import PATHS, Model, WeightKernel, mapped, passing
from torch import Tensor, nn

from module_fusion import fuse_modules, verify
from module_fusion.verifying import judging


def kernel_with(change: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    """The members' bits forward, and a change of the gradient that arrives."""

    changed = passing(change)

    class Kernel(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return changed.apply(WeightKernel.forward(self, x))

    return Kernel


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module, size: float) -> None:
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(x).float().square().mean() * self.size}


def fused_with(layer: type[nn.Module], dtype: torch.dtype, blocks: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = Model(blocks, 32).to(dtype)
    with mapped(K=layer):
        fuse_modules(model, PATHS, kernel="K")
    return model


def through_float16(gradient: Tensor) -> Tensor:
    return gradient.half().to(gradient.dtype)


def test_a_backward_that_loses_gradients_of_the_models_own_size_is_found():
    model = WithLoss(fused_with(kernel_with(through_float16), torch.bfloat16), 1e-6)
    found = verify(model, torch.randn(8, 32, 32).bfloat16(), gradients=True)
    assert found.outputs[0].equal
    assert not found
    assert "less accurate than the modules" in found.verdict or "rounding" in found.verdict
    assert all(group.problem for group in found.groups)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_backward_passes_at_every_size(dtype: torch.dtype, size: float):
    class InOtherOrder(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            h = (self.norm.weight.float() * wide).to(x.dtype)
            return self.mlp(h.flatten(0, -2)).view(x.shape)

    model = WithLoss(fused_with(InOtherOrder, dtype), size)
    found = verify(model, torch.randn(4, 8, 32).to(dtype), gradients=True)
    assert found, found
    assert sum(group.kernel_calls for group in found.groups) == 2


def test_gradients_are_judged_with_what_arrives_in_the_unfused_run(
    monkeypatch: pytest.MonkeyPatch,
):
    """The last kernel lets nothing through, and the first one is not judged with that."""
    model = fused_with(kernel_with(torch.zeros_like), torch.float32)
    seen: list[Tensor] = []
    real = judging._cotangents
    monkeypatch.setattr(
        judging, "_cotangents", lambda call: seen.append(real(call)["output"]) or real(call)
    )
    x = torch.randn(4, 8, 32)
    found = verify(WithLoss(model, 1e-3), x, gradients=True)
    assert [bool(group.problem) for group in found.groups] == [True, True]
    arrived = {float(value.norm()) for value in seen}
    assert len(arrived) == 2
    assert all(0 < size < 0.1 for size in arrived)


class Detached(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x).detach()


class Chain(nn.Module):
    """Nothing in it has a gradient but what is fused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = Model(1, 32).layers[0]
        self.norm, self.mlp = block.norm, block.mlp
        with mapped(K=Detached):
            fuse_modules(self, ["norm", "mlp"], kernel="K")

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_kernel_whose_output_requires_no_gradient_is_found(gradients: bool):
    found = verify(Chain(), torch.randn(2, 3, 32), gradients=gradients)
    assert found.groups[0].kernel_calls == 1
    assert found.groups[0].problem == (
        "the kernel's output does not require a gradient where that of the modules does"
    )
    assert "output: requires a gradient in the unfused run alone" in found.problems
    missing = {d.problem for d in found.gradients}
    assert missing == ({"only the unfused run has a gradient"} if gradients else set())


def test_an_output_without_gradient_in_another_thread_is_found():
    class InThread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain = Chain()

        def forward(self, x: Tensor) -> Tensor:
            out: list[Tensor] = []
            thread = threading.Thread(target=lambda: out.append(self.chain(x)))
            thread.start()
            thread.join()
            return out[0]

    found = verify(InThread(), torch.randn(2, 3, 32))
    assert found.groups[0].kernel_calls == 1
    assert found.problems == ("output: requires a gradient in the unfused run alone",)
