"""Blocks as other libraries write them: whatever is fused, nothing changes, and what `fuse` finds.

The checks are those of `benchmarks/zoo`: every pair that is called one after the other, and every
norm and MLP beside each other, fused by path without a kernel and with one that runs the members.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from support import mapped, members_kernel
from zoo import check, discover, others
from zoo.build import Built, perturbed
from zoo.compare import expectation

from module_fusion import fuse, fuse_modules, report

HIDDEN, INTERMEDIATE, HEADS, TOKENS = 16, 24, 2, 5
FOREVER = float("inf")
Kind = Callable[[], nn.Module]


pytestmark = pytest.mark.usefixtures("one_thread")


class ScaleNorm(nn.Module):
    """RMSNorm as torchtune has it: `scale`, in float32."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)
        return normed * self.scale


class FeedForward(nn.Module):
    """As in torchtitan, and in torchtune with `gate_proj`, `down_proj`, `up_proj` handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.w2 = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.w1(x))
        if self.w3 is not None:
            h = h * self.w3(x)
        return self.w2(h)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (
            nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        q, k, v = (
            layer(value).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, value in ((self.q_proj, x), (self.k_proj, y), (self.v_proj, y))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.output_proj(attended.transpose(1, 2).flatten(-2))


class TransformerSelfAttentionLayer(nn.Module):
    """torchtune."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward()
        self.sa_norm, self.mlp_norm = ScaleNorm(), ScaleNorm()
        self.sa_scale, self.mlp_scale = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.sa_norm(x)
        h = self.sa_scale(self.attn(h, h)) + x
        mlp_out = self.mlp(self.mlp_norm(h))
        return h + self.mlp_scale(mlp_out)


class TransformerCrossAttentionLayer(nn.Module):
    """torchtune, for images: the MLP behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), FeedForward()
        self.ca_norm, self.mlp_norm = ScaleNorm(), ScaleNorm()
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        h = self.attn(self.ca_norm(x), image) * self.gate.tanh() + x
        return h + self.mlp(self.mlp_norm(h)) * self.gate.tanh()


class Experts(nn.Module):
    """torchtitan: grouped weights, and counts of tokens that are kept."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, INTERMEDIATE, HIDDEN) * 0.1)
        self.w2 = nn.Parameter(torch.randn(experts, HIDDEN, INTERMEDIATE) * 0.1)
        self.w3 = nn.Parameter(torch.randn(experts, INTERMEDIATE, HIDDEN) * 0.1)
        self.register_buffer("tokens_per_expert", torch.zeros(experts))

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).softmax(-1).max(-1)
        chosen_ones = F.one_hot(chosen, len(self.w1)).to(x.dtype)
        if self.training:
            self.tokens_per_expert.add_(chosen_ones.flatten(0, -2).sum(0))
        h = F.silu(torch.einsum("bth,eih->btei", x, self.w1))
        h = h * torch.einsum("bth,eih->btei", x, self.w3)
        out = torch.einsum("btei,ehi->bteh", h, self.w2)
        return (out * (chosen_ones * scores[..., None])[..., None]).sum(-2)


class TransformerBlock(nn.Module):
    """torchtitan: dense in the first blocks, experts in the others."""

    def __init__(self, moe_enabled: bool = False) -> None:
        super().__init__()
        self.attention = Attention()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.moe_enabled = moe_enabled
        if moe_enabled:
            self.moe = Experts()
        else:
            self.feed_forward = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        if self.moe_enabled:
            return x + self.moe(self.ffn_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """torchtitan: the blocks by name."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {str(i): TransformerBlock(moe_enabled=i > 0) for i in range(2)}
        self.layers = nn.ModuleDict(blocks)
        self.norm, self.output = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0], 1, 1)).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)


class PackedSwiGLU(nn.Module):
    """timm: one matrix for both halves, with places for dropout and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(HIDDEN, 2 * INTERMEDIATE), nn.SiLU()
        self.drop1, self.norm = nn.Dropout(0.0), nn.Identity()
        self.fc2, self.drop2 = nn.Linear(INTERMEDIATE, HIDDEN), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(one) * two))))


