"""The kernel's seat: what `kernels.kernelize` finds, what runs, and when the kernel steps aside."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import Adapter
from kernels import Mode, kernelize, use_kernel_forward_from_hub
from structure import structure
from support import (
    PATHS,
    InMemoryRepository,
    Mlp,
    Model,
    Norm,
    WeightKernel,
    mapped,
    members_kernel,
    runs,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from module_fusion import (
    ModuleSpec,
    NotFusableError,
    SpecMismatchError,
    fuse_modules,
    report,
    unfuse_modules,
)


class InferenceKernel(nn.Module):
    """Declares that it has no backward."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x)


class EagerKernel(nn.Module):
    """Declares that torch.compile cannot trace it."""

    can_torch_compile = False
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x)


def fuse(model: nn.Module, kernel: type[nn.Module] = WeightKernel, **options: Any) -> None:
    with mapped(RMSNormMLP=kernel):
        fuse_modules(model, PATHS, kernel="RMSNormMLP", **options)


def last_reasons(model: nn.Module) -> list[str | None]:
    return [group.reason for group in report(model).groups]


def test_the_seat_is_a_submodule_without_parameters_that_carries_the_kernel_name(
    model: Model,
) -> None:
    keys = list(model.state_dict())
    fuse_modules(model, PATHS, kernel="RMSNormMLP")
    seat = model.get_submodule("layers.0.mlp.fused_kernel")
    assert dict(model.named_modules())["layers.0.mlp.fused_kernel"] is seat
    assert seat is model.layers[0].mlp.fused_kernel
    assert type(seat).kernel_layer_name == "RMSNormMLP"
    assert list(seat.parameters()) == []
    assert list(model.state_dict()) == keys
    assert seat.norm is model.layers[0].norm
    assert seat.mlp is model.layers[0].mlp
    assert type(seat) is type(model.layers[1].mlp.fused_kernel)


def test_without_a_kernel_there_is_no_seat(model: Model) -> None:
    fuse_modules(model, PATHS)
    assert not hasattr(model.layers[0].mlp, "fused_kernel")
    assert not any(name.endswith("fused_kernel") for name, _ in model.named_modules())


def test_a_member_that_goes_through_its_own_children_does_not_meet_the_seat(x: Tensor) -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(8, 8), nn.Tanh())).to(x.device)
    expected = model(x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, {"first": "0", "second": "1"}, kernel="Kernel")
    assert len(model[1]) == 2
    assert [type(child) for child in model[1].children()] == [nn.Linear, nn.Tanh]
    assert torch.equal(model(x), expected)


class Attention(nn.Module):
    def forward(
        self, hidden: Tensor, cos: Tensor, mask: Tensor | None = None, *, scale: float = 1.0
    ) -> Tensor:
        hidden = hidden * cos * scale
        return hidden if mask is None else hidden + mask


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), Attention()

    def forward(self, x: Tensor, cos: Tensor, mask: Tensor | None, style: str) -> Tensor:
        h = self.norm(x)
        if style == "positional":
            return self.attention(h, cos, mask)
        if style == "keyword":
            return self.attention(mask=mask, cos=cos, hidden=h)
        return self.attention(h, cos=cos, scale=2.0)


def test_the_seat_has_the_chain_s_own_signature_with_the_extra_inputs_of_every_member() -> None:
    model = nn.Sequential(Attended())
    fuse_modules(model, ["0.norm", "0.attention"], kernel="Kernel")
    seat = model[0].attention.fused_kernel
    assert str(inspect.signature(seat.forward)) == "(input, cos, mask=None, scale=1.0)"
    assert str(inspect.signature(type(seat).forward)) == "(self, input, cos, mask=None, scale=1.0)"


