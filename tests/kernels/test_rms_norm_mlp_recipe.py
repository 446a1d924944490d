"""What `prepare` finds out about members, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rms_norm_mlp_cases import NORMS, mlp_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
    T5Config,
)
from transformers.models.gemma import modeling_gemma as gemma
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.t5 import modeling_t5 as t5

from module_fusion.kernels.rms_norm_mlp import few_inputs, probe_mlp, recipe, reference
from module_fusion.kernels.rms_norm_mlp.layers import RMSNormMLP
from module_fusion.kernels.rms_norm_mlp.recipe import prepare

H, I = 64, 160  # noqa: E741
SIZES = {"hidden_size": H, "intermediate_size": I}
SEPARATE = {"gate": ("gate_proj",), "up": ("up_proj",), "down": ("down_proj",), "gate_first": True}
MERGED = {"gate": ("gate_up_proj",), "up": None, "down": ("down_proj",), "gate_first": True}
T5 = {"gate": ("wi_0",), "up": ("wi_1",), "down": ("wo",), "activation": "gelu_tanh"}
SILU, TANH = {"activation": "silu"}, {"activation": "gelu_tanh"}


def t5_config(dropout: float) -> T5Config:
    return T5Config(d_model=H, d_ff=I, feed_forward_proj="gated-gelu", dropout_rate=dropout)


Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module], str, dict[str, Any]]
REAL: dict[str, Pair] = {
    "llama": (
        lambda: llama.LlamaRMSNorm(H, 1e-5),
        lambda: llama.LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True)),
        "early", {**SEPARATE, **SILU, "eps": "variance_epsilon"},
    ),
    "mistral": (
        lambda: mistral.MistralRMSNorm(H),
        lambda: mistral.MistralMLP(MistralConfig(**SIZES)),
        "early", {**SEPARATE, **SILU, "eps": "variance_epsilon"},
    ),
    "qwen3": (
        lambda: qwen3.Qwen3RMSNorm(H),
        lambda: qwen3.Qwen3MLP(Qwen3Config(**SIZES)),
        "early", {**SEPARATE, **SILU},
    ),
    "gemma": (
        lambda: gemma.GemmaRMSNorm(H),
        lambda: gemma.GemmaMLP(GemmaConfig(**SIZES)),
        "one_plus", {**SEPARATE, **TANH, "eps": "eps"},
    ),
    "gemma2": (
        lambda: gemma2.Gemma2RMSNorm(H),
        lambda: gemma2.Gemma2MLP(Gemma2Config(**SIZES)),
        "one_plus", {**SEPARATE, **TANH},
    ),
    "gemma3": (
        lambda: gemma3.Gemma3RMSNorm(H),
        lambda: gemma3.Gemma3MLP(Gemma3TextConfig(**SIZES)),
        "one_plus", {**SEPARATE, **TANH},
    ),
    "phi3": (
        lambda: phi3.Phi3RMSNorm(H),
        lambda: phi3.Phi3MLP(Phi3Config(**SIZES, pad_token_id=0)),
        "early", {**MERGED, **SILU},
    ),
    "olmo2": (
        lambda: olmo2.Olmo2RMSNorm(H),
        lambda: olmo2.Olmo2MLP(Olmo2Config(**SIZES)),
        "late", {**SEPARATE, **SILU},
    ),
    "t5": (
        lambda: t5.T5LayerNorm(H),
        lambda: t5.T5DenseGatedActDense(t5_config(0.0)),
        "early", T5,
    ),
    "torch": (lambda: nn.RMSNorm(H, 1e-4), lambda: mlp_of(H, I), "late", {"eps": "eps"}),
    "square": (
        lambda: llama.LlamaRMSNorm(H), lambda: mlp_of(H, H), "early", {**SEPARATE, **SILU},
    ),
    "exact GELU": (
        lambda: nn.RMSNorm(H, 1e-5, elementwise_affine=False),
        lambda: mlp_of(H, I, activation="gelu"),
        "late", {"activation": "gelu", "norm_weight": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REAL)
def test_real_classes_are_recognised(name: str, dtype: torch.dtype) -> None:
    make_norm, make_mlp, rounding, expected = REAL[name]
    found = prepare(make_norm().to(dtype), make_mlp().to(dtype))
    assert {key: getattr(found, key) for key in expected} == expected
    # In float32 there is one rounding point, and on a GPU nn.RMSNorm has another than here.
    if dtype != torch.float32 or rounding == "one_plus":
        assert found.norm == rounding
    assert (found.hidden, found.dtype) == (H, dtype)


class Fake(nn.Module):
    """Something that looks like LlamaRMSNorm; `compute` says what it does."""

    def __init__(self, compute: Callable[[Tensor, float], Tensor], eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H))
        self.variance_epsilon = eps
        self.compute = compute

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        return self.weight * self.compute(wide, self.variance_epsilon).to(hidden_states.dtype)


def root(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


FAKES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "L1 mean": lambda x, eps: x / (x.abs().mean(-1, keepdim=True) + eps),
    "a factor of 1.01": lambda x, eps: 1.01 * x * root(x, eps),
    "eps outside the root": lambda x, eps: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps),
    "twice the eps": lambda x, eps: x * root(x, 2 * eps),
    "the mean subtracted": lambda x, eps: (x - x.mean(-1, keepdim=True)) * root(x, eps),
    "the variance": lambda x, eps: x * torch.rsqrt(x.var(-1, keepdim=True) + eps),
    "a sum": lambda x, eps: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps),
    "a clamp": lambda x, eps: x.clamp(-20, 20) * root(x, eps),
    "noise": lambda x, eps: x * root(x, eps) * (1 + 0.01 * torch.rand_like(x)),
    "an exception": lambda x, eps: x * undefined,  # type: ignore[name-defined]  # noqa: F821
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAKES)
def test_what_only_looks_like_an_rms_norm_is_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(
        ValueError, match=r"something else than an RMSNorm|cannot be run|draws random numbers"
    ):
        prepare(Fake(FAKES[name]).to(dtype), mlp_of(H, I).to(dtype))


class Clamped(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (H,), self.weight.clamp(max=2.5), self.eps)


class Long(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-2] < 1000 else self.weight * x


def sized(scale: Callable[[Tensor], float]) -> nn.Module:
    """A gated MLP whose output is scaled by what its input is like."""
    mlp = mlp_of(H, I)
    plain = type(mlp).forward
    forward = {"forward": lambda self, x: plain(self, x) * scale(x)}
    mlp.__class__ = type("Sized", (type(mlp),), forward)
    return mlp


@pytest.mark.parametrize(
    ("norm", "mlp"),
    [
        (Clamped(H, 1e-6), mlp_of(H, I)),
        (Long(H, 1e-6), mlp_of(H, I)),
        (nn.RMSNorm(H), sized(lambda x: 1 if x.is_contiguous() else 2)),
        (nn.RMSNorm(H), sized(lambda x: 2 if x.dim() == 5 else 1)),
        (nn.RMSNorm(H), sized(lambda x: 2 if x.numel() // x.shape[-1] > 1000 else 1)),
    ],
)
def test_what_does_something_else_for_sizes_strides_or_large_weights_is_refused(
    norm: nn.Module, mlp: nn.Module
) -> None:
    with pytest.raises(ValueError, match="computes something else"):
        prepare(norm, mlp)


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "size": torch.abs,
    "size of 1 + weight": lambda weight: (1 + weight).abs(),
    "1 + size": lambda weight: 1 + weight.abs(),
    "no negative": lambda weight: weight.clamp(min=0),
    "root of the square": lambda weight: weight.square().sqrt(),
    "1 for 0": lambda weight: torch.where(weight == 0, 1, weight),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALES)
def test_a_norm_that_takes_some_weights_otherwise_is_refused(name: str, dtype: torch.dtype) -> None:
    class Scaled(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (H,), SCALES[name](self.weight), self.eps)

    with pytest.raises(ValueError, match="something else than an RMSNorm"):
        prepare(Scaled(H, 1e-6).to(dtype), mlp_of(H, I).to(dtype))


def of_one_value(x: Tensor) -> Tensor:
    return x.amax(-1, keepdim=True) == x.amin(-1, keepdim=True)


SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of zeros": lambda x: (x == 0).all(-1, keepdim=True),
    "rows with a zero": lambda x: (x == 0).any(-1, keepdim=True),
    "rows of one value": of_one_value,
    "rows of one negative value": lambda x: of_one_value(x) & (x < 0),
    "rows with one value": lambda x: (x != 0).sum(-1, keepdim=True) == 1,
    "inf": lambda x: (x == torch.inf).any(-1, keepdim=True),
    "-inf": lambda x: (x == -torch.inf).any(-1, keepdim=True),
    "NaN": lambda x: x.isnan().any(-1, keepdim=True),
    "inference": lambda x: torch.full((), x.is_inference()),
    "more than 8 tokens": lambda x: torch.full((), x.dim() == 3 and x.shape[1] > 8),
    "a batch above 5": lambda x: torch.full((), x.dim() == 3 and x.shape[0] > 5),
    "a batch above 7": lambda x: torch.full((), x.dim() == 3 and x.shape[0] > 7),
}


@pytest.mark.parametrize("member", ["norm", "mlp"])
@pytest.mark.parametrize("name", SPECIAL)
def test_a_member_that_does_something_else_with_special_inputs_is_refused(
    name: str, member: str
) -> None:
    """Gives 7 there."""
    norm, mlp = nn.RMSNorm(H, 1e-6), mlp_of(H, I)
    module = norm if member == "norm" else mlp
    plain = type(module).forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return torch.where(SPECIAL[name](x), 7, plain(self, x))  # type: ignore[no-any-return]

    module.__class__ = type("Special", (type(module),), {"forward": forward})
    with pytest.raises(ValueError, match="Special computes something else for"):
        prepare(norm, mlp)


def test_a_member_that_refuses_what_is_no_number_is_refused() -> None:
    class Strict(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            if not x.isfinite().all():
                raise FloatingPointError("no number")
            return super().forward(x)

    with pytest.raises(ValueError, match="cannot be run: FloatingPointError: no number"):
        prepare(Strict(H, 1e-6), mlp_of(H, I))


@pytest.mark.parametrize("hidden", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_norms_of_few_values_are_recognised(norm: str, hidden: int) -> None:
    assert prepare(NORMS[norm](hidden), mlp_of(hidden, 3)).hidden == hidden


def test_a_fake_without_a_fault_is_recognised() -> None:
    assert prepare(Fake(lambda x, eps: x * root(x, eps)), mlp_of(H, I)).eps == "variance_epsilon"


class Gated(nn.Module):
    """A gated MLP of layers with names that say nothing; `compute` says what it does."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(H, I, bias=bias)
        self.b = nn.Linear(I, H, bias=bias)
        self.c = nn.Linear(H, I, bias=bias)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