class ViTBlock(nn.Module):
    """timm."""

    def __init__(self, norm: Kind, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = norm(), Attention(), LayerScale()
        self.norm2, self.mlp, self.ls2 = norm(), PackedSwiGLU(), LayerScale()
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class GEGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, 2 * INTERMEDIATE)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class NetFeedForward(nn.Module):
    """diffusers: its layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(), nn.Dropout(0.0), nn.Linear(INTERMEDIATE, HIDDEN)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class AdaLNBlock(nn.Module):
    """diffusers: what the norm gives is scaled and shifted by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn1, self.norm2 = nn.RMSNorm(HIDDEN), Attention(), nn.RMSNorm(HIDDEN)
        self.ff, self.linear = NetFeedForward(), nn.Linear(HIDDEN, 6 * HIDDEN)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift, scale, gate = self.linear(F.silu(temb))[
            :, None
        ].chunk(6, dim=-1)
        h = self.norm1(hidden_states) * (1 + scale_msa) + shift_msa
        hidden_states = hidden_states + gate_msa * self.attn1(h)
        h = self.norm2(hidden_states) * (1 + scale) + shift
        return hidden_states + gate * self.ff(h)


class NormTypeBlock(nn.Module):
    """diffusers: the same with a choice of norms, of which this is the one that modulates."""

    def __init__(self, norm_type: str) -> None:
        super().__init__()
        self.norm_type = norm_type
        self.norm2, self.ff = nn.RMSNorm(HIDDEN), NetFeedForward()
        self.scale_shift_table = nn.Parameter(torch.zeros(3, HIDDEN))

    def forward(self, hidden_states: Tensor) -> Tensor:
        shift, scale, gate = self.scale_shift_table
        h = self.norm2(hidden_states)
        if self.norm_type == "ada_norm_single":
            h = h * (1 + scale) + shift
        h = self.ff(h)
        if self.norm_type == "ada_norm_single":
            h = h * gate
        return hidden_states + h


class SiblingAttentions(nn.Module):
    """`nn.MultiheadAttention` over itself and over another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(HIDDEN) for _ in range(3))
        self.self_attn, self.cross_attn = (
            nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True) for _ in range(2)
        )
        self.mlp = FeedForward()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.self_attn(h, h, h, need_weights=False)[0]
        attended, weights = self.cross_attn(self.norm2(x), memory, memory)
        x = x + attended * weights.sum(-1, keepdim=True)
        return x + self.mlp(self.norm3(x))


class LayerPairs(nn.Module):
    """Members in pairs, as in the models of lucidrains."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.RMSNorm(HIDDEN), kind()])
            for kind in (Attention, FeedForward, Attention, FeedForward)
        )

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = layer(norm(x)) + x
        return x


