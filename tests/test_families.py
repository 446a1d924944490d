"""`fuse`: what is found without paths, certified, fused, refused and reported."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from kernels import Mode, use_kernel_mapping
from structure import structure
from support import (
    Block,
    InMemoryRepository,
    Mlp,
    Model,
    Norm,
    WeightKernel,
    functions_in_seats,
    mapped,
    members_kernel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from module_fusion import (
    FusionError,
    FusionFamily,
    NotFusableError,
    PathNotFoundError,
    fuse,
    fuse_modules,
    register_family,
    report,
    unfuse_modules,
)
from module_fusion.families import WeightLayout, certificate
from module_fusion.families.dataflow import feeding_pairs
from module_fusion.plain import MemberForm

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NORM_MLP = "model.layers.*.post_attention_layernorm", "model.layers.*.mlp"


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
    assert not result.skipped, result
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
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fuse(llama)
    assert torch.equal(torch.rand(3), expected)


def test_no_hook_fires_while_members_are_probed_and_compared(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    fired: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, output, name=name: fired.append(name))
    # A kernel would not run beside hooks, so the group would not be compared at all.
    monkeypatch.setattr(MemberForm, "why_not_plain", lambda *args: None)
    register_family(BlocksFamily)
    with mapped(Blocks=WeightKernel):
        result = fuse(model, {"blocks": True, "rms_norm_mlp": True})
    assert [group.accuracy is None for group in result.fused] == [False, False]
    assert fired == []


def wrongs() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """MLPs that are no gated MLP, each in its own way, to a probe that looks at one thing only."""

    def detached(mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(F.silu(mlp.gate_proj(x)).detach() * mlp.up_proj(x))

    def without_gradient(mlp: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = F.silu(mlp.gate_proj(x))
        return mlp.down_proj(gate * mlp.up_proj(x))

    def straight_through(mlp: Any, x: Tensor) -> Tensor:
        gate = mlp.gate_proj(x)
        return mlp.down_proj((F.silu(gate) + (gate - gate.detach()) * 0.3) * mlp.up_proj(x))

    def shifts_tokens(mlp: Any, x: Tensor) -> Tensor:
        x = x.roll(1, 1) if x.dim() == 3 else x
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def asks_for_gradients(mlp: Any, x: Tensor) -> Tensor:
        y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        return y * 2 if torch.is_grad_enabled() else y

    return {
        function.__name__: function
        for function in (
            detached, without_gradient, straight_through, shifts_tokens, asks_for_gradients,
        )
    }  # fmt: skip


@pytest.mark.parametrize("name", wrongs())
def test_an_mlp_that_computes_something_else_now_and_then_is_refused(name: str) -> None:
    block = Block(32)
    block.mlp = type("Wrong", (Mlp,), {"forward": wrongs()[name]})(32, 48)
    twin = copy.deepcopy(block)
    result = fuse(block)
    assert [group.action for group in result.groups] == ["skipped"], result
    x = torch.randn(2, 5, 32)
    for each in (block, twin):
        each(x).sum().backward()
    assert torch.equal(block(x), twin(x))
    for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def averages_over_tokens(norm: Any, x: Tensor) -> Tensor:
    every = tuple(range(1, x.dim()))
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(every, keepdim=True) + 1e-6))


def clamps(norm: Any, x: Tensor) -> Tensor:
    x = x.clamp(-500, 500)
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def mends_what_is_no_number(norm: Any, x: Tensor) -> Tensor:
    x = torch.nan_to_num(x)
    return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def beyond_half_precision() -> dict[str, Callable[[Any, Tensor], Tensor]]:
    """MLPs that in float16 alone keep numbers where others overflow."""

    def scales(mlp: Any, x: Tensor) -> Tensor:
        factor = 16 if x.dtype == torch.float16 else 1
        gate, up = F.silu(mlp.gate_proj(x)), mlp.up_proj(x) / factor
        return mlp.down_proj(gate * up) * factor

    def clamps_the_product(mlp: Any, x: Tensor) -> Tensor:
        product = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        return mlp.down_proj(product.clamp(-65504, 65504) if x.dtype == torch.float16 else product)

    def clamps_the_gate(mlp: Any, x: Tensor) -> Tensor:
        gate = mlp.gate_proj(x)
        gate = gate.clamp(-60000, 60000) if x.dtype == torch.float16 else gate
        return mlp.down_proj(F.silu(gate) * mlp.up_proj(x))

    def clamps_up(mlp: Any, x: Tensor) -> Tensor:
        up = mlp.up_proj(x)
        up = up.clamp(-60000, 60000) if x.dtype == torch.float16 else up
        return mlp.down_proj(F.silu(mlp.gate_proj(x)) * up)

    def clamps_the_output(mlp: Any, x: Tensor) -> Tensor:
        y = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        return y.clamp(-65504, 65504) if x.dtype == torch.float16 else y

    functions = (scales, clamps_the_product, clamps_the_gate, clamps_up, clamps_the_output)
    return {function.__name__: function for function in functions}


@pytest.mark.parametrize("name", beyond_half_precision())
def test_an_mlp_that_overflows_later_in_float16_is_refused(name: str) -> None:
    block = Block(32)
    block.norm = LlamaRMSNorm(32)
    block.mlp = type("Wrong", (Mlp,), {"forward": beyond_half_precision()[name]})(32, 48)
    assert str(fuse(block.half()).groups[0].reason).endswith(
        "where the MLPs known overflow in torch.float16"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_mlp_that_overflows_as_usual_is_fused(dtype: torch.dtype) -> None:
    block = Block(32)
    block.norm = LlamaRMSNorm(32)
    assert [group.action for group in fuse(block.to(dtype)).groups] == ["fused"]


@pytest.mark.parametrize("forward", [averages_over_tokens, clamps, mends_what_is_no_number])
def test_a_norm_that_differs_for_other_inputs_is_refused(forward: Any) -> None:
    block = Block(32)
    block.norm = type("Wrong", (Norm,), {"forward": forward})(32)
    assert [group.action for group in fuse(block).groups] == ["skipped"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            parametrizations.weight_norm,
            "proj has a parametrization, which computes its weight at each use",
        ),
        (
            lambda conv: conv.to("meta"),
            "proj.weight is on the meta device: load the weights, then fuse",
        ),
        (lambda conv: conv.double(), "its weight is in torch.float64, not float32, bfloat16 or "),
    ],
)
def test_a_convolution_that_cannot_be_fused_is_reported_with_what_it_is(
    change: Callable[[nn.Module], nn.Module], reason: str
) -> None:
    (group,) = fuse(nn.Sequential(change(nn.Conv2d(3, 8, 4, 4)))).groups
    assert group.action == "skipped"
    assert reason in str(group.reason)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_patch_embedding_of_a_usual_size_is_fused(dtype: torch.dtype, device: str) -> None:
    for convolution, patch in ((nn.Conv3d, (2, 14, 14)), (nn.Conv2d, (16, 16))):
        model = nn.Sequential(convolution(3, 1152, patch, patch, bias=False)).to(device, dtype)
        result = fuse(model)
        assert [group.action for group in result.groups] == ["fused"], result


def test_a_layer_without_weights_yet_is_left_out_and_the_rest_is_fused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.LazyLinear(8), nn.ReLU())
    (row,) = fuse(model).groups
    assert (row.action, row.paths) == ("fused", ("0",))
    assert model(torch.randn(2, 3, 4, 4)).shape == (2, 8)
    assert report(model).groups[0].kernel_calls == 1


def test_a_model_that_is_itself_what_a_family_looks_for_is_reported() -> None:
    (group,) = fuse(nn.Conv2d(3, 8, 4, 4)).groups
    assert (group.action, group.paths, group.classes) == (
        "skipped", ("(the module itself)",), ("Conv2d",),
    )  # fmt: skip
    assert group.reason == "the model itself cannot be a member: fuse a module around it"
    assert fuse(nn.Conv2d(3, 8, 3)).groups == ()


def test_what_a_global_function_is_now_counts_and_not_what_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Global(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(ACTIVATION(self.gate_proj(x)) * self.up_proj(x))

    x = torch.randn(2, 5, 32)
    for function in (F.silu, F.gelu):
        monkeypatch.setitem(globals(), "ACTIVATION", function)
        block = Block(32)
        block.mlp = Global(32, 48)
        twin = copy.deepcopy(block)
        assert len(fuse(block).fused) == 1
        torch.testing.assert_close(block(x), twin(x))


ACTIVATION = F.silu


def test_a_stride_that_is_set_after_fusing_counts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8))
    x = torch.randn(1, 3, 32, 32)
    assert len(fuse(model).fused) == 1
    model[0].stride = (4, 4)
    assert model(x).shape == (1, 8, 7, 7)
    assert "proj has another stride than when" in str(report(model).groups[0].reason)


def test_a_block_whose_weights_are_zero_does_not_vouch_for_the_others(model: Model) -> None:
    class Nonsense(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mlp = self.mlp
            return F.linear(F.relu(F.linear(x, mlp.gate_proj.weight)) * 3, mlp.down_proj.weight)

    register_family(BlocksFamily)
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.zero_()
    with mapped(Blocks=Nonsense):
        result = fuse(model, {"blocks": True})
    assert [group.action for group in result.groups] == ["skipped"] * 2


def test_a_kernel_whose_backward_fails_is_refused(model: Model) -> None:
    class Detached(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return WeightKernel.forward(self, x)

    register_family(BlocksFamily)
    with mapped(Blocks=Detached):
        result = fuse(model, {"blocks": True})
    assert "the gradient of input 0 is missing" in str(result.skipped[0].reason)


def test_a_block_is_chosen_by_the_path_of_a_module_around_it_or_in_it(llama: nn.Module) -> None:
    for path in ("model.layers.0", "model.layers.0.mlp.gate_proj"):
        result = fuse(llama, {"rms_norm_mlp": {"exclude": [path]}})
        assert [group.paths[1] for group in result.fused] == ["model.layers.1.mlp"]
        unfuse_modules(llama)


def test_a_kernel_of_the_users_own_stays_when_fuse_succeeds_and_when_it_fails(
    model: Model,
) -> None:
    class Failing(FusionFamily):
        name, kernel, roles = "failing", "Failing", ("a",)

        def groups(self, model: nn.Module) -> Any:
            raise KeyError("inside a family")

    register_family(BlocksFamily)
    register_family(Failing)
    with mapped(Blocks=WeightKernel):
        fuse_modules(model, ["layers.*.norm", "layers.*.mlp"], kernel="Blocks")
    fuse(model, {"blocks": True})
    with pytest.raises(FusionError, match="'failing' failed in groups: KeyError: 'inside a fam"):
        fuse(model, {"blocks": True, "failing": True})
    assert model.layers[0].mlp.fused_kernel.kernel is WeightKernel.forward


def test_many_experts_are_refused_at_once() -> None:
    experts = nn.Sequential(*(nn.Linear(8, 8) for _ in range(16)))
    assert fuse(nn.Sequential(nn.RMSNorm(8), experts)).fused == []


def test_a_default_device_changes_nothing(llama: nn.Module) -> None:
    model = nn.Sequential(llama, nn.Conv2d(3, 8, 4, 4))
    with torch.device("meta"):
        assert len(fuse(model).fused) == 3


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


@pytest.mark.parametrize("of_family", [Mode.INFERENCE, Mode.TRAINING, None])
@pytest.mark.parametrize("of_call", [Mode.INFERENCE, Mode.TRAINING])
def test_the_mode_of_a_family_comes_before_that_of_the_call(
    llama: nn.Module, device: str, of_family: Mode | None, of_call: Mode
) -> None:
    layers = {mode: members_kernel(1) for mode in (Mode.INFERENCE, Mode.TRAINING)}
    repositories = {mode: InMemoryRepository(layer) for mode, layer in layers.items()}
    options = True if of_family is None else {"mode": of_family}
    with use_kernel_mapping({"RMSNormMLP": {device: repositories}}):
        result = fuse(llama, {"rms_norm_mlp": options}, mode=of_call)
    assert len(result.fused) == 2, result
    assert functions_in_seats(llama) == {layers[of_family or of_call].forward}


def test_an_error_in_the_second_family_takes_the_first_one_back(llama: nn.Module) -> None:
    class Failing(FusionFamily):
        name, kernel, roles = "failing", "Failing", ("a",)

        def groups(self, model: nn.Module) -> Any:
            raise KeyError("inside a family")

    register_family(Failing())
    before = structure(llama)
    with pytest.raises(FusionError, match="'failing' failed in groups: KeyError: 'inside a fam"):
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
    assert all(0.5 < group.accuracy <= 1.1 for group in result.fused if group.accuracy)
    assert re.search(r"error \d\.\d\d x the modules'", str(result))
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
    assert re.search(
        r"error \d\.\d\de-05 of the .* against float64, theirs is \d\.\d\de-0[78]", reason
    )


def test_members_of_one_structure_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    register_family(BlocksFamily)
    compared: list[int] = []
    compare = certificate._compare
    monkeypatch.setattr(certificate, "_compare", lambda *args: compared.append(1) or compare(*args))
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


class Unloadable(InMemoryRepository):
    def load(self) -> type[nn.Module]:
        self.loads += 1
        raise FileNotFoundError("no such kernel")


def test_a_kernel_that_does_not_load_leaves_what_works(llama: nn.Module, device: str) -> None:
    before = structure(llama.model.layers)
    model = nn.Sequential(llama, nn.Conv2d(3, 8, 4, 4, device=device))
    repository = Unloadable(type("Missing", (nn.Module,), {}))
    with use_kernel_mapping({"RMSNormMLP": {"cpu": repository, "cuda": repository}}):
        result = fuse(model)
    assert [group.family for group in result.fused] == ["patch_embeddings"]
    assert {group.reason for group in result.skipped} == {
        "the kernel 'RMSNormMLP' cannot take over: no such kernel"
    }
    assert len(result.skipped) == 2
    assert repository.loads == 2  # For all of them, and to find out which of them it is.
    assert structure(llama.model.layers) == before
    assert model[1](torch.randn(1, 3, 8, 8, device=device)).shape == (1, 8, 2, 2)
    assert report(model).groups[0].kernel_calls == 1


def test_a_kernel_that_fails_on_one_group_is_used_for_the_others(model: Model, x: Tensor) -> None:
    class Choosy(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x)

    def prepare(norm: nn.Module, mlp: nn.Module) -> None:
        vars(norm)["settings"]["unknown" if norm is model.layers[0].norm else "known"]

    setattr(Choosy.forward, "prepare", prepare)
    for block in model.layers:
        block.norm.settings = {"known": 1}
    register_family(BlocksFamily)
    expected, calls = model(x), model.calls()
    with mapped(Blocks=Choosy):
        result = fuse(model, {"blocks": True})
    assert [(group.action, group.paths[0]) for group in result.groups] == [
        ("fused", "layers.1.norm"),
        ("skipped", "layers.0.norm"),
    ]
    assert result.skipped[0].reason == "the kernel 'Blocks' cannot take over: KeyError: 'unknown'"
    assert torch.equal(model(x), expected)
    assert model.calls() == [(calls[0][0] + 1, calls[0][1] + 1), calls[1]]


def test_groups_that_overlap_are_fused_as_far_as_they_do_not() -> None:
    class Overlapping(FusionFamily):
        name, kernel, roles = "overlapping", "Pairs", ("a", "b")

        def groups(self, model: nn.Module) -> Any:
            return [("0", "1"), ("1", "2"), ("2", "3")]

    register_family(Overlapping)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    with mapped(Pairs=members_kernel(1)):
        result = fuse(model, {"overlapping": True})
    assert [group.paths for group in result.fused] == [("0", "1"), ("2", "3")]
    (skipped,) = result.skipped
    assert skipped.paths == ("1", "2")
    assert "'1' would be the last module of one chain and an earlier one of" in str(skipped.reason)


@pytest.mark.parametrize("method", ["groups", "is_fusable", "samples"])
def test_an_error_in_the_code_of_a_family_names_it_and_changes_nothing(
    model: Model, method: str
) -> None:
    def fail(*args: Any) -> Any:
        raise ZeroDivisionError("by zero")

    broken = type("Broken", (BlocksFamily,), {method: fail, "name": "broken"})
    register_family(broken)
    before = structure(model)
    with mapped(Blocks=WeightKernel), pytest.raises(FusionError) as caught:
        fuse(model, {"broken": True})
    assert str(caught.value) == (
        f"The family 'broken' failed in {method}: ZeroDivisionError: by zero. The model is as it "
        f"was before the call."
    )
    assert structure(model) == before


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


PATHS = (
    "paths of the family 'bad' is a tuple of tuples, each with a path for every role (norm, mlp)"
)
NORM, MLP = "layers.*.norm", "layers.*.mlp"


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("name", 5, "name of the family 5 is a text, such as 'norm_linear', not 5."),
        ("kernel", 5, "kernel of the family 'bad' is the layer name in a kernel mapping, such as"),
        ("kernel", "", "The family Bad has no kernel. Set it as a class attribute."),
        ("roles", "proj", "roles of the family 'bad' is a tuple of names, such as ('norm', 'mlp')"),
        ("roles", ("a", "a"), "'a' cannot be the name by which a kernel reaches a member"),
        ("roles", ["norm"], "is a tuple of names, such as ('norm', 'mlp'), not ['norm']."),
        ("roles", ("a", 5), "is a tuple of names, such as ('norm', 'mlp'), not ('a', 5)."),
        ("roles", ("forward",), "'forward' cannot be the name by which a kernel reaches a member"),
        ("inputs", "1", "inputs of the family 'bad' is a number of tensors from 1 on, or None for"),
        ("inputs", 0, "or None for any number, not 0."),
        ("inputs", True, "or None for any number, not True."),
        ("layouts", None, "layouts of the family 'bad' is a tuple of WeightLayout, each with a"),
        ("layouts", (WeightLayout("a", "mlp.weight"),), "is a tuple of paths, not 'mlp.weight'"),  # type: ignore[arg-type]
        ("layouts", (WeightLayout([], ("mlp.weight",)),), "each with a name of its own, not"),  # type: ignore[arg-type]
        ("layouts", (WeightLayout("a", (5,)),), "is a tuple of paths, not (5,)"),  # type: ignore[arg-type]
        ("paths", None, PATHS),
        ("paths", f"{NORM}", PATHS),
        ("paths", (NORM, MLP), f"{PATHS}, such as (('layers.*.norm', 'layers.*.mlp'),), not"),
        ("paths", ((NORM,),), PATHS),
        ("paths", ((5, 6),), "paths of the family 'bad': A path is a string such as"),
        ("paths", (("layers..norm", MLP),), "paths of the family 'bad': 'layers..norm' is not a"),
        (
            "paths",
            ((NORM, "layers.[b-a].mlp"),),
            "paths of the family 'bad': '[b-a]' is not a glob",
        ),
        ("paths", (("nowhere.[::0].norm", MLP),), "'[::0]' is not a slice: its step is zero."),
        ("paths", (("a[::0][1:].norm", MLP),), "'[::0]' is not a slice: its step is zero."),
        ("paths", ((NORM, "*.*.mlp"),), "'layers.*.norm' has 1, '*.*.mlp' has 2"),
    ],
)
def test_a_family_that_says_something_wrong_of_itself_is_not_registered(
    attribute: str, value: Any, message: str
) -> None:
    said = {"name": "bad", "kernel": "Kernel", "roles": ("norm", "mlp"), attribute: value}
    with pytest.raises(NotFusableError) as error:
        register_family(type("Bad", (FusionFamily,), said))
    assert message in str(error.value)
    with pytest.raises(NotFusableError, match="There is no family"):
        fuse(nn.Module(), {said["name"]: True})


@pytest.mark.parametrize("kernel", ["my-kernel", "org/Kernel", "a.B", "RMS Norm"])
def test_the_kernel_of_a_family_may_have_any_name_of_a_mapping(
    kernel: str, model: Model, x: Tensor
) -> None:
    register_family(type("Named", (BlocksFamily,), {"name": "named", "kernel": kernel}))
    with mapped(**{kernel: WeightKernel}):
        fuse(model, {"named": True})
        model(x)
    assert [(g.kernel, g.kernel_calls) for g in report(model).fused] == [(kernel, 1)] * 2
    assert kernel in str(report(model))


def test_paths_of_a_family_may_be_lists() -> None:
    register_family(type("Lists", (BlocksFamily,), {"name": "lists", "paths": [[NORM, MLP]]}))
    with mapped(Blocks=WeightKernel):
        assert len(fuse(Model(2), {"lists": True}).fused) == 2


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


class Loops(nn.Module):
    """Children that are taken from containers; each loop has its own containers."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("norms", "mlps", "more", "others"):
            setattr(self, name, nn.ModuleList(nn.Linear(2, 2) for _ in range(2)))
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)] * 3) for _ in range(2))
        self.norm, self.tail = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        for i, other in enumerate(self.others):
            h = self.more[i](x)
            x = x + other(h)
        for first, attention, last in self.layers:
            x = x + attention(x)
            x = x + last(first(x))
        norm = self.norm
        x = self.tail(norm(x))
        for norm, _ in [(x, x)]:
            x = self.tail(norm(x))
        return x