WRONG: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another activation": lambda m, x: m.b(F.relu(m.c(x)).square() * m.a(x)),
    "quick GELU": lambda m, x: m.b(m.c(x) * torch.sigmoid(1.702 * m.c(x)) * m.a(x)),
    "a clamp": lambda m, x: m.b(F.silu(m.c(x)).clamp(max=50) * m.a(x)),
    "a factor": lambda m, x: 1.001 * m.b(F.silu(m.c(x)) * m.a(x)),
    "a residual": lambda m, x: x + m.b(F.silu(m.c(x)) * m.a(x)),
    "no gate": lambda m, x: m.b(F.silu(m.c(x)) + m.a(x)),
    "a dropout": lambda m, x: F.dropout(m.b(F.silu(m.c(x)) * m.a(x)), 0.1, m.training),
    "two outputs": lambda m, x: (m.b(F.silu(m.c(x)) * m.a(x)), None),  # type: ignore[dict-item,return-value]
    "a fixed batch": lambda m, x: m.b(F.silu(m.c(x)) * m.a(x)).view(3, -1),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_only_looks_like_a_gated_mlp_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Gated"):
        prepare(NORMS["early"](H), Gated(WRONG[name]))


@pytest.mark.parametrize("bias", [False, True])
def test_roles_are_found_by_what_the_layers_do(bias: bool) -> None:
    found = prepare(NORMS["early"](H), Gated(lambda m, x: m.b(F.silu(m.c(x)) * m.a(x)), bias))
    assert (found.gate, found.up, found.down) == (("c",), ("a",), ("b",))


