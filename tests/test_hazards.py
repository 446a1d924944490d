"""One test per hazard of a captured call: the unfused result, or a typed error with its fix."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import support
import torch
from support import Block, Mlp, Norm, WeightKernel, mapped, members_kernel, runs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from written import PATHS, assert_same, fuse, gradients, model_of, path_of

from module_fusion import DeferredUseError, ModuleSpec, fuse_modules, report, unfuse_modules


def checkpoint_last_member(use_reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + checkpoint(self.mlp, self.norm(x), use_reentrant=use_reentrant)

    return forward


def test_a_reentrant_checkpoint_around_the_last_member_is_an_error_that_names_the_fix(
    x: Tensor,
) -> None:
    model = model_of(checkpoint_last_member(use_reentrant=True), x.device)
    expected = gradients(model, x)
    fuse(model)
    with pytest.raises(DeferredUseError, match=r"the whole block, with use_reentrant=False"):
        gradients(model, x)
    unfuse_modules(model)
    assert_same(gradients(model, x), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_checkpoint_around_the_last_member_gives_the_right_gradients_or_an_error(
    x: Tensor, dropout: float
) -> None:
    model = model_of(checkpoint_last_member(use_reentrant=False), x.device)
    mlp = model[0].mlp
    mlp.down_proj = nn.Sequential(nn.Dropout(dropout), mlp.down_proj)
    torch.manual_seed(3)
    expected = gradients(model, x)
    fuse(model, members_kernel(1))
    torch.manual_seed(3)
    try:
        got = gradients(model, x)
    except DeferredUseError:
        return
    assert_same(got, expected)


def test_a_reentrant_checkpoint_that_closes_over_the_value_is_an_error(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        (h,) = [norm(x) for norm in [self.norm]]
        return x + checkpoint(lambda t: self.mlp(h) + t, x, use_reentrant=True)

    model = model_of(forward, x.device)
    fuse(model)
    with pytest.raises(DeferredUseError, match=r"its gradient would be lost.*use_reentrant=False"):
        gradients(model, x)


def test_a_checkpoint_that_closes_over_the_value_gives_the_right_gradients(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + checkpoint(lambda: self.mlp(h), use_reentrant=False)

    model = model_of(forward, x.device)
    expected = gradients(model, x)
    fuse(model)
    assert_same(gradients(model, x), expected)
    assert path_of(model)[0] == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_around_all_that_a_block_does_has_the_right_gradients(
    x: Tensor, use_reentrant: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

        return checkpoint(inside, x, use_reentrant=use_reentrant)

    model = model_of(forward, x.device)
    expected = gradients(model, x)
    fuse(model)
    assert_same(gradients(model, x), expected)
    # A reentrant one need not do the same again: its first run keeps nothing for the backward.
    assert path_of(model)[:2] == ((1, 1) if use_reentrant else (0, 2))


def test_saved_tensor_hooks_around_the_last_member_do_not_reach_the_first(x: Tensor) -> None:
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return x + self.mlp(h)

    model = model_of(forward, x.device)
    expected = gradients(model, x)
    unfused = packed.copy()
    packed.clear()
    fuse(model)
    assert_same(gradients(model, x), expected)
    assert packed == unfused


def test_saved_tensor_hooks_around_the_first_member_reach_it(x: Tensor) -> None:
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor

    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            h = self.norm(x)
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    expected = gradients(model, x)
    unfused = packed.copy()
    packed.clear()
    fuse(model)
    assert_same(gradients(model, x), expected)
    assert packed == unfused


def modified_between(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    x.add_(1)
    return x + self.mlp(h)


def test_an_input_modified_in_place_before_use_is_an_error(x: Tensor) -> None:
    model = model_of(modified_between, x.device)
    fuse(model)
    with torch.no_grad(), pytest.raises(DeferredUseError, match=r"modified in place .*'0.norm'"):
        model(x)


def test_a_view_of_an_input_modified_in_place_before_use_is_an_error(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        x[0, 0].zero_()
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    fuse(model)
    with torch.no_grad(), pytest.raises(DeferredUseError):
        model(x)


def test_a_weight_modified_in_place_before_use_is_an_error(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        self.norm.weight.mul_(2)
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    fuse(model)
    with torch.no_grad(), pytest.raises(DeferredUseError):
        model(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "broken graph"])
def test_under_torch_compile_a_captured_input_keeps_its_value(
    x: Tensor, backend: str, broken: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x * 1
        h = self.norm(x)
        if broken:
            torch._dynamo.graph_break()
        x.add_(1)
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    with torch.no_grad():
        expected = model(x)
        fuse(model)
        torch._dynamo.reset()
        model[0].norm.calls = 0
        got = torch.compile(model, backend=backend, fullgraph=not broken)(x)
    torch.testing.assert_close(got, expected)
    assert broken or model[0].norm.calls == 0


def compiled_and_unfused(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the model gives fused and compiled into one graph, and what it gives unfused."""
    with torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        expected = model(x)
        model.load_state_dict(state)
        fuse(model)
        got = torch.compile(model, backend="eager", fullgraph=True)(x)
        model.load_state_dict(state)
    return got, expected


