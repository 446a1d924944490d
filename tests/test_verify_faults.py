"""Kernels that are wrong in one way each are found, and right ones are not blamed."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import mapped
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import ModuleSpec, VerificationReport, fuse_modules, verify
from module_fusion.verifying import watching

PATHS = {"norm": "0.norm", "mlp": "0.mlp"}


class RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Mlp(nn.Module):
    """A gated MLP with biases."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate)
        self.up_proj = nn.Linear(hidden, intermediate)
        self.down_proj = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.mlp = Mlp(hidden, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def same(value: Tensor) -> Tensor:
    return value


def through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda value: value.to(dtype).to(value.dtype)


def chain(
    seat: Any,
    x: Tensor,
    *,
    eps: float | None = None,
    linear: Any = F.linear,
    normed: Any = same,
    activated: Any = same,
    output: Any = same,
) -> Tensor:
    """What the members compute, with a change where a test asks for one."""
    norm, mlp = seat.norm, seat.mlp
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (eps or norm.eps))
    h = normed(norm.weight * wide.to(x.dtype))
    gate = linear(h, mlp.gate_proj.weight, mlp.gate_proj.bias)
    up = linear(h, mlp.up_proj.weight, mlp.up_proj.bias)
    product = activated(F.silu(gate) * up)
    return output(linear(product, mlp.down_proj.weight, mlp.down_proj.bias))


