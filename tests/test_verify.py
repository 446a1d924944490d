"""`verify`: what it compares, that it leaves nothing behind, and what it says."""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from structure import structure
from support import PATHS, Model, Norm, WeightKernel, mapped, members_kernel, runs
from torch import Tensor, nn
from torch.nn import functional as F

import module_fusion
from module_fusion import (
    FusedModule,
    FusionError,
    fuse,
    fuse_modules,
    report,
    unfuse_modules,
    verify,
)


class Inexact(WeightKernel):
    """Right, and not equal to the bit: it computes in float64."""

    def forward(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        wide = x.double()
        h = norm.weight.double() * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate = F.silu(F.linear(h, mlp.gate_proj.weight.double()))
        product = gate * F.linear(h, mlp.up_proj.weight.double())
        return F.linear(product, mlp.down_proj.weight.double()).to(x.dtype)


def fused_with(kernel: type[nn.Module], model: nn.Module, paths: Any = PATHS) -> nn.Module:
    with mapped(K=kernel):
        fuse_modules(model, paths, kernel="K")
    return model


# What it says


def test_a_kernel_with_the_same_bits_is_equal_to_the_bit(model: Model, x: Tensor):
    kernel = members_kernel(1)
    fused_with(kernel, model)
    found = verify(model, x)
    assert runs(kernel) == 2
    assert found.passed
    assert found.equal
    assert found.verdict == "Passed, equal to the bit: kernels ran 2 times"
    assert [(group.path, group.kernel_calls) for group in found.groups] == [("kernel", 1)] * 2
    assert found.first_difference is None


def test_it_says_how_often_kernels_ran_in_good_english(x: Tensor):
    model = Model(1).to(x.device)
    fused_with(members_kernel(1), model)
    assert verify(model, x).verdict == "Passed, equal to the bit: a kernel ran once"


def test_a_more_accurate_kernel_passes_and_is_not_called_equal(model: Model, x: Tensor):
    fused_with(Inexact, model)
    found = verify(model, x)
    assert found
    assert not found.equal
    assert "equal to the bit" not in found.verdict.replace("not equal to the bit", "")
    assert found.first_difference == found.groups[0]
    output = found.outputs[0]
    assert (output.name, output.shape, output.dtype) == ("output", (2, 3, 8), "float32")
    with torch.no_grad():
        fused = model(x)
        unfuse_modules(model)
        apart = (fused - model(x)).abs()
    assert output.max_abs == pytest.approx(float(apart.max()))
    assert output.max_ulp > 0
    assert 0.99 < output.cosine <= 1
    assert all(group.kernel_error < group.member_error for group in found.groups)


def test_where_no_kernel_runs_the_members_are_equal_and_the_reason_is_said(model: Model, x: Tensor):
    fused_with(WeightKernel, model)
    model.layers[1].norm.register_forward_hook(lambda *_: None)
    found = verify(model, x)
    assert [group.path for group in found.groups] == ["kernel", "members"]
    assert "has a hook" in str(found.groups[1].reason)
    assert "has a hook" in str(found)
    assert found.equal
    fuse_modules(plain := Model(2), PATHS)
    assert verify(plain, torch.randn(2, 8)).verdict == "Passed, equal to the bit: no kernel ran"


class OfNoGradient(WeightKernel):
    """For inference, and wrong."""

    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return 2 * WeightKernel.forward(self, x)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_kernel_that_did_not_run_for_gradients_is_not_said_to_be_checked(
    model: Model, x: Tensor, gradients: bool
):
    fused_with(OfNoGradient, model.eval())
    found = verify(model, x, gradients=gradients)
    assert [group.unchecked for group in found.groups] == [True, True]
    assert not found.verdict.startswith("Passed")
    for said in (str(found), found._repr_html_(), json.dumps(found.to_dict())):
        assert "NOT CHECKED in 2 of 2 groups" in said
    for said in (str(found), found._repr_html_()):
        assert "with torch.no_grad(): verify(model, ...)" in said
    assert found.to_dict()["unchecked"][0] == ["layers.0.norm", "layers.0.mlp"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_kernel_without_a_backward_is_checked_where_the_caller_records_no_gradients(
    model: Model, x: Tensor, mode: Any
):
    fused_with(OfNoGradient, model.eval())
    with mode():
        found = verify(model, x)
    assert [group.kernel_calls for group in found.groups] == [1, 1]
    assert not found.passed
    assert not found.unchecked


def test_of_several_groups_those_that_were_not_checked_are_counted(model: Model, x: Tensor):
    model.eval()
    with mapped(K=Inexact, OfNoGradient=OfNoGradient):
        fuse_modules(model, ["layers.0.norm", "layers.0.mlp"], kernel="K")
        fuse_modules(model, ["layers.1.norm", "layers.1.mlp"], kernel="OfNoGradient")
    found = verify(model, x)
    assert found.passed
    assert found.verdict.startswith("Kernels NOT CHECKED in 1 of 2 groups")
    assert "a kernel ran once, each within rounding" in found.verdict


def test_the_report_folds_blocks_and_its_rows_are_what_the_text_shows(model: Model, x: Tensor):
    found = verify(fused_with(Inexact, model), x)
    text = str(found)
    assert text.splitlines()[0] == f"{found.verdict}."
    assert "kernel x2" in text
    assert "layers.[0-1]" in text
    assert "The first group whose output differs: layers.0.norm -> " in text
    assert "\x1b" not in text
    for table in found.tables():
        assert all(len(row) == len(table.headers) for row in table.rows)
        assert all(cell in text for row in table.rows for cell in row)
    assert [table.title for table in found.tables()] == ["outputs", "groups"]


def test_the_report_goes_through_json(model: Model, x: Tensor):
    found = verify(fused_with(Inexact, model), x, gradients=True)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["passed"] is True
    assert plain["equal"] is False
    assert plain["groups"][0]["difference"]["max_ulp"] > 0
    assert plain["first_difference"]["paths"] == ["layers.0.norm", "layers.0.mlp"]
    assert len(plain["gradients"]) == 8


# Outputs of any structure


@dataclass
class Packed:
    values: Any
    label: str


class Pair(NamedTuple):
    first: Any
    second: Any


class Store:
    """As a cache: neither a dataclass nor a container."""

    __slots__ = ("__dict__", "kept")

    def __init__(self, kept: Any) -> None:
        self.kept = kept
        self.layers = [kept, None]
        self.me = self


SHAPES = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y * 2),
    "named tuple": lambda y: Pair(y, [y]),
    "dict": lambda y: OrderedDict(logits=y, more={"a": [y, None]}),
    "dataclass": lambda y: Packed({"y": y}, "a label"),
    "object": lambda y: Store(y),
    "values": lambda y: {"n": 3, "s": "text", "none": None, "nan": float("nan"), "y": y, 4: {1, 2}},
    "integers": lambda y: (y.argmax(-1), y > 0),
    "complex": lambda y: torch.complex(y, -y),
    "half": lambda y: y.half(),
}