class Triples(nn.Module):
    """Attention, norm and MLP of each layer in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(), nn.RMSNorm(HIDDEN), FeedForward()]) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for index, (attention, norm, mlp) in enumerate(self.layers):
            x = x + attention(x) * (index + 1)
            x = x + mlp(norm(x))
        return x


def encoder_layer(norm_first: bool, **options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(
        HIDDEN, HEADS, INTERMEDIATE, batch_first=True, norm_first=norm_first, **options
    )


def decoder_layer(norm_first: bool) -> nn.Module:
    return nn.TransformerDecoderLayer(
        HIDDEN, HEADS, INTERMEDIATE, batch_first=True, norm_first=norm_first
    )


def stack(block: Kind) -> nn.Module:
    return nn.Sequential(block(), block())


class Example(NamedTuple):
    """A model, whether it takes a second input, and what `fuse` makes of it.

    `fused` lists the groups that get the built-in kernel, which runs unless `why_members` says
    how its reason begins; `refused` those that do not get it, and a part of the reason. `pairs`
    are some that have to run a kernel when fused by path.
    """

    make: Kind
    second: tuple[int, ...] | None = None
    fused: tuple[tuple[str, str], ...] = ()
    why_members: str = ""
    refused: Mapping[tuple[str, str], str] = MappingProxyType({})
    pairs: tuple[tuple[str, str], ...] = ()


MEMORY = (2, 3, HIDDEN)
# Attention over one input takes hidden states alone, as an MLP does.
ATTENTION = "uses scaled_dot_product_attention"
LAYER_NORM = "LayerNorm has weight and bias; an RMSNorm has a weight alone"
EXPERTS = "may write to a tensor, in add_"
EXAMPLES = {
    "torchtune": Example(
        lambda: stack(TransformerSelfAttentionLayer),
        fused=(("0.mlp_norm", "0.mlp"), ("1.mlp_norm", "1.mlp")),
        pairs=(("*.mlp_norm", "*.mlp"), ("*.mlp", "*.mlp_scale")),
        refused={(f"{i}.sa_norm", f"{i}.attn"): ATTENTION for i in "01"},
    ),
    "torchtune cross attention": Example(
        TransformerCrossAttentionLayer,
        MEMORY,
        fused=(("mlp_norm", "mlp"),),
        pairs=(("mlp_norm", "mlp"),),
        refused={("ca_norm", "attn"): ATTENTION},
    ),
    "torchtitan": Example(
        Transformer,
        fused=(("layers.0.ffn_norm", "layers.0.feed_forward"),),
        refused={
            ("layers.1.ffn_norm", "layers.1.moe"): EXPERTS,
            **{(f"layers.{i}.attention_norm", f"layers.{i}.attention"): ATTENTION for i in "01"},
        },
        pairs=(("layers.0.ffn_norm", "layers.0.feed_forward"), ("norm", "output")),
    ),
    "encoder layer, norm first": Example(lambda: stack(lambda: encoder_layer(True))),
    "encoder layer, norm last": Example(lambda: stack(lambda: encoder_layer(False))),
    "encoder layer, another activation": Example(
        lambda: stack(lambda: encoder_layer(True, activation=F.silu))
    ),
    "encoder": Example(
        lambda: nn.TransformerEncoder(encoder_layer(True), 2, enable_nested_tensor=False)
    ),
    "decoder layer, norm first": Example(lambda: decoder_layer(True), MEMORY),
    "decoder layer, norm last": Example(lambda: decoder_layer(False), MEMORY),
    "sequential": Example(
        lambda: nn.Sequential(nn.RMSNorm(HIDDEN), FeedForward(), ScaleNorm(), FeedForward()),
        fused=(("0", "1"), ("2", "3")),
        pairs=(("0", "1"), ("1", "2"), ("2", "3")),
    ),
    "sequential in sequential": Example(
        lambda: stack(lambda: nn.Sequential(nn.RMSNorm(HIDDEN), PackedSwiGLU())),
        fused=(("0.0", "0.1"), ("1.0", "1.1")),
        pairs=(("*.0", "*.1"),),
    ),
    "attentions": Example(
        SiblingAttentions, MEMORY, fused=(("norm3", "mlp"),), pairs=(("norm3", "mlp"),)
    ),
    "timm, RMSNorm": Example(
        lambda: stack(lambda: ViTBlock(lambda: nn.RMSNorm(HIDDEN))),
        fused=(("0.norm2", "0.mlp"), ("1.norm2", "1.mlp")),
        pairs=(("*.norm2", "*.mlp"), ("*.mlp", "*.ls2")),
        refused={(f"{i}.norm1", f"{i}.attn"): ATTENTION for i in "01"},
    ),
    "timm, LayerNorm": Example(
        lambda: stack(lambda: ViTBlock(lambda: nn.LayerNorm(HIDDEN))),
        refused={
            **{(f"{i}.norm1", f"{i}.attn"): ATTENTION for i in "01"},
            **{(f"{i}.norm2", f"{i}.mlp"): LAYER_NORM for i in "01"},
        },
        pairs=(("*.norm2", "*.mlp"),),
    ),
    "diffusers, modulated": Example(AdaLNBlock, (2, HIDDEN)),
    "diffusers, modulated by a setting": Example(
        lambda: NormTypeBlock("ada_norm_single"),
        fused=(("norm2", "ff"),),
        why_members="the output of 'norm' was changed",
    ),
    "diffusers, not modulated": Example(
        lambda: NormTypeBlock("layer_norm"), fused=(("norm2", "ff"),), pairs=(("norm2", "ff"),)
    ),
    "pairs in a list": Example(
        LayerPairs,
        fused=(("layers.1.0", "layers.1.1"), ("layers.3.0", "layers.3.1")),
        pairs=(("layers.1.0", "layers.1.1"),),
        refused={(f"layers.{i}.0", f"layers.{i}.1"): ATTENTION for i in "02"},
    ),
    "triples in a list": Example(
        Triples,
        fused=(("layers.0.1", "layers.0.2"), ("layers.1.1", "layers.1.2")),
        pairs=(("layers.*.1", "layers.*.2"),),
    ),
}
examples = pytest.mark.parametrize("name", EXAMPLES)


def built(name: str) -> Built:
    """The model in eval mode, with inputs by name."""
    example = EXAMPLES[name]
    torch.manual_seed(0)
    model = perturbed(example.make())
    shapes = [(2, TOKENS, HIDDEN), *([example.second] if example.second else [])]
    takes = list(check.forward_signature(type(model)).parameters)
    values = [torch.randn(shape) for shape in shapes]
    return Built(model, dict(zip(takes, values, strict=False)), "all")


@pytest.mark.filterwarnings("ignore")
@examples
def test_every_pair_and_every_family_changes_no_bit_and_is_undone_exactly(name: str) -> None:
    model = built(name)
    found = check.check(model, expectation(model), FOREVER)
    assert found["faults"] == []
    assert found["no_gradients"] is None
    assert len(found["pairs"]) == found["of_pairs"] > 0
    on_kernel = {tuple(row["pair"]) for row in found["pairs"] if row["outcome"] == "kernel"}
    assert set(EXAMPLES[name].pairs) <= on_kernel


@examples
def test_fuse_finds_the_rms_norm_and_gated_mlp_alone_and_runs_its_kernel(name: str) -> None:
    example, (model, inputs, *_) = EXAMPLES[name], built(name)
    expected = model(**inputs)
    result = fuse(model)
    skipped = {group.paths: str(group.reason) for group in result.skipped}
    assert {group.paths for group in result.fused} == set(example.fused)
    assert skipped.keys() == example.refused.keys()
    for paths, reason in example.refused.items():
        assert reason in skipped[paths]
    torch.testing.assert_close(model(**inputs), expected)
    ran = [(group.kernel_calls, group.member_calls) for group in report(model).groups]
    assert ran == [(0, 1) if example.why_members else (1, 0)] * len(example.fused)
    for group in report(model).groups:
        assert str(group.reason or "").startswith(example.why_members)


@examples
def test_the_count_of_norms_before_gated_mlps_agrees_with_what_fuse_finds(name: str) -> None:
    example = EXAMPLES[name]
    there = set() if example.why_members else set(example.fused)
    assert set(discover.norms_before_mlps(built(name))) == there


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fast_path_of_an_encoder_layer_reads_the_weights_and_calls_no_member(
    norm_first: bool,
) -> None:
    torch.manual_seed(0)
    model = perturbed(stack(lambda: encoder_layer(norm_first)))
    x = torch.randn(2, TOKENS, HIDDEN)
    with torch.no_grad():
        fast = model(x)
    slow = model(x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, ["*.dropout", "*.linear2"], kernel="Kernel")
    with torch.no_grad():
        assert torch.equal(model(x), fast)
    assert [(g.kernel_calls, g.member_calls) for g in report(model).groups] == [(0, 0)] * 2
    assert torch.equal(model(x), slow)
    assert [g.kernel_calls + g.member_calls for g in report(model).groups] == [1, 1]


class ParallelAttention(nn.Module):
    """Attention and MLP both take what the norm gives."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = ScaleNorm(), attention, FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            return x + self.attention(h, h, h, need_weights=False)[0] + self.mlp(h)
        padding = torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[TOKENS], [TOKENS - 2]])
        return x + self.attention(h, src_key_padding_mask=padding) + self.mlp(h)


