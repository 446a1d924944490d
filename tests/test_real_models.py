"""Architectures of transformers: whatever pair of siblings is fused, nothing changes.

Every ordered pair (norm-like, MLP-like) of children of one parent is fused, in every repeated
block, whether the second really follows the first or not: parallel blocks, post-norm blocks and
pairs with attention between them must notice by themselves that the kernel may not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from support import mapped, members_kernel, runs
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from module_fusion import SpecMismatchError, fuse_modules, report, unfuse_modules
from module_fusion.seat import FusedKernel
from module_fusion.spec import forward_signature, infer_specs, make_plan

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
VOCABULARY, HIDDEN, HEADS, INTERMEDIATE, LAYERS, POSITIONS = 64, 32, 4, 48, 2, 64
BATCH, TOKENS, NEW_TOKENS = 2, 6, 8
IMAGE, PATCH = 16, 4

# Token ids outside the small vocabulary are errors in transformers; no end of sequence, so that
# every generation has the same length.
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, **SIZES, **IDS}
DENSE = {"intermediate_size": INTERMEDIATE, **TEXT}
GROUPED = {"num_key_value_heads": 2, **DENSE}
SHORT = {"vocab_size": VOCABULARY, "n_layer": LAYERS, "n_head": HEADS, **IDS}
GPT = {"n_embd": HIDDEN, "n_positions": POSITIONS, "n_inner": INTERMEDIATE, **SHORT}

Pair = tuple[str, str]
Inputs = dict[str, Tensor]


def token_ids() -> Inputs:
    """Inputs of a language model: ids (batch, tokens)."""
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)}


def pixels() -> Inputs:
    """Inputs of ViT: an image (batch, channels, height, width)."""
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)}


def patches() -> Inputs:
    """Inputs of the Qwen2-VL tower: flat patches (patches, channels * time * height * width)."""
    generator = torch.Generator().manual_seed(2)
    side = IMAGE // PATCH
    return {
        "hidden_states": torch.randn(BATCH * side**2, 3 * 2 * PATCH**2, generator=generator),
        "grid_thw": torch.tensor([[1, side, side]] * BATCH),
    }


@dataclass(frozen=True)
class Architecture:
    """A model class with a tiny config.

    `adjacent` lists the pairs whose second member takes exactly what the first returns, as
    "parent.norm mlp". `refused` gives the reason for those the kernel must not have.
    """

    model: type[hf.PreTrainedModel]
    config: Callable[..., hf.PreTrainedConfig]
    sizes: dict[str, Any]
    adjacent: tuple[str, ...] = ()
    refused: str | None = None
    inputs: Callable[[], Inputs] = token_ids

    def adjacent_pairs(self) -> list[Pair]:
        return [as_pair(text) for text in self.adjacent]


def as_pair(text: str) -> Pair:
    norm, mlp = text.split()
    parent, _, _ = norm.rpartition(".")
    return norm, f"{parent}.{mlp}"


BEFORE_MLP = ("model.layers.*.post_attention_layernorm mlp",)
BEFORE_MLP_GEMMA = ("model.layers.*.pre_feedforward_layernorm mlp",)
BEFORE_MLP_NEOX = ("gpt_neox.layers.*.post_attention_layernorm mlp",)
BEFORE_MLP_H = ("transformer.h.*.post_attention_layernorm mlp",)

ARCHITECTURES = {
    "llama": Architecture(hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED, BEFORE_MLP),
    "qwen3": Architecture(
        hf.Qwen3ForCausalLM, hf.Qwen3Config, {**GROUPED, "head_dim": 8}, BEFORE_MLP
    ),
    "mistral": Architecture(hf.MistralForCausalLM, hf.MistralConfig, GROUPED, BEFORE_MLP),
    "gemma2": Architecture(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, {**GROUPED, "head_dim": 8}, BEFORE_MLP_GEMMA
    ),
    "gemma3": Architecture(
        hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**GROUPED, "head_dim": 8}, BEFORE_MLP_GEMMA
    ),
    "phi": Architecture(hf.PhiForCausalLM, hf.PhiConfig, {**DENSE, "qk_layernorm": True}),
    "phi3": Architecture(hf.Phi3ForCausalLM, hf.Phi3Config, GROUPED, BEFORE_MLP),
    "olmo2": Architecture(hf.Olmo2ForCausalLM, hf.Olmo2Config, GROUPED),
    "gpt2": Architecture(hf.GPT2LMHeadModel, hf.GPT2Config, GPT, ("transformer.h.*.ln_2 mlp",)),
    "gptj": Architecture(hf.GPTJForCausalLM, hf.GPTJConfig, {**GPT, "rotary_dim": 4}),
    "gpt_neox": Architecture(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, DENSE, BEFORE_MLP_NEOX),
    "gpt_neox_sequential": Architecture(
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig,
        {**DENSE, "use_parallel_residual": False},
        BEFORE_MLP_NEOX,
    ),
    "falcon": Architecture(hf.FalconForCausalLM, hf.FalconConfig, TEXT),
    "falcon_sequential": Architecture(
        hf.FalconForCausalLM, hf.FalconConfig, {**TEXT, "parallel_attn": False}, BEFORE_MLP_H
    ),
    "falcon_two_norms": Architecture(
        hf.FalconForCausalLM,
        hf.FalconConfig,
        {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2},
        ("transformer.h.*.ln_mlp mlp",),
    ),
    "bloom": Architecture(
        hf.BloomForCausalLM, hf.BloomConfig, {**SHORT, "hidden_size": HIDDEN}, BEFORE_MLP_H
    ),
    "bloom_norm_as_residual": Architecture(
        hf.BloomForCausalLM,
        hf.BloomConfig,
        {**SHORT, "hidden_size": HIDDEN, "apply_residual_connection_post_layernorm": True},
        BEFORE_MLP_H,
        refused="deferred output",
    ),
    "mpt": Architecture(
        hf.MptForCausalLM,
        hf.MptConfig,
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_seq_len": POSITIONS,
            **IDS,
        },
        ("transformer.blocks.*.norm_2 ffn",),
    ),
    "persimmon": Architecture(
        hf.PersimmonForCausalLM, hf.PersimmonConfig, {**DENSE, "qk_layernorm": True}, BEFORE_MLP
    ),
    "cohere": Architecture(hf.CohereForCausalLM, hf.CohereConfig, GROUPED),
    "mixtral": Architecture(
        hf.MixtralForCausalLM,
        hf.MixtralConfig,
        {**GROUPED, "num_local_experts": 4},
        BEFORE_MLP,
        # It adds up what its experts return in place.
        refused="may write to a tensor",
    ),
    "bert": Architecture(hf.BertForMaskedLM, hf.BertConfig, DENSE),
    "vit": Architecture(
        hf.ViTModel,
        hf.ViTConfig,
        {**SIZES, "intermediate_size": INTERMEDIATE, "image_size": IMAGE, "patch_size": PATCH},
        ("layers.*.layernorm_after mlp",),
        inputs=pixels,
    ),
    "qwen2_vl_vision": Architecture(
        Qwen2VisionTransformerPretrainedModel,
        Qwen2VLVisionConfig,
        {
            "depth": LAYERS,
            "embed_dim": HIDDEN,
            "hidden_size": HIDDEN,
            "num_heads": HEADS,
            "patch_size": PATCH,
        },
        ("blocks.*.norm2 mlp",),
        inputs=patches,
    ),
}

MLP_LIKE = re.compile("mlp|ffn|feed|intermediate|moe|dense|expert", re.IGNORECASE)


def sibling_pairs(model: nn.Module) -> list[Pair]:
    """Every (norm-like, MLP-like) pair of children of one parent, block numbers as `*`."""
    pairs = {}
    for path, parent in model.named_modules():
        prefix = re.sub(r"\b\d+\b", "*", f"{path}." if path else "")
        for norm, first in parent.named_children():
            for mlp, second in parent.named_children():
                is_norm = "norm" in type(first).__name__.lower()
                if is_norm and norm != mlp and MLP_LIKE.search(f"{mlp} {type(second).__name__}"):
                    pairs[f"{prefix}{norm}", f"{prefix}{mlp}"] = None
    return list(pairs)


def runs_backwards(model: nn.Module, pair: Pair) -> bool:
    """Whether fusing the pair is refused, because its modules run in the other order."""
    try:
        fuse_modules(model, list(pair))
    except SpecMismatchError as error:
        return "in the order in which they run" in str(error)
    unfuse_modules(model)
    return False


def pairs_of_all(backwards: bool) -> Iterator[Any]:
    """The pairs of every architecture; a model on the meta device costs no memory or time."""
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            model = architecture.model(architecture.config(**architecture.sizes))
        for norm, mlp in sibling_pairs(model):
            if runs_backwards(model, (norm, mlp)) == backwards:
                yield pytest.param(name, (norm, mlp), id=f"{name}-{norm}-{mlp.rpartition('.')[2]}")


PAIRS = list(pairs_of_all(backwards=False))
BACKWARDS = list(pairs_of_all(backwards=True))
CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.model.can_generate()]

# An output that is materialised after its siblings ran enters the graph of autograd later than
# it did unfused, so the gradients of a shared input are summed in another order.
SUMMED_IN_ANOTHER_ORDER = [
    ("falcon_two_norms", ("transformer.h.*.ln_attn", "transformer.h.*.mlp")),
    ("falcon_two_norms", ("transformer.h.*.ln_attn", "transformer.h.*.ln_mlp")),
]
# The norm's output is the MLP's input and the next residual, and the two have different parents.
POST_NORM = ("bert.encoder.layer.*.attention.output.LayerNorm", "bert.encoder.layer.*.intermediate")


@pytest.mark.parametrize(("name", "pair"), BACKWARDS)
def test_a_pair_that_is_refused_as_backwards_does_run_in_the_other_order(
    name: str, pair: Pair
) -> None:
    model = build(name)
    calls: list[str] = []
    for path in pair:
        module = model.get_submodule(path.replace("*", "0"))
        module.register_forward_pre_hook(lambda module, args, path=path: calls.append(path))
    outputs(model, inputs_of(name, model))
    assert calls == [pair[1], pair[0]]


def build(name: str, device: str = "cpu", dropout: float | None = None) -> nn.Module:
    """A model with random weights, in eval mode; norms and biases are not ones and zeros."""
    architecture = ARCHITECTURES[name]
    config = architecture.config(**architecture.sizes)
    if dropout is not None:
        for key, value in vars(config).items():
            if "drop" in key and isinstance(value, (int, float)):
                setattr(config, key, dropout)
    torch.manual_seed(0)
    model = architecture.model(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval().to(device)


def inputs_of(name: str, model: nn.Module) -> Inputs:
    """Inputs on the model's device, real numbers in its dtype."""
    parameter = next(model.parameters())
    return {
        key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for key, value in ARCHITECTURES[name].inputs().items()
    }