class Shaped(nn.Module):
    """A model that returns its values in some structure."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.model = Model(1)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.model(x))


SHAPED_PATHS = ["model.layers.*.norm", "model.layers.*.mlp"]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_of_any_structure_are_compared(shape: str):
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    equal = fused_with(WeightKernel, Shaped(SHAPES[shape]), SHAPED_PATHS)
    found = verify(equal, x)
    assert found.equal
    assert found.outputs
    inexact = fused_with(Inexact, Shaped(SHAPES[shape]), SHAPED_PATHS)
    found = verify(inexact, x)
    assert found.passed
    if shape not in ("integers", "half"):
        assert not found.equal


_CALLS = [0]


def _first(a: Any, b: Any) -> Any:
    """One value at odd calls, the other one at even calls: what only the fused run gives."""
    _CALLS[0] += 1
    return a if _CALLS[0] % 2 else b


DIFFERENT = {
    "another class": (lambda y: _first((y,), [y]), "list of 1 fused, tuple of 1 unfused"),
    "another size": (lambda y: _first((y,), (y, y)), "tuple of 2 fused, tuple of 1 unfused"),
    "another key": (lambda y: _first({"a": y}, {"b": y}), "only the unfused run has it"),
    "another shape": (lambda y: _first(y, y[:1]), "shape (1, 8) fused, (2, 8) unfused"),
    "another dtype": (lambda y: _first(y, y.double()), "dtype float64 fused, float32 unfused"),
    "another device": (lambda y: _first(y, y.to("meta")), "device meta fused, cpu unfused"),
    "another number": (lambda y: _first({"n": 1}, {"n": 2}), "n: 2 fused, 1 unfused"),
    "another string": (lambda y: _first(["a"], ["b"]), "0: 'b' fused, 'a' unfused"),
    "no value": (lambda y: _first([None], [y]), "a Tensor fused, a NoneType unfused"),
    "a NaN": (lambda y: _first(y, y / 0 * 0), "NaN or infinite at other places"),
    "an array": (lambda y: _first([np.ones(2)], [np.zeros(2)]), "the arrays differ"),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_a_difference_that_is_not_of_numbers_is_a_failure_that_says_where(difference: str):
    shape, said = DIFFERENT[difference]
    _CALLS[0] = 0
    model = Shaped(shape)
    fuse_modules(model, SHAPED_PATHS)
    found = verify(model, torch.randn(2, 8))
    # The model differs from itself at its third call: then that is what is said.
    assert not found
    assert any(said in str(d.name + ": " + str(d.problem)) for d in found.outputs)


def test_zero_and_minus_zero_and_nan_payloads_are_different_bits():
    for a, b in (
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (
            torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32),
            torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32),
        ),
    ):
        _CALLS[0] = 0
        model = Shaped(lambda y, a=a, b=b: _first(a, b))
        fuse_modules(model, SHAPED_PATHS)
        found = verify(model, torch.randn(2, 8))
        assert not found.equal
        assert not found.passed
        assert found.outputs[0].max_abs == 0


def measured(fused: Tensor, unfused: Tensor) -> Any:
    """The row of a model whose fused run returns one tensor, and every other run another."""
    _CALLS[0] = 0
    model = Shaped(lambda y: _first(unfused, fused))
    fuse_modules(model, SHAPED_PATHS)
    return verify(model, torch.randn(2, 8)).outputs[0]


def test_ulps_cosine_and_argmax_are_what_they_say():
    one = torch.tensor([[1.0, 2.0], [3.0, -4.0]], dtype=torch.bfloat16)
    other = one.clone()
    other[0, 0] = 1 + 2 * 2**-7
    found = measured(other, one)
    assert (found.max_ulp, found.argmax) == (2, 1.0)
    assert found.max_abs == found.max_rel == 2 * 2**-7
    tiny = torch.tensor([2**-149, 0.5])
    opposite = measured(-tiny, tiny)
    assert opposite.max_ulp == 2 * torch.tensor(0.5).view(torch.int32).item()
    assert opposite.cosine == -1
    assert measured(one.flip(-1), one).argmax == 0.0
    with_nan = torch.tensor([1.0, float("nan"), float("inf")])
    found = measured(torch.tensor([2.0, float("nan"), 3.0]), with_nan)
    assert found.nonfinite == (1, 2)
    assert "other places" in found.problem
    assert found.max_abs == 1


# Nothing is left behind


class Eventful(nn.Module):
    """Draws random numbers of every kind, writes buffers, attributes and its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(2)
        self.register_buffer("seen", torch.tensor([-0.0, float("nan")]))
        self.count = 0
        self.log: list[int] = []

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        self.count += 1
        self.log.append(self.count)
        self.seen = self.seen + 1
        self.added = x
        x += 1
        if cache is not None:
            cache.kept.append(x.clone())
        noise = torch.rand(8) + random.random() + float(np.random.rand())
        return F.dropout(self.inner(x) + noise, 0.5, training=self.training)