def test_which_child_feeds_which_is_read_from_loops_over_containers() -> None:
    assert set(feeding_pairs(Loops())) == {
        *((f"norms.{i}", f"mlps.{i}") for i in "01"),
        *((f"more.{i}", f"others.{i}") for i in "01"),
        *((f"layers.{i}.0", f"layers.{i}.2") for i in "01"),
        ("norm", "tail"),
    }


class Ways(nn.Module):
    """A norm before an MLP; each subclass writes it in another way."""

    pre = True

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.other = Norm(8), Mlp(8), nn.Linear(8, 8)


class Annotated(Ways):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(x)
        h: Tensor
        return x + self.mlp(h)


class InATuple(Ways):
    def forward(self, x: Tensor) -> Tensor:
        (residual, _), h = (x, self.other(x)), self.norm(x)
        return residual + self.mlp(h)


class Swapped(Ways):
    """All is computed before anything is assigned."""

    def forward(self, x: Tensor) -> Tensor:
        h, x = self.norm(x), self.other(x)
        h, x = x, h
        return h + self.mlp(x)


class InATest(Ways):
    def forward(self, x: Tensor) -> Tensor:
        if (h := self.norm(x)) is not None:
            return x + self.mlp(h)
        return x


class InAnArgument(Ways):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(h := self.norm(x)) * (h is None)