@pytest.mark.parametrize("style", ["positional", "keyword", "scaled"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_extra_inputs_are_captured_at_the_member_s_own_call(
    x: Tensor, style: str, with_mask: bool
) -> None:
    model = nn.Sequential(Attended()).to(x.device)
    call = (x, x + 1, x - 1 if with_mask else None, style)
    expected = model[0](*call)
    seen: list[tuple[Any, ...]] = []

    class Recorder(nn.Module):
        can_torch_compile = True

        def forward(self, a, b, c, d):  # type: ignore[no-untyped-def]
            seen.append((a, b, c, d))
            return type(self).forward(self, a, b, c, d)

    with mapped(Kernel=Recorder):
        fuse_modules(model, ["0.norm", "0.attention"], kernel="Kernel")
    assert torch.equal(model[0](*call), expected)
    [(a, b, c, d)] = seen
    assert a is x
    assert b is call[1]
    assert c is (None if style == "scaled" else call[2])
    assert d == (2.0 if style == "scaled" else 1.0)


def test_an_input_that_the_spec_leaves_out_makes_the_members_run_when_it_is_passed(
    x: Tensor,
) -> None:
    model = nn.Sequential(Attended()).to(x.device)
    call = (x, x + 1, x - 1, "positional")
    expected = model[0](*call)
    kernel = members_kernel(2)
    specs = [ModuleSpec(["x"], ["hidden"]), ModuleSpec(["hidden", "cos"])]
    with mapped(Kernel=kernel):
        fuse_modules(model, ["0.norm", "0.attention"], specs, kernel="Kernel")
    assert torch.equal(model[0](*call), expected)
    assert runs(kernel) == 0
    assert last_reasons(model) == ["'mask' of 'attention' was passed; its spec leaves it out"]
    model[0](x, x + 1, None, "keyword")
    assert last_reasons(model) == ["'mask' of 'attention' was passed; its spec leaves it out"]


def test_one_name_for_two_inputs_must_be_one_object_at_run_time(x: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x: Tensor, cos: Tensor, other: Tensor) -> Tensor:
            return self.second(self.first(x, cos), other)

    model = nn.Sequential(Twice())
    kernel = members_kernel(2)
    specs = [ModuleSpec(["x", "cos"], ["h"]), ModuleSpec(["h", "cos"])]
    with mapped(Kernel=kernel):
        fuse_modules(model, ["0.first", "0.second"], specs, kernel="Kernel")
    assert torch.equal(model[0](x, x, x + 1), x * x * (x + 1))
    assert runs(kernel) == 0
    assert last_reasons(model) == ["another member got another value for 'cos' of 'first'"]
    assert torch.equal(model[0](x, x, x), x * x * x)
    assert runs(kernel) == 1


@pytest.mark.parametrize(
    "mode", [Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE]
)
def test_kernelize_called_by_the_user_replaces_the_seat_and_only_it(
    model: Model, x: Tensor, mode: Mode, device: str
) -> None:
    expected = model(x)
    fuse_modules(model, PATHS, kernel="RMSNormMLP")
    before = {n: dict(m.__dict__) for n, m in model.named_modules() if "fused_kernel" not in n}
    for block in model.layers:
        block.norm.calls = block.mlp.calls = 0
    with mapped(RMSNormMLP=WeightKernel):
        kernelize(model, mode=mode, device=device)
    for name, module in model.named_modules():
        if "fused_kernel" in name:
            assert module.forward.__func__ is WeightKernel.forward
        else:
            assert list(module.__dict__) == list(before[name])
    assert torch.equal(model(x), expected)
    assert model.calls() == [(0, 0), (0, 0)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_kernel_runs_and_the_members_do_not(
    model: Model, x: Tensor, compiled: bool, with_gradients: bool
) -> None:
    expected = model(x)
    expected.sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    fuse(model)
    for block in model.layers:
        block.norm.calls = block.mlp.calls = 0
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.set_grad_enabled(with_gradients):
        got = run(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    if with_gradients:
        got.sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], wanted)
    assert model.calls() == [(0, 0), (0, 0)]
    if not compiled:
        assert [g.kernel_calls for g in report(model).groups] == [1, 1]


def test_the_graph_of_a_compiled_model_holds_the_kernel_s_operations_once(x: Tensor) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = Model(2).to(x.device)
    fuse(model)
    torch.compile(model, backend=backend, fullgraph=True)(x)
    [graph] = graphs
    roots = [n for n in graph.graph.nodes if "rsqrt" in str(n.target)]
    assert len(roots) == len(model.layers)


def step_hook(model: Model) -> None:
    model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: None)


def step_norm_hook(model: Model) -> None:
    model.layers[0].norm.register_forward_pre_hook(lambda module, args: None)


def step_backward_hook(model: Model) -> None:
    model.layers[0].mlp.register_full_backward_hook(lambda module, given, taken: None)


def step_forward(model: Model) -> None:
    original = model.layers[0].mlp.forward
    model.layers[0].mlp.forward = lambda x: original(x)


def step_adapter(model: Model) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.extra = nn.Parameter(torch.ones_like(base.weight))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + F.linear(x, self.extra)

    model.layers[0].mlp.gate_proj = Adapter(model.layers[0].mlp.gate_proj)


def step_parametrization(model: Model) -> None:
    parametrizations.weight_norm(model.layers[0].mlp.up_proj)


def step_subclass(model: Model) -> None:
    class Scaled(Tensor):
        pass

    weight = model.layers[0].norm.weight
    model.layers[0].norm.weight = nn.Parameter(weight.detach().as_subclass(Scaled))


def step_class(model: Model) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.layers[0].mlp.up_proj.__class__ = Twice


def step_parameter(model: Model) -> None:
    model.layers[0].mlp.up_proj.register_parameter(
        "bias", nn.Parameter(torch.ones(16, device=model.layers[0].norm.weight.device))
    )


def step_backward_pre_hook(model: Model) -> None:
    model.layers[0].mlp.down_proj.register_full_backward_pre_hook(lambda module, given: None)


STEPS = {
    "mlp.down_proj has a hook": step_backward_pre_hook,
    "mlp.up_proj has a hook": step_hook,
    "norm has a hook": step_norm_hook,
    "mlp has a hook": step_backward_hook,
    "mlp has an instance-level forward": step_forward,
    "mlp.gate_proj is a Adapter, was a Linear": step_adapter,
    "mlp.up_proj is a ParametrizedLinear, was a Linear": step_parametrization,
    "norm has a weight of type Scaled": step_subclass,
    "mlp.up_proj is a Twice, was a Linear": step_class,
    "mlp.up_proj has another bias than before": step_parameter,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reason", STEPS)
def test_the_kernel_steps_aside_for_that_call(
    model: Model, x: Tensor, reason: str, compiled: bool
) -> None:
    fuse(model)
    model(x)
    STEPS[reason](model)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    if compiled and "hook" in reason and "backward" in STEPS[reason].__name__:
        run = torch.compile(model, backend="eager")
    got = run(x)
    groups = report(model).groups
    if not compiled:
        assert (groups[0].kernel_calls, groups[0].member_calls) == (1, 1)
        assert str(groups[0].reason).startswith(reason)
        # A tensor subclass in the first block makes the input of the second one.
        assert groups[1].kernel_calls == (1 if "Scaled" in reason else 2)
    unfuse_modules(model)
    assert torch.equal(got, model(x))


def test_the_kernel_runs_again_when_the_hook_is_gone(model: Model, x: Tensor) -> None:
    fuse(model)
    handle = model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    model(x)
    handle.remove()
    model(x)
    assert [(g.kernel_calls, g.member_calls) for g in report(model).groups] == [(1, 1), (2, 0)]


def test_a_global_hook_makes_the_members_run(model: Model, x: Tensor) -> None:
    fuse(model)
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: called.append(type(module).__name__)
    )
    try:
        model(x)
    finally:
        handle.remove()
    assert called.count("Linear") == 6
    assert last_reasons(model)[0] is not None
    assert "a global module hook is registered" in str(last_reasons(model)[0])


def test_a_kernel_without_backward_runs_only_where_no_gradient_is_needed(
    model: Model, x: Tensor
) -> None:
    expected = model(x)
    expected.sum().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    fuse(model, InferenceKernel, mode=Mode.INFERENCE)
    got = model(x)
    got.sum().backward()
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))
    assert last_reasons(model)[0] == "gradients are needed and the kernel has no backward"
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    model.requires_grad_(False)
    assert torch.equal(model(x), expected)
    assert [(g.kernel_calls, g.member_calls) for g in report(model).groups] == [(2, 1), (2, 1)]


