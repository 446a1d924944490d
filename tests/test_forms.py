"""The form of a member, by which each call tells whether it is plain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import mapped, members_kernel, runs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from module_fusion import fuse_modules, report
from module_fusion.modules import state_of

PATHS = ["*.norm", "*.mlp"]


class Norm(nn.Module):
    def __init__(self, eps: Any = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.eps = eps
        self.watches = False

    def watched(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.watches:
            x = self.watched(x)
        return self.weight * x * (self.eps + 1)


class ByItem(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * float(self.eps[0][0])


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


def fused(norms: list[nn.Module], kernel: type[nn.Module]) -> nn.Sequential:
    model = nn.Sequential(*[Block(norm) for norm in norms])
    with mapped(Kernel=kernel):
        fuse_modules(model, PATHS, kernel="Kernel")
    return model


def test_equal_members_share_what_is_known_of_them() -> None:
    model = fused([Norm(), Norm()], members_kernel(1))
    first, second = (state_of(block.norm).form for block in model)
    assert first.parts is second.parts
    assert first.code is second.code


class Incomparable(float):
    def __eq__(self, other: object) -> bool:
        raise TypeError("not to be compared")

    __hash__ = float.__hash__


@pytest.mark.parametrize(
    "values",
    [[1, 1.0, 1, 1.0], [True, 1], [0, False], [Incomparable(1), Incomparable(1)]],
    ids=str,
)
def test_settings_that_are_equal_and_of_another_type_are_kept_apart(values: list[Any]) -> None:
    kernel, x = members_kernel(1), torch.randn(2, 8)
    model = fused([Norm(value) for value in values], kernel)
    model(x)
    assert runs(kernel) == len(values)
    for block, value in zip(model, values, strict=True):
        block.norm.eps = not value if type(value) is bool else type(value)(2)
    model(x)
    assert runs(kernel) == len(values)


@pytest.mark.parametrize("make", [torch.ones, np.ones])
@pytest.mark.parametrize("kind", [list, tuple])
def test_settings_that_hold_arrays_are_not_compared(make: Any, kind: type) -> None:
    x = torch.randn(2, 8)
    model = nn.Sequential(*[Block(ByItem(kind([make(1)]))) for _ in range(2)])
    model[0].norm.eps[0][0] = 3  # An array is not equal to another, it is so by its items.
    expected = model(x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, PATHS, kernel="Kernel")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_method_that_is_taken_off_a_class_has_the_members_run() -> None:
    class Own(Norm):
        def watched(self, x: Tensor) -> Tensor:
            return x

        forward = Norm.forward

    kernel, x = members_kernel(1), torch.randn(2, 8)
    model = fused([Own()], kernel)
    expected = model(x)
    del Own.watched
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert runs(kernel) == 1
    assert "whose watched was replaced" in str(report(model).groups[0].reason)
    del Norm.watched
    try:
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    finally:
        Norm.watched = lambda self, x: x  # type: ignore[method-assign]


def test_what_a_kernel_says_when_it_refuses_is_not_in_the_guards_of_a_graph() -> None:
    class Refusing(nn.Module):
        can_torch_compile = has_backward = True

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("it refused")

    refused: list[int] = []

    def prepare(norm: nn.Module, mlp: nn.Module) -> None:
        refused.append(1)
        raise ValueError(f"no {len(refused)}")

    setattr(Refusing.forward, "prepare", prepare)
    model = fused([Norm() for _ in range(12)], Refusing)
    assert "no 3" in str(report(model).groups[2].reason)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    model(torch.randn(2, 8))
    assert counter.frame_count <= 3
