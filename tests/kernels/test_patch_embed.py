"""PatchEmbed against the convolution it replaces, on every path there is.

Paths: torch operations (CPU), Triton in its interpreter (CPU; one test runs this file again
with TRITON_INTERPRET=1), Triton on a GPU where there is one.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from module_fusion.kernels.patch_embed import _geometry, _ops, _torch, layers
from module_fusion.kernels.patch_embed.layers import PatchEmbed

FOLDER = Path(layers.__file__).parent.parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON
CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
prepare = PatchEmbed.forward.prepare  # type: ignore[attr-defined]


def several(examples: int) -> settings:
    """Settings for properties that hold on a device, which stays the same for all examples."""
    checks = [*settings.default.suppress_health_check, HealthCheck.function_scoped_fixture]
    # Shrinking compiles, or interprets, a thousand times.
    slow = INTERPRETED or torch.cuda.is_available()
    phases = set(Phase) - ({Phase.shrink, Phase.explain} if slow else set())
    return settings(max_examples=examples, suppress_health_check=checks, phases=phases)


@pytest.fixture(autouse=True)
def _few_patches_too(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU multiplies fp32 patches of any number and size."""
    if INTERPRETED and device != "cpu":
        pytest.skip("the interpreter runs on the CPU")
    monkeypatch.setattr(_ops, "_FEW_ROWS", 0)
    monkeypatch.setattr(_ops, "_FEW_TERMS", 0)


def multiplies(x: Tensor, weight_NK: Tensor, plan: _geometry.PatchPlan) -> bool:
    """In place of `_gains`: whenever the product can have the convolution's strides."""
    return not (len(plan.patch) == 3 and _geometry.is_channels_last(x))


@pytest.fixture
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions in fp32 proper, to compare with."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def _rows_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU multiplies patches of any size."""
    monkeypatch.setattr(_torch, "_gains", lambda *_: True)


def bound(proj: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """The kernel in a seat, as the library binds it."""
    seat = SimpleNamespace(proj=proj, prepared=prepare(proj, **options))
    return lambda x: PatchEmbed.forward(seat, x)  # type: ignore[arg-type]


def conv2d(device: str = "cpu", dtype: torch.dtype = torch.float32, patch: int = 8) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 24, patch, patch, device=device, dtype=dtype)


def results(
    run: Callable[[Tensor], Tensor], proj: nn.Module, x: Tensor, grad: Tensor
) -> list[Tensor]:
    """Output and gradients: input, weight, bias."""
    x = x.detach().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *proj.parameters()), grad)]