def test_a_kernel_that_torch_compile_cannot_trace_runs_in_eager_mode_only(
    model: Model, x: Tensor
) -> None:
    expected = model(x)
    fuse(model, EagerKernel)
    for block in model.layers:
        block.norm.calls = block.mlp.calls = 0
    assert torch.equal(model(x), expected)
    assert model.calls() == [(0, 0), (0, 0)]
    torch.compile(model, backend="eager", fullgraph=True)(x)
    assert model.calls() == [(1, 1), (1, 1)]


@pytest.mark.parametrize("change", ["dtype", "autocast", "input"])
def test_a_dtype_the_kernel_was_not_chosen_for_runs_the_members(
    model: Model, x: Tensor, change: str
) -> None:
    fuse(model)
    if change == "dtype":
        model.double()
        x = x.double()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=change == "autocast"):
        if change == "input":
            with pytest.raises(RuntimeError, match="dtype"):
                model.layers[0](x.double())
        else:
            model(x)
    group = report(model).groups[0]
    assert (group.kernel_calls, group.member_calls) == (0, 1)
    assert group.reason is not None


def test_a_mapping_from_role_to_path_names_the_members(model: Model, x: Tensor) -> None:
    class Swapped(nn.Module):
        can_torch_compile = True

        def forward(self, x: Tensor) -> Tensor:
            return x * 0 + self.first.weight.sum() + self.last.up_proj.weight.sum()

    with mapped(Kernel=Swapped):
        fuse_modules(model, {"first": "layers.0.norm", "last": "layers.0.mlp"}, kernel="Kernel")
    block = model.layers[0]
    wanted = x + (x * 0 + block.norm.weight.sum() + block.mlp.up_proj.weight.sum())
    assert torch.equal(block(x), wanted)


