"""`ModuleSpec`, its inference from signatures, and the wiring plan made from it.

The plan is looked at through what it is for: the signature in the kernel's seat, and the
result of a kernel that runs the members by the plan.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from inspect import Signature
from typing import Any

import pytest
import torch
from support import mapped, members_kernel, runs
from torch import Tensor, nn

from module_fusion import (
    FusionError,
    ModuleSpec,
    SpecMismatchError,
    fuse_modules,
    report,
    unfuse_modules,
)
from module_fusion.spec import infer_specs


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Shift(nn.Module):
    """An optional input."""

    def forward(self, y: Tensor, shift: float = 0.5) -> Tensor:
        return y + shift


class Square(nn.Module):
    """Names its input as most of transformers does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * hidden_states


class AddNorm(nn.Module):
    """Two inputs, two outputs."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = hidden_states + residual
        return residual.tanh(), residual


class Gate(nn.Module):
    """A required keyword-only parameter."""

    def forward(self, hidden_states: Tensor, *, gate: Tensor) -> Tensor:
        return hidden_states * gate


class Total(nn.Module):
    """Only positional arguments without names."""

    def forward(self, *tensors: Tensor) -> Tensor:
        return sum(tensors[1:], tensors[0])


class Masked(nn.Module):
    """A required input that other members have with a default."""

    def forward(self, hidden_states: Tensor, shift: float) -> Tensor:
        return hidden_states - shift


class Parent(nn.Module):
    """Two members, one after the other; the second gets the parent's other arguments."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return self.second(self.first(x), **others)


def fuse(
    model: nn.Module,
    specs: Sequence[ModuleSpec] | None = None,
    members: Sequence[str] = ("first", "second"),
    inputs: int = 1,
) -> type[nn.Module]:
    """Fuse with a kernel that runs the members by the plan; `runs` tells how often it did."""
    layer = members_kernel(inputs)
    with mapped(Chain=layer):
        fuse_modules(model, list(members), specs, kernel="Chain")
    return layer


def seat_signature(model: nn.Module, specs: Sequence[ModuleSpec] | None = None) -> Signature:
    """Signature of the chain in the seat of a kernel that was never found."""
    with mapped():
        fuse_modules(model, ["first", "second"], specs, kernel="Chain")
    return inspect.signature(model.second.fused_kernel.forward)  # type: ignore[union-attr, operator]


def mismatch(model: nn.Module, specs: Any, members: Sequence[str] = ("first", "second")) -> str:
    with pytest.raises(SpecMismatchError) as caught:
        fuse_modules(model, list(members), specs)
    assert not report(model).groups
    return str(caught.value)


def check_same(
    model: nn.Module,
    layer: type[nn.Module],
    call: Callable[[], Any],
    reason: str | None = None,
) -> None:
    """The kernel runs, or does not for the reason given; either way the result is the same."""
    result = call()
    (group,) = report(model).groups
    if reason is None:
        assert (runs(layer), group.kernel_calls, group.member_calls) == (1, 1, 0)
    else:
        assert (runs(layer), group.kernel_calls, group.reason) == (0, 0, reason)
    unfuse_modules(model)
    torch.testing.assert_close(result, call(), rtol=0, atol=0)


X = torch.tensor([1.0, -2.0, 3.0])


def test_a_spec_keeps_its_names_and_compares_by_them() -> None:
    spec = ModuleSpec(inputs=["x", "_"], outputs=("y",))
    assert (spec.inputs, spec.outputs) == (("x", "_"), ("y",))
    assert spec == ModuleSpec(("x", "_"), ["y"])
    assert spec != ModuleSpec(["x"], ["y"])
    assert hash(spec) == hash(ModuleSpec(("x", "_"), ["y"]))


