"""Models on the meta device or of FakeTensors: there is nothing to compare or to measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from structure import structure
from support import PATHS, Model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from module_fusion import FusionError, benchmark, fuse, fuse_modules, verify

CALLS: list[tuple[str, Callable[..., Any]]] = [
    ("fuse", lambda model, x: fuse(model)),
    ("fuse", lambda model, x: fuse(model, dry_run=True)),
    ("verify", verify),
    ("benchmark", benchmark),
]


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 64, 16, stride=16), nn.Flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.embed(x))


@pytest.mark.parametrize(("name", "call"), CALLS)
@pytest.mark.parametrize("make", [lambda: fuse_with_paths(Model(1)), Vision])
def test_under_a_fake_tensor_mode_the_error_says_so(name: str, call: Any, make: Any):
    model = make()
    before = structure(model)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(FusionError, match=f"A FakeTensorMode is active, and {name} has to compute"),
    ):
        call(model, torch.zeros(2, 8))
    assert structure(model) == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_kernel_that_is_prepared_waits_for_values_under_a_fake_tensor_mode(dry_run: bool):
    model = Model(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = fuse_modules(model, PATHS, kernel="RMSNormMLP", dry_run=dry_run)
    assert found.groups[0].path == "members"
    assert found.groups[0].reason == (
        "A FakeTensorMode is active, and a kernel that is prepared has to compute with values: "
        "leave the FakeTensorMode, and give a real model, and fuse again"
    )
    assert fuse_modules(model, PATHS, kernel="RMSNormMLP").groups[0].path == "kernel"


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_a_model_of_fake_tensors_is_refused_outside_of_the_mode_too(name: str, call: Any):
    with FakeTensorMode():
        model = Model(1)
    fuse_with_paths(model)
    with pytest.raises(FusionError, match=f"weight' is a FakeTensor, and {name} has to compute"):
        call(model, torch.zeros(2, 8))


@pytest.mark.parametrize("name", ["verify", "benchmark"])
def test_a_model_on_the_meta_device_is_not_said_to_be_equal_or_fast(name: str):
    model = fuse_with_paths(Model(1).to("meta"))
    with pytest.raises(FusionError, match=f"there are no values for {name}. Load the weights"):
        {"verify": verify, "benchmark": benchmark}[name](model, torch.zeros(2, 8, device="meta"))


def test_weights_that_are_loaded_at_the_call_alone_are_compared_and_measured():
    """As accelerate offloads: on the meta device between calls."""
    model = fuse_with_paths(Model(1))
    norm = model.layers[0].norm
    real, norm.weight = norm.weight, nn.Parameter(torch.empty(8, device="meta"))
    load = norm.register_forward_pre_hook(lambda *call: setattr(norm, "weight", real))
    put = norm.register_forward_hook(
        lambda *call: setattr(norm, "weight", nn.Parameter(torch.empty(8, device="meta")))
    )
    x = torch.randn(2, 8)
    assert verify(model, x).equal
    assert benchmark(model, x, seconds=0.0)["fused"].member_calls > 0
    load.remove()
    put.remove()


def fuse_with_paths(model: nn.Module) -> nn.Module:
    fuse_modules(model, PATHS)
    return model
