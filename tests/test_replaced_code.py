"""Code and settings that are replaced after fusing count, and the report says so."""

from __future__ import annotations

import abc
import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from support import mapped, members_kernel
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import ModuleSpec, fuse, fuse_modules, fused, report, unfuse_modules
from module_fusion.modules import state_of

HIDDEN, INTERMEDIATE = 32, 64


def normalised(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class HelperNorm(nn.Module):
    """It calls a function of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(HIDDEN)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * normalised(x, self.eps)


class Norm(HelperNorm):
    """It calls a method of its own."""

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self._norm(x)


class DerivedNorm(Norm):
    """It calls what its base class has."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Activation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def once(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(HIDDEN, INTERMEDIATE), nn.Linear(HIDDEN, INTERMEDIATE)
        self.down, self.act = nn.Linear(INTERMEDIATE, HIDDEN), Activation()

    def gated(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return F.silu(x) * factor

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gated(self.gate(x)) * self.up(x))


class StaticMlp(Mlp):
    @staticmethod
    def activation(x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class ChildMlp(Mlp):
    """It reads a number and calls a method of its child."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act.once(self.gate(x)) * self.act.factor * self.up(x))


class PartialMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        del self.act
        self.act = functools.partial(F.gelu, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, norm: type[nn.Module], mlp: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.mlp = norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def thrice(*args: Any) -> Tensor:
    return 3 * args[-1] if isinstance(args[-1], Tensor) else 3 * args[-2]


def other_code(self: nn.Module, x: Tensor, factor: float = 1.0) -> Tensor:
    return F.silu(x) * factor * 3


def doubled(self: nn.Module, *args: Any) -> Any:
    return 2 * nn.Module._call_impl(self, *args)  # type: ignore[misc]


def doubled_weight(self: nn.Module) -> Any:
    return 2 * self._parameters["weight"]  # type: ignore[operator]


Patch = pytest.MonkeyPatch
CHANGES: dict[str, tuple[type, type, Callable[[Patch, Any], None], str]] = {
    "a method on the instance": (
        Norm, Mlp, lambda patch, b: setattr(b.norm, "_norm", thrice),
        "norm has an instance-level _norm",
    ),
    "a method of the class": (
        Norm, Mlp, lambda patch, b: patch.setattr(Norm, "_norm", thrice),
        "norm has a class whose _norm was replaced, Norm",
    ),
    "a method of the base class": (
        DerivedNorm, Mlp, lambda patch, b: patch.setattr(Norm, "forward", thrice),
        "norm has a class whose forward was replaced, Norm",
    ),
    "a function of the file": (
        HelperNorm, Mlp, lambda patch, b: patch.setitem(globals(), "normalised", thrice),
        "norm reads another normalised than when the kernel was chosen; fuse again",
    ),
    "a static method": (
        Norm, StaticMlp,
        lambda patch, b: patch.setattr(StaticMlp, "activation", staticmethod(F.gelu)),
        "mlp has a class whose activation was replaced, StaticMlp",
    ),
    "code, as a notebook reloads it": (
        Norm, Mlp, lambda patch, b: patch.setattr(Mlp.gated, "__code__", other_code.__code__),
        "mlp runs Mlp.gated, whose code was replaced",
    ),
    "a default": (
        Norm, Mlp, lambda patch, b: patch.setattr(Mlp.gated, "__defaults__", (3.0,)),
        "mlp runs Mlp.gated, whose code was replaced",
    ),
    "a child's number": (
        Norm, ChildMlp, lambda patch, b: setattr(b.mlp.act, "factor", 3.0),
        "mlp reads another act.factor than when the kernel was chosen; fuse again",
    ),
    "a child's method": (
        Norm, ChildMlp, lambda patch, b: setattr(b.mlp.act, "once", F.gelu),
        "mlp reads another act.once than when the kernel was chosen; fuse again",
    ),
    "another partial": (
        Norm, PartialMlp, lambda patch, b: setattr(b.mlp, "act", functools.partial(F.silu)),
        "mlp reads another act than when the kernel was chosen; fuse again",
    ),
    "a parameter that the instance hides": (
        Norm, Mlp, lambda patch, b: vars(b.norm).update(weight=torch.zeros(HIDDEN)),
        "norm has an instance-level weight",
    ),
    "a child that the instance hides": (
        Norm, Mlp, lambda patch, b: vars(b.mlp).update(gate=b.mlp.up),
        "mlp has an instance-level gate",
    ),
    "a child's parameter that it hides": (
        Norm, Mlp, lambda patch, b: vars(b.mlp.down).update(weight=2 * b.mlp.down.weight),
        "mlp.down has an instance-level weight",
    ),
    "what a class runs when it is called": (
        Norm, Mlp, lambda patch, b: patch.setattr(Mlp, "_call_impl", doubled, raising=False),
        "mlp has a class whose _call_impl was replaced, Mlp",
    ),
    "a class's property over a parameter": (
        Norm, Mlp,
        lambda patch, b: patch.setattr(Norm, "weight", property(doubled_weight), raising=False),
        "norm has a class whose weight was replaced, Norm",
    ),
    "a partial's keyword": (
        Norm, PartialMlp, lambda patch, b: b.mlp.act.keywords.update(approximate="none"),
        "mlp reads another act than when the kernel was chosen; fuse again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_replaced_after_fusing_runs_and_the_report_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, mlp, change, reason = CHANGES[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(norm, mlp)), torch.randn(4, HIDDEN)
    fuse(model)
    model(x)
    assert report(model).groups[0].kernel_calls == 1
    change(monkeypatch, model[0])
    found = model(x)
    group = report(model).groups[0]
    assert (group.kernel_calls, group.member_calls) == (1, 1)
    assert str(group.reason).startswith(reason)
    unfuse_modules(model)
    assert torch.equal(found, model(x))


def test_a_forward_that_the_instance_had_before_fusing_runs() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(Norm, Mlp)), torch.randn(4, HIDDEN)
    model[0].mlp.forward = lambda x: 2 * x
    expected, kernel = model(x), members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(model, ["0.norm", "0.mlp"], kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert report(model).groups[0].kernel_calls == 0
    assert report(model).groups[0].reason == "mlp has an instance-level forward"


# A graph is not made again when an attribute of a class is replaced, fused or not.
SEEN_BY_GRAPHS = [name for name in CHANGES if "class" not in name and name != "a static method"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SEEN_BY_GRAPHS)
def test_a_compiled_model_runs_what_was_replaced(
    name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, mlp, change, _ = CHANGES[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(norm, mlp)), torch.randn(4, HIDDEN)
    twin = copy.deepcopy(model)
    fuse(model)
    compiled, twins = (torch.compile(m, backend="eager", fullgraph=True) for m in (model, twin))
    if when == "after":
        compiled(x), twins(x)
    for changed in (model, twin):
        change(monkeypatch, changed[0])
    found, stale = compiled(x), twins(x)  # torch does not see every change itself.
    unfuse_modules(model)
    assert any(torch.allclose(found, other, atol=1e-5) for other in (model(x), stale))


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_convolution_whose_product_was_replaced_runs_itself(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 14, stride=14), nn.Identity()).bfloat16()
    x = torch.randn(2, 3, 28, 28, dtype=torch.bfloat16)
    fuse_modules(model, {"proj": "0"}, kernel="PatchEmbed")
    model(x)

    def tripled(self: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, 3 * weight, bias, self.stride)

    if where == "instance":
        model[0]._conv_forward = types.MethodType(tripled, model[0])
    else:
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", tripled)
    found = model(x)
    assert (report(model).groups[0].kernel_calls, report(model).groups[0].member_calls) == (1, 1)
    assert "_conv_forward" in str(report(model).groups[0].reason)
    unfuse_modules(model)
    assert torch.equal(found, model(x))


@pytest.mark.parametrize(
    "asked",
    [
        lambda: 3.0 if torch.get_default_dtype() is torch.float64 else 1.0,
        lambda: 3.0 if torch.are_deterministic_algorithms_enabled() else 1.0,
        lambda: 3.0 if torch.is_inference_mode_enabled() else 1.0,
    ],
)
def test_a_member_that_asks_for_what_may_change_unseen_is_left_alone(asked: Any) -> None:
    class Asks(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * asked() * self.up(x))

    result = fuse(nn.Sequential(Block(Norm, Asks)), {"rms_norm_mlp": True})
    assert not result.fused
    assert "it is not known what that does" in str(result.skipped[0].reason)


@pytest.mark.parametrize("value", [torch.ones(INTERMEDIATE), [1.0], {"factor": 1.0}])
def test_a_member_that_reads_what_its_child_keeps_is_left_alone(value: Any) -> None:
    class Reads(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.act.kept = value

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x) + 0 * len(self.act.kept))

    result = fuse(nn.Sequential(Block(Norm, Reads)), {"rms_norm_mlp": True})
    assert not result.fused
    assert "uses 'kept' of a module" in str(result.skipped[0].reason)


class Counting(Activation):
    """It counts its calls, and those of a method, under names that lists and tensors have too."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.index = 0, 0

    def tick(self) -> None:
        self.index += 1

    def is_ticked(self) -> bool:
        return self.index > 1000

    def is_late(self) -> bool:
        return self.count > 1000

    @property
    def real(self) -> bool:
        return self.count > 1000

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return F.silu(x)


class Compared(Counting):
    def __gt__(self, count: int) -> bool:
        return self.count > count


class Asking(nn.Module):
    """Its call reads what another method of it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.index = 0

    def tick(self) -> None:
        self.index += 1

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.index > 1000 else x


def is_late(counting: Any) -> bool:
    return bool(counting.count > 1000)


class CountedMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.asking, self.compared = Counting(), Asking(), Activation()
        self.asks = is_late
        self.acts, self.values = nn.ModuleList([self.act]), nn.ModuleDict({"real": self.act})

    def is_late(self) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.asking(self.down(self.act(self.gate(x)) * self.up(x)))
        return y * 2 if self.is_late() else y


def by_variable(mlp: Any) -> bool:
    act = mlp.act
    return bool(act.count > 1000)


def by_unpacking(mlp: Any) -> bool:
    act, most = mlp.act, 1000
    return bool(act.count > most)


def by_variable_of_a_function_around(mlp: Any) -> bool:
    act = mlp.act
    return bool((lambda: act.count > 1000)())


def by_itself(mlp: Any) -> bool:
    return is_late(mlp.act)


def by_a_method_and_an_attribute(mlp: Any) -> bool:
    mlp.act.tick()
    return bool(mlp.act.index > 1000)


def by_two_methods(mlp: Any) -> bool:
    mlp.act.tick()
    return bool(mlp.act.is_ticked())


def by_a_method_and_the_call(mlp: Any) -> bool:
    mlp.asking.tick()
    return False


COUNTS = "reads what Counting counts, its "
COUNTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "an attribute": (lambda mlp: mlp.act.count > 1000, COUNTS + "count"),
    "a method": (lambda mlp: mlp.act.is_late(), COUNTS + "count"),
    "a variable": (by_variable, COUNTS + "count"),
    "a variable that is unpacked": (by_unpacking, COUNTS + "count"),
    "a variable of a function around": (by_variable_of_a_function_around, COUNTS + "count"),
    "an argument": (by_itself, COUNTS + "count"),
    "a function that it holds": (lambda mlp: mlp.asks(mlp.act), COUNTS + "count"),
    "an item": (lambda mlp: mlp.acts[0].count > 1000, COUNTS + "count"),
    "a comprehension": (lambda mlp: [a.count for a in mlp.acts] > [1000], COUNTS + "count"),
    "children": (lambda mlp: any(a.count > 1 for a in mlp.acts.children()), COUNTS + "count"),
    "a grandchild": (lambda mlp: mlp.values.real.count > 1000, COUNTS + "count"),
    "a grandchild of a variable": (
        lambda mlp: (lambda v: v.real.count > 1000)(mlp.values), COUNTS + "count",
    ),
    "a property": (lambda mlp: mlp.act.real, COUNTS + "count"),
    "a property of a variable": (lambda mlp: (lambda act: act.real)(mlp.act), COUNTS + "count"),
    "an operator": (lambda mlp: mlp.compared > 1000, "reads what Compared counts, its count"),
    "a method and an attribute": (by_a_method_and_an_attribute, COUNTS + "index"),
    "two methods": (by_two_methods, COUNTS + "index"),
    "a method and the call": (by_a_method_and_the_call, "reads what Asking counts, its index"),
    "getattr": (lambda mlp: getattr(mlp.act, "count") > 1000, "uses getattr, and"),  # noqa: B009
    "a dict": (lambda mlp: (lambda a: a.__dict__["count"] > 1)(mlp.act), "uses __dict__, and"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_a_member_that_reads_what_its_child_counts_runs(name: str) -> None:
    method, why = COUNTED[name]
    cls = type("Counts", (CountedMlp,), {"is_late": method})
    model, x = nn.Sequential(Block(Norm, cls)), torch.randn(4, HIDDEN)
    if name == "an operator":
        model[0].mlp.compared = Compared()
    twin = copy.deepcopy(model)
    result = fuse(model)
    assert not result.fused
    assert why in str(result.skipped[0].reason)
    assert torch.equal(model(x), twin(x))


class Numbers(nn.Module):
    """Its numbers have names that lists, tensors and `torch.finfo` have too; a method reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.max, self.eps, self.count = 1.0, 1.0, 0

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.eps

    def mean(self, x: Tensor) -> Tensor:
        return self.scaled(x)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x


def usual(x: Tensor, scale: Tensor) -> Tensor:
    """What much code takes of tensors and lists."""
    parts = [x]
    parts.append(parts[0].to(scale.dtype))
    return parts[-1].reshape(x.shape) / (1 if torch.finfo(x.dtype).eps < 1 else 2)


class NumbersMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers()

    def scale(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weight, act = self.gate.weight, self.act
        gate = act(usual(F.linear(x, weight, self.gate.bias), weight))
        return self.down(self.scale(self.numbers(gate)) * self.up(x))


def times_a_variable(mlp: Any, x: Tensor) -> Tensor:
    numbers = mlp.numbers
    return x * float(numbers.max)


def by_a_method_of_a_variable(mlp: Any, x: Tensor) -> Tensor:
    numbers = mlp.numbers
    return numbers.mean(x)  # type: ignore[no-any-return]


def an_item(mlp: Any, x: Tensor) -> Tensor:
    return x * [mlp.numbers][0].max


def one_of_two(mlp: Any, x: Tensor) -> Tensor:
    numbers = mlp.numbers if x.dim() == 2 else mlp.act
    return x * float(numbers.max)


def it_or_itself(mlp: Any, x: Tensor) -> Tensor:
    numbers = mlp.numbers or mlp
    return x * float(numbers.max)


def an_item_or_another(mlp: Any, x: Tensor) -> Tensor:
    numbers = [mlp.numbers][0] if x.dim() == 2 else mlp.act
    return x * float(numbers.max)


def it_or_a_list(mlp: Any, x: Tensor) -> Tensor:
    numbers = mlp.numbers or []
    return x * float(numbers.max)


def it_or_a_list_of_before(mlp: Any, x: Tensor) -> Tensor:
    numbers: Any = []
    return x * float((mlp.numbers or numbers).max)


def without_casts(self: Any, x: Tensor) -> Tensor:
    gate = self.numbers(self.act(self.gate(x)))
    return self.down(self.scale(gate) * self.up(x))  # type: ignore[no-any-return]


READ: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "an attribute": (lambda mlp, x: x * mlp.numbers.max, "max"),
    "a variable": (times_a_variable, "max"),
    "an item": (an_item, "max"),
    "one of two": (lambda mlp, x: x * (mlp.numbers if x.dim() == 2 else mlp.act).max, "max"),
    "a variable, one of two": (one_of_two, "max"),
    "a variable, it or itself": (it_or_itself, "max"),
    "a variable, an item or another": (an_item_or_another, "max"),
    "a variable, it or a list": (it_or_a_list, "max"),
    "it or a list": (it_or_a_list_of_before, "max"),
    "a method": (lambda mlp, x: mlp.numbers.scaled(x), "eps"),
    "a method of a variable": (by_a_method_of_a_variable, "eps"),
    "a method that a method calls": (by_a_method_of_a_variable, "scaled"),
}


@pytest.mark.parametrize("name", READ)
def test_a_number_of_a_child_is_watched_however_it_is_read(name: str) -> None:
    torch.manual_seed(0)
    method, changed = READ[name]
    is_cast = name.startswith(("a method", "an attribute")) or name == "a variable"
    methods = {"scale": method} | ({} if is_cast else {"forward": without_casts})
    cls = type("Reads", (NumbersMlp,), methods)
    model, x = nn.Sequential(Block(Norm, cls)), torch.randn(4, HIDDEN)
    assert fuse(model).fused
    model(x)
    group = report(model).groups[0]
    assert (group.kernel_calls, group.member_calls) == (1, 0)
    setattr(model[0].mlp.numbers, changed, thrice if changed == "scaled" else 3.0)
    found = model(x)
    reason = f"mlp reads another numbers.{changed} than when the kernel was chosen; fuse again"
    assert reason in str(report(model).groups[0].reason)
    unfuse_modules(model)
    assert torch.equal(found, model(x))


def test_where_a_child_is_an_item_what_is_cast_may_be_that_child() -> None:
    cls = type("Reads", (NumbersMlp,), {"scale": an_item})
    result = fuse(nn.Sequential(Block(Norm, cls)))
    assert "mlp uses 'to' of a module, and it is not known" in str(result.skipped[0].reason)


@pytest.mark.parametrize("where", ["the instance", "the class", "a tuple"])
def test_a_function_that_a_child_holds_is_read(where: str) -> None:
    class Holds(Activation):
        noise: Any = torch.rand_like

    class Calls(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.act = Holds() if where == "the class" else Activation()
            if where != "the class":
                self.act.noise = (torch.rand_like,) if where == "a tuple" else torch.rand_like

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(F.silu(self.gate(x)) * self.up(x))
            noise: Any = self.act.noise
            return x + 0 * (noise[0] if where == "a tuple" else noise)(x)

    result = fuse(nn.Sequential(Block(Norm, Calls)), {"rms_norm_mlp": True})
    assert not result.fused
    assert "mlp may draw random numbers, in rand_like" in str(result.skipped[0].reason)


def test_a_member_that_calls_a_module_which_is_no_child_is_left_alone() -> None:
    class Calls(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["drop"] = nn.Dropout(0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.down(F.silu(self.gate(x)) * self.up(x)))  # type: ignore[no-any-return]

    result = fuse(nn.Sequential(Block(Norm, Calls)), {"rms_norm_mlp": True})
    assert not result.fused
    assert "mlp uses its drop, and it is not known" in str(result.skipped[0].reason)


class Missing(dict[str, Any]):
    """It has whatever is asked for, as some configs have."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __missing__(self, name: str) -> Any:
        return Missing()


class Failing(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.parametrize("kind", [Missing, Failing, dict])
def test_a_container_that_answers_anything_is_looked_at_as_a_container(kind: Any) -> None:
    class Configured(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.config = kind(factor=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x)) * self.config["factor"]

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(Norm, Configured)), torch.randn(4, HIDDEN)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, ["0.norm", "0.mlp"], kernel="Kernel")
    model(x)
    assert [(g.kernel_calls, g.member_calls) for g in report(model).groups] == [(1, 0)]
    model[0].mlp.config["factor"] = 3.0
    found = model(x)
    assert "reads another config" in str(report(model).groups[0].reason)
    unfuse_modules(model)
    assert torch.equal(found, model(x))


def test_a_member_that_reads_a_property_of_an_object_is_left_alone() -> None:
    class Config:
        @property
        def factor(self) -> float:
            return 1.0

    class Configured(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.config.factor * self.up(x))

    result = fuse(nn.Sequential(Block(Norm, Configured)), {"rms_norm_mlp": True})
    assert not result.fused
    assert "uses its config, and it is not known what" in str(result.skipped[0].reason)


class WithMetaclass(Mlp, abc.ABC):
    """A class of a metaclass."""


@pytest.mark.parametrize("cls", [Mlp, WithMetaclass])
@pytest.mark.parametrize("with_kernel", [False, True])
def test_what_is_set_on_the_class_of_a_fused_module_counts_until_it_is_unfused(
    cls: type[nn.Module], with_kernel: bool
) -> None:
    torch.manual_seed(0)
    model, other, x = nn.Sequential(Block(Norm, cls)), None, torch.randn(4, HIDDEN)
    unpatched, original = model(x), cls.forward

    def fuse_it(model: nn.Module) -> None:
        with mapped(Kernel=members_kernel(1)):
            fuse_modules(model, ["0.norm", "0.mlp"], kernel="Kernel" if with_kernel else None)

    fuse_it(model)

    def patched(self: nn.Module, x: Tensor) -> Tensor:
        return 3 * x

    type(model[0].mlp).forward = patched
    assert torch.equal(model(x), x + 3 * model[0].norm(x))
    if with_kernel:
        reason = f"mlp has a class whose forward was replaced, {cls.__name__}"
        assert report(model).groups[0].reason == reason
    other = copy.deepcopy(nn.Sequential(Block(Norm, cls)))
    expected = other(x)
    fuse_it(other)
    assert torch.equal(other(x), expected)
    with pytest.warns(UserWarning, match=r"forward was set on type\('0.mlp'\) .*ends with the fus"):
        unfuse_modules(model)
    assert cls.forward is original
    assert torch.equal(model(x), unpatched)
    unfuse_modules(other)


@pytest.mark.parametrize("path", ["0", "0.norm", "0.mlp"])
@pytest.mark.parametrize("name", ["forward", "__call__", "train"])
@pytest.mark.filterwarnings("error")
def test_what_is_set_on_the_class_of_a_fused_module_can_be_put_back(path: str, name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(Norm, Mlp)), torch.randn(4, HIDDEN)
    classes = [vars(cls).copy() for cls in (Block, Norm, Mlp)]
    fuse(model)
    expected = model(x)
    cls = type(model.get_submodule(path))
    old, seen = getattr(cls, name), []

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return old(self, *args, **kwargs)

    with mock.patch.object(cls, name, wrapper):
        torch.testing.assert_close(model(x), expected)
        model.eval()
    assert seen
    setattr(cls, name, wrapper)
    setattr(cls, name, old)
    ran = report(model).groups[0].kernel_calls
    assert torch.equal(model(x), expected)
    assert report(model).groups[0].kernel_calls == ran + 1
    unfuse_modules(model)
    assert [vars(cls).copy() for cls in (Block, Norm, Mlp)] == classes
    torch.testing.assert_close(model(x), expected)


def with_twice_the_input(self: Any, x: Tensor) -> Any:
    return 2 * x + self.mlp(self.norm(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_that_the_class_around_the_members_gets_runs(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls: Any = type("Around", (Block,), {"forward": Block.forward})
    torch.manual_seed(0)
    model, x = nn.Sequential(cls(Norm, Mlp)), torch.randn(4, HIDDEN)
    other, twin = copy.deepcopy(model), copy.deepcopy(model)
    fuse(model)
    model(x)
    monkeypatch.setattr(cls, "forward", with_twice_the_input)
    expected = twin(x)
    call: Any = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    torch.testing.assert_close(call(x), expected)
    if not compiled:
        assert torch.equal(model(x), expected)
        reason = "the class around norm has another forward now: unfuse, and fuse again"
        assert str(report(model).groups[0].reason).startswith(reason)
    fuse(other)
    torch.testing.assert_close(other(x), expected)
    assert report(other).groups[0].kernel_calls == 1
    unfuse_modules(model)
    assert torch.equal(model(x), expected)
    fuse(model)
    torch.testing.assert_close(model(x), expected)
    assert report(model).groups[0].kernel_calls == 1


def asking(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return x + self.mlp(2 * h if type(h) is Tensor else h)


class Two(Block):
    """A block with a second pair of members."""

    def __init__(self) -> None:
        super().__init__(Norm, Mlp)
        self.norm2, self.mlp2 = Norm(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm(x))
        return x + self.mlp2(self.norm2(x))


def asking_twice(self: Any, x: Tensor) -> Any:
    x = asking(self, x)
    h = self.norm2(x)
    return x + self.mlp2(2 * h if type(h) is Tensor else h)


def fuse_pair(model: nn.Module, norm: str, mlp: str) -> None:
    with mapped(K=members_kernel(1)):
        fuse_modules(model, {"norm": norm, "mlp": mlp}, kernel="K")


def exchange_code(cls: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cls.forward, "__code__", asking_twice.__code__)


def set_forward(value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda cls, patch: patch.setattr(cls, "forward", value)


@pytest.mark.parametrize(
    "replace",
    [
        set_forward(asking_twice),
        exchange_code,
        set_forward(staticmethod(lambda x: 3 * x)),
        set_forward(functools.partial(lambda x, y: x * y, 2)),
        set_forward(functools.partialmethod(lambda self, y, x: x * y, 2)),
    ],
)
@pytest.mark.parametrize("then", ["called", "copied", "unpickled", "one unfused", "another fused"])
def test_code_around_the_members_that_was_not_read_gets_no_captured_value(
    replace: Callable[[Any, pytest.MonkeyPatch], None], then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = types.FunctionType(Two.forward.__code__, globals(), "forward")
    monkeypatch.setattr(Two, "forward", function)  # Its code is exchanged in one case.
    torch.manual_seed(0)
    model, x = nn.Sequential(Two()), torch.randn(4, HIDDEN)
    twin = copy.deepcopy(model)
    fuse_pair(model, "0.norm", "0.mlp")
    if then != "another fused":
        fuse_pair(model, "0.norm2", "0.mlp2")
    replace(Two, monkeypatch)
    if then == "another fused":
        fuse_pair(model, "0.norm2", "0.mlp2")
    if then == "one unfused":
        unfuse_modules(model, ["0.norm2"])
    model = {"copied": copy.deepcopy, "unpickled": through_pickle}.get(then, lambda m: m)(model)
    assert torch.equal(model(x), twin(x))
    assert [group.kernel_calls for group in report(model).groups] == [0] * len(report(model).groups)
    unfuse_modules(model)
    assert torch.equal(model(x), twin(x))


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def test_two_chains_of_one_block_fused_by_two_calls_have_their_kernels() -> None:
    model, x = nn.Sequential(Two()), torch.randn(4, HIDDEN)
    fuse_pair(model, "0.norm", "0.mlp")
    fuse_pair(model, "0.norm2", "0.mlp2")
    model(x)
    assert [(g.kernel_calls, g.reason) for g in report(model).groups] == [(1, None)] * 2


@pytest.mark.parametrize("how", ["fuse", "fuse_modules"])
def test_fusing_again_reads_a_replaced_forward(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Around(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    def fuse_again() -> None:
        if how == "fuse":
            fuse(model)
        else:
            fuse_modules(model, {"norm": "0.norm", "mlp": "0.mlp"}, kernel="RMSNormMLP")

    model, x = nn.Sequential(Around(Norm, Mlp)), torch.randn(4, HIDDEN)
    twin, good = copy.deepcopy(model), Around.forward
    monkeypatch.setattr(Around, "forward", asking)
    fuse_modules(model, {"norm": "0.norm", "mlp": "0.mlp"}, kernel="RMSNormMLP")
    assert torch.equal(model(x), twin(x))
    monkeypatch.setattr(Around, "forward", good)
    fuse_again()
    torch.testing.assert_close(model(x), twin(x))
    assert report(model).groups[0].kernel_calls == 1
    monkeypatch.setattr(Around, "forward", asking)
    assert torch.equal(model(x), twin(x))


def test_fusing_again_by_family_reads_the_code_around_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Helped(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.helped(x)

        def helped(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    model, x = nn.Sequential(Helped(Norm, Mlp)), torch.randn(4, HIDDEN)
    twin = copy.deepcopy(model)
    fuse(model)
    with monkeypatch.context() as patch:
        patch.setattr(Helped, "helped", asking)
        with fused(model, {"norm": "0.norm", "mlp": "0.mlp"}, kernel="RMSNormMLP"):
            assert torch.equal(model(x), twin(x))
    model(x)
    assert report(model).groups[0].kernel_calls == 1
    monkeypatch.setattr(Helped, "helped", asking)
    fuse(model)
    assert torch.equal(model(x), twin(x))
    assert "asks for type(...)" in str(report(model).groups[0].reason)


def test_a_chain_that_is_fused_again_reads_the_code_around_it_again() -> None:
    class Asking(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.inner = norm

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            return 2 * h if type(h) is Tensor else h

    model, x = nn.Sequential(Block(Norm, Mlp)), torch.randn(4, HIDDEN)
    model[0].norm = Asking(model[0].norm)
    asking, model[0].norm = model[0].norm, model[0].norm.inner
    fuse_pair(model, "0.norm", "0.mlp")
    norm, mlp = model[0].norm, model[0].mlp
    model[0].norm = asking
    twin = copy.deepcopy(model)
    unfuse_modules(twin)
    fuse_pair(model, "0.norm.inner", "0.mlp")
    assert (model[0].norm.inner, model[0].mlp) == (norm, mlp)
    assert torch.equal(model(x), twin(x))
    assert "asks for type(...)" in str(report(model).groups[0].reason)


@pytest.mark.parametrize("kept", ["forward", "member", "compiled", "class's"])
def test_a_call_that_was_kept_while_fused_runs_the_modules_after_unfusing(kept: str) -> None:
    model, x = Block(Norm, Mlp), torch.randn(4, HIDDEN)
    expected = model(x)
    fuse_pair(model, "norm", "mlp")
    if kept == "forward":
        forward = model.forward
        model.forward = lambda x: forward(x)  # As accelerate's hooks do.
    elif kept == "member":
        norm, mlp = model.norm.__call__, model.mlp.__call__
    elif kept == "compiled":
        model.forward = torch.compile(model.forward, backend="eager")
        model(x)
    else:
        model.forward = types.MethodType(type(model).forward, model)
    unfuse_modules(model)
    found = x + mlp(norm(x)) if kept == "member" else model(x)
    torch.testing.assert_close(found, expected)


def as_chains_of_blocks(model: nn.Module) -> Any:
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)
    fuse_other(model, "0", "1")
    return model


def collector_as_last(model: nn.Module) -> Any:
    call = model[0].norm.__call__
    fuse_other(model, "0.norm")
    return lambda x: model[1](x + model[0].mlp(call(x)))


def last_as_collector(model: nn.Module) -> Any:
    call = model[0].mlp.__call__
    fuse_other(model, "0.mlp", "1.norm")
    return lambda x: model[1](x + call(model[0].norm(x)))


def last_as_boundary(model: nn.Module) -> Any:
    call = model[0].mlp.__call__
    fuse_other(model, "0.mlp.gate", "0.mlp.down")
    return lambda x: model[1](x + call(model[0].norm(x)))


def fuse_other(model: nn.Module, *paths: str) -> None:
    unfuse_modules(model)
    kernel = "K" if paths[-1].endswith("down") else None
    with mapped(K=members_kernel(1)):
        fuse_modules(model, list(paths), kernel=kernel)


@pytest.mark.parametrize(
    "then", [as_chains_of_blocks, collector_as_last, last_as_collector, last_as_boundary]
)
@pytest.mark.parametrize("kernel", [None, "K"])
def test_a_call_that_was_kept_runs_the_module_in_its_other_role(
    then: Callable[[nn.Module], Any], kernel: str | None
) -> None:
    model, x = nn.Sequential(Block(Norm, Mlp), Block(Norm, Mlp)), torch.randn(4, HIDDEN)
    expected = model(x)
    with mapped(K=members_kernel(1)):
        fuse_modules(model, {"norm": "*.norm", "mlp": "*.mlp"}, kernel=kernel)
    assert torch.equal(then(model)(x), expected)


class CopiesItself(Block):
    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def test_a_block_that_copies_itself_has_its_kernel_from_the_first_call_on() -> None:
    model, x = nn.Sequential(CopiesItself(Norm, Mlp)), torch.randn(4, HIDDEN)
    fuse_pair(model, "*.norm", "*.mlp")
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    assert [(g.kernel_calls, g.reason) for g in report(copied).groups] == [(1, None)]


@pytest.mark.parametrize("how", ["fuse", "fuse_modules"])
def test_fusing_again_reads_a_forward_around_two_chains(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Layers(Block):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            pairs = [nn.ModuleDict({"norm": Norm(), "mlp": Mlp()}) for _ in range(2)]
            self.layers = nn.ModuleList(pairs)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer["mlp"](layer["norm"](x))
            return x

    def other(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = 2 * x + layer["mlp"](layer["norm"](x))
        return x

    model, x, forward = nn.Sequential(Layers()), torch.randn(4, HIDDEN), Layers.forward
    twin = copy.deepcopy(model)
    paths = {"norm": "0.layers.*.norm", "mlp": "0.layers.*.mlp"}
    fuse_modules(model, paths, kernel="RMSNormMLP")
    monkeypatch.setattr(Layers, "forward", other)
    assert torch.equal(model(x), twin(x))
    with fused(model, paths, kernel="RMSNormMLP"):
        torch.testing.assert_close(model(x), twin(x))
        assert [group.kernel_calls for group in report(model).groups] == [1, 1]
    assert torch.equal(model(x), twin(x))
    monkeypatch.setattr(Layers, "forward", forward)
    torch.testing.assert_close(model(x), twin(x))
    assert [group.kernel_calls for group in report(model).groups] == [2, 2]
    monkeypatch.setattr(Layers, "forward", other)
    assert torch.equal(model(x), twin(x))
    if how == "fuse":
        fuse(model)
    else:
        fuse_modules(model, paths, kernel="RMSNormMLP")
    torch.testing.assert_close(model(x), twin(x))
    assert [group.kernel_calls for group in report(model).groups] == [3, 3]


def scaled(x: Tensor, eps: float = 1e-6, *, dim: int = -1) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + eps)


class NormWithDefaults(HelperNorm):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * self.weight * scaled(x)


class Zeros(nn.Module):
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_functions_with_defaults_have_their_kernel_in_a_compiled_graph() -> None:
    model, x = nn.Sequential(Block(NormWithDefaults, Mlp)), torch.randn(4, HIDDEN)
    specs = [ModuleSpec(["x"], ["h"]), ModuleSpec(["h"], ["y"])]
    with mapped(Kernel=Zeros):
        fuse_modules(model, ["0.norm", "0.mlp"], specs, kernel="Kernel")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), x)


def good_twice(self: Any, x: Tensor) -> Any:
    x = x + self.mlp(self.norm(x))
    return 2 * x + self.mlp2(self.norm2(x))


def fuse_one_with_and_one_without_its_kernel(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the code around both is another one since."""
    fuse_modules(model, {"norm": "0.norm", "mlp": "0.mlp"}, kernel="RMSNormMLP")
    monkeypatch.setattr(Two, "forward", asking_twice)
    fuse_modules(model, {"norm": "0.norm2", "mlp": "0.mlp2"}, kernel="RMSNormMLP")
    assert [bool(state_of(m).chain.armed) for m in (model[0].mlp, model[0].mlp2)] == [True, False]
    monkeypatch.setattr(Two, "forward", good_twice)


def test_fusing_by_family_reads_the_code_around_all_of_its_chains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Two()), torch.randn(4, HIDDEN)
    twin = copy.deepcopy(model)
    fuse_one_with_and_one_without_its_kernel(model, monkeypatch)
    fuse(model)
    torch.testing.assert_close(model(x), twin(x))
    assert [(g.kernel_calls, g.reason) for g in report(model).groups] == [(1, None)] * 2
    monkeypatch.setattr(Two, "forward", asking_twice)
    assert torch.equal(model(x), twin(x))


def test_fusing_by_family_leaves_what_it_was_not_asked_to_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Two()), torch.randn(4, HIDDEN)
    fuse_one_with_and_one_without_its_kernel(model, monkeypatch)
    monkeypatch.setattr(Two, "forward", asking_twice)
    twin = copy.deepcopy(model)
    unfuse_modules(twin)
    fuse(model, {"rms_norm_mlp": {"include": "0.norm2"}})
    assert torch.equal(model(x), twin(x))
    assert [g.kernel_calls for g in report(model).groups] == [0, 0]


def test_a_call_that_raises_gives_back_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Two())
    fuse_one_with_and_one_without_its_kernel(model, monkeypatch)
    chains = [state_of(member).chain for member in (model[0].mlp, model[0].mlp2)]
    before = [(c.armed, c.refusal, c.boundary.read) for c in chains]
    with (
        mock.patch("module_fusion.families.fuse._compare", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        fuse(model, {"rms_norm_mlp": True})
    assert [(c.armed, c.refusal, c.boundary.read) for c in chains] == before