def test_outputs_are_one_value_without_a_name_when_left_out() -> None:
    assert ModuleSpec(["x"]).outputs == ("_",)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ModuleSpec(["x"]).inputs = ("y",)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("inputs", "outputs", "text"),
    [
        ("x", ["y"], "ModuleSpec.inputs is a list of names, not 'x'."),
        (["x"], "y", "ModuleSpec.outputs is a list of names, not 'y'."),
        (None, ["y"], "ModuleSpec.inputs is a list of names, not None."),
        ({"x"}, ["y"], "ModuleSpec.inputs is a list of names, not {'x'}."),
        (["a b"], ["y"], "A name in ModuleSpec.inputs must be a Python identifier, not 'a b'."),
        ([""], ["y"], "A name in ModuleSpec.inputs must be a Python identifier, not ''."),
        (["class"], ["y"], "A name in ModuleSpec.inputs must be a Python identifier, not 'class'."),
        ([3], ["y"], "A name in ModuleSpec.inputs must be a Python identifier, not 3."),
        (["x"], ["1"], "A name in ModuleSpec.outputs must be a Python identifier, not '1'."),
        (["x", "x"], ["y"], "ModuleSpec.inputs has 'x' twice: names must be unambiguous."),
        (
            ["x"],
            ["z", "y", "y", "z"],
            "ModuleSpec.outputs has 'y', 'z' twice: names must be unambiguous.",
        ),
        (["x"], [], "ModuleSpec.outputs is empty: a member returns a value; use ['_']."),
    ],
)
def test_names_that_cannot_stand_in_a_signature_are_refused(
    inputs: Any, outputs: Any, text: str
) -> None:
    with pytest.raises(SpecMismatchError) as caught:
        ModuleSpec(inputs, outputs)
    assert str(caught.value) == text


def test_an_underscore_may_stand_for_several_values() -> None:
    assert ModuleSpec(["_", "x", "_"], ["_", "_"]).inputs == ("_", "x", "_")


def test_self_is_no_name_for_an_input_because_a_kernel_has_one() -> None:
    with pytest.raises(SpecMismatchError) as caught:
        fuse(Parent(Double(), Square()), [ModuleSpec(["self"], ["y"]), ModuleSpec(["y"])])
    assert "'self'" in str(caught.value)


def signatures(*forwards: Callable[..., Any]) -> list[Signature]:
    return [inspect.signature(forward) for forward in forwards]


def test_each_output_is_inferred_to_be_the_next_first_input() -> None:
    assert infer_specs(signatures(lambda x: 0, lambda y: 0, lambda z, mask=None: 0)) == [
        ModuleSpec(["x"], ["y"]),
        ModuleSpec(["y"], ["z"]),
        ModuleSpec(["z", "mask"], ["_"]),
    ]


def test_keyword_only_parameters_are_inferred_under_their_names() -> None:
    assert infer_specs(signatures(lambda x, *, scale: 0, lambda y, *args, bias=None, **kw: 0)) == [
        ModuleSpec(["x", "scale"], ["y"]),
        ModuleSpec(["y", "bias"]),
    ]


def test_a_name_with_another_default_is_inferred_to_be_another_input() -> None:
    first, second = infer_specs(signatures(lambda x, eps=1e-6: 0, lambda y, eps=1e-5: 0))
    assert first.inputs == ("x", "eps")
    assert second.inputs == ("y", "eps_1")


def test_a_name_with_an_equal_default_is_inferred_to_be_the_same_input() -> None:
    equal = float("1e-06")
    _, second = infer_specs(signatures(lambda x, eps=1e-6: 0, lambda y, eps=equal: 0))
    assert second.inputs == ("y", "eps")


def test_a_parameter_named_as_an_earlier_output_is_not_inferred_to_take_it() -> None:
    specs = infer_specs(signatures(lambda x: 0, lambda y: 0, lambda z, y: 0))
    assert specs[2] == ModuleSpec(["z", "_"])


def test_members_without_named_parameters_are_inferred_to_take_one_value() -> None:
    assert infer_specs(signatures(lambda *args: 0, lambda *args, **kwargs: 0)) == [
        ModuleSpec(["input"], ["input"]),
        ModuleSpec(["input"]),
    ]


@pytest.mark.parametrize("first", [Double, Square])
def test_an_inferred_chain_runs_whatever_the_names_are(first: type[nn.Module]) -> None:
    model = Parent(first(), Square())
    check_same(model, fuse(model), lambda: model(X))


