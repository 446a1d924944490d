"""`verify` against kernels that are right in their output and wrong in what they leave behind."""

from __future__ import annotations

import array
import decimal
import fractions
import functools
import json
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from support import PATHS, Model, WeightKernel, mapped, passing
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


def permutes_a_weight(seat: Any) -> None:
    weight = seat.mlp.down_proj.weight.data
    weight.copy_(weight.flip(0))


def permutes_a_buffer(seat: Any) -> None:
    seat.norm.order.copy_(seat.norm.order.flip(0))


def draws_in_python(seat: Any) -> None:
    random.random()


def draws_in_numpy(seat: Any) -> None:
    numpy.random.rand()


def freezes(seat: Any) -> None:
    seat.mlp.up_proj.weight.requires_grad_(False)


def leaves_a_gradient(seat: Any) -> None:
    seat.mlp.up_proj.weight.grad = torch.ones_like(seat.mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("effect", "what"),
    [
        (scales_a_weight, "layers.0.mlp.down_proj.weight"),
        (writes_a_buffer, "layers.0.norm.seen"),
        (draws, "the random state"),
        (permutes_a_weight, "layers.0.mlp.down_proj.weight"),
        (permutes_a_buffer, "layers.0.norm.order"),
        (draws_in_python, "Python's random state"),
        (draws_in_numpy, "NumPy's random state"),
        (freezes, "layers.0.mlp.up_proj.weight.requires_grad"),
        (leaves_a_gradient, "layers.0.mlp.up_proj.weight.grad"),
    ],
)
def test_what_a_kernel_leaves_behind_is_a_failure(
    model: Model, x: Tensor, effect: Callable[[Any], None], what: str
):
    for block in model.layers:
        block.norm.register_buffer("seen", torch.zeros(3, device=x.device))
        block.norm.register_buffer("order", torch.arange(4.0, device=x.device))
    found = verify(fused_with(effect, model), x)
    assert not found.passed
    assert found.problems[0].startswith(f"{what} is not as the unfused run left it")
    assert found.groups[0].kernel_calls == 1
    weight = model.layers[0].mlp.up_proj.weight
    assert weight.requires_grad
    assert weight.grad is None


