"""`fuse`: what is found without paths, certified, fused, refused and reported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from structure import structure
from support import Block, Mlp, Model, WeightKernel, mapped
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import (
    FusionError,
    FusionFamily,
    NotFusableError,
    PathNotFoundError,
    fuse,
    register_family,
    report,
    unfuse_modules,
)
from module_fusion.families import certificate
from module_fusion.families.dataflow import feeding_pairs
from module_fusion.families.family import _FAMILIES

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NORM_MLP = "model.layers.*.post_attention_layernorm", "model.layers.*.mlp"


@pytest.fixture(autouse=True)
def _families_as_before() -> Iterator[None]:
    before = dict(_FAMILIES)
    yield
    _FAMILIES.clear()
    _FAMILIES.update(before)


@pytest.fixture
def llama(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(device)


def logits(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(torch.arange(12, device=device).view(2, 6)).logits


def test_the_kernel_runs_in_every_block_and_the_members_do_not(llama: nn.Module) -> None:
    expected = logits(llama)
    result = fuse(llama)
    assert [group.family for group in result.fused] == ["rms_norm_mlp"] * 2
    assert result.fused[0].paths == tuple(path.replace("*", "0") for path in NORM_MLP)
    torch.testing.assert_close(logits(llama), expected)
    assert [(g.kernel_calls, g.member_calls) for g in report(llama).groups] == [(1, 0), (1, 0)]


def test_fusing_and_taking_back_leaves_the_model_as_it_was(llama: nn.Module) -> None:
    before, expected = structure(llama), logits(llama)
    fuse(llama)
    unfuse_modules(llama)
    assert structure(llama) == before
    assert torch.equal(logits(llama), expected)


def test_fusing_twice_reports_what_is_fused_already(llama: nn.Module) -> None:
    fuse(llama)
    again = fuse(llama)
    assert [group.action for group in again.fused] == ["already fused"] * 2
    assert len(report(llama).groups) == 2


def test_the_random_numbers_of_the_user_stay(llama: nn.Module) -> None:
    certificate._CERTIFICATES.clear()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fuse(llama)
    assert torch.equal(torch.rand(3), expected)


def test_no_hook_fires_while_the_kernel_is_compared(llama: nn.Module) -> None:
    certificate._CERTIFICATES.clear()
    fired: list[str] = []
    for name, module in llama.named_modules():
        module.register_forward_hook(lambda m, args, output, name=name: fired.append(name))
    fuse(llama)
    assert fired == []


def test_false_and_an_empty_mapping_fuse_nothing(llama: nn.Module) -> None:
    for families in (False, {}, {"rms_norm_mlp": False}, {"rms_norm_mlp": None}):
        assert fuse(llama, families).groups == ()


def test_include_and_exclude_choose_groups_by_path(llama: nn.Module) -> None:
    result = fuse(llama, {"rms_norm_mlp": {"include": "model.layers.1.mlp"}})
    assert [group.paths[1] for group in result.groups] == ["model.layers.1.mlp"]
    unfuse_modules(llama)
    result = fuse(llama, {"rms_norm_mlp": {"exclude": ["model.layers.[-1].mlp"]}})
    assert [group.paths[1] for group in result.groups] == ["model.layers.0.mlp"]


@pytest.mark.parametrize(
    ("families", "error", "message"),
    [
        ({"rms_norm": True}, NotFusableError, "no family 'rms_norm'. Did you mean 'rms_norm_mlp'?"),
        ({"x": True}, NotFusableError, "Did you mean 'patch_embeddings' or 'rms_norm_mlp'?"),
        ("rms_norm_mlp", FusionError, "families is True or a mapping from names"),
        ({"rms_norm_mlp": "yes"}, FusionError, "The options of 'rms_norm_mlp' are True, False or"),
        ({"rms_norm_mlp": {"only": []}}, FusionError, "'rms_norm_mlp' has no option 'only'"),
        ({"rms_norm_mlp": {"include": "nowhere"}}, PathNotFoundError, "nowhere"),
        ({"rms_norm_mlp": {"mode": "fast"}}, NotFusableError, "mode is a kernels.Mode"),
    ],
)
def test_a_wrong_argument_is_a_typed_error_and_the_model_untouched(
    llama: nn.Module, families: Any, error: type[Exception], message: str
) -> None:
    before = structure(llama)
    with pytest.raises(error, match=re.escape(message)):
        fuse(llama, families)
    assert structure(llama) == before


def test_an_error_in_the_second_family_takes_the_first_one_back(llama: nn.Module) -> None:
    class Failing(FusionFamily):
        name, kernel, roles = "failing", "Failing", ("a",)

        def groups(self, model: nn.Module) -> Any:
            raise KeyError("inside a family")

    register_family(Failing())
    before = structure(llama)
    with pytest.raises(KeyError):
        fuse(llama, {"rms_norm_mlp": True, "failing": True})
    assert structure(llama) == before


class Wrong(nn.Module):
    """An RMSNorm by its looks."""

    def __init__(self, hidden: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)
        self.variance_epsilon = 1e-6
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        if self.how == "a little more":
            return self.weight * x * torch.rsqrt(variance + self.variance_epsilon) * 1.01
        if self.how == "another mean":
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)
        if self.how == "epsilon outside":
            return self.weight * x / (variance.sqrt() + 0.01)
        return self.weight * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-6)


@pytest.mark.parametrize("how", ["a little more", "another mean", "epsilon outside", "centred"])
def test_a_norm_that_only_looks_like_one_is_refused(how: str) -> None:
    block = Block(32)
    block.norm = Wrong(32, how)
    x = torch.randn(2, 3, 32)
    expected = block(x)
    result = fuse(block)
    assert [group.action for group in result.groups] == ["skipped"]
    assert "Wrong" in str(result.groups[0].reason)
    assert torch.equal(block(x), expected)


class AlmostKernel(nn.Module):
    """Like `WeightKernel`, a little wrong."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        x = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * 1.00001
        gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return F.linear(gate, mlp.down_proj.weight)