@pytest.mark.parametrize("gate_first", [False, True])
def test_the_order_in_a_merged_projection_is_found(gate_first: bool) -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = I
            self.inner = nn.ModuleDict({"both": nn.Linear(H, 2 * I), "out": nn.Linear(I, H)})

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.inner["both"](x).split([self.width, self.width], dim=-1)
            gate, up = (first, second) if gate_first else (second, first)
            return self.inner["out"](F.silu(gate) * up)  # type: ignore[no-any-return]

    found = prepare(NORMS["early"](H), Merged())
    assert (found.gate, found.up, found.down) == (("inner", "both"), None, ("inner", "out"))
    assert found.gate_first is gate_first


def test_a_forward_that_names_its_real_sizes_is_probed_at_them() -> None:
    gated = Gated(lambda m, x: m.b(F.silu(m.c(x)).view(*x.shape[:-1], I) * m.a(x)))
    found = prepare(NORMS["early"](H), gated)
    assert found.gate == ("c",)


def in_groups(mlp: Any, x: Tensor) -> Tensor:
    """Normalises in groups of 32 channels, where there are as many."""
    product = F.silu(mlp.c(x)) * mlp.a(x)
    if product.shape[-1] % 32 == 0:
        product = F.layer_norm(product.unflatten(-1, (-1, 32)), (32,)).flatten(-2)
    return mlp.b(product)  # type: ignore[no-any-return]