EVENTFUL_PATHS = ["inner.layers.*.norm", "inner.layers.*.mlp"]


def everything(model: nn.Module) -> list[Any]:
    """What may not change."""
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        {name: (id(b), b.clone().view(torch.int32).tolist()) for name, b in model.named_buffers()},
        [(id(p), id(p.grad), p._version, p.tolist()) for p in model.parameters()],
        [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
        [(id(type(m)), m._forward_hooks, m._forward_pre_hooks) for m in model.modules()],
        report(model).groups,
        structure(model),
    ]  # fmt: skip


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtypes", [None, [torch.float64, torch.float32]], ids=str)
def test_nothing_is_left_behind(gradients: bool, dtypes: Any):
    model = Eventful()
    fused_with(Inexact, model, EVENTFUL_PATHS)
    x, store = torch.randn(2, 8), Store([torch.zeros(1)])
    model(x.clone())
    for parameter in list(model.parameters())[:3]:
        parameter.grad = torch.full_like(parameter, -0.0)
    before, x_before, version = everything(model), x.clone(), x._version
    log = model.log
    found = verify(model, x, cache=store, gradients=gradients, dtypes=dtypes)
    assert found.passed, str(found)
    assert [group.path for group in found.groups] == ["kernel"] * 2 * len(dtypes or [1])
    assert everything(model) == before
    assert torch.equal(x, x_before)
    assert x._version == version
    assert [len(store.kept), model.count, model.log] == [1, 1, [1]]
    assert model.log is log
    changed = {d.name for d in found.outputs}
    assert {"output", "args.0", "kwargs.cache.kept.1"} <= changed