def outputs(model: nn.Module, inputs: Inputs, **options: Any) -> list[Tensor]:
    """Every tensor the model returns: logits or hidden states, and what it recorded."""
    found: list[Tensor] = []
    for value in model(**inputs, **options).values():
        values = value if isinstance(value, tuple) else [value]
        found.extend(item for item in values if isinstance(item, Tensor))
    assert found
    # Infinities and NaNs would hide what differs before them.
    assert all(value.isfinite().all() for value in found)
    return found


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    """The gradient of every parameter, for a loss in which every output element counts."""
    model.zero_grad(set_to_none=True)
    total = sum(
        (value * torch.linspace(-1, 1, value.numel()).view(value.shape).to(value)).sum()
        for value in outputs(model, inputs)
    )
    total.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert any(gradient is not None and gradient.any() for gradient in found.values())
    return found


def same_bits(first: Any, second: Any) -> bool:
    """Whether two tensors, or all tensors in two lists or dicts, have the same bits."""
    if isinstance(first, dict):
        return list(first) == list(second) and same_bits([*first.values()], [*second.values()])
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_bits, first, second))
    if first is None or second is None:
        return first is second
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    as_bytes = [
        tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (first, second)
    ]
    return torch.equal(*as_bytes)


def assert_same_to_rounding(
    found: dict[str, Tensor | None], expected: dict[str, Tensor | None]
) -> None:
    """Compare gradients that were summed in another order.

    That moves each by a few times the precision of the largest; a lost term, by its own size.
    """
    known = {name: gradient for name, gradient in expected.items() if gradient is not None}
    assert known.keys() == {name for name, gradient in found.items() if gradient is not None}
    largest = max(gradient.abs().max() for gradient in known.values())
    for name, gradient in known.items():
        error = (found[name] - gradient).abs().max()
        assert error <= 100 * torch.finfo(gradient.dtype).eps * largest, name