class BlocksFamily(FusionFamily):
    """The blocks of the tests' own model, by path."""

    name, kernel, roles = "blocks", "Blocks", ("norm", "mlp")
    paths = (("nowhere.*.norm", "nowhere.*.mlp"), ("layers.*.norm", "layers.*.mlp"))

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        return [(torch.randn(64, 8, generator=generator),)]


def test_a_family_of_the_user_is_found_by_its_paths_certified_and_fused(
    model: Model, x: Tensor
) -> None:
    register_family(BlocksFamily)
    expected, calls = model(x), model.calls()
    with mapped(Blocks=WeightKernel):
        result = fuse(model, {"blocks": True})
    assert [group.accuracy for group in result.fused] == [1.0, 1.0]
    assert "error 1.00 x the modules'" in str(result)
    assert torch.equal(model(x), expected)
    assert model.calls() == calls
    assert [group.kernel_calls for group in report(model).groups] == [1, 1]


def test_a_kernel_that_is_less_accurate_is_refused_with_the_numbers(
    model: Model, x: Tensor
) -> None:
    register_family(BlocksFamily)
    before = structure(model)
    with mapped(Blocks=AlmostKernel):
        result = fuse(model, {"blocks": True})
    assert structure(model) == before
    assert [group.action for group in result.groups] == ["skipped"] * 2
    reason = str(result.groups[0].reason)
    assert re.search(r"error \d\.\d\de-05 against float64, theirs is \d\.\d\de-0[78]", reason)


def test_members_of_one_structure_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    register_family(BlocksFamily)
    compared: list[int] = []
    compare = certificate._compare
    monkeypatch.setattr(certificate, "_compare", lambda *args: compared.append(1) or compare(*args))
    certificate._CERTIFICATES.clear()
    model = Model(5)
    model.layers[3].mlp = Mlp(8, 24)
    with mapped(Blocks=WeightKernel):
        fuse(model, {"blocks": True})
    assert len(compared) == 2


