"""All or nothing, and exact undo; any order of fuses and unfuses is in test_machine.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from structure import structure
from support import PATHS, Block, Model, Norm, WeightKernel, mapped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from module_fusion import (
    FusedModule,
    FusionError,
    NotFusableError,
    chain,
    fuse_modules,
    fused,
    planning,
    report,
    seat,
    surgery,
    unfuse_modules,
)

POINTS = {
    "apply": (surgery, "_apply"),
    "set_class": (surgery, "set_class"),
    "state": (surgery, "ModuleState"),
    "kernelize": (surgery, "kernelize"),
    "chain": (planning, "Chain"),
    "seat": (chain, "seat_class"),
    "form": (seat, "MemberForm"),
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_at_any_point_of_fusing_leaves_the_model_as_it_was(
    point: str, at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(3)
    fuse_modules(model, ["layers.2.norm", "layers.2.mlp"])
    before, x = structure(model), torch.randn(2, 8)
    expected = model(x)
    module, name = POINTS[point]
    original: Callable[..., Any] = getattr(module, name)
    calls = [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at + 1:
            raise error("planted")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)
    with mapped(Kernel=WeightKernel):
        try:
            fuse_modules(model, ["layers.[:2].norm", "layers.[:2].mlp"], kernel="Kernel")
        except (error, NotFusableError):
            assert structure(model) == before
        else:
            assert 0 < calls[0] <= at
            unfuse_modules(model, ["layers.0.norm", "layers.1.norm"])
            assert structure(model) == before
    monkeypatch.undo()
    assert torch.equal(model(x), expected)
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, ["layers.[:2].norm", "layers.[:2].mlp"], kernel="Kernel")
    assert torch.equal(model(x), expected)


def test_fused_fuses_inside_and_restores_outside_whatever_is_raised() -> None:
    model, x = Model(2), torch.randn(2, 8)
    before, expected = structure(model), model(x)
    with fused(model, PATHS) as inside:
        assert len(inside.fused) == 2
        assert torch.equal(model(x), expected)
        assert isinstance(model.layers[0].mlp, FusedModule)
    assert structure(model) == before
    with pytest.raises(KeyError), fused(model, PATHS):
        raise KeyError
    assert structure(model) == before
    with pytest.raises(FusionError), fused(model, ["layers.*.nrom"]):
        raise AssertionError("not reached")
    assert structure(model) == before


def test_fused_gives_a_chain_its_kernel_back_as_it_was_not_as_the_members_are_now() -> None:
    class Prepared(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x) if self.prepared == "prepared" else x

    vars(Prepared)["forward"].prepare = lambda norm, mlp: "prepared"
    model, x = Model(1), torch.randn(2, 8)
    with mapped(Kernel=Prepared):
        fuse_modules(model, PATHS, kernel="Kernel")
        before, expected = structure(model), model(x)
        weight = model.layers[0].mlp.up_proj
        parametrize.register_parametrization(weight, "weight", nn.Identity())
        with fused(model, PATHS, kernel="Kernel") as inside:
            assert "parametrization" in (inside.groups[0].reason or "")
            assert torch.equal(model(x), expected)
        parametrize.remove_parametrizations(weight, "weight")
    assert (
        structure(model).modules["layers.0.mlp.fused_kernel"]
        == (before.modules["layers.0.mlp.fused_kernel"])
    )
    ran = report(model).groups[0].kernel_calls
    assert torch.equal(model(x), expected)
    assert report(model).groups[0].kernel_calls == ran + 1


def test_fused_leaves_what_was_fused_before_and_takes_an_unfuse_inside() -> None:
    model = Model(2)
    fuse_modules(model, ["layers.0.norm", "layers.0.mlp"])
    middle = structure(model)
    with fused(model, PATHS) as inside:
        assert [group.action for group in inside.groups] == ["already fused", "fused"]
    assert structure(model) == middle
    with fused(model, PATHS):
        unfuse_modules(model)
    assert report(model).groups == ()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("raised", [False, True])
def test_fused_over_a_fused_chain_gives_back_the_kernel_that_was_there(
    loaded: bool, raised: bool
) -> None:
    model, x = Model(1), torch.randn(2, 8)

    def mapping(with_kernel: bool) -> Any:
        return mapped(**({"Kernel": WeightKernel} if with_kernel else {"Other": WeightKernel}))

    with mapping(loaded):
        fuse_modules(model, PATHS, kernel="Kernel")
    seat = model.layers[0].mlp.fused_kernel
    before, keys, kernel = structure(model), list(vars(seat)), seat.kernel
    expected = model(x)
    with (
        pytest.raises(KeyError) if raised else nullcontext(),
        mapping(not loaded),
        fused(model, PATHS, kernel="Kernel"),
    ):
        assert torch.equal(model(x), expected)
        if raised:
            raise KeyError
    assert structure(model) == before
    assert seat.kernel is kernel
    assert list(vars(seat)) == keys
    calls = report(model).groups[0].kernel_calls
    assert torch.equal(model(x), expected)
    assert report(model).groups[0].kernel_calls == calls + loaded


def test_the_same_call_again_is_harmless_and_said() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    before = structure(model)
    again = fuse_modules(model, PATHS)
    assert [group.action for group in again.groups] == ["already fused"] * 2
    assert structure(model) == before


def test_a_partial_unfuse_takes_back_the_chains_a_path_touches() -> None:
    model = Model(4)
    fuse_modules(model, PATHS)
    gone = unfuse_modules(model, ["layers.[1:3].norm"])
    assert [group.paths[0] for group in gone.groups] == ["layers.1.norm", "layers.2.norm"]
    assert [group.paths[0] for group in report(model).groups] == ["layers.0.norm", "layers.3.norm"]
    assert type(model.layers[1]) is Block
    assert unfuse_modules(model, "layers.1.norm").groups == ()
    assert len(unfuse_modules(model).groups) == 2
    assert unfuse_modules(model).groups == ()


def test_unfusing_a_part_restores_the_part_and_the_rest_later() -> None:
    model, x = Model(2), torch.randn(2, 8)
    before, expected = structure(model), model(x)
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, PATHS, kernel="Kernel")
    unfuse_modules(model.layers[0].norm)
    assert type(model.layers[0].norm) is Norm
    assert torch.equal(model(x), expected)
    unfuse_modules(model.layers[0].mlp)
    assert type(model.layers[0]) is Block
    unfuse_modules(model)
    assert structure(model) == before