def test_an_inferred_chain_of_three_passes_every_value_on() -> None:
    class Three(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    model = Three(Double(), Shift())
    model.third = Square()
    layer = fuse(model, members=["first", "second", "third"], inputs=2)
    check_same(model, layer, lambda: model(X))


def test_the_seat_has_the_signature_of_the_chain() -> None:
    signature = seat_signature(Parent(Double(), Square()))
    assert list(signature.parameters) == ["x"]


def test_the_seat_is_called_with_every_input_that_no_member_produces() -> None:
    signature = seat_signature(Parent(AddNorm(), Gate()), ADD_NORM_GATE)
    assert str(signature) == "(hidden_states, residual, gate)"


def test_optional_inputs_come_last_with_their_defaults() -> None:
    specs = [ModuleSpec(["y", "shift"], ["hidden_states"]), ModuleSpec(["hidden_states", "gate"])]
    signature = seat_signature(Parent(Shift(), Gate()), specs)
    assert str(signature) == "(y, gate, shift=0.5)"


def test_an_input_that_one_member_requires_has_no_default() -> None:
    specs = [ModuleSpec(["y", "shift"], ["h"]), ModuleSpec(["h", "shift"])]
    assert str(seat_signature(Parent(Shift(), Masked()), specs)) == "(y, shift)"
    specs = [ModuleSpec(["h", "shift"], ["y"]), ModuleSpec(["y", "shift"])]
    assert str(seat_signature(Parent(Masked(), Shift()), specs)) == "(h, shift)"


def test_the_seat_has_the_names_of_the_specs_and_not_of_the_parameters() -> None:
    specs = [ModuleSpec(["pixels"], ["tokens"]), ModuleSpec(["tokens", "offset"])]
    assert str(seat_signature(Parent(Double(), Shift()), specs)) == "(pixels, offset=0.5)"


def test_an_optional_parameter_left_out_is_not_in_the_signature() -> None:
    specs = [ModuleSpec(["x"], ["y"]), ModuleSpec(["y"])]
    assert str(seat_signature(Parent(Double(), Shift()), specs)) == "(x)"


def test_the_chain_in_the_seat_can_be_called_by_name() -> None:
    model = Parent(Double(), Shift())
    seat_signature(model)
    chain = model.second.fused_kernel
    assert torch.equal(chain(shift=1.0, x=X), X * 2 + 1.0)
    assert torch.equal(chain(X), X * 2 + 0.5)


ADD_NORM_GATE = [
    ModuleSpec(["hidden_states", "residual"], ["normed", "_"]),
    ModuleSpec(["normed", "gate"]),
]


def test_one_of_several_outputs_is_wired_and_the_other_goes_to_the_parent() -> None:
    class AddNormGate(Parent):
        def forward(self, x: Tensor, residual: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
            normed, residual = self.first(x, residual)
            return self.second(normed, gate=gate), residual

    model = AddNormGate(AddNorm(), Gate())
    specs = [
        ModuleSpec(["hidden_states", "residual"], ["hidden_states", "_"]),
        ModuleSpec(["hidden_states", "gate"]),
    ]
    with torch.no_grad():
        check_same(model, fuse(model, specs, inputs=3), lambda: model(X, X + 1, X - 1))


def test_both_outputs_of_a_member_are_wired_by_name() -> None:
    class Both(Parent):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            normed, summed = self.first(x, residual)
            return self.second(summed, normed)

    model = Both(AddNorm(), Total())
    specs = [ModuleSpec(["x", "residual"], ["normed", "summed"]), ModuleSpec(["summed", "normed"])]
    check_same(model, fuse(model, specs, inputs=2), lambda: model(X, X + 1))


def test_a_member_of_several_outputs_is_captured_from_its_first_call_on() -> None:
    class Both(Parent):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            normed, _ = self.first(x, residual)
            return self.second(normed)

    model = Both(AddNorm(), Square())
    layer = fuse(model, [ModuleSpec(["x", "residual"], ["y", "_"]), ModuleSpec(["y"])], inputs=2)
    for kernel_calls in (1, 2, 3):
        model(X, X)
        (group,) = report(model).groups
        assert (group.kernel_calls, group.member_calls) == (kernel_calls, 0)
    assert runs(layer) == 3


def test_a_kernel_does_not_run_where_a_member_returns_another_number_of_values() -> None:
    class Both(Parent):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return self.second(self.first(x, residual)[0])

    model = Both(AddNorm(), Square())
    specs = [ModuleSpec(["x", "residual"], ["y", "_", "_"]), ModuleSpec(["y"])]
    check_same(
        model,
        fuse(model, specs, inputs=2),
        lambda: model(X, X),
        reason="first returns 2 values, its spec names 3 outputs; it gave no deferred value for "
        "'hidden_states' of 'second'",
    )


def test_a_kernel_does_not_run_where_the_outputs_arrive_in_another_order() -> None:
    class Swapped(Parent):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            normed, summed = self.first(x, residual)
            return self.second(normed, summed)

    model = Swapped(AddNorm(), Total())
    specs = [ModuleSpec(["x", "residual"], ["normed", "summed"]), ModuleSpec(["summed", "normed"])]
    check_same(
        model,
        fuse(model, specs, inputs=2),
        lambda: model(X, X + 1),
        reason="the output of another module or call came as 'summed' of 'second'",
    )


def test_an_input_takes_the_latest_output_of_its_name() -> None:
    class Three(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x)))

    model = Three(Square(), Square())
    model.third = Square()
    specs = [ModuleSpec(["hidden_states"], ["hidden_states"])] * 3
    layer = fuse(model, specs, members=["first", "second", "third"])
    signature = inspect.signature(type(model.third.fused_kernel).forward)
    assert list(signature.parameters) == ["self", "hidden_states"]
    check_same(model, layer, lambda: model(X))


