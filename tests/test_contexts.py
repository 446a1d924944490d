"""The captured call under every way PyTorch has of running a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import PATHS, Block, Model, WeightKernel, mapped, members_kernel, runs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap

from module_fusion import fuse_modules, report, unfuse_modules

# Without a kernel nothing is captured; with one the calls are.
KERNELS = {"no kernel": None, "members kernel": members_kernel(1), "weight kernel": WeightKernel}


@pytest.fixture
def model(x: Tensor) -> Model:
    torch.manual_seed(1)
    return Model(3).to(x.device)


@pytest.fixture(params=KERNELS)
def fuse(request: pytest.FixtureRequest) -> Callable[[nn.Module], None]:
    layer = KERNELS[request.param]

    def fuse(model: nn.Module) -> None:
        with mapped(**({"Kernel": layer} if layer else {})):
            fuse_modules(model, PATHS, kernel="Kernel" if layer else None)

    return fuse


Fuse = Callable[[nn.Module], None]


def test_eager_gives_the_same_bits_and_gradients(model: Model, x: Tensor, fuse: Fuse) -> None:
    x.requires_grad_()
    expected = model(x)
    wanted = torch.autograd.grad(expected.sum(), [x, *model.parameters()])
    fuse(model)
    got = model(x)
    assert torch.equal(got, expected)
    got = torch.autograd.grad(got.sum(), [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_second_derivatives_are_the_same(model: Model, x: Tensor, fuse: Fuse) -> None:
    def curvature() -> Tensor:
        given = x.clone().requires_grad_()
        [slope] = torch.autograd.grad(model(given).sum(), given, create_graph=True)
        return torch.autograd.grad(slope.pow(2).sum(), given)[0]

    expected = curvature()
    fuse(model)
    assert torch.equal(curvature(), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_model_compiles_into_one_graph(
    model: Model, x: Tensor, fuse: Fuse, backend: str
) -> None:
    expected = model(x)
    fuse(model)
    counter = CompileCounter()
    torch.compile(model, backend=counter, fullgraph=True)(x)
    assert counter.frame_count == 1
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), expected)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_compiling_layer_by_layer_compiles_no_more_often_than_the_unfused_model(
    x: Tensor, fuse: Fuse, with_gradients: bool
) -> None:
    def compiles(fused: bool) -> int:
        torch.compiler.reset()
        model = Model(6).to(x.device)
        if fused:
            fuse(model)
        counter = CompileCounter()
        for layer in model.layers:
            layer.compile(backend=counter, fullgraph=True)
        with torch.set_grad_enabled(with_gradients):
            model(x)
            model(x)
        return int(counter.frame_count)

    assert compiles(fused=True) <= compiles(fused=False)


def test_fusing_and_unfusing_after_compile_is_seen_by_the_compiled_model(
    model: Model, x: Tensor
) -> None:
    class Zero(nn.Module):
        can_torch_compile = True

        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    with mapped(Kernel=Zero):
        fuse_modules(model, PATHS, kernel="Kernel")
    assert torch.equal(compiled(x), x)
    unfuse_modules(model)
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_signature_and_result(
    model: Model, x: Tensor, fuse: Fuse, strict: bool
) -> None:
    expected = model(x)
    plain = torch.export.export(model, (x,), strict=strict)
    fuse(model)
    exported = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(exported.module()(x), expected)
    assert exported.call_spec == plain.call_spec
    assert list(exported.state_dict) == list(plain.state_dict)
    assert exported.graph_signature.user_inputs == plain.graph_signature.user_inputs


def test_functional_call_uses_the_parameters_it_is_given(
    model: Model, x: Tensor, fuse: Fuse
) -> None:
    others = {name: 2 * p.detach() for name, p in model.named_parameters()}
    expected = functional_call(model, others, x)
    fuse(model)
    assert torch.equal(functional_call(model, others, x), expected)


def test_functional_call_on_one_member_does_not_leak_into_the_other(x: Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            other = {"weight": self.norm.weight * 3}
            return self.mlp(functional_call(self.norm, other, x))

    model = nn.Sequential(Block()).to(x.device)
    expected = model(x)
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(model, ["0.norm", "0.mlp"], kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert runs(kernel) == 0


def test_transforms_of_torch_func_give_the_same(model: Model, x: Tensor, fuse: Fuse) -> None:
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, x).sum()

    def everything() -> list[Tensor]:
        per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
        return [vmap(model)(x), tangent, *per_sample.values()]

    expected = everything()
    fuse(model)
    for got, wanted in zip(everything(), expected, strict=True):
        assert torch.equal(got, wanted)


def test_vmap_over_one_member_alone_works(x: Tensor) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(vmap(self.norm)(x))

    model = nn.Sequential(Block()).to(x.device)
    expected = model(x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, ["0.norm", "0.mlp"], kernel="Kernel")
    assert torch.equal(model(x), expected)


def test_forward_mode_derivatives_are_the_same(model: Model, x: Tensor, fuse: Fuse) -> None:
    from torch.autograd import forward_ad

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(model(dual)).tangent

    expected = tangent()
    fuse(model)
    assert torch.equal(tangent(), expected)


@pytest.mark.filterwarnings("ignore")
def test_tracing_gives_the_same(model: Model, x: Tensor, fuse: Fuse) -> None:
    expected = model(x)
    fuse(model)
    assert torch.equal(torch.jit.trace(model, (x,))(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_gives_the_same(model: Model, x: Tensor, fuse: Fuse, compiled: bool) -> None:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        expected = model(x)
        fuse(model)
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        got = run(x)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_inference_mode_gives_the_same_and_runs_the_kernel(
    model: Model, x: Tensor, fuse: Fuse, compiled: bool
) -> None:
    with torch.inference_mode():
        expected = model(x)
        fuse(model)
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        assert torch.equal(run(x), expected)
    groups = report(model).groups
    if not compiled and groups[0].kernel is not None:
        assert [group.kernel_calls for group in groups] == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_cuda_graph_replays_the_same(fuse: Fuse) -> None:
    model = Model(3).cuda()
    static = torch.randn(2, 3, 8, device="cuda")
    with torch.no_grad():
        fuse(model)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(static)
        static.copy_(torch.randn_like(static))
        graph.replay()
        unfuse_modules(model)
        assert torch.equal(output, model(static))


def test_modes_entered_between_capture_and_use_are_an_error_or_the_same(x: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from module_fusion import DeferredUseError

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            h = self.norm(x)
            with FlopCounterMode(display=False):
                return self.mlp(h)

    model = nn.Sequential(Block()).to(x.device)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, ["0.norm", "0.mlp"], kernel="Kernel")
    with pytest.raises(DeferredUseError, match="TorchDispatchMode"):
        model(x)


class Counting(Block):
    """Writes to a dict that was there before, as caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["calls"] = 1
        return super().forward(x)


def test_a_kernel_that_falls_back_to_the_members_compiles_where_the_block_writes_to_a_dict(
    x: Tensor,
) -> None:
    model = nn.Sequential(Counting()).to(x.device)
    with torch.no_grad():
        expected = model(x)
        with mapped(Kernel=members_kernel(1)):
            fuse_modules(model, ["0.norm", "0.mlp"], kernel="Kernel")
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
