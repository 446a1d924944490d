"""`fuse`: what the checks of groups, of kernels in place and of members see."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from kernels import Mode, kernelize, use_kernel_mapping
from support import Block, Mlp, Model, Norm, WeightKernel, mapped, members_kernel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from module_fusion import (
    FusionError,
    FusionFamily,
    NotFusableError,
    fuse,
    fuse_modules,
    register_family,
    report,
    unfuse_modules,
)
from module_fusion.families import certificate
from module_fusion.families.certificate import _structure
from module_fusion.families.family import _FAMILIES
from module_fusion.kernels import MAPPING
from module_fusion.kernels.rms_norm_mlp import recipe
from module_fusion.kernels.rms_norm_mlp.recipe import prepare
from module_fusion.modules import original_class
from module_fusion.plain import MemberForm

PATHS = {"norm": "layers.*.norm", "mlp": "layers.*.mlp"}


def scaled(mlp: Any, x: Tensor, scale: Any = None) -> Tensor:
    y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y if scale is None else y * scale


def scaled_by_keyword(mlp: Any, x: Tensor, *, scale: Any = None) -> Tensor:
    y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y if scale is None else y * scale


@pytest.mark.parametrize("forward", [scaled, scaled_by_keyword])
@pytest.mark.parametrize("place", [0, 1])
def test_a_member_that_takes_another_input_is_skipped_and_the_rest_is_fused(
    forward: Any, place: int
) -> None:
    model = Model(2, 32)
    model.layers[place].mlp = type("Scaled", (Mlp,), {"forward": forward})(32, 48)
    result = fuse(model)
    assert [group.reason for group in result.skipped] == ["mlp takes another input, 'scale'"]
    assert [group.paths for group in result.fused] == [
        (f"layers.{1 - place}.norm", f"layers.{1 - place}.mlp")
    ]


class BlocksFamily(FusionFamily):
    """The blocks of the tests' own model, by path."""

    name, kernel, roles = "blocks", "Blocks", ("norm", "mlp")
    paths = (tuple(PATHS.values()),)

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        return [(torch.randn(64, 8, generator=generator),)]