def kernel_for(model: nn.Module, pair: Pair) -> type[nn.Module]:
    """A kernel that runs the members of this pair themselves."""
    paths = [path.replace("*", "0") for path in pair]
    signatures = [forward_signature(type(model.get_submodule(path))) for path in paths]
    plan = make_plan(signatures, infer_specs(signatures), paths)
    return members_kernel(len(plan.signature.parameters))


@contextmanager
def fused_with_kernel(model: nn.Module, pair: Pair) -> Iterator[type[nn.Module]]:
    """The pair fused inside, with a kernel in every block's seat."""
    kernel = kernel_for(model, pair)
    with mapped(MembersKernel=kernel):
        fuse_modules(model, list(pair), kernel="MembersKernel")
    assert all(group.path == "kernel" for group in report(model).fused)
    yield kernel
    unfuse_modules(model)


def one_pair(name: str) -> Pair:
    """An adjacent pair of the architecture, or else a pair of siblings."""
    adjacent = ARCHITECTURES[name].adjacent_pairs()
    if name == "bert":
        return POST_NORM
    return adjacent[0] if adjacent else next(p.values[1] for p in PAIRS if p.values[0] == name)


def has_kernel(name: str, pair: Pair) -> bool:
    """Whether the kernel runs: the pair is adjacent, and nothing forbids it."""
    architecture = ARCHITECTURES[name]
    return pair in architecture.adjacent_pairs() and architecture.refused is None


