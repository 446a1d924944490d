"""`fuse`: what the checks of groups, of kernels in place and of members see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from support import Block, Mlp, Model, Norm, WeightKernel, mapped
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import (
    FusionError,
    FusionFamily,
    fuse,
    fuse_modules,
    register_family,
    report,
    unfuse_modules,
)
from module_fusion.families.family import _FAMILIES

PATHS = {"norm": "layers.*.norm", "mlp": "layers.*.mlp"}


@pytest.fixture(autouse=True)
def _families_as_before() -> Iterator[None]:
    before = dict(_FAMILIES)
    yield
    _FAMILIES.clear()
    _FAMILIES.update(before)


def scaled(mlp: Any, x: Tensor, scale: Any = None) -> Tensor:
    y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y if scale is None else y * scale


def scaled_by_keyword(mlp: Any, x: Tensor, *, scale: Any = None) -> Tensor:
    y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y if scale is None else y * scale


@pytest.mark.parametrize("forward", [scaled, scaled_by_keyword])
@pytest.mark.parametrize("place", [0, 1])
def test_a_member_that_takes_another_input_is_skipped_and_the_rest_is_fused(
    forward: Any, place: int
) -> None:
    model = Model(2, 32)
    model.layers[place].mlp = type("Scaled", (Mlp,), {"forward": forward})(32, 48)
    result = fuse(model)
    assert [group.reason for group in result.skipped] == ["mlp takes another input, 'scale'"]
    assert [group.paths for group in result.fused] == [
        (f"layers.{1 - place}.norm", f"layers.{1 - place}.mlp")
    ]


class BlocksFamily(FusionFamily):
    """The blocks of the tests' own model, by path."""

    name, kernel, roles = "blocks", "Blocks", ("norm", "mlp")
    paths = (tuple(PATHS.values()),)

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        return [(torch.randn(64, 8, generator=generator),)]


class TwiceKernel(WeightKernel):
    """Gives twice the output of the members."""

    def forward(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        x = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return F.linear(gate, mlp.down_proj.weight) * 2


def test_a_kernel_in_place_that_the_comparison_refuses_does_not_run_any_more(
    model: Model, x: Tensor
) -> None:
    expected = model(x)
    register_family(BlocksFamily)
    with mapped(Blocks=TwiceKernel):
        fuse_modules(model, PATHS, kernel="Blocks")
        assert not torch.equal(model(x), expected)
        wrong = model(x)
        fuse(model, {"blocks": True}, dry_run=True)
        assert torch.equal(model(x), wrong)
        result = fuse(model, {"blocks": True})
    for row in (*result.groups, *report(model).groups):
        assert row.path == "members"
        assert "less accurate than the modules" in str(row.reason)
    assert {row.action for row in result.groups} == {"already fused"}
    assert torch.equal(model(x), expected)
    with mapped(Blocks=WeightKernel):
        fuse(model, {"blocks": True})
    assert {row.path for row in report(model).groups} == {"kernel"}


def test_a_kernel_that_was_taken_out_is_back_if_the_call_fails(model: Model, x: Tensor) -> None:
    class Failing(FusionFamily):
        name, kernel, roles = "failing", "Failing", ("a",)

        def groups(self, model: nn.Module) -> Any:
            raise KeyError("inside a family")

    register_family(BlocksFamily)
    register_family(Failing)
    with mapped(Blocks=TwiceKernel):
        fuse_modules(model, PATHS, kernel="Blocks")
        before = model(x)
        with pytest.raises(FusionError):
            fuse(model, {"blocks": True, "failing": True})
    assert torch.equal(model(x), before)


EXTRA = torch.clone


def test_a_kernel_in_place_that_refuses_the_members_does_not_run_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Global(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return EXTRA(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    monkeypatch.setitem(globals(), "EXTRA", torch.clone)
    block = Block(32)
    block.mlp = Global(32, 48)
    assert len(fuse(block).fused) == 1
    monkeypatch.setitem(globals(), "EXTRA", torch.neg)
    (row,) = fuse(block).groups
    assert (row.action, row.path) == ("already fused", "members")
    assert "computes something else" in str(row.reason)
    x = torch.randn(2, 5, 32)
    ours = block(x)
    unfuse_modules(block)
    assert torch.equal(ours, block(x))