def weight_modified(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    self.norm.weight.mul_(2)
    return x + self.mlp(h)


def matmul(self: Any, x: Tensor) -> Tensor:
    return self.mlp(self.norm(x) @ self.mlp.up_proj.weight[:8])


def divided(self: Any, x: Tensor) -> Tensor:
    return self.mlp(self.norm(x) / (x.abs() + 1))


def aliased(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    alias = h
    h += x
    return self.mlp(h) + alias


def assigned(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    h[0] = 0.5
    return self.mlp(h)


def compared(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    return self.mlp(torch.where(h < x, h, x))


def double_tensors(h: Any) -> Any:
    return h * 2 if isinstance(h, Tensor) else h


def asked_by_a_helper(self: Any, x: Tensor) -> Tensor:
    return self.mlp(double_tensors(self.norm(x)))


def used_after(self: Any, x: Tensor) -> Tensor:
    h = self.norm(x)
    return self.mlp(h) + h @ self.mlp.up_proj.weight[:8]


@pytest.mark.parametrize(
    "forward",
    [
        weight_modified,
        matmul,
        divided,
        aliased,
        assigned,
        compared,
        asked_by_a_helper,
        used_after,
    ],
)
def test_under_torch_compile_any_other_use_of_the_value_is_the_unfused_one(
    x: Tensor, forward: Any
) -> None:
    model = model_of(forward, x.device)
    got, expected = compiled_and_unfused(model, x)
    assert torch.equal(got, expected)
    assert "compiled graphs run the members" in str(path_of(model)[2])
    unfuse_modules(model)
    for module in model.modules():
        assert "_fusion" not in module.__dict__


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def test_a_member_without_weights_runs_in_compiled_graphs_and_the_report_says_so(
    x: Tensor,
) -> None:
    calls = []

    class Counted(WeightKernel):
        can_torch_compile = True
        has_backward = True

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            gate = F.silu(F.linear(x, self.mlp.gate_proj.weight))
            return F.linear(gate * F.linear(x, self.mlp.up_proj.weight), self.mlp.down_proj.weight)

    model = support.Model(1).to(x.device)
    model.layers[0].norm = Weightless()
    expected = model(x)
    with mapped(Kernel=Counted):
        fuse_modules(model, ["layers.*.norm", "layers.*.mlp"], kernel="Kernel")
    assert torch.equal(model(x), expected)
    reason = "norm has no weights, so it may return its input: compiled graphs run it"
    assert report(model).groups[0].reason == reason
    assert len(calls) == 1
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert len(calls) == 1


class Gate(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["graph break", "compiled sibling", "compiled in place"])
def test_a_value_that_waits_goes_into_compiled_code_as_the_unfused_one(
    x: Tensor, where: str, backend: str
) -> None:
    """A frame that starts with a captured output: the rest of one, or another module's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        if where == "graph break":
            torch._dynamo.graph_break()
        return x + self.gate(h) * self.mlp(h)

    model = model_of(forward, x.device)
    model[0].gate = Gate().to(x.device)
    counter = CompileCounterWithBackend(backend)

    def compiles_and_gradients() -> tuple[list[int], list[Tensor]]:
        torch.compiler.reset()
        counter.frame_count = 0
        run: Any = model
        if where == "graph break":
            run = torch.compile(model, backend=counter)
        elif where == "compiled sibling":
            model[0].gate = torch.compile(gate, backend=counter, fullgraph=True)
        else:
            model[0].gate.compile(backend=counter, fullgraph=True)
        counts, found = [], []
        for scale in (1, 2, 3):
            found += gradients(run, x * scale)
            counts.append(counter.frame_count)
        model[0].gate, gate._compiled_call_impl = gate, None
        return counts, found

    gate = model[0].gate
    before, expected = compiles_and_gradients()
    fuse(model, members_kernel(1))
    counts, got = compiles_and_gradients()
    assert torch.equal(got[0], expected[0])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # The gradient of a value that is used twice.
    # Nothing is compiled again at every call that was not before.
    assert counts[2] - counts[1] <= before[2] - before[1]
    assert counts[0] > 0


def test_a_value_that_waits_is_not_computed_anew_in_compiled_code(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x * 1
        h = self.norm(x)
        if self.modifies:
            x.add_(1)
        return self.gate(h) + self.mlp(h)

    model = model_of(forward, x.device)
    model[0].modifies = False
    model[0].gate = Gate().to(x.device)
    expected = model(x)
    fuse(model, members_kernel(1))
    model[0].gate.compile(backend="eager")
    model[0].modifies = True
    with pytest.raises(DeferredUseError, match="modified in place or replaced"), torch.no_grad():
        model(x)
    model[0].modifies = False
    assert torch.equal(model(x), expected)
    assert "goes into compiled code" in str(path_of(model)[2])
    model[0].gate._compiled_call_impl = None
    for again in (False, True):
        kernel = members_kernel(1)
        if again:
            fuse(model, kernel)
        assert torch.equal(model(x), expected)
        assert runs(kernel) == 0  # The parent uses the value first.
        assert ("goes into compiled code" in str(path_of(model)[2])) is not again


def test_a_value_that_was_computed_goes_into_compiled_code_as_it_is(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        before = h.sum()
        return self.gate(h) + self.mlp(h) + before

    model = model_of(forward, x.device)
    model[0].gate = Gate().to(x.device)
    expected = model(x)
    model[0].gate = torch.compile(model[0].gate, backend="eager", fullgraph=True)
    fuse(model, members_kernel(1))
    for _ in range(3):
        assert torch.equal(model(x), expected)


def test_under_torch_compile_an_untouched_value_still_reaches_the_kernel_elsewhere(
    x: Tensor,
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.straight = Block()
            self.touched = model_of(matmul, x.device)[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.touched(self.straight(x))

    model = Mixed().to(x.device)
    expected = model(x)
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, ["*.norm", "*.mlp"], kernel="Kernel")
    for block in (model.straight, model.touched):
        block.norm.calls = 0
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert (model.straight.norm.calls, model.touched.norm.calls) == (0, 1)


def test_an_inference_tensor_modified_in_place_before_use_was_copied(x: Tensor) -> None:
    model = model_of(modified_between, x.device)
    kernel = members_kernel(1)
    with torch.inference_mode():
        expected = model(x.clone())
        fuse(model, kernel)
        assert torch.equal(model(x.clone()), expected)
    assert runs(kernel) == 1


def test_without_a_kernel_an_input_may_be_modified_in_place_before_use(x: Tensor) -> None:
    model = model_of(modified_between, x.device)
    with torch.no_grad():
        expected = model(x.clone())
        fuse_modules(model, PATHS)
        assert torch.equal(model(x.clone()), expected)


class TupleNorm(Norm):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x), x.mean()


def tuple_model(device: torch.device) -> nn.Sequential:
    def forward(self: Any, x: Tensor) -> Tensor:
        h, mean = self.norm(x)
        return x + self.mlp(h) + mean

    model = model_of(forward, device)
    model[0].norm = TupleNorm().to(device)
    return model


def test_a_tuple_returning_member_is_unpacked_without_a_spec(x: Tensor) -> None:
    model = tuple_model(x.device)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert path_of(model)[:2] == (0, 1)


def test_a_tuple_returning_member_with_a_spec_is_deferred_element_by_element(x: Tensor) -> None:
    model = tuple_model(x.device)
    expected = model(x)
    specs = [ModuleSpec(["x"], ["h", "_"]), ModuleSpec(["h"])]
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(model, PATHS, specs, kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert runs(kernel) == 1


def test_a_spec_with_the_wrong_number_of_outputs_runs_the_members(x: Tensor) -> None:
    model = tuple_model(x.device)
    expected = model(x)
    specs = [ModuleSpec(["x"], ["h", "_", "_"]), ModuleSpec(["h"])]
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, PATHS, specs, kernel="Kernel")
    for calls in (1, 2):
        assert torch.equal(model(x), expected)
        assert path_of(model)[:2] == (0, calls)
    assert "returns 2 values, its spec names 3 outputs" in str(path_of(model)[2])


class Passing(Norm):
    """Passes what it does not work on: a context, None where there is none."""

    def forward(self, x: Any, context: Any = None) -> Any:  # type: ignore[override]
        return context if x is None else super().forward(x), context


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("norm", [nn.Identity, Norm], ids=["identity", "with a weight"])
def test_a_member_that_may_return_the_none_it_is_given_runs_at_its_call(
    x: Tensor, norm: type[nn.Module], by_name: bool
) -> None:
    class Optional(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.norm, self.mlp, self.name = norm(), Mlp(), name

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            context = self.norm(**{self.name: context}) if self.name else self.norm(context)
            return self.mlp(x if context is None else x + context)

    if norm is Norm:
        norm = type("Lenient", (Norm,), {"forward": lambda s, x: x if x is None else x * s.weight})
    name = next(iter(inspect.signature(norm.forward).parameters.keys() - {"self", "s"}))
    model = nn.ModuleList([Optional(name if by_name else "")]).to(x.device)
    expected = model[0](x), model[0](x, x)
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(model, PATHS, kernel="Kernel")
    assert torch.equal(model[0](x), expected[0])
    assert "norm got None, which it may return as it is" in str(path_of(model)[2])
    assert torch.equal(model[0](x, x), expected[1])
    compiled = torch.compile(model[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected[0])
    assert torch.equal(compiled(x, x), expected[1])


def test_an_element_that_is_none_is_none_for_the_parent(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h, context = self.norm(x)
        return x + self.mlp(h) * (1 if context is None else 2)

    model = model_of(forward, x.device)
    model[0].norm = Passing().to(x.device)
    expected = model(x)
    specs = [ModuleSpec(["x"], ["h", "_"]), ModuleSpec(["h"])]
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, PATHS, specs, kernel="Kernel")
    for _ in range(3):
        assert torch.equal(model(x), expected)
    assert "may return None, or another number of values" in str(path_of(model)[2])


class TwoInputs(Mlp):
    def forward(self, a: Tensor, b: Any) -> Tensor:  # type: ignore[override]
        return super().forward(b[0] if type(b) is list else b) + a


@pytest.mark.parametrize(
    ("call", "ran"),
    [
        (lambda mlp, x, h: mlp(x, h), 1),
        (lambda mlp, x, h: mlp(x, b=h), 1),
        (lambda mlp, x, h: mlp(b=h, a=x), 1),
        (lambda mlp, x, h: mlp(x, [h]), 0),
    ],
    ids=["second position", "keyword", "keywords", "list"],
)
def test_a_deferred_value_is_found_wherever_it_is_passed(x: Tensor, call: Any, ran: int) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return call(self.mlp, x, self.norm(x))

    model = model_of(forward, x.device)
    model[0].mlp = TwoInputs().to(x.device)
    expected = model(x)
    specs = [ModuleSpec(["x"], ["h"]), ModuleSpec(["a", "h"])]
    kernel = members_kernel(2)
    with mapped(Kernel=kernel):
        fuse_modules(model, PATHS, specs, kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert runs(kernel) == ran


@pytest.mark.parametrize(
    "member",
    [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(3), lambda: nn.RReLU()],
    ids=["Dropout", "BatchNorm", "RReLU"],
)
def test_a_member_with_state_or_randomness_runs_once_and_at_its_own_call(
    x: Tensor, member: Callable[[], nn.Module]
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        noise = torch.rand_like(x)
        return self.mlp(h) + noise + self.norm(x)

    model = model_of(forward, x.device)
    model[0].norm = member().to(x.device)
    torch.manual_seed(2)
    fuse(model, members_kernel(1))
    got = [model(x), model(x), *model.buffers()]
    unfuse_modules(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    torch.manual_seed(2)
    assert_same(got, [model(x), model(x), *model.buffers()])


def test_a_class_that_got_another_forward_between_two_fusions_is_read_again(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    def random(self: Any, x: Tensor) -> Tensor:
        return torch.rand_like(x)

    def of_type(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x)) * (type(x) is Tensor)

    model = nn.Sequential(Block()).to(x.device)
    model[0].norm = Scaled()
    for cls, forward, reason in (
        (Scaled, random, "norm may draw random numbers, in rand_like"),
        (Block, of_type, "of_type"),
    ):
        fuse(model, members_kernel(1))
        model(x)
        assert path_of(model)[:2] == (1, 0)
        unfuse_modules(model)
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", forward)
            fuse(model, members_kernel(1))
            model(x)
            assert path_of(model)[:2] == (0, 1)
            assert reason in str(report(model))
            unfuse_modules(model)


def test_a_member_called_twice_makes_two_captures(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = self.norm(x), self.norm(2 * x + 1)
        return self.mlp(second) - self.mlp(first)

    model = model_of(forward, x.device)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert path_of(model)[:2] == (2, 0)


def test_a_member_shared_by_two_parents_keeps_the_calls_apart(x: Tensor) -> None:
    model = nn.Sequential(Block(), Block()).to(x.device)
    model[1].norm = model[0].norm
    expected = model(x)
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, ["*.norm", "*.mlp"], kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert [group.kernel_calls for group in report(model).groups] == [1, 1]
    unfuse_modules(model)
    assert torch.equal(model(x), expected)


def test_one_block_used_recursively_keeps_the_calls_apart(x: Tensor) -> None:
    def forward(self: Any, x: Tensor, depth: int = 3) -> Tensor:
        h = self.norm(x)
        if depth:
            x = forward(self, x / 2, depth - 1)
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert path_of(model)[:2] == (4, 0)


def raising(self: Any, x: Tensor) -> Tensor:
    self.norm(x * 1)
    raise KeyError("between capture and use")


def test_a_thousand_exceptions_between_capture_and_use_leave_no_tensor_behind(x: Tensor) -> None:
    model = model_of(raising, x.device)
    fuse(model)

    def live() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects() if type(thing) is Tensor)

    before = live()
    for _ in range(1000):
        with pytest.raises(KeyError):
            model(x)
    assert live() <= before


def test_a_fused_model_is_freed_without_the_garbage_collector(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    fuse(model)
    model(x)
    alive = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_eight_threads_on_one_fused_model_give_the_same_bits(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    inputs = [x + i for i in range(8)]
    expected = [model(value) for value in inputs]
    fuse(model)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(500):
            if not torch.equal(model(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert path_of(model)[:2] == (4000, 0)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "nothing": nullcontext,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("around", ["first", "last", "look"])
def test_a_member_runs_in_the_context_of_its_own_call(x: Tensor, context: str, around: str) -> None:
    def here(place: str) -> Any:
        return CONTEXTS[context]() if place == around else nullcontext()

    def forward(self: Any, x: Tensor) -> Tensor:
        with here("first"):
            h = self.norm(x)
        with here("look"):
            mean = h.mean()
        with here("last"):
            y = self.mlp(h)
        return (x * 2).detach() + y.float() + mean if context != "inference_mode" else y * 1

    model = model_of(forward, x.device)
    with torch.no_grad() if context == "inference_mode" else nullcontext():
        expected = model(x)
        fuse(model)
        got = model(x)
    assert torch.equal(got, expected)
    assert (got.requires_grad, got.dtype) == (expected.requires_grad, expected.dtype)
    if context != "inference_mode":
        fused_gradients = gradients(model, x) if expected.requires_grad else []
        unfuse_modules(model)
        assert_same(fused_gradients, gradients(model, x) if expected.requires_grad else [])


def test_asking_for_the_type_is_answered_as_the_real_value_would(x: Tensor) -> None:
    def unpack(h: Any) -> Any:
        return h[0] if isinstance(h, (tuple, list)) else h

    def double(h: Any) -> Any:
        return h * 2 if torch.is_tensor(h) and isinstance(h, nn.Module | Tensor) else h

    def halve(h: Any) -> Any:
        return h if isinstance(h, (nn.Parameter, Sequence, dict)) else h / 2

    for ask in (unpack, double, halve):
        model = model_of(lambda self, x, ask=ask: x + self.mlp(ask(self.norm(x))), x.device)
        expected = model(x)
        fuse(model)
        assert torch.equal(model(x), expected)


def type_asking(h: Any) -> Any:
    return h * 2 if type(h) is Tensor else h * 3


class Between(nn.Module):
    def forward(self, h: Any) -> Any:
        return type_asking(h)


class AsksInItsMethod(Block):
    def ask(self, h: Any) -> Any:
        return h * 2 if type(h) is Tensor else h

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ask(self.norm(x)))


class Asks(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.mlp(h * 2 if type(h) is Tensor else h)


class AsksInItsBase(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def asking_decorator(forward: Any) -> Any:
    @functools.wraps(forward)
    def decorated(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return forward(self, h * 2 if type(h) is Tensor else h)

    return decorated


class AsksInADecorator(Block):
    @asking_decorator
    def forward(self, h: Tensor) -> Tensor:
        return self.mlp(h)


class AsksInAModule(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(support.doubled_tensor(self.norm(x)))


@pytest.mark.parametrize("block", [AsksInItsMethod, AsksInItsBase, AsksInADecorator, AsksInAModule])
@pytest.mark.parametrize("compiled", [False, True])
def test_where_code_below_the_parent_asks_for_type_nothing_is_captured(
    x: Tensor, block: type[Block], compiled: bool
) -> None:
    model = nn.Sequential(block()).to(x.device)
    expected = model(x)
    fuse(model)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert torch.equal(run(x), expected)
    assert "asks for type(...), which a captured output cannot answer" in str(path_of(model)[2])


Alias = Tensor


class AsksByAlias(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.mlp(h * 2 if isinstance(h, Alias) else h)


class AsksByAliasInAMethod(Block):
    def ask(self, h: Any) -> Any:
        return h * 2 if isinstance(h, Alias) else h

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ask(self.norm(x)))


class AsksByAliasInItsBase(AsksByAlias):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("block", [AsksByAlias, AsksByAliasInAMethod, AsksByAliasInItsBase])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_isinstance_by_another_name_is_answered_as_the_real_value_would(
    x: Tensor, block: type[Block], compiled: bool
) -> None:
    model = nn.Sequential(block()).to(x.device)
    expected = model(x)
    fuse(model)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert torch.equal(run(x), expected)


def by_callable(h: Any) -> Any:
    return h * 2 if callable(h) else h


def by_class(h: Any) -> Any:
    return h * 2 if h.__class__ is Tensor else h


def by_name_of_class(h: Any) -> Any:
    return h * 2 if h.__class__.__name__ == "Tensor" else h


@functools.singledispatch
def by_dispatch(h: Any) -> Any:
    return h


@by_dispatch.register(Tensor)
def double(h: Any) -> Any:
    return h * 2


@pytest.mark.parametrize("ask", [by_callable, by_class, by_name_of_class, by_dispatch])
def test_other_questions_are_answered_as_the_real_value_would(x: Tensor, ask: Any) -> None:
    model = model_of(lambda self, x: x + self.mlp(ask(self.norm(x))), x.device)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)


def raised(h: Any, x: Tensor) -> Tensor:
    return torch.pow(h, 2)


def chosen(h: Any, x: Tensor) -> Tensor:
    return torch.where(x > 0, h, 0.0)


def left_over(h: Any, x: Tensor) -> Tensor:
    return torch.remainder(h, 2.0)


def widened(h: Any, x: Tensor) -> Tensor:
    return torch.float_power(h, 2).to(x.dtype)


@pytest.mark.parametrize("operation", [raised, chosen, left_over, widened])
def test_an_operation_that_asks_first_if_it_got_a_number_is_given_the_real_value(
    x: Tensor, operation: Any
) -> None:
    model = model_of(lambda self, x: x + self.mlp(operation(self.norm(x), x)), x.device)
    expected = gradients(model, x)
    fuse(model)
    if sys.version_info < (3, 11):
        with pytest.raises(DeferredUseError, match="cannot be read"):
            model(x)
        return
    assert_same(gradients(model, x), expected)
    assert path_of(model)[:2] == (0, 1)


@pytest.mark.parametrize("where", ["parent", "helper", "module"])
@pytest.mark.parametrize("compiled", [False, True])
def test_where_code_asks_for_type_nothing_is_captured(
    x: Tensor, where: str, compiled: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        if where == "helper":
            h = type_asking(h)
        elif where == "module":
            h = self.between(h)
        return self.mlp(h)

    def parent(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.mlp(h * 2 if type(h) is Tensor else h)

    model = model_of(parent if where == "parent" else forward, x.device)
    model[0].between = Between()
    expected = model(x)
    fuse(model)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert torch.equal(run(x), expected)
    assert "asks for type(...), which a captured output cannot answer" in str(path_of(model)[2])


def test_a_custom_autograd_function_on_the_value_is_an_error(x: Tensor) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * 2

    model = model_of(lambda self, x: self.mlp(Double.apply(self.norm(x))), x.device)
    fuse(model)
    with pytest.raises(DeferredUseError, match=r"autograd\.Function"):
        model(x)
    unfuse_modules(model)
    model(x)


class CountingNorm(Norm):
    def forward(self, x: Tensor, cache: list[int] | None = None) -> Tensor:  # type: ignore[override]
        if cache is not None:
            cache.append(len(cache))
        return super().forward(x)


def test_a_mutable_argument_makes_the_member_run_at_its_own_call(x: Tensor) -> None:
    cache: list[int] = []
    lengths: list[int] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x, cache)
        lengths.append(len(cache))
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    model[0].norm = CountingNorm().to(x.device)
    model(x)
    fuse(model, members_kernel(2))
    model(x)
    assert lengths == [1, 2]
    assert "norm got a list, which may change before it is used" in str(path_of(model)[2])


def test_a_parent_that_asks_for_a_legacy_tensor_type_gets_an_error_and_no_crash(
    x: Tensor,
) -> None:
    def ask(h: Any) -> Any:
        return h * 2 if isinstance(h, (torch.FloatTensor, torch.cuda.FloatTensor)) else h

    model = model_of(lambda self, x: self.mlp(ask(self.norm(x))), x.device)
    fuse(model)
    with pytest.raises(DeferredUseError):
        model(x)


@pytest.mark.parametrize("strict_export", [False, True])
def test_a_parent_that_asks_whether_its_value_is_a_tensor_is_compiled_as_the_unfused_one(
    x: Tensor, strict_export: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = h * 2 if isinstance(h, Tensor) else h
        return self.mlp(h)

    model = model_of(forward, x.device)
    expected = model(x)
    fuse(model)
    if strict_export:
        got = torch.export.export(model, (x,), strict=True).module()(x)
    else:
        got = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert torch.equal(got, expected)


def test_a_weight_replaced_before_use_is_an_error(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = nn.Parameter(self.norm.weight * 3)
        h = torch.func.functional_call(self.norm, {"weight": weight}, (x,))
        return self.mlp(h)

    model = model_of(forward, x.device)
    fuse(model)
    with pytest.raises(DeferredUseError, match="modified in place or replaced"):
        model(x)


def test_an_input_modified_before_the_value_is_touched_is_an_error(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        x.add_(1)
        return self.mlp(h + 1)

    model = model_of(forward, x.device)
    fuse(model)
    with torch.no_grad(), pytest.raises(DeferredUseError, match="modified in place"):
        model(x)


def test_a_buffer_modified_before_use_is_an_error(x: Tensor) -> None:
    class Shifted(Norm):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        self.norm.shift.mul_(2)
        return self.mlp(h)

    model = model_of(forward, x.device)
    model[0].norm = Shifted().to(x.device)
    fuse(model, members_kernel(1))
    with torch.no_grad(), pytest.raises(DeferredUseError):
        model(x)


def test_a_mode_over_the_whole_forward_runs_the_members(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.mlp(h) + torch.sin(h)

    model = model_of(forward, x.device)
    expected = model(x)
    fuse(model)
    with x.device:
        assert torch.equal(model(x), expected)
    assert "a TorchFunctionMode or TorchDispatchMode is active" in str(path_of(model)[2])


class TwiceTheRoot(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.rsqrt else result


class KernelWithoutRsqrt(nn.Module):
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        x = norm.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return F.linear(gate, mlp.down_proj.weight)


@pytest.mark.parametrize("around", ["first", "model"])
@pytest.mark.parametrize("compiled", [False, True])
def test_under_a_function_mode_the_members_run_in_eager_and_in_graphs(
    x: Tensor, around: str, compiled: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if around == "model":
            return x + self.mlp(self.norm(x))
        with TwiceTheRoot():
            h = self.norm(x)
        return x + self.mlp(h)

    def result() -> Tensor:
        torch._dynamo.reset()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        with torch.no_grad(), TwiceTheRoot() if around == "model" else nullcontext():
            return run(x)

    model = model_of(forward, x.device)
    expected = result()
    fuse(model, KernelWithoutRsqrt)
    assert torch.equal(result(), expected)


@pytest.mark.parametrize("touched", [False, True])
def test_a_requires_grad_that_is_changed_between_call_and_use_is_an_error(
    x: Tensor, touched: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.norm.requires_grad_(False)
        h = self.norm(x)
        self.norm.requires_grad_(True)
        return x + self.mlp(h * 1 if touched else h)

    model = model_of(forward, x.device)
    fuse(model)
    with pytest.raises(DeferredUseError, match=r"modified in place or replaced .*'0.norm'"):
        model(x)


class ReturnsAView(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :] if self.weight.numel() else x


def test_a_view_of_an_input_that_is_used_in_inference_mode_is_an_error(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x * 1
        self.norm(x).add_(1)
        return self.mlp(self.norm(x)) + x

    model = model_of(forward, x.device)
    model[0].norm = ReturnsAView().to(x.device)
    fuse(model, members_kernel(1))
    with torch.inference_mode(), pytest.raises(DeferredUseError, match="a view of its input"):
        model(x)


class MoreOnRequest(Norm):
    def forward(self, x: Tensor, more: bool = False) -> Any:  # type: ignore[override]
        y = super().forward(x)
        return (y, y.mean(), x.sum()) if more else (y, y.mean())


def test_a_tuple_whose_length_depends_on_an_argument_is_unpacked_as_it_is(x: Tensor) -> None:
    def forward(self: Any, x: Tensor, more: bool = False) -> Tensor:
        if more:
            h, _, last = self.norm(x, more)
        else:
            h, last = self.norm(x)
        return self.mlp(h) + last

    model = model_of(forward, x.device)
    block = model[0]
    block.norm = MoreOnRequest().to(x.device)
    expected = [block(x), block(x), block(x, True), block(x)]
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        specs = [ModuleSpec(["x"], ["y", "_"]), ModuleSpec(["y"])]
        fuse_modules(model, PATHS, specs, kernel="Kernel")
    assert_same([block(x), block(x), block(x, True), block(x)], expected)
    assert runs(kernel) == 0  # How many there are shows at the call.


def test_a_hook_added_between_call_and_use_is_an_error_that_names_it(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        self.norm.register_forward_hook(lambda *_: None)
        return x + self.mlp(h + 0)

    model = model_of(forward, x.device)
    fuse(model)
    with pytest.raises(DeferredUseError, match=r"'0.norm' was changed .*: it has a hook"):
        model(x)


def draws(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


class DrawsInAHelper(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return draws(x)


class DrawsInAMethod(Norm):
    def noise(self, x: Tensor) -> Tensor:
        return torch.normal(x, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x)


class DrawsAbove(DrawsInAMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class DropsAlways(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class CountsInABuffer(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        return super().forward(x) * self.steps


@pytest.mark.parametrize(
    "member", [DrawsInAHelper, DrawsInAMethod, DrawsAbove, DropsAlways, CountsInABuffer]
)
def test_a_member_whose_effects_are_below_its_forward_runs_at_its_own_call(
    x: Tensor, member: type[Norm]
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.mlp(h) + torch.rand_like(x)

    model = model_of(forward, x.device).eval()
    model[0].norm = member().to(x.device).eval()
    twin = copy.deepcopy(model)
    fuse(model, members_kernel(1))
    results = []
    for run in (model, twin):
        torch.manual_seed(4)
        results.append([run(x), run(x), *run.buffers()])
    assert_same(*results)
    assert path_of(model)[0] == 0


@pytest.mark.parametrize("member", [nn.Identity, lambda: nn.Dropout(0.0)])
def test_a_member_that_returns_its_input_stays_an_alias_in_inference_mode(
    x: Tensor, member: Callable[[], nn.Module]
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x * 1
        h = self.norm(x)
        h.add_(1)
        return self.mlp(h) + x

    model = model_of(forward, x.device).eval()
    model[0].norm = member()
    with torch.inference_mode():
        expected = model(x)
        fuse(model, members_kernel(1))
        assert torch.equal(model(x), expected)


def test_under_torch_compile_a_checkpointed_block_runs_the_kernel(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: x + self.mlp(self.norm(x)), x, use_reentrant=False)

    model = model_of(forward, x.device)
    expected = model(x)
    fuse(model)
    model[0].norm.calls = 0
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, expected)
    assert model[0].norm.calls == 0