pytestmark = pytest.mark.usefixtures("one_thread")


devices = pytest.mark.parametrize("device", DEVICES)
architectures = pytest.mark.parametrize("name", ARCHITECTURES)
pairs = pytest.mark.parametrize(("name", "pair"), PAIRS)


@architectures
def test_every_architecture_has_siblings_and_lists_its_adjacent_ones_among_them(name: str) -> None:
    siblings = [param.values[1] for param in PAIRS + BACKWARDS if param.values[0] == name]
    assert siblings
    assert set(ARCHITECTURES[name].adjacent_pairs()) <= set(siblings)


@devices
@pairs
def test_outputs_have_the_same_bits_fused_with_or_without_kernel_and_unfused_again(
    name: str, pair: Pair, device: str
) -> None:
    model = build(name, device)
    inputs = inputs_of(name, model)
    expected = outputs(model, inputs)
    fuse_modules(model, list(pair))
    assert same_bits(outputs(model, inputs), expected)
    unfuse_modules(model)
    with fused_with_kernel(model, pair):
        assert same_bits(outputs(model, inputs), expected)
    assert same_bits(outputs(model, inputs), expected)


@devices
@pairs
def test_gradients_have_the_same_bits_fused_with_or_without_kernel_and_unfused_again(
    name: str, pair: Pair, device: str
) -> None:
    model = build(name, device)
    inputs = inputs_of(name, model)
    expected = gradients(model, inputs)
    fuse_modules(model, list(pair))
    assert same_bits(gradients(model, inputs), expected)
    unfuse_modules(model)
    with fused_with_kernel(model, pair) as kernel:
        found = gradients(model, inputs)
    assert (name, pair) in SUMMED_IN_ANOTHER_ORDER or same_bits(found, expected)
    assert runs(kernel) == (LAYERS if has_kernel(name, pair) else 0)
    assert same_bits(gradients(model, inputs), expected)


