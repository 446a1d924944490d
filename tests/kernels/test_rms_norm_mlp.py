"""The kernel against its members, on every path that this machine has.

With TRITON_INTERPRET=1 the Triton kernels run on CPU tensors. Triton reads that variable when it
is imported, so one test here runs this file again in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rms_norm_mlp_cases import (
    HIDDEN_ACTS,
    NORMS,
    Seat,
    assert_as_exact,
    assert_forward,
    assert_gradients,
    members,
    outputs_and_gradients,
)
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from module_fusion.kernels.rms_norm_mlp import _ops, cpu, reference
from module_fusion.kernels.rms_norm_mlp._triton import INTERPRETED, can_run_triton

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Shrinking a failure repeats it a thousand times, which takes the interpreter minutes, and the
# compiler too.
SLOW = INTERPRETED or torch.cuda.is_available()
EXAMPLES = settings(
    max_examples=max(20, settings().max_examples // 40),
    phases=set(Phase) - ({Phase.shrink, Phase.explain} if SLOW else set()),
)

if INTERPRETED:
    import interpreter

    interpreter.install()

# With one intermediate value all of the output has one error, GELU's at a point.
intermediates = st.sampled_from([2, 3, 8, 17, 33, 64, 96])
sizes = st.sampled_from([1, 2, 3, 8, 17, 33, 64, 96])
batches = st.sampled_from([(1,), (0,), (1, 1), (2,), (3, 5), (16,), (17,), (2, 0, 3), (2, 3, 7)])
variants = st.fixed_dictionaries(
    {
        "norm": st.sampled_from(sorted(NORMS)),
        "activation": st.sampled_from(sorted(HIDDEN_ACTS)),
        "bias": st.booleans(),
        "merged": st.sampled_from([False, True, "up first"]),
        "scale": st.sampled_from([1.0, 0.01, 4.0]),
    }
)
# The interpreter computes with NumPy, which says so where a value becomes inf.
numpy_may_overflow = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
layouts = st.sampled_from(["contiguous", "transposed", "expanded", "every other"])
magnitudes = st.sampled_from([1e-4, 1.0, 100.0])


def in_layout(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """Random values of a shape in memory that is laid out in some way."""
    if layout == "transposed":
        return torch.randn(*reversed(shape)).to(device, dtype).permute(*reversed(range(len(shape))))
    if layout == "expanded":
        return torch.randn(shape[-1]).to(device, dtype).expand(shape)
    if layout == "every other":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(device, dtype)[..., ::2]
    return torch.randn(shape).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@EXAMPLES
@given(
    hidden=sizes, intermediate=intermediates, batch=batches, dtype=st.sampled_from(DTYPES),
    layout=layouts, size=magnitudes, seed=st.integers(0, 99), options=variants,
)  # fmt: skip
def test_the_output_is_as_exact_as_that_of_the_members(
    device: str, hidden: int, intermediate: int, batch: tuple[int, ...], dtype: torch.dtype,
    layout: str, size: float, seed: int, options: dict[str, Any],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    seat = Seat(*members(hidden, intermediate, dtype, device, **options))
    x = in_layout((*batch, hidden), layout, dtype, device) * size
    assert_forward(seat, x)


@pytest.mark.parametrize("device", DEVICES)
@EXAMPLES
@given(
    # In rows of one or two values the gradient of x is what a cancellation leaves.
    hidden=sizes.filter(lambda size: size > 2), intermediate=intermediates, batch=batches,
    dtype=st.sampled_from(DTYPES), layout=layouts, dy_layout=layouts, size=magnitudes,
    dy_size=magnitudes, seed=st.integers(0, 99), options=variants,
)  # fmt: skip
def test_the_gradients_are_as_exact_as_those_of_the_members(
    device: str, hidden: int, intermediate: int, batch: tuple[int, ...], dtype: torch.dtype,
    layout: str, dy_layout: str, size: float, dy_size: float, seed: int, options: dict[str, Any],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    seat = Seat(*members(hidden, intermediate, dtype, device, **options))
    x = in_layout((*batch, hidden), layout, dtype, device) * size
    dy = in_layout((*batch, hidden), dy_layout, dtype, device) * dy_size
    assert_gradients(seat, x, dy, seat)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_the_stride_of_a_dimension_of_one_does_not_count(
    device: str, merged: bool, tokens: int
) -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        seat = Seat(*members(8, 16, dtype, device, merged=merged))
        x = torch.randn(tokens, 8).to(device, dtype)[None].transpose(0, 1)
        assert x.is_contiguous()
        assert x.stride(1) == 8 * tokens
        assert_forward(seat, x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("activation", sorted(HIDDEN_ACTS))
def test_many_values_leave_nothing_to_luck(
    device: str, dtype: torch.dtype, norm: str, activation: str
) -> None:
    torch.manual_seed(0)
    seat = Seat(*members(192, 320, dtype, device, norm=norm, activation=activation, bias=True))
    x, dy = torch.randn(2, 64, 192).to(device, dtype), torch.randn(2, 64, 192).to(device, dtype)
    assert_forward(seat, x)
    assert_forward(seat, x[:1, :16])
    assert_gradients(seat, x, dy, seat)


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory holds NaN: what no program writes must not be what a member left there."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        real = getattr(owner, name)

        def poisoned(*arguments: Any, real: Any = real, **options: Any) -> Tensor:
            values: Tensor = real(*arguments, **options)
            return values.fill_(torch.nan) if values.is_floating_point() else values

        monkeypatch.setattr(owner, name, poisoned)


def assert_sizes(hidden: int, intermediate: int, tokens: int, dtype: Any, device: str) -> None:
    """Output and gradients of members of these sizes."""
    torch.manual_seed(0)
    seat = Seat(*members(hidden, intermediate, dtype, device))
    x, dy = torch.randn(2, tokens, hidden).to(device, dtype)
    assert_forward(seat, x)
    assert_gradients(seat, x, dy, seat)


# In the interpreter steps are of 256, along intermediate of 512 for one token; the activation
# takes 2048 values of a row at a time, and 1024 backward. A GPU's longer ones are below.
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "tokens"), [(387, 601, 1), (387, 601, 16), (131, 2113, 17)]
)
@pytest.mark.usefixtures("_poisoned")
def test_odd_sizes_beyond_one_tile(
    device: str, dtype: torch.dtype, hidden: int, intermediate: int, tokens: int
) -> None:
    assert_sizes(hidden, intermediate, tokens, dtype, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 16, 300])
@pytest.mark.usefixtures("_poisoned")
def test_odd_sizes_as_large_as_those_of_models(dtype: torch.dtype, tokens: int) -> None:
    """Steps along hidden and intermediate are of at most 1024."""
    assert_sizes(4097, 11009, tokens, dtype, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("_poisoned")
def test_the_gradients_of_the_norm_of_more_rows_than_programs(
    device: str, dtype: torch.dtype
) -> None:
    if not can_run_triton(torch.device(device, 0 if device == "cuda" else None)):
        pytest.skip("no Triton on this device here")
    torch.manual_seed(0)
    x, dy = torch.randn(2, 387, 67).to(device, dtype)
    weight = torch.randn(67).to(device, dtype)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, dy = (tensor.detach().requires_grad_() for tensor in tensors)
        return torch.autograd.grad(reference.rms_norm(x, weight, 1e-5, "early"), (x, weight), dy)

    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-5)
    options = reference.Options(1e-5, "early", "silu")
    ours = _ops.triton_backward._rms_norm_gradients(dy, x, rstd, weight, options, True, True)
    theirs = gradients(x, weight, dy)
    truth = gradients(x.double(), weight.double(), dy.double())
    for name, *values in zip(("x", "norm"), ours, theirs, truth, strict=True):
        assert_as_exact(name, *values, x.numel())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("activation", sorted(HIDDEN_ACTS))
def test_over_many_draws_of_few_tokens_the_errors_are_no_larger(
    device: str, dtype: torch.dtype, merged: bool, activation: str
) -> None:
    """With few tokens an error is a matter of luck, so many are summed, and none is allowed for.

    Few tokens take other products than many do, which sum in another order.
    """
    squares: dict[str, Tensor] = {}
    for seed in range(30):
        torch.manual_seed(seed)
        options = {"norm": "late", "activation": activation, "merged": merged}
        seat = Seat(*members(64, 96, dtype, device, **options))
        x, dy = torch.randn(2, 2, 64).to(device, dtype)
        for name, (ours, theirs, truth) in outputs_and_gradients(seat, x, dy, seat).items():
            both = [((v.double() - truth).norm() / truth.norm()) ** 2 for v in (ours, theirs)]
            squares[name] = squares.get(name, 0) + torch.stack(both)
    for name, (ours, theirs) in squares.items():
        ratio = float((ours / theirs) ** 0.5)
        assert ratio < 1.1, f"{name}: {ratio:.2f} times the error of the members"


@numpy_may_overflow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [0.5, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("activation", sorted(HIDDEN_ACTS))
def test_the_derivative_of_the_activation_is_as_exact_as_torchs(
    device: str, activation: str, size: float
) -> None:
    if not can_run_triton(torch.device(device, 0 if device == "cuda" else None)):
        pytest.skip("no Triton on this device here")
    torch.manual_seed(0)
    gate, dy = torch.randn(2, 64, 512, device=device)
    gate *= size

    def derivative(gate: Tensor) -> Tensor:
        gate = gate.requires_grad_()
        return torch.autograd.grad(reference.activate(gate, activation), gate, dy.to(gate.dtype))[0]

    truth, theirs = derivative(gate.double()), derivative(gate.clone())
    options = reference.Options(0.0, "late", activation)
    up = torch.ones_like(gate)
    _, ours, _ = _ops.triton_backward._gated_gradients(dy, gate, up, options, merged=False)
    errors = [(value.double() - truth).norm() for value in (ours, theirs)]
    assert errors[0] < 1.1 * errors[1]


@numpy_may_overflow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(HIDDEN_ACTS))
def test_gates_of_any_size_give_numbers_where_torch_does(
    device: str, activation: str, dtype: torch.dtype
) -> None:
    if not can_run_triton(torch.device(device, 0 if device == "cuda" else None)):
        pytest.skip("no Triton on this device here")
    sizes = torch.logspace(-30, 38, 69, dtype=torch.float64).to(device, dtype)
    gate = torch.cat([sizes, -sizes])[None]
    gate = gate[gate.isfinite()][None].requires_grad_()
    one = torch.ones_like(gate)
    value = reference.activate(gate, activation)
    (slope,) = torch.autograd.grad(value, gate, one)
    options = reference.Options(0.0, "late", activation)
    with torch.no_grad():
        again, ours, _ = _ops.triton_backward._gated_gradients(
            one, gate, one, options, merged=False
        )
        for mine, theirs in (
            (_ops.triton_forward.gated(gate, one, activation), value),
            (again, value),
            (ours, slope),
        ):
            usable = theirs.isfinite()
            torch.testing.assert_close(mine[usable], theirs[usable], atol=1e-6, rtol=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", ["norm", "mlp", "all but down", "all but x"])
def test_only_the_wanted_gradients_are_given(device: str, dtype: torch.dtype, frozen: str) -> None:
    torch.manual_seed(0)
    norm, mlp = members(32, 48, dtype, device, bias=True)
    seat = Seat(norm, mlp)
    for parameter in seat.weights():
        if parameter is not None:
            parameter.requires_grad_(False)
    wanted = {"norm": mlp, "mlp": norm, "all but down": mlp.down_proj, "all but x": None}[frozen]
    if isinstance(wanted, nn.Module):
        wanted.requires_grad_()
    x, dy = torch.randn(2, 5, 32).to(device, dtype)
    assert_gradients(seat, x, dy, seat)
    # The operator returns the wanted ones alone, in a list.
    assert_gradients(seat, x, dy, torch.compile(seat, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize("device", DEVICES)
def test_the_triton_backward_computes_no_gradient_for_nothing(device: str) -> None:
    if not can_run_triton(torch.device(device, 0 if device == "cuda" else None)):
        pytest.skip("no Triton on this device here")
    seat = Seat(*members(32, 48, torch.bfloat16, device, bias=True))
    weights, options = seat.weights(), seat.prepared.options(seat.norm)
    x = torch.randn(5, 32).to(device, torch.bfloat16)
    with torch.no_grad():
        y, *saved = _ops.triton_forward.forward_for_backward(x, weights, options)
        for wanted in range(8):
            needs = [position == wanted for position in range(8)]
            found = _ops.triton_backward.backward(y, x, *saved, weights, options, needs)
            assert [gradient is not None for gradient in found] == needs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("merged", [False, True, "up first"])
def test_no_tensor_of_the_caller_is_written_to(device: str, merged: bool | str) -> None:
    torch.manual_seed(0)
    norm, mlp = members(32, 48, torch.bfloat16, device, merged=merged)
    seat = Seat(norm, mlp)
    x = torch.randn(5, 32).to(device, torch.bfloat16).requires_grad_()
    dy = torch.randn(5, 32).to(device, torch.bfloat16)
    seen = [x, dy, *norm.parameters(), *mlp.parameters()]
    before = [(tensor.detach().clone(), tensor._version) for tensor in seen]
    output = seat(x)
    first = torch.autograd.grad(output, [x, *mlp.parameters()], dy, retain_graph=True)
    second = torch.autograd.grad(output, [x, *mlp.parameters()], dy)
    with torch.no_grad():
        seat(x)
    for tensor, (value, version) in zip(seen, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version
    # What was saved is still what it was, and sums have a fixed order.
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_the_weights_are_those_of_the_moment(device: str) -> None:
    norm, mlp = members(16, 24, torch.float32, device)
    seat = Seat(norm, mlp)
    x = torch.randn(4, 16, device=device)
    mlp.up_proj.weight = nn.Parameter(torch.randn(24, 16, device=device))
    norm.variance_epsilon = 0.5
    torch.testing.assert_close(seat(x), mlp(norm(x)))


@pytest.mark.parametrize("device", DEVICES)
def test_an_input_that_does_not_fit_is_left_to_the_members(device: str) -> None:
    norm, mlp = members(16, 24, torch.float32, device)
    seat = Seat(norm, mlp)
    one = torch.randn(4, 1, device=device)
    assert torch.equal(seat(one), mlp(norm(one)))
    with pytest.raises(RuntimeError, match="must match"):
        seat(torch.randn(4, 5, device=device))


class SkipsNothing(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.numel() == 0 else super().forward(x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_without_tokens_is_left_to_the_members(
    device: str, shape: tuple[int, ...], compiled: bool
) -> None:
    norm, mlp = members(8, 12, torch.float32, device)
    mlp.__class__ = SkipsNothing
    seat: Any = Seat(norm, mlp)
    seat = torch.compile(seat, backend="aot_eager", fullgraph=True) if compiled else seat
    seat(torch.randn(3, 8, device=device))
    x = torch.zeros(shape, device=device)
    assert seat(x).shape == x.shape
    seat(x).sum().backward()
    assert [parameter.grad is None for parameter in mlp.parameters()] == [True] * 3
    assert norm.weight.grad is not None


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_takes_any_number_of_tokens(device: str) -> None:
    torch._dynamo.reset()
    seat = Seat(*members(8, 12, torch.float32, device))
    compiled = torch.compile(seat, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(torch.randn(5, 8, device=device))
    for tokens in (7, 9):
        x = torch.randn(tokens, 8, device=device)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x), seat(x))


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_are_those_of_the_members(device: str) -> None:
    norm, mlp = members(8, 12, torch.float32, device)
    seat = Seat(norm, mlp)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    seconds = []
    for function in (seat, lambda z: mlp(norm(z))):
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.pow(2).sum(), [x, *mlp.parameters()]))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_tied_weights_have_the_second_derivatives_of_the_members(device: str) -> None:
    torch.manual_seed(0)
    norm, mlp = members(8, 12, torch.float32, device)
    mlp.up_proj.weight = mlp.gate_proj.weight
    seat = Seat(norm, mlp)
    x, tensors = torch.randn(3, 8, device=device), [*norm.parameters(), *mlp.parameters()]
    found = []
    for function in (seat, lambda z: mlp(norm(z))):
        firsts = torch.autograd.grad(function(x).square().sum(), tensors, create_graph=True)
        total = torch.stack([first.square().sum() for first in firsts]).sum()
        found.append([*firsts, *torch.autograd.grad(total, tensors)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trains", [False, True])
def test_the_output_may_be_modified_in_place(device: str, dtype: torch.dtype, trains: bool) -> None:
    norm, mlp = members(16, 24, dtype, device)
    seat = Seat(norm, mlp)
    x, other = torch.randn(2, 2, 3, 16).to(device, dtype).requires_grad_()
    found = []
    for function in (seat, lambda z: mlp(norm(z))):
        with torch.set_grad_enabled(trains):
            y = function(x)
        assert not y._is_view()
        y *= other
        found.append(torch.autograd.grad(y.sum(), [x, other] if trains else [other]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_input_that_was_modified_gives_the_right_gradient_or_an_error(
    device: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm, mlp = members(16, 24, dtype, device)
    seat = Seat(norm, mlp)
    leaf = torch.randn(2, 3, 16).to(device, dtype).requires_grad_()

    def gradient(function: Any) -> Tensor:
        x = leaf * 1
        x += function(x)
        return torch.autograd.grad(x.float().square().sum(), leaf)[0]

    if dtype == torch.bfloat16 and not seat.prepared.triton:
        torch.testing.assert_close(gradient(seat), gradient(lambda z: mlp(norm(z))))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(seat)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("merged", [False, True, "up first"])
def test_compiled_whole_forward_and_backward(
    device: str, dtype: torch.dtype, merged: bool | str
) -> None:
    torch.manual_seed(0)
    norm, mlp = members(32, 48, dtype, device, merged=merged, bias=not merged)
    seat = Seat(norm, mlp)
    # Inductor would need minutes for what the operators do outside of it.
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(seat, fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 32).to(device, dtype)
    dy = torch.randn(2, 3, 32).to(device, dtype)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), seat(x))
    assert_gradients(seat, x, dy, compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("merged", [False, True, "up first"])
@pytest.mark.parametrize("shape", [(32,), (1, 1, 32)])
def test_one_token_in_a_graph_is_two_kernels_that_give_the_same_bits(
    shape: tuple[int, ...], merged: bool | str
) -> None:
    torch.manual_seed(0)
    norm, mlp = members(32, 48, torch.bfloat16, "cuda", merged=merged, bias=bool(merged))
    seat = Seat(norm, mlp)
    names: list[str] = []

    def noting(graph: Any, example: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for backend in (noting, "inductor"):
        torch.compiler.reset()
        compiled = torch.compile(seat, fullgraph=True, backend=backend)
        for layout in ("contiguous", "every other"):
            x = in_layout(shape, layout, torch.bfloat16, "cuda")
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), seat(x), rtol=0, atol=0)
    assert sum("triton_kernel" in name for name in names) >= 2
    assert not any(name.startswith(_ops.NAMESPACE) for name in names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_token_in_a_graph_that_cuda_replays_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    seat = Seat(*members(32, 48, torch.bfloat16, "cuda"))
    compiled = torch.compile(seat, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 1, 32).to("cuda", torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), seat(x), rtol=0, atol=0)


def test_the_gpu_path_is_an_operator_in_a_graph() -> None:
    norm, mlp = members(16, 24, torch.float32, DEVICES[-1])
    seat = Seat(norm, mlp)
    names: list[str] = []

    def backend(graph: Any, example: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(seat, fullgraph=True, backend=backend)(torch.randn(2, 16, device=DEVICES[-1]))
    assert any(name.startswith(_ops.NAMESPACE) for name in names) == seat.prepared.triton


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_captured_in_a_cuda_graph(tokens: int) -> None:
    norm, mlp = members(256, 512, torch.bfloat16, "cuda")
    seat = Seat(norm, mlp)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = seat(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = seat(x)
        output.zero_()
        graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", reference.NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_has_the_bits_of_the_formula(device: str, norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).to(device, dtype), torch.randn(96).to(device, dtype)
    if can_run_triton(x.device):
        options = reference.Options(1e-5, norm, "silu")
        ours = _ops.triton_forward.rms_norm(x, weight, options)
    else:
        ours = cpu.rms_norm(x, weight, 1e-5, norm)
    theirs = reference.rms_norm(x, weight, 1e-5, norm)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-5, norm)
    assert_as_exact(norm, ours, theirs, truth, ours.numel())
    # The order of a sum changes the rounding of a few values; another rounding point of many.
    assert (ours == theirs).float().mean() > 0.99 or dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", sorted(HIDDEN_ACTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gated_step_has_the_bits_of_the_modules(
    device: str, activation: str, dtype: torch.dtype
) -> None:
    if not can_run_triton(torch.device(device, 0 if device == "cuda" else None)):
        pytest.skip("no Triton on this device here")
    torch.manual_seed(0)
    gate, up, dy = torch.randn(3, 8, 1536).to(device, dtype)
    options = reference.Options(0.0, "late", activation)
    ours = (
        _ops.triton_forward.gated(gate, up, activation),
        *_ops.triton_backward._gated_gradients(dy, gate, up, options, merged=False),
    )
    gate.requires_grad_()
    up.requires_grad_()
    product = reference.activate(gate, activation) * up
    theirs = (product, product, *torch.autograd.grad(product, (gate, up), dy))
    for name, mine, other in zip(("gated", "again", "dgate", "dup"), ours, theirs, strict=True):
        # Another formula of the activation changes a few values; another rounding point many.
        assert (mine == other).float().mean() > 0.99, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 16, 17])
@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_are_exact_leave_the_bits_of_the_members(
    device: str, tokens: int, norm: str, dtype: torch.dtype
) -> None:
    """Gate and up sum two values each, which float32 holds exactly and half precision does not."""
    torch.manual_seed(0)
    seat = Seat(*members(128, 128, dtype, device, norm=norm))
    one = torch.eye(128)
    gate, up, down = one + one.roll(1, 0) / 16, one.roll(2, 0) - one.roll(3, 0) / 16, one
    with torch.no_grad():
        for weight, values in zip(seat.weights()[1:4], (gate, up, down), strict=True):
            assert weight is not None
            weight.copy_(values)
        x = torch.randn(tokens, 128).to(device, dtype)
        ours, theirs = seat(x), seat.mlp(seat.norm(x))
    assert (ours == theirs).float().mean() > 0.99


POINTERS = ("x", "dy", "y", "w", "norm", "gate", "up", "down", "bias", "rstd", "dx", "dw",
            "product", "dproduct", "dgate", "dup", "gate_bias", "up_bias")  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted are not compiled")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("_rms_norm", {"HAS_WEIGHT": True, "NORM": "early", "SAVE": True, "BLOCK": 1024}),
        ("_rms_norm", {"HAS_WEIGHT": False, "NORM": "late", "SAVE": False, "BLOCK": 1024}),
        ("_gated", {"ACT": "silu", "BLOCK": 1024}),
        ("_gated", {"ACT": "gelu_tanh", "BLOCK": 1024}),
        ("_gated", {"ACT": "gelu", "BLOCK": 1024}),
        ("_gated_backward", {"ACT": "silu", "BLOCK": 1024}),
        ("_gated_backward", {"ACT": "gelu_tanh", "BLOCK": 1024}),
        (
            "_rms_norm_backward",
            {"HAS_WEIGHT": True, "NORM": "one_plus", "NEED_DX": True, "NEED_DW": True, "BLOCK": 64},
        ),
        *(
            (
                "_skinny_gate_up",
                {
                    "HAS_WEIGHT": True, "NORM": "early", "ACT": "silu", "HAS_GATE_BIAS": bias,
                    "HAS_UP_BIAS": bias, "BLOCK_M": tokens, "BLOCK_I": 16, "BLOCK_H": 256,
                    "STAGES": 3, "FLATTEN": bias,
                },
            )
            for tokens, bias in ((1, False), (16, True))
        ),
        *(
            (
                "_skinny_down",
                {
                    "HAS_BIAS": bias, "BLOCK_M": tokens, "BLOCK_H": 16, "BLOCK_I": 256,
                    "STAGES": 3, "FLATTEN": bias,
                },
            )
            for tokens, bias in ((1, True), (16, False))
        ),
    ],
)  # fmt: skip
def test_the_kernels_compile_for_a_gpu_that_is_not_here(
    kernel: str, constants: dict[str, Any], dtype: str
) -> None:
    """The interpreter runs what the compiler refuses; this needs no GPU and no driver."""
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    if kernel.startswith("_skinny") and dtype == "fp32":
        pytest.skip("float32 takes cuBLAS")
    module = _ops.triton_forward
    function = getattr(module, kernel, None) or getattr(_ops.triton_backward, kernel)
    types = {}
    for name in function.arg_names:
        stem, _, shape = name.rpartition("_")
        if name in constants:
            types[name] = "constexpr"
        elif stem in POINTERS and shape.isupper():
            types[name] = "*fp32" if stem in ("rstd", "dw") else f"*{dtype}"
        else:
            types[name] = "fp32" if name == "eps" else "i32"
    source = compiler.ASTSource(function, types, constants)
    assert compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.skipif(INTERPRETED, reason="is the process started below")
def test_the_same_with_the_triton_kernels_interpreted() -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6."):
        pytest.skip(f"interpreter.py mends the interpreter of triton 3.6, not {triton.__version__}")
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTEST_ADDOPTS", None)
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
