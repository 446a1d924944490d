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