def test_nothing_is_left_behind_after_an_exception_in_either_run():
    class Failing(Inexact):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the kernel")

    class Late(Eventful):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("the model")

    for model, kernel, said in (
        (Eventful(), Failing, "the kernel"),
        (Late(), Inexact, "the model"),
    ):
        fused_with(kernel, model, EVENTFUL_PATHS)
        x = torch.randn(2, 8)
        before = everything(model)
        for dtypes in (None, [torch.float64]):
            with pytest.raises(KeyError, match=said):
                verify(model, x, dtypes=dtypes)
            assert everything(model) == before


def test_both_runs_draw_the_same_random_numbers():
    model = Eventful().train()
    fused_with(WeightKernel, model, EVENTFUL_PATHS)
    assert verify(model, torch.randn(2, 8)).equal


def test_the_kernel_is_watched_without_a_hook_on_a_member(model: Model, x: Tensor):
    seen: list[int] = []

    class Watching(Inexact):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(self.norm._forward_hooks) + len(self.mlp._forward_hooks))
            return Inexact.forward(self, x)

    fused_with(Watching, model)
    verify(model, x)
    assert seen == [0, 0]


# Dtypes and weights


def test_several_dtypes_are_run_with_weights_and_inputs_cast_and_kernels_chosen_anew():
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Seeing(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((x.dtype, self.mlp.up_proj.weight.dtype))
            return WeightKernel.forward(self, x)

    model = Model(2)
    model.layers[1].mlp.up_proj.weight = model.layers[0].mlp.up_proj.weight
    storage = torch.randn(2, 8)
    model.layers[0].norm.weight = nn.Parameter(storage[0])
    model.layers[1].norm.weight = nn.Parameter(storage[1])
    fused_with(Seeing, model)
    x = torch.randn(2, 8)
    before = everything(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    found = verify(model, x, dtypes=[torch.float32, torch.bfloat16])
    assert found.equal
    assert seen == [(torch.float32,) * 2] * 2 + [(torch.bfloat16,) * 2] * 2
    assert [d.run for d in found.outputs] == ["float32", "bfloat16"]
    assert [d.dtype for d in found.outputs] == ["float32", "bfloat16"]
    assert "in bfloat16" in str(found)
    assert everything(model) == before
    assert [p.data_ptr() for p in model.parameters()] == pointers
    model(torch.randn(2, 8))
    assert [group.kernel_calls for group in report(model).groups] == [1, 1]


# Gradients


def test_gradients_of_parameters_and_inputs_are_compared(model: Model, x: Tensor):
    fused_with(WeightKernel, model)
    x.requires_grad_()
    found = verify(model, x, gradients=True)
    assert found.equal
    names = [d.name for d in found.gradients]
    assert names == [*(name for name, _ in model.named_parameters()), "args.0"]
    assert x.grad is None
    found = verify(fused_with(Inexact, Model(2)), torch.randn(2, 8), gradients=True)
    assert found.passed
    assert not all(d.equal for d in found.gradients)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_it_works_without_gradients_of_the_caller_and_in_training(
    mode: Any, training: bool, gradients: bool
):
    model = fused_with(Inexact, Model(2)).train(training)
    with mode():
        found = verify(model, torch.randn(2, 8), gradients=gradients)
    assert found.passed, str(found)
    assert [group.kernel_calls for group in found.groups] == [1, 1]
    assert bool(found.gradients) is gradients


def test_the_loss_is_what_gradients_are_taken_of():
    class Losing(Shaped):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"loss": y.square().mean(), "logits": y * 1e6}

    model = fused_with(Inexact, Losing(lambda y: y), SHAPED_PATHS)
    x = torch.randn(2, 8)
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(model(x)["loss"], list(parameters.values()))
    found = verify(model, x, gradients=True)
    assert found.passed
    unfuse_modules(model)
    theirs = torch.autograd.grad(model(x)["loss"], list(parameters.values()))
    expected = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    assert any(expected)
    assert [d.max_abs for d in found.gradients] == expected


# What cannot be verified


def test_a_model_that_differs_from_itself_is_not_blamed_on_fusion(model: Model, x: Tensor):
    numbers = itertools.count()

    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + next(numbers))

    for kernel in (None, WeightKernel):
        drifting = Drifting()
        if kernel is None:
            fuse_modules(drifting, ["inner.layers.*.norm", "inner.layers.*.mlp"])
        else:
            fused_with(kernel, drifting, ["inner.layers.*.norm", "inner.layers.*.mlp"])
        found = verify(drifting, torch.randn(2, 8))
        assert not found
        assert len(found.problems) == 1
        assert "the unfused model differs from itself" in found.verdict