@pytest.mark.parametrize(
    "attention",
    [
        lambda: nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True),
        lambda: encoder_layer(True),
        lambda: nn.TransformerEncoder(encoder_layer(False), 1),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_attention_of_torch_that_takes_another_way_for_captured_outputs_gets_none(
    attention: Kind,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(perturbed(ParallelAttention(attention())))
    x = torch.randn(2, TOKENS, HIDDEN)
    with torch.no_grad():
        expected = model(x)
        with mapped(Kernel=members_kernel(1)):
            fuse_modules(model, ["*.norm", "*.mlp"], kernel="Kernel")
        assert torch.equal(model(x), expected)
    group = report(model).groups[0]
    assert (group.kernel_calls, group.member_calls) == (0, 1)
    assert "computes in another way then" in str(group.reason)


def attended(block: Any, x: Tensor) -> Tensor:
    output: Tensor = block.attention(x, x, x, need_weights=False)[0]
    return output


class AttendsFirst(nn.Module):
    """The attention is called before the norm, and gets the norm's output in another way too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.norm, self.mlp = ScaleNorm(), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention(x, x, x, need_weights=False)[0]
        h = self.norm(x + a)
        return a + self.mlp(h) + self.again(h)

    def again(self, h: Tensor) -> Tensor:
        return attended(self, h)


class AttendsByAlias(AttendsFirst):
    def forward(self, x: Tensor) -> Tensor:
        me = self
        a = self.attention(x, x, x, need_weights=False)[0]
        h = self.norm(x + a)
        return a + self.mlp(h) + attended(me, h)


class AttendsByName(AttendsFirst):
    def forward(self, x: Tensor) -> Tensor:
        a = self.attention(x, x, x, need_weights=False)[0]
        h = self.norm(x + a)
        attention = self._modules["attention"]
        return a + self.mlp(h) + attention(h, h, h, need_weights=False)[0]


class AttendsWhenCalledAgain(AttendsFirst):
    def forward(self, x: Tensor, last: bool = False) -> Tensor:
        a = self.attention(x, x, x, need_weights=False)[0]
        h = self.norm(x + a)
        return h if last else a + self.mlp(h) + self(h, True)


class AttendsToWhatWasKept(AttendsFirst):
    kept = None

    def forward(self, x: Tensor) -> Tensor:
        p = x if self.kept is None else self.kept
        a = self.attention(p, p, p, need_weights=False)[0]
        self.kept = h = self.norm(x + a)
        return a + self.mlp(h)


@pytest.mark.parametrize(
    "block",
    [AttendsFirst, AttendsByAlias, AttendsByName, AttendsWhenCalledAgain, AttendsToWhatWasKept],
)
@pytest.mark.filterwarnings("ignore")
def test_attention_that_is_called_first_and_again_takes_the_same_way(block: Kind) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(perturbed(block()))
    x = torch.randn(2, TOKENS, HIDDEN)
    with torch.no_grad():
        expected = [model(x), model(x)]
        model[0].kept = None
        with mapped(Kernel=members_kernel(1)):
            fuse_modules(model, ["*.norm", "*.mlp"], kernel="Kernel")
        assert all(map(torch.equal, [model(x), model(x)], expected))
        model[0].kept = None


class AttendsBefore(AttendsFirst):
    def forward(self, x: Tensor) -> Tensor:
        a = self.attention(x, x, x, need_weights=False)[0]
        return a + self.mlp(self.norm(x + a))


def test_attention_that_is_called_first_alone_leaves_the_kernel_in_place() -> None:
    model = nn.Sequential(perturbed(AttendsBefore()))
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, ["*.norm", "*.mlp"], kernel="Kernel")
    model(torch.randn(2, TOKENS, HIDDEN))
    assert [(g.kernel_calls, g.member_calls) for g in report(model).groups] == [(1, 0)]


class Asking(nn.Module):
    """A module of somebody's own that asks what the attention of torch asks."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if not torch.overrides.has_torch_function((x,)) else x * 3


def test_other_code_that_asks_has_torch_function_gets_no_captured_output() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.asking, self.mlp = ScaleNorm(), Asking(), FeedForward()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.mlp(h) + self.asking(h)

    model, x = nn.Sequential(perturbed(Block())), torch.randn(2, TOKENS, HIDDEN)
    expected = model(x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, ["*.norm", "*.mlp"], kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert "Asking.forward asks has_torch_function(...)" in str(report(model).groups[0].reason)


@pytest.mark.filterwarnings("ignore")
def test_a_vision_transformer_of_timm_has_its_patch_embedding_on_the_kernel() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = others.build("timm/vit_tiny_patch16_224")
    found = check.check(model, expectation(model), FOREVER)
    assert found["faults"] == []
    assert len(found["pairs"]) == found["of_pairs"] > 0
    on_kernel = [group["paths"] for group in found["groups"] if group["outcome"] == "kernel"]
    assert on_kernel == [["patch_embed.proj"]]
    assert discover.patch_embeddings(model) == ["patch_embed.proj"]