class TwiceKernel(WeightKernel):
    """Gives twice the output of the members."""

    def forward(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        x = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return F.linear(gate, mlp.down_proj.weight) * 2


def test_a_kernel_in_place_that_the_comparison_refuses_does_not_run_any_more(
    model: Model, x: Tensor
) -> None:
    expected = model(x)
    register_family(BlocksFamily)
    with mapped(Blocks=TwiceKernel):
        fuse_modules(model, PATHS, kernel="Blocks")
        assert not torch.equal(model(x), expected)
        wrong = model(x)
        fuse(model, {"blocks": True}, dry_run=True)
        assert torch.equal(model(x), wrong)
        result = fuse(model, {"blocks": True})
    for row in (*result.groups, *report(model).groups):
        assert row.path == "members"
        assert "less accurate than the modules" in str(row.reason)
    assert {row.action for row in result.groups} == {"already fused"}
    assert torch.equal(model(x), expected)
    with mapped(Blocks=WeightKernel):
        fuse(model, {"blocks": True})
    assert {row.path for row in report(model).groups} == {"kernel"}


def test_a_kernel_that_was_taken_out_is_back_if_the_call_fails(model: Model, x: Tensor) -> None:
    class Failing(FusionFamily):
        name, kernel, roles = "failing", "Failing", ("a",)

        def groups(self, model: nn.Module) -> Any:
            raise KeyError("inside a family")

    register_family(BlocksFamily)
    register_family(Failing)
    with mapped(Blocks=TwiceKernel):
        fuse_modules(model, PATHS, kernel="Blocks")
        before = model(x)
        with pytest.raises(FusionError):
            fuse(model, {"blocks": True, "failing": True})
    assert torch.equal(model(x), before)


EXTRA = torch.clone


def test_a_kernel_in_place_that_refuses_the_members_does_not_run_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Global(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return EXTRA(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    monkeypatch.setitem(globals(), "EXTRA", torch.clone)
    block = Block(32)
    block.mlp = Global(32, 48)
    assert len(fuse(block).fused) == 1
    monkeypatch.setitem(globals(), "EXTRA", torch.neg)
    (row,) = fuse(block).groups
    assert (row.action, row.path) == ("already fused", "members")
    assert "computes something else" in str(row.reason)
    x = torch.randn(2, 5, 32)
    ours = block(x)
    unfuse_modules(block)
    assert torch.equal(ours, block(x))


class Factor:
    def __init__(self, value: float) -> None:
        self.value = value


class ScaledMlp(Mlp):
    """Scales its output by something that is not a plain number."""

    def __init__(self, factor: Any) -> None:
        super().__init__()
        self.factor = factor


def by_list(mlp: Any, x: Tensor) -> Tensor:
    return Mlp.forward(mlp, x) * mlp.factor[0]


def by_object(mlp: Any, x: Tensor) -> Tensor:
    return Mlp.forward(mlp, x) * mlp.factor.value


def by_function(mlp: Any, x: Tensor) -> Tensor:
    return Mlp.forward(mlp, x) * mlp.factor(1)


def by_type(mlp: Any, x: Tensor) -> Tensor:
    return Mlp.forward(mlp, x) * (2 if type(mlp.factor) is bool else 1)


@pytest.mark.parametrize(
    ("forward", "one", "other"),
    [
        (by_list, [1.0], [3.0]),
        (by_object, Factor(1.0), Factor(3.0)),
        (by_function, functools.partial(pow, 1.0), functools.partial(pow, 0)),
        (by_type, 1, True),
    ],
)
def test_groups_that_differ_in_an_object_are_compared_each_by_itself(
    forward: Callable[[Any, Tensor], Tensor], one: Any, other: Any, model: Model
) -> None:
    scaled_mlp = type("ScaledMlp", (ScaledMlp,), {"forward": forward})
    for layer, factor in zip(model.layers, (one, other), strict=False):
        layer.mlp = scaled_mlp(factor).to(next(model.parameters()).device)
    members = [(layer.norm, layer.mlp) for layer in model.layers[:2]]
    first, second = (tuple(map(_structure, pair)) for pair in members)
    assert first != second
    assert first == tuple(map(_structure, members[0]))


def test_equal_blocks_of_a_real_model_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config)
    compared: list[int] = []
    compare = certificate._compare
    monkeypatch.setattr(certificate, "_compare", lambda *args: compared.append(1) or compare(*args))
    assert len(fuse(model).fused) == 28
    assert len(compared) == 1


def averages_over_tokens(norm: Any, x: Tensor) -> Tensor:
    every = tuple(range(1, x.dim()))
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(every, keepdim=True) + 1e-6))


def detaches(norm: Any, x: Tensor) -> Tensor:
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return norm.weight * (x * root.detach())


def flattens(mlp: Any, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def squeezes(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)).squeeze()


def doubles_single_tokens(mlp: Any, x: Tensor) -> Tensor:
    x = x * 2 if x.dim() == 3 and x.shape[1] == 1 else x
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def detaches_up(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x.detach()))


def halves_in_bfloat16(mlp: Any, x: Tensor) -> Tensor:
    y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return y * 0.5 if x.dtype == torch.bfloat16 else y


FORMS = [
    (averages_over_tokens, "computes something else for inputs of shape (1, 3, hidden)"),
    (detaches, "has other gradients than the members known"),
    (flattens, "gives another shape than that of its input, (1, 1, hidden)"),
    (squeezes, "gives another shape than that of its input, (1, hidden)"),
    (doubles_single_tokens, "computes something else for inputs of shape (1, 1, hidden)"),
    (detaches_up, "has other gradients than the members known"),
    (halves_in_bfloat16, "computes something else in torch.bfloat16 than in float64"),
]


def members_with(forward: Callable[[Any, Tensor], Tensor]) -> Block:
    block = Block(32)
    block.mlp = Mlp(32, 48)
    if forward in (averages_over_tokens, detaches):
        block.norm = type("Wrong", (Norm,), {"forward": forward})(32)
    else:
        block.mlp = type("Wrong", (Mlp,), {"forward": forward})(32, 48)
    return block