def test_nothing_fused_is_an_error_with_the_call_to_make(model: Model, x: Tensor):
    with pytest.raises(FusionError, match=r"Fuse it first: fuse\(model\)"):
        verify(model, x)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "generate"}, "Model has no method 'generate'"),
        ({"method": 3}, "method is the name of a method"),
        ({"dtypes": torch.float32}, "dtypes is a list of floating dtypes"),
        ({"dtypes": [torch.int8]}, "dtypes is a list of floating dtypes"),
        ({"dtypes": []}, "dtypes is a list of floating dtypes"),
    ],
)
def test_bad_arguments_are_typed_errors(model: Model, x: Tensor, options: Any, said: str):
    fuse_modules(model, PATHS)
    with pytest.raises(FusionError, match=said):
        verify(model, x, **options)
    with pytest.raises(FusionError, match=r"takes a torch\.nn\.Module, not int"):
        verify(3)


def test_a_keyword_that_the_method_has_too_is_an_error_and_by_position_it_works():
    class Taking(Shaped):
        def forward(self, x: Tensor, gradients: bool = False) -> Any:
            assert gradients in (False, "mine")
            return super().forward(x)

    model = fused_with(WeightKernel, Taking(lambda y: y), SHAPED_PATHS)
    x = torch.randn(2, 8)
    with pytest.raises(FusionError, match="has a parameter 'gradients', and so has verify"):
        verify(model, x, gradients=True)
    assert verify(model, x, "mine").equal


def test_inputs_that_can_be_used_only_once_are_an_error(model: Model):
    fuse_modules(model, PATHS)
    with pytest.raises(FusionError, match="these cannot be copied"):
        verify(model, iter([torch.randn(2, 8)]) and (value for value in [1]))


def test_a_random_generator_among_the_inputs_is_used_from_the_same_state_in_both_runs():
    class Drawing(Shaped):
        def forward(self, x: Tensor, generator: torch.Generator) -> Any:
            return super().forward(x + torch.rand(8, generator=generator))

    model = fused_with(WeightKernel, Drawing(lambda y: y), SHAPED_PATHS)
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    assert verify(model, torch.randn(2, 8), generator=generator).equal
    assert torch.equal(generator.get_state(), state)


def test_inputs_that_share_memory_share_it_in_the_copies():
    class Aliased(Shaped):
        def forward(self, x: Tensor, whole: Tensor) -> Any:
            whole += 1
            return super().forward(x)

    model = fused_with(Inexact, Aliased(lambda y: y), SHAPED_PATHS)
    whole = torch.zeros(4, 8)
    found = verify(model, whole[1:3], whole)
    assert {d.name for d in found.outputs} == {"output", "args.0", "args.1"}
    assert not whole.any()


# What became of the modules


def other_norm() -> Norm:
    torch.manual_seed(9)
    return Norm(8)