def test_an_output_can_feed_a_member_that_is_not_the_next_one() -> None:
    class Three(Parent):
        def forward(self, x: Tensor) -> Tensor:
            once = self.first(x)
            return self.third(once, self.second(once))

    model = Three(Double(), Square())
    model.third = Total()
    specs = [
        ModuleSpec(["x"], ["once"]),
        ModuleSpec(["once"], ["squared"]),
        ModuleSpec(["once", "squared"]),
    ]
    layer = fuse(model, specs, members=["first", "second", "third"])
    check_same(model, layer, lambda: model(X))


def test_an_optional_parameter_left_out_keeps_its_default() -> None:
    model = Parent(Double(), Shift())
    layer = fuse(model, [ModuleSpec(["x"], ["y"]), ModuleSpec(["y"])])
    check_same(model, layer, lambda: model(X))


def test_a_call_that_passes_a_parameter_left_out_runs_the_members() -> None:
    model = Parent(Double(), Shift())
    layer = fuse(model, [ModuleSpec(["x"], ["y"]), ModuleSpec(["y"])])
    check_same(
        model,
        layer,
        lambda: model(X, shift=2.0),
        reason="'shift' of 'second' was passed; its spec leaves it out",
    )


@pytest.mark.parametrize("others", [{}, {"shift": 0.25}])
def test_an_optional_parameter_in_the_spec_reaches_the_kernel(others: dict[str, float]) -> None:
    model = Parent(Double(), Shift())
    check_same(model, fuse(model, inputs=2), lambda: model(X, **others))


def test_a_keyword_only_parameter_is_wired_by_its_own_name() -> None:
    model = Parent(Double(), Gate())
    check_same(model, fuse(model, inputs=2), lambda: model(X, gate=X + 1))


def test_a_keyword_only_parameter_can_take_an_earlier_output() -> None:
    class ByKeyword(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(x, gate=self.first(x))

    model = ByKeyword(Double(), Gate())
    specs = [ModuleSpec(["x"], ["gate"]), ModuleSpec(["x", "gate"])]
    check_same(model, fuse(model, specs), lambda: model(X))


def test_arguments_without_names_are_named_by_the_spec() -> None:
    class Extra(Parent):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second(self.first(x), y, x)

    model = Extra(Double(), Total())
    specs = [ModuleSpec(["x"], ["doubled"]), ModuleSpec(["doubled", "y", "x"])]
    check_same(model, fuse(model, specs, inputs=2), lambda: model(X, X + 1))


def test_more_arguments_without_names_than_the_spec_has_run_the_members() -> None:
    class Extra(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x), x)

    model = Extra(Double(), Total())
    check_same(
        model,
        fuse(model),
        lambda: model(X),
        reason="'second' got 'positional argument 1', which its spec leaves out",
    )