@pytest.mark.parametrize("name", ["my-kernel", "org/Kernel", "a.B", "RMS Norm"])
def test_a_kernel_may_have_any_name_of_a_mapping(model: Model, x: Tensor, name: str) -> None:
    with mapped(**{name: WeightKernel}):
        fuse_modules(model, PATHS, kernel=name)
        model(x)
    assert [(g.kernel, g.kernel_calls) for g in report(model).fused] == [(name, 1)] * 2
    copied = pickle.loads(pickle.dumps(model))
    assert [g.kernel for g in report(copied).fused] == [name] * 2


def test_a_kernel_may_call_the_members(model: Model, x: Tensor) -> None:
    class Calling(nn.Module):
        can_torch_compile = True

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm(x))

    expected = model(x)
    fuse(model, Calling)
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert [g.kernel_calls for g in report(model).groups] == [1, 1]


def test_a_chain_of_one_runs_its_kernel(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(8, 4)).to(x.device)

    class Half(nn.Module):
        can_torch_compile = True

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.proj.weight) / 2

    with mapped(Half=Half):
        fuse_modules(model, {"proj": "0"}, kernel="Half")
    assert torch.equal(model(x), F.linear(x, model[0].weight) / 2)


@pytest.mark.parametrize("role", ["0", "forward", "training", "class", "fused kernel"])
def test_a_role_that_cannot_be_an_attribute_is_refused(model: Model, role: str) -> None:
    before = structure(model)
    with pytest.raises(SpecMismatchError, match="cannot be the name by which a kernel reaches"):
        fuse_modules(model, {role: "layers.0.norm", "mlp": "layers.0.mlp"}, kernel="Kernel")
    assert structure(model) == before