def replace_last(model: Model) -> None:
    model.layers[0].mlp = Model(1).layers[0].mlp


def replace_first(model: Model) -> None:
    model.layers[0].norm = other_norm()


def replace_both(model: Model) -> None:
    replace_last(model)
    replace_first(model)


def move(model: Model) -> None:
    model.layers[0].mlp = model.layers[1].mlp


def change_class(model: Model) -> None:
    model.layers[0].mlp.__class__ = type(Model(1).layers[0].mlp)


@pytest.mark.parametrize("kernel", [None, WeightKernel])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace_last, "'layers.0.norm' was fused, and the last module of its chain is no longer"),
        (replace_first, "'layers.0.norm', fused with 'layers.0.mlp' as 'norm', is no longer"),
        (move, "'layers.0.norm' was fused, and the last module of its chain is no longer"),
        (change_class, "the class of 'layers.0.mlp' was changed after fusing: it is Mlp"),
    ],
)
def test_a_member_replaced_after_fusing_does_not_pass(change: Any, said: str, kernel: Any):
    model = Model(2)
    if kernel is None:
        fuse_modules(model, PATHS)
    else:
        fused_with(kernel, model)
    change(model)
    found = verify(model, torch.randn(2, 8))
    assert not found
    if kernel is None:  # Without one, it is not known which module is around the members.
        said = said.replace("is no longer", "is not in the module given to verify: either this is")
    assert said in "\n".join(found.problems)
    assert "unfuse_modules(model)" in "\n".join(found.problems)


@pytest.mark.parametrize(("part", "other"), [("mlp", "norm"), ("norm", "mlp")])
def test_a_part_of_the_model_is_told_from_a_module_that_was_replaced(part: str, other: str):
    model = fused_with(WeightKernel, Model(2))
    found = verify(getattr(model.layers[0], part), torch.randn(2, 8))
    assert not found
    assert found.problems[0] == (
        f"'layers.0.{other}' is outside the module given to verify, and is fused with '(the module "
        f"itself)', which is in it. Give the module that has both: verify(model, ...)"
    )
    assert verify(model.layers[0], torch.randn(2, 8))


def test_a_whole_chain_replaced_after_fusing_does_not_pass():
    model = fused_with(WeightKernel, Model(2))
    replace_both(model)
    found = verify(model, torch.randn(2, 8))
    assert "the modules in 'layers.0' that were fused are no longer in the model" in found.verdict


def test_a_module_replaced_inside_a_member_is_named_with_what_to_do():
    class Wide(nn.Linear):
        pass

    model = fused_with(WeightKernel, Model(2))
    model.layers[1].mlp.up_proj = Wide(8, 16, bias=False)
    found = verify(model, torch.randn(2, 8))
    assert found.equal
    assert found.groups[1].path == "members"
    assert found.notes == (
        "layers.1.mlp.up_proj is a Wide, and was a Linear when the kernel was chosen, so the "
        "modules run; fuse again for a kernel that knows it",
    )
    assert found.notes[0] in str(found)


# Every kind of run


def test_a_kernel_that_is_given_other_inputs_than_the_members_is_found(
    model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch
):
    """The kernel is right about what it is given; the mechanism around it is not."""
    from module_fusion.chain import Chain

    fused_with(Inexact, model)
    gather = Chain.kernel_inputs

    def wrong(self: Chain, *args: Any) -> Any:
        inputs, reason = gather(self, *args)
        return [value * 1.5 for value in inputs], reason

    monkeypatch.setattr(Chain, "kernel_inputs", wrong)
    found = verify(model, x)
    assert "layers.0.norm -> layers.0.mlp: the kernel was given other inputs" in found.verdict


def test_a_difference_outside_the_kernels_is_found(model: Model, x: Tensor):
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(1)

        def forward(self, x: Tensor) -> Tensor:
            fused = isinstance(self.inner.layers[0].mlp, FusedModule)
            return self.inner(x) * (1.001 if fused else 1)

    asking = fused_with(Inexact, Asking(), ["inner.layers.*.norm", "inner.layers.*.mlp"])
    found = verify(asking, x.cpu())
    assert "output: differs in another place than the kernels' outputs" in found.verdict


