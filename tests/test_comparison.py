"""What `verify` and `benchmark` stand on: the model as if unfused, and nothing left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from structure import structure
from support import PATHS, Model, WeightKernel, mapped
from torch import Tensor, nn

from module_fusion import fuse_modules, report
from module_fusion.comparison import counts_kept, nothing_left_behind, unfused
from module_fusion.inventory import chains_in, states_of


def test_inside_unfused_every_class_is_the_original_and_outside_the_kernel_runs(
    model: Model, x: Tensor
):
    classes = [type(module) for module in model.modules()]
    with mapped(K=WeightKernel):
        fuse_modules(model, PATHS, kernel="K")
    while_fused = structure(model)
    with unfused(model):
        assert [type(module) for module in model.modules()] == classes
        model(x)
        assert model.calls() == [(1, 1), (1, 1)]
    assert structure(model) == while_fused
    model(x)
    assert model.calls() == [(1, 1), (1, 1)]
    assert [group.kernel_calls for group in report(model).groups] == [1, 1]


def test_unfused_gives_the_classes_back_after_an_exception(model: Model):
    fuse_modules(model, PATHS)
    while_fused = structure(model)
    with pytest.raises(KeyError, match="mine"), unfused(model):
        raise KeyError("mine")
    assert structure(model) == while_fused


def test_counts_and_reasons_are_put_back_and_leave_no_attribute(model: Model, x: Tensor):
    with mapped(K=WeightKernel):
        fuse_modules(model, PATHS, kernel="K")
    found = chains_in(model)
    owners = [owner for item in found for owner in (item.chain, *states_of(item))]
    before = [dict(vars(owner)) for owner in owners]
    with counts_kept(found):
        model(x)
        handle = model.layers[0].norm.register_forward_hook(lambda *call: None)
        model(x)
        handle.remove()
        assert "reason" in vars(states_of(found[0])[1])
    assert [vars(owner) for owner in owners] == before


class _Stateful(nn.Module):
    """Draws random numbers of every kind, writes one buffer and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("replaced", torch.full((3,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = torch.ones(3)
        return x * self.weight + torch.rand(3) + random.random() + float(np.random.rand())


def test_random_state_buffers_and_gradients_are_put_back():
    model = _Stateful()
    buffers = dict(model.named_buffers())
    model.weight.grad = gradient = torch.full((3,), 7.0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with nothing_left_behind(model) as again:
        first = model(torch.ones(3))
        first.sum().backward()
        assert not torch.equal(model.weight.grad, torch.full((3,), 7.0))
        again()
        assert torch.equal(model(torch.ones(3)), first)
        model.weight.grad = None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert model.weight.grad is gradient
    assert gradient.tolist() == [7.0] * 3
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert model.written.tolist() == [0.0] * 3
    assert model.replaced.isnan().all()