def test_an_argument_without_a_name_may_be_called_as_a_parameter_is() -> None:
    class Rest(nn.Module):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            return x - rest[0]

    class Extra(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x), x)

    model = Extra(Double(), Rest())
    # "x" is the name of the value in `rest`, and of the parameter that takes the output.
    layer = fuse(model, [ModuleSpec(["x"], ["doubled"]), ModuleSpec(["doubled", "x"])])
    check_same(model, layer, lambda: model(X))


def test_one_outside_name_is_one_value_for_every_member() -> None:
    class Same(Parent):
        def forward(self, x: Tensor, first: float, second: float) -> Tensor:
            return self.second(self.first(x, first), second)

    specs = [ModuleSpec(["y", "shift"], ["h"]), ModuleSpec(["h", "shift"])]
    model = Same(Shift(), Masked())
    shift = 0.25
    check_same(model, fuse(model, specs, inputs=2), lambda: model(X, shift, shift))
    model = Same(Shift(), Masked())
    check_same(
        model,
        fuse(model, specs, inputs=2),
        lambda: model(X, 0.25, 0.75),
        reason="another member got another value for 'shift' of 'first'",
    )


def test_an_input_that_is_not_wired_comes_from_outside_under_its_own_name() -> None:
    class Outside(Parent):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.second(y, self.first(x))

    class Minus(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left - right

    model = Outside(Double(), Minus())
    layer = fuse(model, [ModuleSpec(["x"], ["left"]), ModuleSpec(["_", "left"])], inputs=2)
    signature = inspect.signature(type(model.second.fused_kernel).forward)
    assert list(signature.parameters) == ["self", "x", "left"]
    check_same(model, layer, lambda: model(X, X + 1))


def test_an_input_that_is_not_wired_cannot_have_the_name_of_another_input() -> None:
    class Minus(nn.Module):
        def forward(self, left: Tensor, right: Tensor, y: Tensor) -> Tensor:
            return left - right - y

    specs = [ModuleSpec(["x"], ["y"]), ModuleSpec(["_", "left", "y"])]
    assert "'left'" in mismatch(Parent(Double(), Minus()), specs)


class PositionalOnly(nn.Module):
    def forward(self, y: Tensor, shift: float = 0.5, /) -> Tensor:
        return y + shift


@pytest.mark.parametrize(
    ("second", "args", "kwargs", "text"),
    [
        (Gate, (), {}, "missing 1 required keyword-only argument: 'gate'"),
        (Shift, (1.0,), {"shift": 2.0}, "got multiple values for argument 'shift'"),
        (PositionalOnly, (), {"shift": 1.0}, "positional-only arguments passed as keyword"),
    ],
)
def test_a_call_that_was_an_error_before_fusing_is_the_same_error(
    second: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    class Wrong(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x), *args, **kwargs)

    model = Wrong(Double(), second())
    layer = fuse(model, inputs=2)
    with pytest.raises(TypeError, match=text):
        model(X)
    assert runs(layer) == 0


def test_one_member_is_a_chain_with_its_own_signature() -> None:
    model = nn.Sequential(Shift())
    model.add_module("only", Shift())
    with mapped():
        fuse_modules(model, ["only"], kernel="Chain")
    assert str(inspect.signature(model.only.fused_kernel.forward)) == "(y, shift=0.5)"


def test_more_specs_than_modules_are_refused() -> None:
    assert mismatch(Parent(Double(), Square()), [ModuleSpec(["x"], ["x"])] * 3) == (
        "There are 3 specs for 2 modules, 'first', 'second'. "
        "Give one ModuleSpec per module, or none."
    )


def test_fewer_specs_than_modules_are_refused() -> None:
    assert mismatch(Parent(Double(), Square()), []) == (
        "There are 0 specs for 2 modules, 'first', 'second'. "
        "Give one ModuleSpec per module, or none."
    )


@pytest.mark.parametrize(
    "specs",
    [
        ModuleSpec(["x"], ["x"]),
        [["x"], ["y"]],
        {"first": ModuleSpec(["x"], ["x"])},
        3,
        (spec for spec in ()),
    ],
    ids=["one spec", "lists", "mapping", "number", "generator"],
)
def test_what_is_not_a_list_of_specs_is_refused(specs: Any) -> None:
    assert mismatch(Parent(Double(), Square()), specs) == (
        "specs is a list of ModuleSpec, one per module: "
        "[ModuleSpec(inputs=['x'], outputs=['y']), ...]."
    )


def test_more_inputs_than_parameters_are_refused() -> None:
    specs = [ModuleSpec(["x", "mask"], ["y"]), ModuleSpec(["y"])]
    text = mismatch(Parent(Double(), Square()), specs)
    assert text.startswith("The spec of 'first' names 2 inputs, ['x', 'mask'], but its forward ")
    assert text.endswith(" Name at most its parameters, in order.")


def test_a_required_parameter_left_out_is_refused() -> None:
    text = mismatch(Parent(AddNorm(), Gate()), [ModuleSpec(["x"], ["y"]), ModuleSpec(["y"])])
    assert text.startswith("The spec of 'first' leaves out 'residual', which its forward ")
    assert text.endswith(" requires. Only parameters with a default can be left out.")


def test_a_required_keyword_only_parameter_left_out_is_refused() -> None:
    text = mismatch(Parent(Double(), Gate()), [ModuleSpec(["x"], ["y"]), ModuleSpec(["y"])])
    assert text.startswith("The spec of 'second' leaves out 'gate', which its forward ")


def test_an_input_that_is_produced_only_later_is_refused() -> None:
    specs = [ModuleSpec(["b"], ["a"]), ModuleSpec(["c"], ["b"])]
    assert mismatch(Parent(Double(), Square()), specs) == (
        "Input 'b' of 'first' is produced only later, by 'second'. List the paths in the order in "
        "which the modules run, or name the input otherwise if it comes from outside."
    )


def test_a_later_member_cannot_take_what_is_produced_after_it() -> None:
    model = Parent(Double(), Total())
    model.third = Square()
    specs = [ModuleSpec(["x"], ["a"]), ModuleSpec(["a", "c"], ["b"]), ModuleSpec(["b"], ["c"])]
    assert mismatch(model, specs, ["first", "second", "third"]) == (
        "Input 'c' of 'second' is produced only later, by 'third'. List the paths in the order in "
        "which the modules run, or name the input otherwise if it comes from outside."
    )


def test_an_output_that_no_later_member_takes_is_refused() -> None:
    specs = [ModuleSpec(["x"], ["a"]), ModuleSpec(["b"], ["c"])]
    assert mismatch(Parent(Double(), Square()), specs) == (
        "No later member takes an output of 'first'. Give the output and the input it feeds the "
        "same name: specs=[ModuleSpec(inputs=[..], outputs=[..]), ..]."
    )


def test_one_outside_name_with_two_defaults_is_refused() -> None:
    class Other(nn.Module):
        def forward(self, y: Tensor, shift: float = 0.25) -> Tensor:
            return y - shift

    specs = [ModuleSpec(["x", "shift"], ["y"]), ModuleSpec(["y", "shift"])]
    assert mismatch(Parent(Shift(), Other()), specs) == (
        "Input 'shift' comes from outside with default 0.5 for an earlier member and 0.25 for "
        "'second'. Give one of them another name: "
        "specs=[ModuleSpec(inputs=[..], outputs=[..]), ..]."
    )


def test_a_first_member_without_parameters_is_inferred_to_take_none() -> None:
    class Constant(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(3)

    class Start(Parent):
        def forward(self) -> Tensor:
            return self.second(self.first())

    model = Start(Constant(), Square())
    fuse_modules(model, ["first", "second"])
    assert torch.equal(model(), torch.ones(3))


def test_a_forward_without_a_signature_is_refused() -> None:
    class Opaque(nn.Module):
        forward = max

    with pytest.raises(SpecMismatchError, match=r"^The forward of 'first' has no signature: "):
        fuse_modules(Parent(Opaque(), Square()), ["first", "second"])


def test_every_refusal_is_a_fusion_error_and_a_value_error() -> None:
    with pytest.raises(FusionError):
        ModuleSpec([], [])
    with pytest.raises(ValueError, match="outputs is empty"):
        ModuleSpec([], [])