@pytest.mark.parametrize(("forward", "reason"), FORMS)
def test_the_kernel_itself_refuses_what_differs_in_other_forms(forward: Any, reason: str) -> None:
    block = members_with(forward)
    if forward is halves_in_bfloat16:
        block.norm = LlamaRMSNorm(32)
        block.bfloat16()
    (row,) = fuse_modules(block, ["norm", "mlp"], kernel="RMSNormMLP").groups
    assert row.path == "members"
    assert reason in str(row.reason)
    with torch.no_grad(), torch.inference_mode(), pytest.raises(ValueError, match="Wrong"):
        prepare(block.norm, block.mlp)


def test_members_that_compute_something_else_in_their_dtype_are_refused(model: Model) -> None:
    register_family(BlocksFamily)
    for layer in model.layers:
        mlp = type("Wrong", (Mlp,), {"forward": halves_in_bfloat16})(8, 16)
        layer.mlp = mlp.to(layer.norm.weight.device)
    model.bfloat16()
    with mapped(Blocks=WeightKernel):
        result = fuse(model, {"blocks": True})
    assert {row.reason for row in result.skipped} == {
        "the modules compute something else in torch.bfloat16 than in float64"
    }
    assert not result.fused


def test_the_samples_of_the_family_have_dimensions_of_one() -> None:
    block = members_with(Mlp.forward)
    family = _FAMILIES["rms_norm_mlp"]
    generator = torch.Generator().manual_seed(0)
    shapes = {tuple(x.shape) for (x,) in family.samples([block.norm, block.mlp], generator)}
    assert {(1, 32), (1, 1, 32), (1, 5, 32), (2, 1, 32)} <= shapes