LARGE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "groups of channels": in_groups,
    "many channels": lambda m, x: m.b(F.silu(m.c(x)) * m.a(x)) * (1 if x.shape[-1] < H else 2),
    "many channels, in training": lambda m, x: (
        m.b(F.silu(m.c(x)) * m.a(x)) * (2 if m.training and x.shape[-1] >= H else 1)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_an_mlp_that_does_something_else_at_its_real_sizes_is_refused(
    name: str, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=f"at its real sizes, {H} and {I}, than at small ones"):
        prepare(NORMS["early"](H).to(dtype), Gated(LARGE[name]).to(dtype))


class Largest(TorchDispatchMode):
    """The largest storage that an operation made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return output


@pytest.mark.parametrize("groups", [False, True])
def test_an_mlp_of_gigabytes_is_proved_at_its_real_sizes_in_little_memory(groups: bool) -> None:
    hidden, intermediate = 8192, 28672
    mlp = Gated(in_groups if groups else lambda m, x: m.b(F.silu(m.c(x)) * m.a(x)))
    for layer, shape in zip(
        (mlp.a, mlp.b, mlp.c),
        ((intermediate, hidden), (hidden, intermediate), (intermediate, hidden)),
        strict=True,
    ):
        layer.weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16).expand(shape))
    norm = NORMS["early"](hidden).bfloat16()
    with Largest() as largest:
        if groups:
            with pytest.raises(ValueError, match="at its real sizes, 8192 and 28672"):
                prepare(norm, mlp)
        else:
            assert prepare(norm, mlp).gate == ("c",)
    assert 0 < largest.bytes < 2**27


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize("intermediate", [2, 3])
def test_an_mlp_of_few_values_is_proved_where_its_output_is_zero(
    hidden: int, intermediate: int, activation: str
) -> None:
    mlp = mlp_of(hidden, intermediate, activation=activation)
    assert prepare(NORMS["early"](hidden), mlp).activation == activation


def test_weights_taken_elsewhere_than_into_linear_are_proved_if_they_are_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def product(mlp: Any, x: Tensor) -> Tensor:
        return mlp.b(F.silu(x @ mlp.c.weight.t()) * mlp.a(x))  # type: ignore[no-any-return]

    assert prepare(NORMS["early"](H), Gated(product)).gate == ("c",)
    with pytest.raises(ValueError, match="something else"):
        prepare(NORMS["early"](H), Gated(lambda m, x: in_groups(m, x) + 0 * product(m, x)))
    recipe._RECIPES.clear()
    monkeypatch.setattr(probe_mlp, "_MOST_REAL_WEIGHTS", 3 * H * I - 1)
    with pytest.raises(ValueError, match=r"takes weights elsewhere than into F\.linear"):
        prepare(NORMS["early"](H), Gated(product))


@pytest.mark.parametrize("large", [False, True])
def test_every_layer_of_few_inputs_uses_every_input(large: bool) -> None:
    layer = nn.Linear(100, 3) if large else nn.Linear(3, 100)
    x = torch.eye(layer.in_features)
    with few_inputs.FewInputs(layer):
        output = layer(x) - layer.bias
    assert output.any(dim=1).all()
    assert output.any(dim=0).all()


@pytest.mark.parametrize(
    ("norm", "mlp", "reason"),
    [
        (nn.LayerNorm(H), mlp_of(H, I), "LayerNorm has weight and bias"),
        (nn.LayerNorm(H, bias=False), mlp_of(H, I), "something else than an RMSNorm"),
        (nn.Identity(), mlp_of(H, I), "something else than an RMSNorm"),
        (nn.RMSNorm(32), mlp_of(H, I), r"has shape \(32,\); the MLP takes 64"),
        (nn.RMSNorm((2, H)), mlp_of(H, I), r"has shape \(2, 64\)"),
        (nn.RMSNorm(H), GPT2MLP(I, GPT2Config(n_embd=H)), "weights in a Conv1D"),
        (nn.RMSNorm(H), nn.Sequential(nn.Linear(H, I), nn.Linear(I, H)), "form no gate"),
        (nn.RMSNorm(H), nn.Identity(), "form no gate, up and down projection: none"),
        (nn.RMSNorm(H), t5.T5DenseGatedActDense(t5_config(0.1)), "in training mode"),
        (
            nn.RMSNorm(H),
            MixtralSparseMoeBlock(MixtralConfig(**SIZES, num_local_experts=2)),
            "weights in a Mixtral",
        ),
        (nn.RMSNorm(H).double(), mlp_of(H, I).double(), r"weights are in torch\.float64"),
        (nn.RMSNorm(H).half(), mlp_of(H, I), r"in torch\.float16, torch\.float32 on"),
        (nn.RMSNorm(H).to("meta"), mlp_of(H, I).to("meta"), "meta device"),
        (nn.BatchNorm1d(H), mlp_of(H, I), "has buffers or modules"),
    ],
)
def test_a_refusal_says_why(norm: nn.Module, mlp: nn.Module, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=reason):
            prepare(norm, mlp)


class DependsOnTheDtype(nn.Module):
    """As `nn.RMSNorm(H, eps=None)` is on devices where torch takes the epsilon of the dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, torch.finfo(x.dtype).eps, "late")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_epsilon_that_is_the_dtype_s_is_found(dtype: torch.dtype) -> None:
    norm = DependsOnTheDtype().to(dtype)
    assert prepare(norm, mlp_of(H, I).to(dtype)).eps == torch.finfo(dtype).eps


