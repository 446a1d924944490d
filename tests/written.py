"""A model whose block has the `forward` that a test writes, and how to fuse and compare it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import Block, WeightKernel, mapped
from torch import Tensor, nn

from module_fusion import fuse_modules, report

PATHS = ["0.norm", "0.mlp"]


def model_of(forward: Callable[[Any, Tensor], Any], device: torch.device) -> nn.Sequential:
    """A model with one block whose `forward` is the given function."""
    block = type("Written", (Block,), {"forward": forward})
    torch.manual_seed(1)
    return nn.Sequential(block()).to(device)


def fuse(model: nn.Module, kernel: type[nn.Module] = WeightKernel) -> None:
    with mapped(Kernel=kernel):
        fuse_modules(model, PATHS, kernel="Kernel")


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def assert_same(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


def path_of(model: nn.Module) -> tuple[int, int, str | None]:
    group = report(model).groups[0]
    return group.kernel_calls, group.member_calls, group.reason
