"""`verify` against kernels that are right in their output and wrong in what they leave behind."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import PATHS, Model, WeightKernel, mapped
from torch import Tensor, nn

from module_fusion import (
    BenchmarkReport,
    FusionReport,
    VerificationReport,
    fuse_modules,
    verify,
)
from module_fusion.benchmarking.report import BenchmarkRow
from module_fusion.report import Feed, GroupReport
from module_fusion.verifying.differences import Difference
from module_fusion.verifying.report import GroupVerification


def fused_with(effect: Callable[[Any], None], model: nn.Module) -> nn.Module:
    """A model whose kernel gives the members' bits, and then does something."""

    class WithEffect(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            y = WeightKernel.forward(self, x)
            effect(self)
            return y

    with mapped(K=WithEffect):
        fuse_modules(model, PATHS, kernel="K")
    return model


def scales_a_weight(seat: Any) -> None:
    seat.mlp.down_proj.weight.data.mul_(1.5)


def writes_a_buffer(seat: Any) -> None:
    seat.norm.seen += 1


def draws(seat: Any) -> None:
    torch.rand(1)


@pytest.mark.parametrize(
    ("effect", "what"),
    [
        (scales_a_weight, "layers.0.mlp.down_proj.weight"),
        (writes_a_buffer, "layers.0.norm.seen"),
        (draws, "the random state"),
    ],
)
def test_what_a_kernel_leaves_behind_is_a_failure(
    model: Model, x: Tensor, effect: Callable[[Any], None], what: str
):
    for block in model.layers:
        block.norm.register_buffer("seen", torch.zeros(3, device=x.device))
    found = verify(fused_with(effect, model), x)
    assert not found.passed
    assert found.problems[0].startswith(f"{what} is not as the unfused run left it")
    assert found.groups[0].kernel_calls == 1


def test_a_run_that_calls_no_fused_module_does_not_pass(model: Model, x: Tensor):
    fused_with(lambda seat: None, model)
    model.forward = lambda x: x
    found = verify(model, x)
    assert found.problems == ("none of the fused modules was called in this run",)


class Returns(nn.Module):
    """Gives the output of a model in another form."""

    def __init__(self, model: Model, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.model(x))


class Off(WeightKernel):
    """One unit in the last place away in some elements."""

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x) * (1 + 2**-23)


@pytest.mark.parametrize(
    "form",
    [
        lambda y: deque([y]),
        lambda y: {"a": y}.values(),
        lambda y: {1: y, "1": torch.ones(1)},
        lambda y: {"a": {"b": y}, "a.b": torch.ones(1)},
        lambda y: bytearray(y.detach().cpu().numpy().tobytes()),
    ],
)
def test_no_form_of_output_is_called_equal_unseen(
    model: Model, x: Tensor, form: Callable[[Tensor], Any]
):
    with mapped(K=Off):
        fuse_modules(model, PATHS, kernel="K")
    assert not verify(Returns(model, form), x).equal


def test_an_iterator_cannot_be_compared(model: Model, x: Tensor):
    fused_with(lambda seat: None, model)
    found = verify(Returns(model, lambda y: iter([y])), x)
    assert any("cannot be compared without using it up" in text for text in found.problems)


def test_numbers_that_follow_from_a_judged_kernel_are_no_failure(model: Model, x: Tensor):
    class MoreExact(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            norm, mlp, wide = self.norm, self.mlp, x.double()
            h = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            h = norm.weight.double() * h
            gate = nn.functional.silu(h @ mlp.gate_proj.weight.double().T)
            product = gate * (h @ mlp.up_proj.weight.double().T)
            return (product @ mlp.down_proj.weight.double().T).to(x.dtype)

    with mapped(K=MoreExact):
        fuse_modules(model, PATHS, kernel="K")
    found = verify(Returns(model, lambda y: {"y": y, "loss": y.sum().item()}), x)
    assert found.passed, found
    assert not found.equal


def test_hooks_on_parameters_do_not_run_and_are_there_afterwards(model: Model, x: Tensor):
    fused_with(lambda seat: None, model)
    seen: list[Tensor] = []
    weight = model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: seen.append(gradient))
    assert verify(model, x, gradients=True).passed
    assert seen == []
    assert weight.grad is None
    model(x).sum().backward()
    assert len(seen) == 1


def strict(text: str) -> Any:
    """As a reader of JSON that takes the standard's numbers alone."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "found",
    [
        VerificationReport(
            outputs=(Difference("y", (2,), "float32", False, INF, NAN, 1, -INF),),
            groups=(GroupVerification(("a", "b"), kernel_error=INF, member_error=0.5),),
            first_difference=GroupVerification(("a", "b"), kernel_error=INF),
        ),
        FusionReport([GroupReport("fused", ("a",), accuracy=INF, wires=(Feed(None, 0, "x"),))]),
        BenchmarkReport(
            (BenchmarkRow("fused", 1.0, (0.5, INF), NAN, None),),
            *("cpu", "2", "forward", False, 1, 1, 0.95),
        ),
    ],
)
def test_numbers_that_json_does_not_have_are_texts(found: Any):
    plain = strict(json.dumps(found.to_dict(), allow_nan=False))
    assert "inf" in json.dumps(plain)
    assert plain == found.to_dict()