@devices
@pytest.mark.parametrize(("name", "pair"), [*SUMMED_IN_ANOTHER_ORDER, ("bert", POST_NORM)])
def test_gradients_summed_in_another_order_differ_by_rounding_alone(
    name: str, pair: Pair, device: str
) -> None:
    model = build(name, device).double()
    inputs = inputs_of(name, model)
    expected = gradients(model, inputs)
    with fused_with_kernel(model, pair):
        found = gradients(model, inputs)
    assert_same_to_rounding(found, expected)


@devices
@pairs
def test_training_with_dropout_draws_the_same_random_numbers(
    name: str, pair: Pair, device: str
) -> None:
    model = build(name, device, dropout=0.1).train()
    inputs = inputs_of(name, model)

    def step() -> tuple[list[Tensor], dict[str, Tensor | None]]:
        torch.manual_seed(3)
        values = outputs(model, inputs)
        torch.manual_seed(3)
        return values, gradients(model, inputs)

    expected = step()
    with fused_with_kernel(model, pair):
        values, found = step()
    assert same_bits(values, expected[0])
    assert (name, pair) in SUMMED_IN_ANOTHER_ORDER or same_bits(found, expected[1])


@devices
@pairs
def test_state_dict_keeps_keys_order_and_bits(name: str, pair: Pair, device: str) -> None:
    model = build(name, device)
    inputs = inputs_of(name, model)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    fuse_modules(model, list(pair))
    assert same_bits(dict(model.state_dict()), expected)
    unfuse_modules(model)
    with fused_with_kernel(model, pair):
        outputs(model, inputs)
        assert same_bits(dict(model.state_dict()), expected)
    assert same_bits(dict(model.state_dict()), expected)


@devices
@pairs
def test_the_kernel_runs_in_every_block_where_the_pair_is_adjacent_and_nowhere_else(
    name: str, pair: Pair, device: str
) -> None:
    model = build(name, device)
    inputs = inputs_of(name, model)
    calls = 3
    with fused_with_kernel(model, pair) as kernel:
        blocks = len(report(model).fused)
        for _ in range(calls):
            outputs(model, inputs)
        groups = report(model).fused
    if has_kernel(name, pair):
        assert runs(kernel) == LAYERS * calls == blocks * calls
        assert all((g.kernel_calls, g.member_calls) == (calls, 0) for g in groups)
    else:
        assert runs(kernel) == 0
        assert all((g.kernel_calls, g.member_calls) == (0, calls) for g in groups)
        assert all(group.reason for group in groups)


@pytest.mark.parametrize("name", [n for n, found in ARCHITECTURES.items() if found.refused])
def test_the_report_says_why_an_adjacent_pair_ran_without_the_kernel(name: str) -> None:
    model = build(name)
    (pair,) = ARCHITECTURES[name].adjacent_pairs()
    with fused_with_kernel(model, pair):
        outputs(model, inputs_of(name, model))
        reasons = [str(group.reason) for group in report(model).fused]
    assert len(reasons) == LAYERS
    assert all(str(ARCHITECTURES[name].refused) in reason for reason in reasons)


@devices
def test_members_of_different_parents_run_the_kernel_and_keep_the_residual(device: str) -> None:
    model = build("bert", device)
    inputs = inputs_of("bert", model)
    expected = outputs(model, inputs)
    with fused_with_kernel(model, POST_NORM) as kernel:
        assert same_bits(outputs(model, inputs), expected)
        assert runs(kernel) == LAYERS