def in_rounded_halves(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One rounding more than `F.linear` has: a half of the sum is rounded before the rest."""
    middle = x.shape[-1] // 2
    return F.linear(x[..., :middle], weight[:, :middle]) + F.linear(
        x[..., middle:], weight[:, middle:], bias
    )


def with_the_first_row_last(y: Tensor) -> Tensor:
    y = y.clone()
    y[..., -1, :] = y[..., 0, :]
    return y


def with_one_element_zero(y: Tensor) -> Tensor:
    y = y.clone()
    flat = y.view(-1)
    flat[int(flat.abs().argmax())] = 0
    return y


def with_a_nan(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[7] = float("nan")
    return y


def without_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight)


def kernel_of(function: Callable[..., Tensor]) -> type[nn.Module]:
    return type("Kernel", (nn.Module,), {"forward": function, "has_backward": True})


def verified(
    function: Callable[..., Tensor] | None,
    dtype: torch.dtype,
    *shape: int,
    seed: int = 0,
    scale: float = 1.0,
    gradients: bool = False,
) -> VerificationReport:
    """Verify a block with a kernel; the built-in one for None."""
    torch.manual_seed(seed)
    hidden = shape[-1]
    model = nn.Sequential(Block(hidden, 2 * hidden)).to(dtype)
    x = (torch.randn(shape) * scale).to(dtype)
    if function is None:
        fuse_modules(model, PATHS, kernel="RMSNormMLP")
    else:
        with mapped(K=kernel_of(function)):
            fuse_modules(model, PATHS, kernel="K")
    with torch.set_grad_enabled(gradients):
        report = verify(model, x, gradients=gradients)
    assert [group.kernel_calls for group in report.groups] == [1]
    return report


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ANYWHERE = {
    "last row": ({"output": with_the_first_row_last}, "row 23 of 24 of the kernel's output"),
    "one element": ({"output": with_one_element_zero}, "one element of the kernel's output"),
    "one NaN": ({"output": with_a_nan}, "NaN or infinite"),
    "dropped bias": ({"linear": without_bias}, "0.norm -> 0.mlp: "),
    "another eps": ({"eps": 1.0}, "0.norm -> 0.mlp: "),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fault", ANYWHERE)
def test_a_wrong_kernel_is_found_in_every_dtype(fault: str, dtype: torch.dtype):
    changes, said = ANYWHERE[fault]
    report = verified(lambda self, x: chain(self, x, **changes), dtype, 2, 12, 64)
    assert not report
    assert not report.passed
    assert not report.equal
    assert said in report.verdict
    assert report.first_difference == report.groups[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_that_drops_a_residual_is_found(dtype: torch.dtype):
    class Residual(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Block(32, 64))
    model[0].mlp = Residual(32, 64)
    model.to(dtype)
    for function, passes in (
        (lambda self, x: chain(self, x), False),
        (lambda self, x: self.mlp(self.norm(x)), True),
    ):
        with mapped(K=kernel_of(function)):
            fuse_modules(model, PATHS, kernel="K")
        assert bool(verify(model, torch.randn(2, 5, 32).to(dtype))) is passes


NARROWER = {
    f"{place} through {dtype}": {place: through(dtype)}
    for place in ("normed", "activated", "output")
    for dtype in (torch.bfloat16, torch.float16)
}


@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 64), (300, 64)], ids=str)
@pytest.mark.parametrize("fault", NARROWER)
def test_one_rounding_to_a_narrower_dtype_is_found(fault: str, shape: tuple[int, ...]):
    changes = NARROWER[fault]
    report = verified(lambda self, x: chain(self, x, **changes), torch.float32, *shape)
    assert not report
    assert report.groups[0].kernel_error > 100 * report.groups[0].member_error


@pytest.mark.parametrize("seed", range(3))
def test_one_rounding_more_among_many_is_found_where_it_breaks_the_promise(seed: int):
    report = verified(
        lambda self, x: chain(self, x, linear=in_rounded_halves), torch.bfloat16, 1, 128, 256,
        seed=seed,
    )  # fmt: skip
    group = report.groups[0]
    assert 1.1 < group.kernel_error / group.member_error < 1.3
    assert "is allowed: 1.1 times that, or a few units" in report.verdict


def test_an_epsilon_of_another_size_is_found_in_float32():
    report = verified(lambda self, x: chain(self, x, eps=1e-5), torch.float32, 2, 40, 64)
    assert not report


def test_the_measure_is_float64_also_where_a_member_asks_for_float32():
    """A kernel in float64 is off by the rounding of its output alone, a quarter of a unit."""

    def function(self: Any, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        wide = x.double()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        h = norm.weight.double() * wide
        gate, up, down = (
            lambda value, layer=layer: F.linear(value, layer.weight.double(), layer.bias.double())
            for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        return down(F.silu(gate(h)) * up(h)).to(x.dtype)

    group = verified(function, torch.float32, 2, 40, 64).groups[0]
    assert 0 < group.kernel_error < 0.25 * torch.finfo(torch.float32).eps
    assert group.member_error > 2 * group.kernel_error


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.05


def test_a_wrong_backward_is_found_and_the_right_output_stays_equal():
    def function(self: Any, x: Tensor) -> Tensor:
        return _WrongBackward.apply(self.mlp(self.norm(x)))

    report = verified(function, torch.float32, 2, 12, 32, gradients=True)
    assert not report
    assert "of the gradient of" in report.verdict
    assert all(d.equal for d in report.outputs)
    assert not any(d.equal for d in report.gradients)
    assert verified(function, torch.float32, 2, 12, 32).equal


def test_a_gradient_that_does_not_arrive_is_found():
    def function(self: Any, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x).detach())

    report = verified(function, torch.float32, 2, 12, 32, gradients=True)
    assert report.problems == (
        "the gradient of 0.norm.weight: only the unfused run has a gradient",
        "0.norm -> 0.mlp: the gradient of input 0 is missing, unlike the modules'",
    )


def test_a_kernel_with_another_dtype_or_shape_is_found():
    wide = verified(lambda self, x: chain(self, x).float(), torch.bfloat16, 2, 3, 32)
    assert "0.norm -> 0.mlp: the kernel's output: dtype float32 fused, bfloat16" in " ".join(
        wide.problems
    )


def _independently_rounded(self: Any, x: Tensor) -> Tensor:
    """As many roundings as the modules have, all of the same size, and none of them the same."""
    norm, mlp = self.norm, self.mlp

    def rounded(value: Tensor) -> Tensor:
        return (value * 1.37).to(x.dtype).float() / 1.37

    def linear(value: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(value, layer.weight.float(), layer.bias.float())

    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    h = rounded(norm.weight.float() * rounded(wide))
    gate, up = rounded(linear(h, mlp.gate_proj)), rounded(linear(h, mlp.up_proj))
    return linear(rounded(rounded(F.silu(gate)) * up), mlp.down_proj).to(x.dtype)


def _in_blocks(self: Any, x: Tensor) -> Tensor:
    """Sums in another order."""

    def linear(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parts = zip(value.float().split(16, -1), weight.float().split(16, 1), strict=True)
        return (sum(F.linear(a, b) for a, b in parts) + bias.float()).to(value.dtype)

    return chain(self, x, linear=linear)


RIGHT = {"built-in": None, "independent": _independently_rounded, "in blocks": _in_blocks}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_not_blamed(name: str):
    """Outliers, small and large inputs, one token and many, three dtypes."""
    random_ = random.Random(0)
    differing = 0
    for seed in range(60):
        dtype = random_.choice(FLOATS if name != "independent" else FLOATS[1:])
        shape = random_.choice([(1, 1), (1, 3), (2, 9), (2, 40), (200,)])
        hidden, scale = random_.choice([16, 64, 128]), random_.choice([0.02, 1.0, 30.0])
        report = verified(RIGHT[name], dtype, *shape, hidden, seed=seed, scale=scale)
        assert report.passed, (seed, str(report))
        differing += not report.equal
    assert differing > 20 or name == "built-in"


def test_one_large_channel_that_all_rows_share_does_not_make_a_right_kernel_wrong():
    """Its rounding is one piece of luck, and not one for each row."""
    for seed in range(30):
        torch.manual_seed(seed)
        model = nn.Sequential(Block(64, 128)).to(torch.bfloat16)
        x = torch.randn(2, 100, 64)
        x[..., 5] *= 100
        with mapped(K=kernel_of(_independently_rounded)):
            fuse_modules(model, PATHS, kernel="K")
        with torch.no_grad():
            report = verify(model, x.to(torch.bfloat16))
        assert report.passed, (seed, str(report))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_built_in_patch_embedding_passes(dims: int):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    differing = 0
    for seed in range(30):
        torch.manual_seed(seed)
        dtype = FLOATS[seed % 3]
        model = nn.Sequential()
        patch, grid = (2, 4, 14)[seed % 3], 1 + seed % 4
        model.proj = layer(3, 32, patch, patch)
        model.to(dtype)
        fuse_modules(model, ["proj"], kernel="PatchEmbed")
        with torch.no_grad():
            report = verify(model, torch.randn(2, 3, *[grid * patch] * dims).to(dtype))
        assert report.groups[0].kernel_calls == 1
        assert report.passed, str(report)
        differing += not report.equal
    assert differing


class HelperBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.helped(x)

    def helped(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def test_code_that_gives_the_modules_another_value_than_the_kernel_knows_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asking(self: HelperBlock, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.mlp(2 * h if type(h) is Tensor else h)

    torch.manual_seed(0)
    model, x = nn.Sequential(HelperBlock(8, 16)), torch.randn(4, 8)
    fuse_modules(model, PATHS, kernel="RMSNormMLP")
    assert verify(model, x).passed
    monkeypatch.setattr(HelperBlock, "helped", asking)
    found = verify(model, x)
    assert not found.passed
    assert "something else than the output of 'norm', and the kernel does not know" in str(found)


class CallsAgain(Block):
    """The second call of the last member gets another value, the third a captured one."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.mlp(h)
        z = self.mlp(h + 1)
        return self.mlp(self.norm(z)) + y


def test_modules_that_ran_themselves_on_another_value_are_not_blamed() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(CallsAgain(8, 16)), torch.randn(4, 8)
    fuse_modules(model, PATHS, kernel="RMSNormMLP")
    assert verify(model, x, gradients=True).problems == ()


class TwoStreams(Block):
    """The norm has been called twice before the MLP is."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(x)
        b = self.norm(2 - x)
        return self.joined(a, b)

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        return self.mlp(a) + self.mlp(b)


class Reversed(TwoStreams):
    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        return self.mlp(b) + self.mlp(a)


class FirstAgain(TwoStreams):
    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        return self.mlp(b) + self.mlp(a) + self.mlp(a)


def verified_streams(
    block: type[Block],
    around: type[nn.Module] = nn.Sequential,
    before: Callable[[], object] = lambda: None,
) -> VerificationReport:
    torch.manual_seed(0)
    model = around(block(32, 64)).bfloat16()
    with mapped(K=kernel_of(_independently_rounded)):
        fuse_modules(model, PATHS, kernel="K")
    before()
    report = verify(model, torch.randn(4, 32).bfloat16())
    assert not report.equal
    return report


@pytest.mark.parametrize(("block", "calls"), [(TwoStreams, 2), (Reversed, 2), (FirstAgain, 3)])
def test_a_kernel_is_compared_with_the_call_whose_output_the_last_member_is_given(
    block: type[Block], calls: int
) -> None:
    report = verified_streams(block)
    assert report.problems == ()
    assert report.groups[0].kernel_calls == calls


def _other_call(self: TwoStreams, a: Tensor, b: Tensor) -> Tensor:
    return self.mlp(a) + self.mlp(a if type(b) is Tensor else b)


def _doubled_in_place(self: TwoStreams, a: Tensor, b: Tensor) -> Tensor:
    if type(a) is Tensor:
        a.mul_(2)
    return self.mlp(a) + self.mlp(b)


@pytest.mark.parametrize(
    ("joined", "said"),
    [
        (_other_call, "the kernel was given other inputs than the modules are"),
        (_doubled_in_place, "something else than the output of 'norm', and the kernel does not"),
    ],
)
def test_of_several_calls_the_output_of_another_or_a_changed_one_is_found(
    joined: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verified_streams(
        TwoStreams, before=lambda: monkeypatch.setattr(TwoStreams, "joined", joined)
    )
    assert said in str(report)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x + self.weight


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, a: Tensor, b: Tensor | None) -> Tensor:
        return self.linear(a) if b is None else self.linear(a) + b


class Several(nn.Module):
    """The last member takes both outputs of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.last = Two(), Last()

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(self.last(x, x))

    def joined(self, x: Tensor) -> Tensor:
        first, second = self.two(x), self.two(x + 1)
        return self.last(*first) + self.last(*second)


def verified_several(before: Callable[[], object] = lambda: None) -> VerificationReport:
    def function(self: Any, x: Tensor) -> Tensor:
        weight, linear = self.two.weight, self.last.linear
        wide = F.linear((x * weight).double(), linear.weight.double(), linear.bias.double())
        return (wide + (x + weight)).to(x.dtype)

    torch.manual_seed(0)
    model = nn.Sequential(Several())
    specs = [ModuleSpec(["x"], ["a", "b"]), ModuleSpec(["a", "b"], ["y"])]
    with mapped(K=kernel_of(function)):
        fuse_modules(model, {"two": "*.two", "last": "*.last"}, specs, kernel="K")
    before()
    report = verify(model, torch.randn(4, 8))
    assert not report.equal
    return report


def test_a_last_member_that_is_called_before_one_with_several_outputs_is_followed() -> None:
    report = verified_several()
    assert report.problems == ()
    assert (report.groups[0].kernel_calls, report.groups[0].member_calls) == (2, 1)


class Scaled(Last):
    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(a, b)


@pytest.mark.parametrize("scale", [2.0, 1.0, float("nan")])
def test_another_number_than_the_kernel_got_is_found(scale: float) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.last = Two(), Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.joined(x)

        def joined(self, x: Tensor) -> Tensor:
            a, b = self.two(x)
            return self.last(a, b, scale)

    def asking(self: Asking, x: Tensor) -> Tensor:
        a, b = self.two(x)
        return self.last(a, b, 2.0 if type(b) is Tensor else scale)

    def function(self: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        members = self.last(*self.two(x), scale)
        return members * (1 + 2**-23)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = nn.Sequential(Asking())
    specs = [ModuleSpec(["x"], ["a", "b"]), ModuleSpec(["a", "b", "scale"], ["y"])]
    with mapped(K=kernel_of(function)):
        fuse_modules(model, {"two": "*.two", "last": "*.last"}, specs, kernel="K")
    Asking.joined = asking  # type: ignore[method-assign]
    report = verify(model, torch.randn(4, 8))
    assert report.groups[0].kernel_calls == 1
    found = "the kernel was given other inputs than the modules are" in str(report)
    assert found is (scale != 2.0)


def test_none_in_the_place_of_an_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(self: Several, x: Tensor) -> Tensor:
        a, b = self.two(x)
        return self.last(a, None if type(b) is Tensor else b)

    report = verified_several(lambda: monkeypatch.setattr(Several, "joined", joined))
    assert "something else than the output of 'two'" in str(report)


class Three(TwoStreams):
    """Two members feed each other before the last one."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__(hidden, intermediate)
        self.inner = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm(x), self.norm(2 - x)
        # Not in the order of the norms.
        d, c = self.inner(b), self.inner(a)
        return self.joined(c, d)


def test_calls_are_told_apart_through_every_member_of_a_chain() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return self.mlp(self.inner(self.norm(x)).float().to(x.dtype)) * (1 + 2**-23)

    torch.manual_seed(0)
    model = nn.Sequential(Three(32, 64))
    paths = {"norm": "0.norm", "inner": "0.inner", "mlp": "0.mlp"}
    with mapped(K=kernel_of(function)):
        fuse_modules(model, paths, kernel="K")
    report = verify(model, torch.randn(4, 32))
    assert report.problems == ()
    assert not report.equal
    assert report.groups[0].kernel_calls == 2


class FiveTimes(nn.Sequential):
    """Counts the calls of members that `verify` keeps, after each of its own."""

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for _ in range(5):
            x = self[0](x)
            kept.append(sum(type(o) is watching.MemberCall for o in gc.get_objects()))
        KEPT.append(kept)
        return x


KEPT: list[list[int]] = []


def test_calls_of_members_are_kept_while_the_model_has_their_outputs() -> None:
    with torch.no_grad():
        report = verified_streams(Block, FiveTimes)
    assert report.groups[0].kernel_calls == 5
    assert KEPT[-1] == [1] * 5