def test_calls_in_threads_are_watched_and_judged(model: Model, x: Tensor):
    class Threaded(nn.Module):
        one_by_one = False

        def __init__(self) -> None:
            super().__init__()
            self.inner = Model(1)

        def forward(self, x: Tensor) -> Tensor:
            results: dict[int, Tensor] = {}

            def work(number: int) -> None:
                with torch.no_grad():
                    results[number] = self.inner(x + number)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
                if self.one_by_one:
                    thread.join()
            for thread in threads:
                thread.join()
            return torch.stack([results[number] for number in range(4)])

    for kernel, one_by_one in itertools.product((Inexact, _off), (True, False)):
        Threaded.one_by_one = one_by_one
        threaded = fused_with(kernel, Threaded(), ["inner.layers.*.norm", "inner.layers.*.mlp"])
        found = verify(threaded, torch.randn(2, 8))
        assert found.groups[0].kernel_calls == 4
        assert found.passed is (kernel is Inexact), str(found)
        assert "other threads" in found.notes[0]


class _off(Inexact):
    def forward(self, x: Tensor) -> Tensor:
        return Inexact.forward(self, x) * 1.001


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_run_in_eager_mode_and_it_is_said(whole: bool):
    model: Any = Model(2)
    fused_with(Inexact, model)
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.layers[0].compile(backend="eager")
    found = verify(model, torch.randn(2, 8))
    assert found.passed
    assert [group.kernel_calls for group in found.groups] == [1, 1]
    assert "compiled modules ran in eager mode" in found.notes[0]
    assert not verify(_compiled(_off), torch.randn(2, 8))


def _compiled(kernel: type[nn.Module]) -> Any:
    return torch.compile(fused_with(kernel, Model(1)), backend="eager")


@pytest.fixture(scope="module")
def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    fuse(model, {"rms_norm_mlp": True})
    return model


def test_a_language_model_with_its_cache_labels_and_gradients(language_model: Any):
    ids = torch.randint(64, (2, 7))
    found = verify(language_model, ids, labels=ids, use_cache=True, gradients=True)
    assert found.passed
    names = {d.name for d in found.outputs}
    assert {"loss", "logits", "past_key_values.layers.1.keys"} <= names
    assert [group.kernel_calls for group in found.groups] == [1, 1]


@pytest.mark.parametrize("dtypes", [None, [torch.float32, torch.bfloat16]], ids=str)
def test_generate(language_model: Any, dtypes: Any):
    ids = torch.randint(64, (2, 5))
    found = verify(
        language_model, ids, method="generate", max_new_tokens=4, do_sample=True, dtypes=dtypes
    )
    assert found.passed
    assert found.outputs[0].shape == (2, 9)
    assert {group.kernel_calls for group in found.groups} == {4}


def test_a_cache_given_as_input_is_as_before(language_model: Any):
    with torch.no_grad():
        cache = language_model(torch.randint(64, (1, 5)), use_cache=True).past_key_values
    kept = [layer.keys.clone() for layer in cache.layers]
    found = verify(language_model, torch.randint(64, (1, 1)), past_key_values=cache)
    assert found.passed
    assert {"past_key_values.layers.0.keys"} <= {d.name for d in found.outputs}
    assert cache.get_seq_length() == 5
    assert all(torch.equal(k, layer.keys) for k, layer in zip(kept, cache.layers, strict=True))


def test_a_vision_model_with_its_patch_embedding():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    model = transformers.SiglipVisionModel(config).eval()
    fuse(model, {"patch_embeddings": True})
    pixels = torch.randn(2, 3, 56, 56)
    found = verify(model, pixels, dtypes=[torch.float32, torch.bfloat16])
    assert found.passed, str(found)
    assert [group.kernel_calls for group in found.groups] == [1, 1]


def test_there_is_no_second_copy_of_the_weights(model: Model, x: Tensor):
    """Every run reads the very parameters of the model."""
    pointers: set[int] = set()

    class Reading(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            pointers.add(self.mlp.up_proj.weight.data_ptr())
            return WeightKernel.forward(self, x)

    verify(fused_with(Reading, model), x)
    assert pointers == {layer.mlp.up_proj.weight.data_ptr() for layer in model.layers}
    assert module_fusion.verify is verify