class Reading(Mlp):
    """Multiplies by something that is found elsewhere than in a plain attribute."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__(32, 48)
        self.config = Factor(1.0)
        self.options = {"factor": 1.0}
        self.numbers = [1.0]
        self.tensor = torch.tensor(1.0)
        self.hidden_parameters = [nn.Parameter(torch.ones(()))]
        self.__dict__["gain"] = nn.Parameter(torch.ones(()))


def reads_a_config(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.config.value


def reads_a_dict(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.options["factor"]


def reads_a_list(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.numbers[0]


def reads_its_class(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.factor


def reads_a_global(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * GLOBAL


def reads_a_tensor(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.tensor


def reads_a_parameter_in_a_list(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.hidden_parameters[0]


def reads_a_parameter_in_its_dict(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.gain


GLOBAL = 1.0
CHANGES: list[tuple[Any, Callable[[Any], Any], str]] = [
    (reads_a_config, lambda mlp: setattr(mlp.config, "value", 2.0), "config.value"),
    (reads_a_dict, lambda mlp: mlp.options.update(factor=2.0), "options"),
    (reads_a_list, lambda mlp: mlp.numbers.insert(0, 2.0), "numbers"),
    (reads_its_class, lambda mlp: setattr(original_class(mlp), "factor", 2.0), "factor"),
    (reads_a_global, lambda mlp: globals().update(GLOBAL=2.0), "GLOBAL"),
]


def reading_block(forward: Any) -> Block:
    block = Block(32)
    block.mlp = type("Reading", (Reading,), {"forward": forward})()
    return block


@pytest.mark.parametrize(("forward", "change", "what"), CHANGES)
def test_a_value_that_is_changed_where_the_code_reads_it_counts(
    forward: Any, change: Callable[[Any], Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "GLOBAL", 1.0)
    block, x = reading_block(forward), torch.randn(2, 5, 32)
    assert len(fuse(block).fused) == 1
    block(x)
    assert report(block).groups[0].kernel_calls == 1
    change(block.mlp)
    ours = block(x)
    assert f"mlp reads another {what} than when" in str(report(block).groups[0].reason)
    unfuse_modules(block)
    assert torch.equal(ours, block(x))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (reads_a_tensor, "reads its tensor, a tensor that is no parameter"),
        (reads_a_parameter_in_a_list, "uses its hidden_parameters, and it is not known"),
        (reads_a_parameter_in_its_dict, "reads its gain, a tensor that is no parameter"),
    ],
)
def test_a_tensor_that_is_no_parameter_and_no_buffer_is_refused(forward: Any, reason: str) -> None:
    (row,) = fuse(reading_block(forward)).groups
    assert row.action == "skipped"
    assert reason in str(row.reason)


def test_members_of_real_models_read_nothing_elsewhere() -> None:
    config = hf.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    layer = hf.LlamaForCausalLM(config).model.layers[0]
    for member in (layer.post_attention_layernorm, layer.mlp):
        assert [part.reads for part in MemberForm(member).parts if part.reads] == []


def test_a_copy_and_the_kernels_library_leave_nothing_of_the_members_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "EXTRA", torch.clone)
    block = Block(32)
    block.mlp = type("Global", (Mlp,), {"forward": calls_a_global})(32, 48)
    with use_kernel_mapping(MAPPING):
        fuse_modules(block, ["norm", "mlp"], kernel="RMSNormMLP")
        copy.deepcopy(block)
        assert not recipe._RECIPES
        kernelize(block, mode=Mode.INFERENCE, device="cpu")
        assert not recipe._RECIPES
        assert report(block).groups[0].path == "kernel"
        monkeypatch.setitem(globals(), "EXTRA", torch.neg)
        kernelize(block, mode=Mode.INFERENCE, device="cpu")
    assert report(block).groups[0].path == "members"


def calls_a_global(mlp: Any, x: Tensor) -> Tensor:
    return EXTRA(mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))


def test_a_class_of_another_module_does_not_replace_a_family_of_the_same_name() -> None:
    namespace = {"__module__": "elsewhere", "name": "rms_norm_mlp", "kernel": "K", "roles": ("a",)}
    other = type("RMSNormMLPFamily", (FusionFamily,), namespace)
    with pytest.raises(NotFusableError, match=r"RMSNormMLPFamily of module_fusion\.families"):
        register_family(other)


def test_paths_to_include_and_exclude_may_be_a_set() -> None:
    model = Model(2, 32)
    result = fuse(model, {"rms_norm_mlp": {"include": {"layers.*"}, "exclude": {"layers.0"}}})
    assert [row.paths for row in result.fused] == [("layers.1.norm", "layers.1.mlp")]


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(32), Mlp(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mlp(x))


def test_a_forward_that_was_replaced_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([Parent()])
    assert fuse(model).groups == ()
    monkeypatch.setattr(Parent, "forward", Block.forward)
    assert len(fuse(model).fused) == 1


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Norm(32) for _ in range(2))
        self.mlps = nn.ModuleList(Mlp(32, 48) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            h = self.norms[i](x)
            x = x + self.mlps[i](h)
        return x


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"norm": Norm(32), "mlp": Mlp(32, 48)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts["mlp"](self.parts["norm"](x))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Looped, [("norms.0", "mlps.0"), ("norms.1", "mlps.1")]),
        (Keyed, [("parts.norm", "parts.mlp")]),
    ],
)
def test_members_that_are_taken_from_a_container_by_index_or_key_are_found(
    make: Callable[[], nn.Module], expected: list[tuple[str, str]]
) -> None:
    model, x = make(), torch.randn(2, 5, 32)
    before = model(x)
    result = fuse(model)
    assert [row.paths for row in result.fused] == expected
    torch.testing.assert_close(model(x), before)
    assert [row.kernel_calls for row in report(model).groups] == [1] * len(expected)


def weighted(norm: Any, mlp: Any, x: Tensor) -> Tensor:
    x = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
    return F.linear(gate, mlp.down_proj.weight)


class WrongWithoutGradients(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        y = weighted(self.norm, self.mlp, x)
        return y if torch.is_grad_enabled() else y * 2


class FiniteKernel(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(weighted(self.norm, self.mlp, x))


class WideKernel(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        return weighted(self.norm, self.mlp, x).double()


class AbsoluteKernel(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        norm = type("Absolute", (), {"weight": self.norm.weight.abs()})
        return weighted(norm, self.mlp, x)


class NeverZeroKernel(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.norm.weight
        norm = type("NeverZero", (), {"weight": torch.where(weight == 0, 1, weight)})
        return weighted(norm, self.mlp, x)


class OddBlocksFamily(BlocksFamily):
    """With an infinite number among the inputs."""

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        x = torch.randn(64, 8, generator=generator)
        odd = x.clone()
        odd[0, 0] = float("inf")
        return [(x,), (odd,)]


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (WrongWithoutGradients, "less accurate than the modules"),
        (FiniteKernel, "relative error inf of the output"),
        (AbsoluteKernel, "less accurate than the modules"),
        (NeverZeroKernel, "less accurate than the modules"),
        (WideKernel, "the kernel's output is in torch.float64, the modules' in torch.float32"),
    ],
)
def test_a_kernel_that_is_wrong_in_one_respect_is_refused(
    kernel: type[nn.Module], reason: str, model: Model
) -> None:
    register_family(OddBlocksFamily)
    with mapped(Blocks=kernel):
        result = fuse(model, {"blocks": True})
    assert not result.fused
    assert all(reason in str(row.reason) for row in result.skipped)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_variance_among_the_buffers_stays_one_and_the_comparison_is_of_numbers(
    dtype: torch.dtype, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Batch(nn.BatchNorm1d):
        """In evaluation a norm by what was seen."""

    seen: list[Tensor] = []
    differences = certificate._differences
    register_family(BlocksFamily)
    for layer in model.layers:
        layer.norm = Batch(8).to(layer.norm.weight.device)
    with monkeypatch.context() as patched, mapped(Blocks=members_kernel(1)):
        patched.setattr(
            certificate,
            "_differences",
            lambda *runs: seen.extend(run[0] for run in runs[:3]) or differences(*runs),
        )
        result = fuse(model.eval().to(dtype), {"blocks": True})
    assert len(result.fused) == len(model.layers), result
    assert len(seen) == 3 * 3
    assert all(value.isfinite().all() for value in seen)


def rounds_inside(mlp: Any, x: Tensor) -> Tensor:
    x = x.to(torch.bfloat16).to(torch.float32)
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def test_a_cast_inside_the_members_counts_as_their_error(model: Model) -> None:
    register_family(BlocksFamily)
    for layer in model.layers:
        mlp = type("Rounds", (Mlp,), {"forward": rounds_inside})(8, 16)
        layer.mlp = mlp.to(layer.norm.weight.device)
    with mapped(Blocks=WeightKernel):
        result = fuse(model, {"blocks": True})
    assert all(row.accuracy is not None and row.accuracy < 0.1 for row in result.fused)
    assert len(result.fused) == len(model.layers)


def test_of_few_elements_a_larger_error_is_allowed() -> None:
    errors = certificate._Errors()
    exact = torch.ones(4, dtype=torch.float64)
    errors.add(exact.float() * 1.0018, exact.float() * 1.001, exact)
    assert errors.certificate("output", 1e-7).refusal is None
    many = certificate._Errors()
    exact = torch.ones(40000, dtype=torch.float64)
    many.add(exact.float() * 1.0018, exact.float() * 1.001, exact)
    assert many.certificate("output", 1e-7).refusal is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_weights_on_several_devices_are_a_reason() -> None:
    register_family(BlocksFamily)
    model = Model(1).cuda()
    model.layers[0].mlp.cpu()
    with mapped(Blocks=WeightKernel):
        (row,) = fuse(model, {"blocks": True}).skipped
    assert row.reason == "the weights are on several devices: cpu, cuda:0"


def test_nothing_is_tried_while_a_global_hook_is_registered() -> None:
    model, ran = Model(2, 32), []
    handle = nn.modules.module.register_module_forward_hook(lambda *args: ran.append(1))
    try:
        result = fuse(model)
    finally:
        handle.remove()
    assert {row.reason for row in result.groups} == {"a global module hook is registered"}
    assert not ran


def test_of_two_groups_that_end_in_the_same_module_the_first_is_fused(model: Model) -> None:
    class Twice(BlocksFamily):
        name = "twice"

        def groups(self, model: nn.Module) -> Any:
            return [("layers.0.norm", "layers.0.mlp"), ("layers.1.norm", "layers.0.mlp")]

    register_family(Twice)
    with mapped(Blocks=WeightKernel):
        result = fuse(model, {"twice": True})
    assert len(result.fused) == 1
    assert [row.reason for row in result.skipped] == [
        "layers.0.norm -> layers.0.mlp ends in the same module"
    ]