def test_the_default_epsilon_of_torch_is_found() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        norm = nn.RMSNorm(H).to(dtype)
        eps = prepare(norm, mlp_of(H, I).to(dtype)).eps
        x = torch.full((1, H), 1e-4, dtype=dtype)
        expected = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + eps)
        torch.testing.assert_close(norm(x).double(), expected, rtol=1e-2, atol=0)


def test_members_of_one_structure_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = mlp_of(H, I)
    first = prepare(llama.LlamaRMSNorm(H), mlp)
    monkeypatch.setattr(recipe, "_prove", lambda *members: pytest.fail("probed"))
    assert prepare(llama.LlamaRMSNorm(H), type(mlp)(mlp.config)) is first
    for norm in (llama.LlamaRMSNorm(H, 1e-3), qwen3.Qwen3RMSNorm(H), nn.RMSNorm(H).half()):
        with pytest.raises(pytest.fail.Exception, match="probed"):
            prepare(norm, mlp)


def test_what_is_kept_of_structures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe._RECIPES.clear()
    monkeypatch.setattr(recipe, "_MAX_RECIPES", 3)
    mlp, counts = mlp_of(H, I), []
    for power in range(7):
        prepare(llama.LlamaRMSNorm(H, 10.0**-power), mlp)
        counts.append(len(recipe._RECIPES))
    assert counts == [1, 2, 3, 1, 2, 3, 1]