def test_a_kernel_that_is_not_there_leaves_the_modules_alone(model: Model) -> None:
    register_family(BlocksFamily)
    before = structure(model)
    with mapped(Other=WeightKernel):
        result = fuse(model, {"blocks": True})
    assert structure(model) == before
    assert {group.reason for group in result.skipped} == {"no kernel was loaded for 'Blocks'"}


def test_a_mapping_of_the_user_comes_before_the_built_in_kernel(llama: nn.Module) -> None:
    class Mine(nn.Module):
        can_torch_compile = True

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.mlp(self.norm(hidden_states))

    with mapped(RMSNormMLP=Mine):
        fuse(llama, {"rms_norm_mlp": True})
    assert llama.model.layers[0].mlp.fused_kernel.kernel is Mine.forward


def test_a_family_without_a_name_is_refused() -> None:
    class Nameless(FusionFamily):
        kernel, roles = "Kernel", ("a",)

    with pytest.raises(NotFusableError, match="The family Nameless has no name"):
        register_family(Nameless())
    with pytest.raises(NotFusableError, match="A family is a FusionFamily, not int"):
        register_family(3)


def test_a_name_that_is_taken_is_refused_and_the_same_class_again_is_not() -> None:
    class Other(FusionFamily):
        name, kernel, roles = "blocks", "Kernel", ("a",)

    register_family(BlocksFamily)
    register_family(BlocksFamily)
    with pytest.raises(NotFusableError, match="There is a family 'blocks' already, BlocksFamily"):
        register_family(Other)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in "abcdef":
            setattr(self, name, nn.Linear(2, 2))
        self.after = nn.Linear(2, 2)

    def forward(self, x: Tensor, how: bool = False) -> Tensor:
        h = self.a(x)
        h = self.b(h) if how else h
        y = self.c(x)
        if how:
            y = self.d(y)
        y, _ = self.e(y), 1
        z = self.f(x=self.a(x))
        return self.tail(z)

    def tail(self, z: Tensor) -> Tensor:
        h = self.d(z)
        return self.after(h)


def test_which_child_feeds_which_is_read_from_the_source() -> None:
    pairs = feeding_pairs(Conditional())
    assert set(pairs) == {
        ("a", "b"),
        ("c", "d"),
        ("c", "e"),
        ("d", "e"),
        ("a", "f"),
        ("d", "after"),
    }
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert feeding_pairs(model) == [("0", "1")]


def test_a_chain_of_the_family_in_another_chain_already_is_skipped_with_the_reason(
    llama: nn.Module,
) -> None:
    from module_fusion import fuse_modules

    fuse_modules(llama, ["model.layers.0.mlp"])
    result = fuse(llama, {"rms_norm_mlp": True})
    assert [group.action for group in result.groups] == ["fused", "skipped"]
    assert "belongs to another chain" in str(result.skipped[0].reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_in_a_short_dtype_gives_the_same_tokens(llama: Any, dtype: torch.dtype) -> None:
    llama = llama.to(dtype)
    ids = torch.arange(8, device=llama.device).view(2, 4)
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = llama.generate(ids, **options)
    fuse(llama)
    tokens = llama.generate(ids, **options)
    assert all(g.kernel_calls == 64 and not g.member_calls for g in report(llama).groups)
    unfuse_modules(llama)
    for got, wanted in zip(tokens, expected, strict=True):
        differing = (got != wanted).nonzero()
        if differing.numel():
            # Another order of summation may decide between two tokens that rounding made equal.
            first = int(differing[0])
            best = llama(wanted[None, :first]).logits[0, -1].float().topk(2).values
            assert best[0] - best[1] <= 4 * torch.finfo(dtype).eps * best[0].abs()