class Aliases(Ways):
    def forward(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        return x + mlp(norm(x))


class OneOfTwo(Ways):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x) if self.pre else x
        return x + self.mlp(h)


class InAChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"norm": Norm(8), "mlp": Mlp(8)})

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        return x + self.inner.mlp(inner.norm(x))


WAYS = (Annotated, InATuple, Swapped, InATest, InAnArgument, Aliases, OneOfTwo, InAChild)


@pytest.mark.parametrize("cls", WAYS)
def test_a_norm_before_an_mlp_is_fused_however_the_block_is_written(cls: type[nn.Module]) -> None:
    model, x = cls(), torch.randn(2, 3, 8)
    expected = model(x)
    found = fuse(model, {"rms_norm_mlp": True}).fused
    inside = "inner." if cls is InAChild else ""
    assert [group.paths for group in found] == [(f"{inside}norm", f"{inside}mlp")]
    torch.testing.assert_close(model(x), expected)
    (group,) = report(model).groups
    assert (group.kernel_calls, group.member_calls) == (1, 0)


class Unrelated(Ways):
    """What the MLP gets is not the norm's output."""

    def forward(self, x: Tensor) -> Tensor:
        h, y = self.norm(x), x
        x = self.mlp(y) + h
        h, *_ = x, self.norm(x)
        x = self.mlp(h)
        h: Tensor = self.norm(x)
        h: Tensor = x
        return self.mlp(h)


