"""A kernel's `prepare` gets the members by their roles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Mlp, Model, mapped, members_kernel
from torch import nn

from module_fusion import NotFusableError, fuse_modules, report

NORM, MLP = "layers.*.norm", "layers.*.mlp"


def both(norm: nn.Module, mlp: nn.Module) -> Any:
    return norm, mlp


class Callable_:
    def __call__(self, norm: nn.Module, mlp: nn.Module, /) -> Any:
        return norm, mlp


def by_position(norm: nn.Module, mlp: nn.Module, /) -> Any:
    return norm, mlp


def with_defaults(norm: Any = None, mlp: Any = None, more: int = 3) -> Any:
    return norm, mlp


def keyword_only(*, mlp: nn.Module, norm: nn.Module) -> Any:
    return norm, mlp


def any_keywords(**members: nn.Module) -> Any:
    return members["norm"], members["mlp"]


@pytest.mark.parametrize(
    "prepare",
    [
        both,
        by_position,
        Callable_(),
        with_defaults,
        keyword_only,
        any_keywords,
        functools.lru_cache(by_position),
        functools.partial(both),
        functools.wraps(both)(lambda *members: members),
        lambda *members: members,
        lambda mlp, norm: (norm, mlp),
        lambda norm, **others: (norm, others["mlp"]),
    ],
)
def test_prepare_gets_the_members_whatever_its_signature_is(prepare: Callable[..., Any]) -> None:
    model = Model(2)
    kernel: Any = members_kernel(1)
    kernel.forward.prepare = prepare
    with mapped(Kernel=kernel):
        fuse_modules(model, {"norm": NORM, "mlp": MLP}, kernel="Kernel", use_fallback=False)
    for layer in model.layers:
        assert layer.mlp.fused_kernel.prepared == (layer.norm, layer.mlp)


@pytest.mark.parametrize(
    ("kernel", "modules", "names"),
    [
        (
            "RMSNormMLP",
            {"first": "layers.0.norm", "mlp": "layers.0.mlp"},
            r"takes \(norm, mlp\), .*\(first, mlp\)",
        ),
        ("RMSNormMLP", ["layers.0.mlp"], r"takes \(norm, mlp\), .*\(mlp\)"),
        ("PatchEmbed", {"conv": "layers.0.mlp"}, r"takes \(proj, token_major\), .*\(conv\)"),
    ],
)
def test_roles_that_a_kernel_does_not_know_are_an_error_before_anything_changes(
    kernel: str, modules: Any, names: str
) -> None:
    model = Model(1)
    with pytest.raises(NotFusableError, match=names):
        fuse_modules(model, modules, kernel=kernel)
    assert type(model.layers[0].mlp) is Mlp


def test_roles_that_are_exchanged_are_refused_with_the_reason() -> None:
    model, x = Model(1), torch.randn(2, 3, 8)
    expected = model(x)
    fuse_modules(model, {"mlp": "layers.0.norm", "norm": "layers.0.mlp"}, kernel="RMSNormMLP")
    assert torch.equal(model(x), expected)
    assert str(report(model).groups[0].reason).startswith("the kernel refuses:")