class WrongSignature(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class Unloadable(InMemoryRepository):
    def load(self) -> type[nn.Module]:
        raise FileNotFoundError("no such kernel")


@pytest.mark.parametrize("failing", ["signature", "load", "second block", "no mapping"])
def test_a_failing_kernelize_leaves_the_model_as_it_was(
    model: Model, x: Tensor, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels import use_kernel_mapping

    from module_fusion import surgery

    repository: Any = InMemoryRepository(WeightKernel)
    if failing == "signature":
        repository = InMemoryRepository(WrongSignature)
    if failing == "load":
        repository = Unloadable(WrongSignature)
    if failing == "second block":
        seats: list[nn.Module] = []

        def second_fails(seat: nn.Module, **options: Any) -> None:
            if seats:
                raise RuntimeError("no more kernels")
            seats.append(seat)
            kernelize(seat, **options)

        monkeypatch.setattr(surgery, "kernelize", second_fails)
    mapping = {} if failing == "no mapping" else {"K": {"cpu": repository, "cuda": repository}}
    before = structure(model)
    with (
        use_kernel_mapping(mapping, inherit_mapping=False),
        pytest.raises(NotFusableError, match=r"'K' cannot take over .* The model is as it was"),
    ):
        fuse_modules(model, PATHS, kernel="K", use_fallback=False)
    assert structure(model) == before
    assert "Nothing is fused" in str(report(model))


def test_the_same_call_again_picks_up_a_kernel_registered_since(model: Model, x: Tensor) -> None:
    fuse_modules(model, PATHS, kernel="Fused")
    model(x)
    assert last_reasons(model)[0] == "no kernel was loaded for 'Fused'"
    with mapped(Fused=WeightKernel):
        fuse_modules(model, PATHS, kernel="Fused")
    model(x)
    assert [g.kernel_calls for g in report(model).groups] == [1, 1]


def test_other_kernelizable_layers_of_the_model_are_left_alone(x: Tensor) -> None:
    @use_kernel_forward_from_hub("RMSNormMLP")
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = Model(1).to(x.device)
    model.other = Other()
    fuse(model)
    assert "forward" not in model.other.__dict__


def test_members_without_weights_need_gradients_too(x: Tensor) -> None:
    class NoBackward(nn.Module):
        can_torch_compile = True
        has_backward = False

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(nn.Sequential(nn.Tanh(), nn.Sigmoid()))
    with mapped(Fast=NoBackward):
        fuse_modules(model, {"a": "0.0", "b": "0.1"}, kernel="Fast", mode=Mode.INFERENCE)
    x = x.requires_grad_()
    assert torch.equal(model(x), x.tanh().sigmoid())
    assert last_reasons(model)[0] == "gradients are needed and the kernel has no backward"


def test_the_seat_called_directly_is_the_chain(model: Model, x: Tensor) -> None:
    block = model.layers[0]
    expected = block.mlp(block.norm(x))
    fuse_modules(model, PATHS, kernel="Unmapped")
    assert torch.equal(block.mlp.fused_kernel(x), expected)


def test_train_and_eval_reach_the_seat(model: Model) -> None:
    fuse(model)
    model.eval()
    assert not model.layers[0].mlp.fused_kernel.training
    model.train()
    assert model.layers[0].mlp.fused_kernel.training


class WithTables(nn.Module):
    """Takes a tuple of tensors besides the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        return self.linear(x) * tables[0]


class TablesKernel(nn.Module):
    has_backward = False

    def forward(self, x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return F.linear(x, self.last.linear.weight) * tables[0]


def test_gradients_needed_by_a_tensor_in_a_tuple_count(x: Tensor) -> None:
    model = nn.Sequential(WithTables()).to(x.device).requires_grad_(False)
    tables = (torch.ones(8, device=x.device, requires_grad=True),)
    with mapped(Tables=TablesKernel):
        fuse_modules(model, {"last": "0"}, kernel="Tables", mode=Mode.INFERENCE)
    assert model[0](x, tables).requires_grad
    assert last_reasons(model) == ["gradients are needed and the kernel has no backward"]
    with torch.no_grad():
        model[0](x, tables)
    assert report(model).groups[0].kernel_calls == 1


def test_forward_mode_derivatives_are_not_left_to_a_kernel(x: Tensor) -> None:
    from torch.autograd import forward_ad

    model = nn.Sequential(WithTables()).to(x.device).requires_grad_(False)
    tables = (torch.ones(8, device=x.device),)
    with mapped(Tables=TablesKernel):
        fuse_modules(model, {"last": "0"}, kernel="Tables", mode=Mode.INFERENCE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(model[0](dual, tables)).tangent is not None


def test_what_a_kernel_declares_goes_with_a_copy_of_the_model(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.layer import layer

    fuse(model, InferenceKernel, mode=Mode.INFERENCE)
    monkeypatch.setattr(layer, "_CACHED_LAYER", {})
    copied = copy.deepcopy(model)
    copied(torch.randn(2, 8, device=model.layers[0].norm.weight.device))
    assert last_reasons(copied)[0] == "gradients are needed and the kernel has no backward"


def test_the_wrong_one_of_several_outputs_does_not_reach_the_kernel(x: Tensor) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Two(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[1])

    model = nn.Sequential(Parent()).to(x.device)
    expected = model(x)
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(
            model,
            ["0.first", "0.second"],
            [ModuleSpec(["x"], ["a", "_"]), ModuleSpec(["a"])],
            kernel="Kernel",
        )
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    assert runs(kernel) == 0


def test_a_class_that_calls_in_its_own_way_is_not_bypassed(model: Model, x: Tensor) -> None:
    class Doubling(nn.Linear):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(*args, **kwargs)

    model.layers[0].mlp.up_proj.__class__ = Doubling
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert "calls in a way of its own" in str(last_reasons(model)[0]) or "may not know" in str(
        last_reasons(model)[0]
    )


class Preparing(WeightKernel):
    """A kernel that runs its members once when it takes the seat."""

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x)


def run_once(norm: nn.Module, mlp: nn.Module) -> None:
    mlp(norm(torch.zeros(1, 8)))


setattr(Preparing.forward, "prepare", run_once)


def test_a_kernel_is_not_shown_members_that_do_more_than_compute(x: Tensor) -> None:
    class Drawing(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * random.random()

    model = Model(1).to(x.device)
    model.layers[0].norm = Drawing(8).to(x.device)
    state = random.getstate()
    with mapped(Preparing=Preparing):
        fuse_modules(model, ["layers.*.norm", "layers.*.mlp"], kernel="Preparing")
    assert random.getstate() == state
    assert "Drawing uses random.random, and it is not known" in str(report(model).groups[0].reason)


def test_the_reason_of_an_earlier_kernel_goes_with_it(model: Model, x: Tensor) -> None:
    def prepare(norm: nn.Module, mlp: nn.Module) -> None:
        if norm.weight.shape != (4,):
            raise ValueError("four values are wanted")

    refusing = type("Refusing", (nn.Module,), {"forward": lambda self, x: x})
    setattr(refusing.forward, "prepare", prepare)
    fuse(model, refusing)
    model(x)
    assert report(model).groups[0].reason == "the kernel refuses: four values are wanted"
    fuse(model)
    assert [(g.path, g.reason) for g in report(model).groups] == [("kernel", None)] * len(
        model.layers
    )


class WithOther(Norm):
    """Takes two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class Called(nn.Module):
    """Calls its members with whatever it is given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, Mlp()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.mlp(self.norm(*args, **kwargs))  # type: ignore[no-any-return]


def test_a_kernel_for_other_inputs_is_refused_also_after_it_served_a_chain(x: Tensor) -> None:
    """`kernels` compares a layer with the first class that it serves, and with no other."""
    one, two = Called(Norm()).to(x.device), Called(WithOther()).to(x.device)
    expected = two(x, x)
    with mapped(K=members_kernel(1)):
        fuse_modules(one, ["norm", "mlp"], kernel="K")
        with pytest.raises(NotFusableError, match=r"takes \(a0\), the chain's inputs are \(x, y\)"):
            fuse_modules(two, ["norm", "mlp"], kernel="K")
    assert report(two).groups == ()
    assert torch.equal(two(x, x), expected)


def test_a_copy_has_the_kernel_that_its_original_had_no_use_for(x: Tensor) -> None:
    model = Called(Norm()).to(x.device)
    expected = model(x)
    model.mlp.down_proj = Adapter(model.mlp.down_proj, torch.float32).to(x.device)
    kernel = members_kernel(1)
    kernel.forward.prepare = lambda *members: None  # type: ignore[attr-defined]
    with mapped(K=kernel):
        fuse_modules(model, ["norm", "mlp"], kernel="K", mode=Mode.TRAINING)
    model.mlp.down_proj = model.mlp.down_proj.base_layer
    copied = copy.deepcopy(model)
    for one in (model, copied):
        assert torch.equal(one(x), expected)
    assert runs(kernel) == 1  # In the copy, which asked again.


@pytest.mark.parametrize(
    "call", [lambda m, x: m(y=x), lambda m, x: m(), lambda m, x: m(x, x)],
    ids=["another name", "nothing", "one more"],
)  # fmt: skip
def test_a_call_that_the_member_would_refuse_is_refused_there_and_then(
    x: Tensor, call: Any
) -> None:
    class Swallows(Called):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            self.norm(*args, **kwargs)  # The value is not used.
            return self.mlp(self.norm(x))  # type: ignore[no-any-return]

    model = Swallows(Norm()).to(x.device)
    with mapped(K=members_kernel(1)):
        fuse_modules(model, ["norm", "mlp"], kernel="K")
    with pytest.raises(TypeError, match="argument"):
        call(model, x)