def test_a_tuple_gives_each_variable_its_own_value() -> None:
    assert ("norm", "mlp") not in feeding_pairs(Unrelated())


def test_a_chain_of_the_family_in_another_chain_already_is_skipped_with_the_reason(
    llama: nn.Module,
) -> None:
    fuse_modules(llama, ["model.layers.0.mlp"])
    result = fuse(llama, {"rms_norm_mlp": True})
    assert [group.action for group in result.groups] == ["fused", "skipped"]
    assert "belongs to another chain" in str(result.skipped[0].reason)


class Weightless(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize(
    ("make", "outcome"),
    [
        (
            lambda: Weightless(1e-6),
            ("fused", "norm has no weights, so it may return its input: compiled graphs run it"),
        ),
        (
            lambda: nn.LayerNorm(8, elementwise_affine=False),
            ("skipped", "LayerNorm computes something else than an RMSNorm"),
        ),
        (lambda: nn.Dropout(0.0), None),
    ],
)
def test_a_norm_without_a_weight_is_found_by_its_epsilon(
    make: Callable[[], nn.Module], outcome: tuple[str, str | None] | None, device: str
) -> None:
    model = nn.Sequential(Block()).to(device)
    model[0].norm = make()
    x = torch.randn(4, 8, device=device)
    expected = model(x)
    found = fuse(model, {"rms_norm_mlp": True}).groups
    torch.testing.assert_close(model(x), expected)
    assert [(group.action, group.reason) for group in found] == ([outcome] if outcome else [])
    assert [group.kernel_calls for group in report(model).groups] == [1] * bool(
        outcome and outcome[0] == "fused"
    )