def test_the_epsilon_is_the_attribute_that_counts_not_one_of_the_same_value() -> None:
    class Decoys(llama.LlamaRMSNorm):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.a_decoy = 1e-5
            llama.LlamaRMSNorm.__init__(self, H, 1e-5)
            self.z_decoy = 1e-5

    assert prepare(Decoys(), mlp_of(H, I)).eps == "variance_epsilon"


def test_a_class_whose_forward_was_replaced_is_probed_again() -> None:
    class Norm(llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states)

    norm, mlp = Norm(H), mlp_of(H, I)
    prepare(norm, mlp)
    Norm.forward = lambda self, x: F.layer_norm(x, (H,), self.weight)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="something else than an RMSNorm"):
        prepare(norm, mlp)


def test_probing_leaves_members_and_random_state_alone() -> None:
    recipe._RECIPES.clear()
    norm, mlp = llama.LlamaRMSNorm(H), Gated(WRONG["a dropout"])
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    attributes = [dict(module.__dict__) for module in (norm, mlp, mlp.a)]
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="training"):
        prepare(norm, mlp)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [dict(module.__dict__) for module in (norm, mlp, mlp.a)] == attributes
    for name, value in mlp.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("draws", ["always", "in training"])
def test_nobody_s_random_numbers_are_used_up_or_put_back_by_probing(
    draws: str,
) -> None:
    """Another thread may draw while a member is probed: its numbers stay drawn, and only they."""
    recipe._RECIPES.clear()
    seen: list[Tensor] = []

    def compute(mlp: Any, x: Tensor) -> Tensor:
        # The numbers of someone else, drawn meanwhile, are no operation of the member.
        thread = threading.Thread(target=lambda: seen.append(torch.rand(1)))
        thread.start()
        thread.join()
        trains = mlp.training if draws == "in training" else True
        return F.dropout(mlp.b(F.silu(mlp.c(x)) * mlp.a(x)), 0.1, trains)

    norm, mlp = NORMS["early"](H), Gated(compute)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="draws random numbers"):
        prepare(norm, mlp)
    seen.append(torch.rand(1))
    torch.manual_seed(0)
    assert seen == [torch.rand(1) for _ in seen]
    assert len(seen) > 1


def test_a_generator_that_a_member_keeps_is_not_used_up() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()

    class Noisy(llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            noise = torch.randn(hidden_states.shape, generator=self.generator)
            return super().forward(hidden_states) + noise

    norm = Noisy(H)
    norm.generator = generator
    with pytest.raises(ValueError, match="Noisy draws random numbers"):
        prepare(norm, mlp_of(H, I))
    assert torch.equal(generator.get_state(), state)


def test_a_swapped_class_is_probed_as_the_original() -> None:
    norm, mlp = llama.LlamaRMSNorm(H), mlp_of(H, I)
    for module in (norm, mlp):
        original = type(module)
        namespace = {"_fusion_original_class": original, "forward": lambda self, x: 1 / 0}
        module.__class__ = type(original.__name__, (original,), namespace)
        module.__dict__["_fusion"] = object()
    assert prepare(norm, mlp).activation == "silu"


def test_the_layer_is_one_the_kernels_library_takes() -> None:
    own = set(vars(RMSNormMLP)) - set(vars(nn.Module))
    assert {name for name in own if not name.startswith("__")} == {
        "can_torch_compile",
        "has_backward",
    }
    assert RMSNormMLP.forward.prepare is prepare  # type: ignore[attr-defined]