@devices
@architectures
def test_recorded_hidden_states_have_the_same_bits(name: str, device: str) -> None:
    model = build(name, device)
    inputs = inputs_of(name, model)
    options: dict[str, Any] = {"output_hidden_states": True}
    if name == "mixtral":
        options["output_router_logits"] = True
    expected = outputs(model, inputs, **options)
    assert len(expected) > LAYERS
    with fused_with_kernel(model, one_pair(name)):
        assert same_bits(outputs(model, inputs, **options), expected)
    assert same_bits(outputs(model, inputs, **options), expected)


@devices
@pytest.mark.parametrize("kernel", [None, "MembersKernel"])
def test_hidden_states_that_a_member_itself_records_are_all_there(
    kernel: str | None, device: str
) -> None:
    """The base model and the head are a chain; the record is looked up by the model's class."""
    model = build("llama", device)
    inputs = inputs_of("llama", model)
    options: dict[str, Any] = {"output_hidden_states": True}
    fuse_modules(model, ["model", "lm_head"], kernel=kernel)
    found = outputs(model, inputs, **options)
    unfuse_modules(model)
    expected = outputs(model, inputs, **options)
    assert len(expected) > LAYERS
    assert same_bits(found, expected)


def generated(model: nn.Module, inputs: Inputs, cache: str) -> list[Tensor]:
    """Tokens (batch, tokens + new tokens), and the logits of each step."""
    result = model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        cache_implementation=cache,
        # A static cache would compile the decoding step; this is about the cache alone.
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert result.sequences.shape == (BATCH, TOKENS + NEW_TOKENS)
    return [result.sequences, *result.logits]


@devices
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate_gives_the_same_tokens_and_logits(name: str, cache: str, device: str) -> None:
    model = build(name, device)
    inputs = inputs_of(name, model)
    pair = one_pair(name)
    expected = generated(model, inputs, cache)
    with fused_with_kernel(model, pair) as kernel:
        assert same_bits(generated(model, inputs, cache), expected)
        assert runs(kernel) == (LAYERS * NEW_TOKENS if has_kernel(name, pair) else 0)
    assert same_bits(generated(model, inputs, cache), expected)


def compiled(model: nn.Module) -> tuple[nn.Module, list[torch.fx.GraphModule]]:
    """The model compiled into one graph, and the list of graphs that its calls will fill."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend), graphs


def seats_in(graph: torch.fx.GraphModule) -> int:
    """In how many kernel's seats something of the graph is computed."""
    stacks = [node.meta.get("nn_module_stack", {}) for node in graph.graph.nodes]
    frames = [frame for stack in stacks for frame in stack.values()]
    return len({path for path, cls in frames if issubclass(cls, FusedKernel)})


@devices
@architectures
def test_compiled_into_one_graph_outputs_have_the_same_bits_and_gradients_the_same_value(
    name: str, device: str
) -> None:
    model = build(name, device)
    inputs = inputs_of(name, model)
    unfused, graphs = compiled(model)
    try:
        expected = outputs(unfused, inputs)
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
        pytest.skip(f"torch does not compile the unfused model: {str(error).splitlines()[0]}")
    expected_gradients = gradients(unfused, inputs)
    assert len(graphs) == 1
    with fused_with_kernel(model, one_pair(name)):
        fused, graphs = compiled(model)
        assert same_bits(outputs(fused, inputs), expected)
        # What autograd sums first is up to the graph, and the graph holds a copy more.
        assert_same_to_rounding(gradients(fused, inputs), expected_gradients)
        notes = [str(group.reason) for group in report(model).groups]
    (graph,) = graphs
    gave_up = any("compiled graphs run the members" in note for note in notes)
    # Seen with Falcon on torch 2.11 and transformers 5.17 only; the report tells it.
    assert not (gave_up and has_kernel(name, one_pair(name))) or name.startswith("falcon")
    runs_kernel = has_kernel(name, one_pair(name)) and not gave_up
    assert seats_in(graph) == (LAYERS if runs_kernel else 0)