def test_a_model_that_permutes_its_own_parameter_is_told(model: Model, x: Tensor):
    class Rolling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fused_with(lambda seat: None, model)
            self.queue = nn.Parameter(torch.arange(8.0, device=x.device), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.queue.data.copy_(self.queue.data.roll(1))
            return self.model(x)

    found = verify(Rolling(), x)
    assert "the unfused model writes to its own parameter 'queue'" in found.verdict
    assert "'queue' was changed by the runs and stays so" in found.notes[0]


class MoreExact(WeightKernel):
    """Right, and with other bits than the members."""

    def forward(self, x: Tensor) -> Tensor:
        norm, mlp, wide = self.norm, self.mlp, x.double()
        h = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = norm.weight.double() * h
        gate = nn.functional.silu(h @ mlp.gate_proj.weight.double().T)
        product = gate * (h @ mlp.up_proj.weight.double().T)
        return (product @ mlp.down_proj.weight.double().T).to(x.dtype)


class Keeping(nn.Module):
    """Keeps what it saw in buffers, as a BatchNorm in training and a cache do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("cache", torch.zeros(2, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        self.cache.copy_(y.detach())
        return self.norm(y.transpose(1, 2))


@pytest.mark.parametrize("gradients", [False, True])
def test_what_follows_from_a_judged_kernel_may_be_kept_in_a_buffer(gradients: bool):
    torch.manual_seed(0)
    keeping = Keeping(Model(1))
    with mapped(K=MoreExact):
        fuse_modules(keeping, [f"model.{path}" for path in PATHS], kernel="K")
    found = verify(keeping.train(), torch.randn(2, 3, 8), gradients=gradients)
    assert found.passed, found
    assert not found.equal
    assert found.groups[0].kernel_calls == 1


@pytest.mark.parametrize(
    ("effect", "what"),
    [(draws, "the random state"), (permutes_a_buffer, "model.layers.0.norm.order")],
)
def test_what_does_not_follow_from_a_judged_kernel_is_found_next_to_what_does(
    effect: Callable[[Any], None], what: str
):
    class WithEffect(MoreExact):
        def forward(self, x: Tensor) -> Tensor:
            effect(self)
            return MoreExact.forward(self, x)

    torch.manual_seed(0)
    keeping = Keeping(Model(1))
    keeping.model.layers[0].norm.register_buffer("order", torch.arange(4.0))
    with mapped(K=WithEffect):
        fuse_modules(keeping, [f"model.{path}" for path in PATHS], kernel="K")
    found = verify(keeping.train(), torch.randn(2, 3, 8))
    assert [text.split(" is not")[0] for text in found.problems] == [what]


def drawn_beside(gradient: Tensor) -> Tensor:
    torch.rand(1)
    return gradient


class DrawsInBackward(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        return passing(drawn_beside).apply(MoreExact.forward(self, x))


def test_what_the_backward_of_a_kernel_leaves_behind_is_a_failure(model: Model, x: Tensor):
    with mapped(K=DrawsInBackward):
        fuse_modules(model, PATHS, kernel="K")
    found = verify(model, x, gradients=True)
    assert found.problems[0].startswith("the random state is not as the unfused run left it")


@pytest.mark.parametrize("threads", [False, True])
def test_a_kernel_that_writes_to_its_input_is_named_before_those_it_misled(threads: bool):
    class Scaling(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            y = WeightKernel.forward(self, x)
            if self.mlp.gate_proj.weight is culprit:
                x.mul_(1.0001)
            return y

    torch.manual_seed(0)
    model = Model(4)
    culprit = model.layers[1].mlp.gate_proj.weight
    with mapped(K=Scaling):
        fuse_modules(model, PATHS, kernel="K")
    with torch.no_grad():
        found = verify(InThread(model) if threads else model, torch.randn(2, 3, 8))
    inside = "model." if threads else ""
    where = (f"{inside}layers.1.norm", f"{inside}layers.1.mlp")
    assert found.problems[0] == f"{' -> '.join(where)}: the kernel wrote to its input"
    assert found.first_difference is not None
    assert found.first_difference.paths == where
    assert [bool(g.problem and "wrote" in g.problem) for g in found.groups] == [
        False,
        True,
        False,
        False,
    ]


def test_a_kernel_may_write_what_the_modules_write(model: Model, x: Tensor):
    class InPlace(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight = norm.weight

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    for block in model.layers:
        block.norm = InPlace(block.norm)
    fused_with(lambda seat: None, model)

    class Doubling(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x.mul_(2))

    with mapped(K=Doubling):
        fuse_modules(model, PATHS, kernel="K")
    with torch.no_grad():
        assert verify(model, x).passed


class InThread(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        out: list[Any] = []

        def work() -> None:
            with torch.no_grad():
                out.append(self.model(x))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return out[0]


def exact_number(y: Tensor) -> float:
    """A number that follows every bit of a tensor."""
    places = torch.arange(1, 1 + y.numel(), dtype=torch.float64, device=y.device)
    return float((y.detach().double().flatten() * places.sqrt()).sum()) * 1e6


def test_numbers_of_other_threads_do_not_fail_a_right_kernel(model: Model, x: Tensor):
    with mapped(K=MoreExact):
        fuse_modules(model, PATHS, kernel="K")
    found = verify(InThread(Returns(model, exact_number)), x)
    assert found.passed, found
    assert not found.equal
    assert any("it is not known whether that follows from rounding" in n for n in found.notes)
    fused_with(lambda seat: None, model)
    found = verify(InThread(Returns(model, exact_number)), x)
    assert found.passed
    assert found.equal


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
        lambda y: decimal.Decimal(y.double().pow(2).sum().item()),
        lambda y: fractions.Fraction(y.double().pow(2).sum().item()),
        lambda y: array.array("f", y.flatten().tolist()),
        lambda y: memoryview(y.detach().cpu().numpy().tobytes()),
        lambda y: numpy.ma.array(y.detach().cpu().numpy().copy()),
        lambda y: y.detach().cpu().numpy().copy().view(Named),
        lambda y: functools.partial(print, y),
        lambda y: lambda: y,
        lambda y: y.sum,
        lambda y: y.detach().clone().untyped_storage(),
    ],
)
def test_no_form_of_output_is_called_equal_unseen(
    model: Model, x: Tensor, form: Callable[[Tensor], Any]
):
    with mapped(K=Off):
        fuse_modules(model, PATHS, kernel="K")
    assert not verify(Returns(model, form), x).equal


class Named(numpy.ndarray):
    """An array of a class of its own."""


@pytest.mark.parametrize(
    ("form", "is_seen"),
    [
        (lambda y: array.array("f", y.flatten().tolist()), True),
        (lambda y: memoryview(y.detach().cpu().numpy().tobytes()), True),
        (lambda y: numpy.ma.array(y.detach().cpu().numpy().copy()), True),
        (lambda y: decimal.Decimal(exact_number(y)), True),
        (lambda y: functools.partial(print, y), False),
        (lambda y: {"f": lambda: y, "y": y}["f"], False),
        (lambda y: y.detach().clone().untyped_storage(), False),
    ],
)
@pytest.mark.parametrize("kernel", ["equal", "right"])
def test_outputs_that_are_not_looked_into_are_said_and_fail_nothing(
    model: Model, x: Tensor, form: Callable[[Tensor], Any], is_seen: bool, kernel: str
):
    with mapped(K=MoreExact if kernel == "right" else WeightKernel):
        fuse_modules(model, PATHS, kernel="K")
    found = verify(Returns(model, form), x)
    assert found.passed, found
    assert found.equal is (kernel == "equal")
    assert [note.endswith("is not compared") for note in found.notes] == ([] if is_seen else [True])


def test_an_iterator_cannot_be_compared(model: Model, x: Tensor):
    fused_with(lambda seat: None, model)
    found = verify(Returns(model, lambda y: iter([y])), x)
    assert any("cannot be compared without using it up" in text for text in found.problems)


def test_numbers_that_follow_from_a_judged_kernel_are_no_failure(model: Model, x: Tensor):
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