def assert_as_good(
    ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], magnitude: list[Tensor]
) -> None:
    """Errors at most 1.1 times those of the convolution in the same dtype.

    The error is the relative L2 distance to float64, the size of what a next layer sees. The
    floor is an fp32 ulp of the sums without cancellation: which order an fp32
    accumulation takes is luck. It is far below one rounding to 16 bits, and below TF32.
    On a GPU it is two: a product of two factors in two parts each may be off by as much,
    and sums as short as here are left to the convolution unless a test says otherwise.
    Values too large for the dtype do not count: oneDNN makes some of them the largest there is.
    """
    for mine, other, true, size in zip(ours, theirs, exact, magnitude, strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        usable = other.isfinite() & (true.abs() < torch.finfo(other.dtype).max)
        error, allowed = (float((value.double() - true)[usable].norm()) for value in (mine, other))
        ulps = 2 if mine.is_cuda else 1
        floor = ulps * torch.finfo(torch.float32).eps * float(size[usable].norm())
        assert error <= 1.1 * allowed + floor


def arranged(x: Tensor, layout: str) -> Tensor:
    """The same shape with other strides."""
    if layout == "channels last":
        dim = 1 if x.dim() > 2 else 0
        return x.movedim(dim, -1).contiguous().movedim(-1, dim)
    if layout == "sliced":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[..., :1, :].expand_as(x) if x.dim() > 2 else x[..., :1].expand_as(x)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "offset":
        return torch.cat([torch.full_like(x[..., :1], torch.nan), x], -1)[..., 1:]
    return x


LAYOUTS = st.sampled_from(
    ["contiguous", "channels last", "sliced", "expanded", "transposed", "offset"]
)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    dims = draw(st.integers(1, 3))
    sizes = st.sampled_from([1, 2, 3, 7, 8, 14, 16])
    patch = draw(
        st.lists(sizes, min_size=dims, max_size=dims).filter(lambda p: 1 < math.prod(p) <= 400)
    )
    rows = draw(st.booleans())
    size = [p if rows else p * draw(st.integers(1, 3)) + draw(st.integers(0, p - 1)) for p in patch]
    batch = draw(st.sampled_from([None, 0, 1, 2, 5]))
    channels = draw(st.sampled_from([1, 3, 4]))
    return {
        "patch": patch,
        "shape": [*([] if batch is None else [batch]), channels, *size],
        "out": draw(st.sampled_from([1, 8, 24, 70])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "bias": draw(st.booleans()),
        "scale": draw(st.sampled_from([1e-2, 1.0, 20.0])),
        "size": draw(st.sampled_from([1e-4, 1.0, 100.0])),
        "grad_size": draw(st.sampled_from([1e-4, 1.0, 100.0])),
        "layout": draw(LAYOUTS),
        "grad_layout": draw(LAYOUTS),
        "seed": draw(st.integers(0, 99)),
    }


def tensors_of(case: dict[str, Any], device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(case["seed"])
    dims, dtype = len(case["patch"]), case["dtype"]
    channels = case["shape"][-dims - 1]
    proj = CONVOLUTIONS[dims](
        channels, case["out"], case["patch"], case["patch"], bias=case["bias"]
    )
    with torch.no_grad():
        for parameter in proj.parameters():
            parameter.mul_(case["scale"])
    proj = proj.to(device, dtype)
    x = torch.randn(case["shape"], device=device, dtype=dtype) * case["size"]
    x = arranged(x, case["layout"])
    grad = torch.randn_like(proj(x).contiguous()) * case["grad_size"]
    return proj, x, arranged(grad, case["grad_layout"])


def exact(proj: nn.Module, x: Tensor, grad: Tensor, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Results in float64, of all operands or of their absolute values."""
    proj = copy.deepcopy(proj).double()
    with torch.no_grad():
        for parameter in proj.parameters():
            parameter.copy_(of(parameter))
    return results(proj, proj, of(x.double()), of(grad.double()))


@given(case=cases(), multiply=st.booleans(), wide=st.booleans())
@several(40 if INTERPRETED else 300)
def test_values_gradients_shapes_and_strides_are_the_convolutions(
    device: str, case: dict[str, Any], multiply: bool, wide: bool
) -> None:
    proj, x, grad = tensors_of(case, device)
    before = x.clone(), grad.clone(), [p.clone() for p in proj.parameters()]
    with pytest.MonkeyPatch.context() as patched:
        if multiply:
            patched.setattr(_torch, "_gains", multiplies)
        if wide and HAS_TRITON:
            patched.setattr(_ops._launch, "_wide", lambda *_: True)
        ours = results(bound(proj), proj, x, grad)
    theirs = results(proj, proj, x, grad)
    assert_as_good(ours, theirs, exact(proj, x, grad, lambda t: t), exact(proj, x, grad, torch.abs))
    after = x, grad, list(proj.parameters())
    for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
        assert torch.equal(old, new)
    if INTERPRETED and len(case["patch"]) == 3 and case["layout"] == "channels last":
        return  # Follows cuDNN; on a CPU, torch decides by sizes and dtype.
    for size, mine, other in zip(
        theirs[0].shape, ours[0].stride(), theirs[0].stride(), strict=True
    ):
        assert size <= 1 or mine == other or theirs[0].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_many_patches_are_summed_in_fp32(device: str, dtype: torch.dtype) -> None:
    proj, x = conv2d(device, dtype), torch.randn(33, 3, 33, 32, device=device).to(dtype)
    grad = torch.randn_like(proj(x).contiguous())
    assert_as_good(
        results(bound(proj), proj, x, grad),
        results(proj, proj, x, grad),
        exact(proj, x, grad, lambda t: t),
        exact(proj, x, grad, torch.abs),
    )


@pytest.fixture(params=[1, 2, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch computes with so many, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("patches", [1, 2, 16, 64])
@pytest.mark.parametrize("needs_input_grad", [False, True])
def test_over_many_draws_the_errors_in_float32_are_no_larger(
    device: str, patches: int, needs_input_grad: bool
) -> None:
    """Sums over as many channels as models have, where their order counts; none is allowed for.

    A convolution sums its weight's gradient per thread, a product does not.
    """
    if INTERPRETED or device == "cuda":
        pytest.skip("the order in which the CPU's products sum; Triton has one of its own")
    squares: dict[str, Tensor] = {}
    for seed in range(8):
        torch.manual_seed(seed)
        proj = nn.Conv3d(3, 1152, (2, 14, 14), (2, 14, 14))
        x, grad = torch.randn(patches, 3, 2, 14, 14), torch.randn(patches, 1152, 1, 1, 1)
        found = []
        wide = copy.deepcopy(proj).double()
        for run, own in ((bound(proj), proj), (proj, proj), (wide, wide)):
            dtype = own.weight.dtype
            leaf = x.to(dtype).requires_grad_(needs_input_grad)
            y = run(leaf)
            wanted = {"weight": own.weight, **({"input": leaf} if needs_input_grad else {})}
            gradients = torch.autograd.grad(y, list(wanted.values()), grad.to(dtype))
            with torch.no_grad():
                values = {"output": y, "for inference": run(x.to(dtype))}
            found.append({**values, **dict(zip(wanted, gradients, strict=True))})
        for name, true in found[2].items():
            errors = [(value[name].double() - true).norm() / true.norm() for value in found[:2]]
            squares[name] = squares.get(name, 0) + torch.stack(errors) ** 2
    for name, (ours, theirs) in squares.items():
        assert ours <= 1.1**2 * theirs, f"{name}: {float((ours / theirs) ** 0.5):.2f}"


@given(case=cases())
@several(15 if INTERPRETED or torch.cuda.is_available() else 100)  # A shape, a compilation.
def test_token_major_output_gives_contiguous_tokens(device: str, case: dict[str, Any]) -> None:
    proj, x, grad = tensors_of({**case, "dtype": torch.float32}, device)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_torch, "_gains", lambda *_: True)
        ours = results(bound(proj, token_major=True), proj, x, grad)
        with torch.no_grad():
            y = bound(proj, token_major=True)(x)
    theirs = results(proj, proj, x, grad)
    assert_as_good(ours, theirs, exact(proj, x, grad, lambda t: t), exact(proj, x, grad, torch.abs))
    if y.dim() == len(case["patch"]) + 2 and y.numel():
        assert y.flatten(2).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.usefixtures("_rows_always")
def test_flattened_tokens_share_the_outputs_memory(device: str, layout: str) -> None:
    x = arranged(torch.randn(2, 3, 32, 16, device=device), layout)
    y = bound(conv2d(device))(x)
    assert y.flatten(2).transpose(1, 2).data_ptr() == y.data_ptr()


@pytest.mark.usefixtures("_rows_always")
def test_every_view_that_the_convolutions_output_allows_is_allowed(device: str) -> None:
    y = bound(conv2d(device))(torch.randn(2, 3, 32, 16, device=device))
    for shape in [(2, -1), (48, 4, 2), (2, 96, 2), (-1, 24), (2, 3, 8, 8)]:
        y.view(shape)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
@pytest.mark.usefixtures("_rows_always")
def test_the_output_may_be_modified_in_place(
    device: str, size: tuple[int, int], dtype: torch.dtype, layout: str, trains: bool
) -> None:
    proj, x = conv2d(device, dtype), torch.randn(2, 3, *size, device=device, dtype=dtype)
    x, other = arranged(x, layout), torch.randn((), device=device, dtype=dtype, requires_grad=True)
    found = []
    for run in (bound(proj), proj):
        with torch.set_grad_enabled(trains):
            y = run(x)
        y *= other
        wanted = [other, *proj.parameters()] if trains else [other]
        found.append([y.detach(), *torch.autograd.grad(y.float().square().mean(), wanted)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(8, 8), (16, 24)])
@pytest.mark.usefixtures("_rows_always")
def test_the_output_is_no_view_and_may_be_detached_in_place(
    device: str, size: tuple[int, int], layout: str, token_major: bool, trains: bool
) -> None:
    x = arranged(torch.randn(2, 3, *size, device=device, dtype=torch.bfloat16), layout)
    with torch.set_grad_enabled(trains):
        y = bound(conv2d(device, torch.bfloat16), token_major=token_major)(x)
    assert y.requires_grad is trains
    assert not y.detach_().requires_grad


@pytest.mark.skipif(INTERPRETED, reason="the Triton kernels have no forward-mode derivative")
def test_forward_mode_derivatives_need_no_gradients() -> None:
    proj, x, tangent = conv2d(), *torch.randn(2, 2, 3, 8, 8)
    with torch.no_grad():
        ours, theirs = (torch.func.jvp(run, (x,), (tangent,))[1] for run in (bound(proj), proj))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_one_patch_has_the_strides_of_the_convolutions_on_a_cpu(dims: int, layout: str) -> None:
    patch = (2, 4, 4)[-dims:]
    proj = CONVOLUTIONS[dims](3, 8, patch, patch)
    x = arranged(torch.randn(2, 3, *patch), layout)
    with torch.no_grad():
        assert bound(proj)(x).stride() == proj(x).stride()


def test_one_patch_per_row_is_multiplied_where_it_lies(device: str) -> None:
    proj = nn.Conv3d(3, 24, (2, 4, 4), (2, 4, 4), device=device)
    x = torch.randn(7, 3, 2, 4, 4, device=device)
    made = storages_made(bound(proj), x)
    assert made == [7 * 24 * 4]
    assert bound(proj)(x).view(-1, 24).shape == (7, 24)


@pytest.mark.parametrize("size", [(8, 8), (19, 24)])
@pytest.mark.usefixtures("_rows_always")
def test_the_weight_is_never_copied(device: str, size: tuple[int, int]) -> None:
    proj = conv2d(device)
    keys = [(name, value.data_ptr()) for name, value in proj.state_dict().items()]
    made = storages_made(bound(proj), torch.randn(2, 3, *size, device=device))
    assert made
    assert proj.weight.untyped_storage().nbytes() not in made
    assert keys == [(name, value.data_ptr()) for name, value in proj.state_dict().items()]


def storages_made(run: Callable[[Tensor], Tensor], x: Tensor) -> list[int]:
    """Bytes of each storage that a call allocates."""
    made: dict[int, tuple[int, Any]] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            known = {
                t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)
            }
            for t in tree_leaves(out):
                if is_tensor(t) and t.untyped_storage().data_ptr() not in known:
                    made[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
            return out

    with torch.no_grad(), Recorder():
        run(x)
    return [size for size, _ in made.values() if size]


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 32), (2, 4, 32, 32), (32, 32), (1, 2, 3, 32, 32), (2, 3, 0, 8), (3, 7, 7)]
)
def test_inputs_that_the_convolution_refuses_are_refused_alike(
    device: str, shape: tuple[int, ...]
) -> None:
    proj, x = conv2d(device), torch.randn(shape, device=device)
    with pytest.raises(RuntimeError) as theirs:
        proj(x)
    with pytest.raises(RuntimeError) as ours:
        bound(proj)(x)
    assert str(ours.value) == str(theirs.value)


def test_a_weight_in_channels_last_memory_runs_the_convolution(device: str) -> None:
    proj = conv2d(device)
    run = bound(proj)
    proj.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 17, 16, device=device)
    assert torch.equal(run(x), proj(x))
    assert run(x).stride() == proj(x).stride()


FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("dims", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_rows_always")
def test_one_channel_s_weight_in_channels_last_memory_runs_the_convolution(
    device: str, dims: int, dtype: torch.dtype
) -> None:
    """Its values lie as those of a contiguous one; its strides say what the output is like."""
    patch = (2, 16, 16)[-dims:]
    proj = CONVOLUTIONS[dims](1, 40, patch, patch, device=device, dtype=dtype)
    run = bound(proj)
    proj.to(memory_format=FORMATS[dims])
    assert proj.weight.is_contiguous()
    x = torch.randn(2, 1, *(2 * p for p in patch), device=device, dtype=dtype)
    with torch.no_grad():
        ours, theirs = run(x), proj(x)
    assert torch.equal(ours, theirs)
    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dims", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strides_are_the_convolution_s_in_every_memory_format(
    device: str, dims: int, dtype: torch.dtype
) -> None:
    """At sizes where a CPU multiplies: the format in which it convolves depends on them."""
    if INTERPRETED:
        pytest.skip("needs a GPU: the Triton path has the memory formats of cuDNN, not of a CPU")
    formats = (torch.contiguous_format, FORMATS[dims])
    patches, grids = ((4, 14, 14), (4, 16, 16)), ((2, 2, 2), (1, 2, 2), (2, 1, 2), (1, 1, 2))
    cases = itertools.product(
        (1, 3, 4), (8, 64), (1, 2), patches, grids[-dims - 1 :], formats, formats, (False, True)
    )
    for channels, out, batch, patch, grid, of_weight, of_input, slices in cases:
        patch, grid = patch[-dims:], grid[-dims:]
        proj = CONVOLUTIONS[dims](channels, out, patch, patch, device=device, dtype=dtype)
        proj.to(memory_format=of_weight)
        size = [count * length for count, length in zip(grid, patch, strict=True)]
        x = torch.randn(batch, channels + slices, *size, device=device).to(dtype)
        x = x.to(memory_format=of_input)[:, slices:]
        with torch.no_grad():
            ours, theirs = bound(proj)(x), proj(x)
        strides = zip(ours.shape, ours.stride(), theirs.stride(), strict=True)
        assert all(length == 1 or mine == other for length, mine, other in strides), (
            f"{channels} to {out} channels, {batch} x {grid} of {patch}, {of_weight} by {of_input}"
            f", sliced {slices}: {ours.stride()} for {theirs.stride()}"
        )


class Conv2dOfSomeone(nn.Conv2d):
    pass


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Linear(3, 3), "a Linear is not exactly nn.Conv1d, nn.Conv2d or nn.Conv3d"),
    (lambda: Conv2dOfSomeone(3, 8, 4, 4), "a Conv2dOfSomeone is not exactly"),
    (lambda: nn.ConvTranspose2d(3, 8, 4, 4), "a ConvTranspose2d is not exactly"),
    (lambda: nn.Conv2d(3, 8, 4, (4, 2)), r"its stride \(4, 2\) is not its kernel size \(4, 4\)"),
    (lambda: nn.Conv2d(3, 8, 4, 4, padding=1), r"its padding is \(1, 1\), not 0"),
    (lambda: nn.Conv2d(3, 8, 4, 4, dilation=2), r"its dilation is \(2, 2\), not 1"),
    (lambda: nn.Conv2d(4, 8, 4, 4, groups=2), "it has 2 groups, not 1"),
    (lambda: nn.Conv2d(3, 8, 1), "its kernel size is 1: there are no patches"),
    (lambda: nn.Conv2d(3, 8, 4, 4).double(), "its weight is in torch.float64, not float32"),
    (lambda: nn.Conv1d(3, 8, 4, 4, dtype=torch.complex64), "its weight is in torch.complex64"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_other_modules_are_refused_with_a_reason(
    make: Callable[[], nn.Module], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        prepare(make())


def wrapped(self: Any, *args: Any) -> Tensor:
    """Three times the convolution, as those who pad otherwise replace it."""
    return 3 * F.conv2d(*args, None, self.stride)


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_convolution_with_a_method_of_its_own_is_refused(name: str) -> None:
    proj = conv2d()
    setattr(proj, name, MethodType(wrapped, proj))
    with pytest.raises(ValueError, match=f"the Conv2d has a {name} of its own"):
        prepare(proj)


@pytest.mark.parametrize("takes_over_the_name", [False, True])
@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_class_whose_method_was_replaced_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, takes_over_the_name: bool
) -> None:
    plain = getattr(nn.Conv2d, name)
    other = functools.wraps(plain)(lambda *args: 3 * plain(*args))
    monkeypatch.setattr(nn.Conv2d, name, other if takes_over_the_name else wrapped)
    proj = conv2d()
    with pytest.raises(ValueError, match=f"{name} of Conv2d is not torch's"):
        prepare(proj)
    original = type(proj)
    proj.__class__ = type("Swapped", (original,), {"_fusion_original_class": original})
    with pytest.raises(ValueError, match=f"{name} of Conv2d is not torch's"):
        prepare(proj)
    assert prepare(nn.Conv3d(3, 8, 4, 4)).patch == (4, 4, 4)


def test_a_replaced_function_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args: 3 * plain(*args))
    with pytest.raises(ValueError, match=r"torch\.nn\.functional\.conv2d was replaced"):
        prepare(conv2d())
    assert prepare(nn.Conv1d(3, 8, 4, 4)).patch == (4,)


def test_padding_called_valid_is_none() -> None:
    # As SigLIP has it.
    assert prepare(nn.Conv2d(3, 8, 4, 4, padding="valid")).patch == (4, 4)


def test_a_swapped_class_is_known_by_its_original() -> None:
    proj = conv2d()
    original = type(proj)
    proj.__class__ = type("Swapped", (original,), {"_fusion_original_class": original})
    assert prepare(proj).patch == (8, 8)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.usefixtures("_no_tf32")
def test_second_derivatives_are_the_convolutions(device: str, dims: int, layout: str) -> None:
    patch = (2, 4, 3)[-dims:]
    proj = CONVOLUTIONS[dims](3, 8, patch, patch, device=device)
    size = [2 * p + 1 for p in patch]
    x = arranged(torch.randn(2, 3, *size, device=device), layout).requires_grad_()
    found = []
    for run in (bound(proj), proj):
        for wanted in ([x], [proj.weight], [x, *proj.parameters()]):
            firsts = torch.autograd.grad(run(x).square().sum(), wanted, create_graph=True)
            total = torch.stack([first.square().sum() for first in firsts]).sum()
            found += [f.detach() for f in firsts]
            found += torch.autograd.grad(total, [x, *proj.parameters()])
    half = len(found) // 2
    for ours, theirs in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("frozen", [(), ("input",), ("weight",), ("weight", "bias"), ("bias",)])
@pytest.mark.usefixtures("_rows_always")
def test_only_the_gradients_that_are_needed_exist(device: str, frozen: tuple[str, ...]) -> None:
    proj, x = conv2d(device), torch.randn(2, 3, 17, 16, device=device)
    values = {"input": x, "weight": proj.weight, "bias": proj.bias}
    for name, value in values.items():
        assert value is not None
        value.requires_grad_(name not in frozen)
    bound(proj)(x).sum().backward()
    assert {n for n, v in values.items() if v is not None and v.grad is None} == set(frozen)


@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 17, 16), (3, 16, 16)])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("_rows_always", "_no_tf32")
def test_one_compiled_graph_forward_and_backward(
    device: str, shape: tuple[int, ...], backend: str
) -> None:
    if backend == "inductor" and shape != (2, 3, 17, 16):
        pytest.skip("one shape is enough for the slower compiler")
    proj, x = conv2d(device), torch.randn(shape, device=device)
    compiled = torch.compile(bound(proj), fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), proj(x))
        assert compiled(x).stride() == bound(proj)(x).stride()
    grad = torch.randn_like(proj(x))
    for ours, theirs in zip(
        results(compiled, proj, x, grad), results(proj, proj, x, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


SIZES_IN_TURN = [(28, 28), (42, 56), (43, 57), (100, 30), (29, 28), (30, 100), (70, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_no_tf32")
def test_images_of_all_sizes_share_the_graphs_that_the_convolution_has(
    device: str, dtype: torch.dtype
) -> None:
    """Multiples of the patch are nothing special."""
    counts = []
    proj = conv2d(device, dtype, patch=14)
    for run in (bound(proj), proj):
        torch.compiler.reset()
        graphs: list[torch.fx.GraphModule] = []
        compiled = torch.compile(
            run, fullgraph=True, dynamic=True, backend=lambda g, _, made=graphs: made.append(g) or g
        )
        with torch.no_grad():
            for size in SIZES_IN_TURN:
                x = torch.randn(2, 3, *size, device=device, dtype=dtype)
                torch.testing.assert_close(compiled(x), proj(x), rtol=0.02, atol=0.02)
        counts.append(len(graphs))
    assert counts[0] <= counts[1]


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."),
    reason="torch 2.8 compares strides with max(1, size), which is another size to it",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("_no_tf32")
def test_one_exported_program_takes_images_of_all_sizes(
    device: str, dtype: torch.dtype, strict: bool
) -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = conv2d(device, dtype, patch=14)
            self.run = bound(self.proj)

        def forward(self, x: Tensor) -> Tensor:
            return self.run(x)

    module = Embedding()
    image, other = (
        torch.randn(2, 3, *size, device=device, dtype=dtype) for size in ((70, 84), (100, 57))
    )
    height, width = (torch.export.Dim(name, min=28, max=500) for name in ("height", "width"))
    with torch.no_grad():
        program = torch.export.export(
            module, (image,), dynamic_shapes={"x": {2: height, 3: width}}, strict=strict
        )
        exported = program.module()
        torch.testing.assert_close(exported(other), module.proj(other), rtol=0.02, atol=0.02)
    if dtype == torch.bfloat16:
        assert "conv" not in "".join(str(node.target) for node in program.graph.nodes)


@pytest.mark.skipif(not HAS_TRITON, reason="the operators need Triton")
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operators_are_registered_as_torch_expects(device: str, channels_last: bool) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("compiled graphs on a CPU hold torch operations")
    proj, x = conv2d(device), torch.randn(2, 3, 17, 16, device=device, requires_grad=True)
    op = getattr(torch.ops, _ops.NAMESPACE).patch_embed
    torch.library.opcheck(op.default, (x, proj.weight, proj.bias, [8, 8], channels_last))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_few_or_short_patches_in_fp32_are_left_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    launches = []
    monkeypatch.setattr(_ops._launch, "output", lambda x, *_: launches.append(x.size(0)))
    wide, narrow = (nn.Conv2d(3, n, 8, 8, device="cuda") for n in (64, 63))
    for rows, proj in ((4095, wide), (4096, wide), (4097, narrow)):
        with torch.no_grad():
            bound(proj)(torch.empty(rows, 3, 8, 8, device="cuda"))
    assert launches == [4096]


@pytest.mark.skipif(not HAS_TRITON, reason="the rule is for the Triton kernels")
def test_offsets_of_large_tensors_have_64_bits() -> None:
    wide = _ops._launch._wide
    assert not wide(torch.empty(2**16, 2**15 - 1, device="meta"))
    assert wide(torch.empty(2**16, 2**15, device="meta"))
    assert wide(torch.empty(2, 3, device="meta").as_strided((2, 3), (2**31, 1)))
    assert not wide(torch.empty(1, device="meta").expand(2**20, 2**20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_fp32_is_as_exact_as_the_convolution_whatever_it_is_allowed(dims: int, tf32: bool) -> None:
    torch.manual_seed(0)
    patch = (2, 14, 14)[-dims:]
    proj = CONVOLUTIONS[dims](3, 1152, patch, patch, device="cuda")
    x = torch.randn(64, 3, *(2 * p for p in patch), device="cuda")
    with torch.backends.cudnn.flags(allow_tf32=tf32):
        grad = torch.randn_like(proj(x))
        ours, theirs = results(bound(proj), proj, x, grad), results(proj, proj, x, grad)
    true = exact(proj, x, grad, lambda t: t)
    for mine, other, value in zip(ours, theirs, true, strict=True):
        error, allowed = (float((v.double() - value).norm() / value.norm()) for v in (mine, other))
        assert error <= max(1.1 * allowed, 3e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [(224, 224), (14, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_warm_call_can_be_captured_in_a_cuda_graph(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    proj = nn.Conv2d(3, 64, 14, 14, device="cuda", dtype=dtype)
    x = torch.randn(8, 3, *size, device="cuda", dtype=dtype)
    run, graph = bound(proj), torch.cuda.CUDAGraph()
    with torch.no_grad():
        run(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = run(x)
        x.normal_()
        graph.replay()
        assert torch.equal(captured, run(x))


def real_models() -> dict[str, Callable[[], tuple[nn.Module, str, tuple[Any, ...]]]]:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        SiglipVisionConfig,
        SiglipVisionModel,
        ViTConfig,
        ViTModel,
    )
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    tiny = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "image_size": 30, "patch_size": 7,
    }  # fmt: skip
    image = torch.randn(2, 3, 30, 30)
    rows, grid = torch.randn(32, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4], [1, 4, 4]])
    video = {"depth": 2, "num_heads": 2, "patch_size": 4}
    return {
        "ViT": lambda: (
            ViTModel(ViTConfig(**tiny)), "embeddings.patch_embeddings.projection", (image,)
        ),
        "SigLIP": lambda: (
            SiglipVisionModel(SiglipVisionConfig(**tiny)), "patch_embedding", (image,)
        ),
        "CLIP": lambda: (CLIPVisionModel(CLIPVisionConfig(**tiny)), "patch_embedding", (image,)),
        "DINOv2": lambda: (
            Dinov2Model(Dinov2Config(**tiny)), "patch_embeddings.projection", (image,)
        ),
        "Qwen2-VL": lambda: (
            qwen2.Qwen2VisionTransformerPretrainedModel(
                qwen2.Qwen2VLVisionConfig(embed_dim=32, hidden_size=32, **video)
            ),
            "patch_embed.proj", (rows, grid),
        ),
        "Qwen2.5-VL": lambda: (
            qwen2_5.Qwen2_5_VisionTransformerPretrainedModel(
                qwen2_5.Qwen2_5_VLVisionConfig(
                    hidden_size=32, out_hidden_size=32, intermediate_size=48, **video
                )
            ),
            "patch_embed.proj", (rows, grid),
        ),
        "Qwen3-VL": lambda: (
            qwen3.Qwen3VLVisionModel(
                qwen3.Qwen3VLVisionConfig(
                    hidden_size=32, out_hidden_size=32, intermediate_size=48,
                    num_position_embeddings=16, deepstack_visual_indexes=[0], **video,
                )
            ),
            "patch_embed.proj", (rows, grid),
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["ViT", "SigLIP", "CLIP", "DINOv2", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]
)
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.usefixtures("_rows_always", "_no_tf32")
def test_whole_vision_models_agree(device: str, name: str, token_major: bool) -> None:
    torch.manual_seed(0)
    model, path, inputs = real_models()[name]()
    model = model.to(device).eval()
    inputs = tuple(value.to(device) for value in inputs)
    (proj,) = [m for n, m in model.named_modules() if n.endswith(path)]
    with torch.no_grad():
        theirs = model(*inputs)[0]
        calls: list[Tensor] = []
        seat = bound(proj, token_major=token_major)
        proj.forward = lambda x: calls.append(x) or seat(x)  # type: ignore[assignment, func-returns-value]
        ours = model(*inputs)[0]
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs)


def test_the_layer_has_only_what_the_kernels_library_accepts() -> None:
    members = {n for n in vars(PatchEmbed) if not n.startswith("__")}
    assert members == {"can_torch_compile", "has_backward", "forward"}
    assert "__init__" not in vars(PatchEmbed)


@pytest.mark.skipif(not HAS_TRITON, reason="the Triton path needs Triton")
def test_sums_of_few_terms_in_fp32_are_left_to_the_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(_ops, "_FEW_ROWS", 8)
    monkeypatch.setattr(_ops, "_FEW_TERMS", 64)
    plan = _geometry.PatchPlan((4, 4), False)
    image, weight = torch.empty(2, 4, 8, 8), torch.empty(64, 4, 4, 4)
    assert not _ops._is_small(image, weight, plan)
    assert _ops._is_small(image[:1], weight, plan)
    assert _ops._is_small(image, weight[:63], plan)
    assert _ops._is_small(image[:, :3], weight[:, :3], plan)
    assert not _ops._is_small(image.half()[:1, :3], weight.half()[:8, :3], plan)


def test_the_folder_imports_nothing_of_the_package() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= {*sys.stdlib_module_names, "torch", "triton"}


@pytest.mark.parametrize("triton", ["", "sys.modules['triton'] = None"])
def test_a_copy_under_another_name_works_beside_this_one(tmp_path: Path, triton: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "hub_patch_embed_1a2b")
    code = f"""
import sys; {triton}
import torch
sys.path[:0] = [{str(tmp_path)!r}, {str(FOLDER.parents[2])!r}]
import hub_patch_embed_1a2b as copied
from types import SimpleNamespace
from {_ops.__name__.rpartition(".")[0]} import layers
assert copied._ops.NAMESPACE == "hub_patch_embed_1a2b__ops"
proj = torch.nn.Conv3d(3, 8, 4, 4)
x = torch.randn(5, 3, 4, 4, 4)
for cls in copied.layers.PatchEmbed, layers.PatchEmbed:
    seat = SimpleNamespace(proj=proj, prepared=cls.forward.prepare(proj))
    torch.testing.assert_close(cls.forward(seat, x), proj(x))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="runs this file in the interpreter")
def test_the_triton_kernels_pass_all_this_in_the_interpreter() -> None:
    version = importlib.metadata.version("triton")
    if not version.startswith("3.6."):
        pytest.skip(f"interpreter.py mends the interpreter of triton 3.6, not {version}")
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins, __file__]
    ran = subprocess.run(
        [*command, "--rootdir", str(FOLDER.parents[2])],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout


def test_the_path_that_runs_is_the_one_meant(device: str) -> None:
    assert INTERPRETED == _ops._INTERPRETED
    proj = conv2d(device)
    x = torch.randn(2, 3, 16, 16, device=device, requires_grad=True)
    y = bound(proj)(x)
    assert ("_PatchEmbed" in type(y.grad_fn).__name__) == (INTERPRETED or device == "cuda")
    assert _geometry.is_known(x, proj.weight, prepare(proj))
