"""Other libraries that change modules, before and after fusing: the result is the unfused one."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from structure import structure
from support import PATHS, Block, Model, WeightKernel, mapped, members_kernel, runs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from module_fusion import NotFusableError, UnfuseError, fuse_modules, report, unfuse_modules


def fuse(model: nn.Module, paths: list[str] = PATHS) -> None:
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, paths, kernel="Kernel")


def reason(model: nn.Module) -> str:
    return str(report(model).groups[0].reason)


def lora(model: nn.Module, target: str) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    return inject_adapter_in_model(config, model)


@pytest.mark.parametrize("target", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("fuse_first", [True, False])
def test_lora_on_a_linear_inside_a_member(
    model: Model, x: Tensor, target: str, fuse_first: bool
) -> None:
    twin = lora(copy.deepcopy(model), target)
    if fuse_first:
        fuse(model)
    model = lora(model, target)
    if not fuse_first:
        fuse(model)
    assert torch.equal(model(x), twin(x))
    if fuse_first:
        assert f"mlp.{target} is a peft.tuners.lora.layer.Linear, was a torch.nn" in reason(model)
    else:
        assert f"mlp.{target} is a peft.tuners.lora.layer.Linear, which a kernel" in reason(model)
    model(x).sum().backward()
    twin(x).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    for layer, other in zip(model.modules(), twin.modules(), strict=False):
        if hasattr(layer, "merge") and hasattr(other, "merge"):
            layer.merge()
            other.merge()
    assert torch.equal(model(x), twin(x))
    unfuse_modules(model)
    assert torch.equal(model(x), twin(x))
    assert list(model.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize("config", ["IA3Config", "OFTConfig", "HRAConfig", "FourierFTConfig"])
@pytest.mark.parametrize("fuse_again", [False, True])
def test_adapters_of_other_kinds_before_fusing_or_fusing_again(
    model: Model, x: Tensor, config: str, fuse_again: bool
) -> None:
    import peft

    options: dict[str, Any] = {"target_modules": ["up_proj"]}
    options |= {
        "IA3Config": {"feedforward_modules": [], "init_ia3_weights": False},
        "OFTConfig": {"r": 2, "oft_block_size": 0, "init_weights": False},
        "HRAConfig": {"r": 2, "init_weights": False},
        "FourierFTConfig": {"n_frequency": 8, "init_weights": False},
    }[config]

    def adapt(model: Any) -> Any:
        torch.manual_seed(2)
        return peft.inject_adapter_in_model(getattr(peft, config)(**options), model)

    twin = adapt(copy.deepcopy(model))
    if fuse_again:
        fuse(model)
    model = adapt(model)
    fuse(model)
    assert torch.equal(model(x), twin(x))
    assert report(model).groups[0].kernel_calls == 0


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_peft_layers_that_are_the_member_itself_before_fusing(model: Model, x: Tensor) -> None:
    import peft

    class Kernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mlp = self.mlp
            x = F.layer_norm(x, (8,), self.norm.weight, self.norm.bias)
            gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
            return F.linear(gate, mlp.down_proj.weight)

    for block in model.layers:
        block.norm = nn.LayerNorm(8, device=x.device)
    config = peft.LNTuningConfig(target_modules=["norm"])
    model = peft.inject_adapter_in_model(config, model)  # type: ignore[assignment, arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_tuning" in name:
                parameter.mul_(3)
    expected = model(x)
    with mapped(Kernel=Kernel):
        fuse_modules(model, PATHS, kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert "norm is a peft.tuners.ln_tuning.layer.LNTuningLayer, which a kernel" in reason(model)


def test_linears_that_transformers_quantizes_as_they_run(x: Tensor) -> None:
    from transformers import Qwen3Config
    from transformers.integrations.bitnet import AutoBitLinear
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    model = Model(1).to(x.device)
    mlp = model.layers[0].mlp = Qwen3MLP(Qwen3Config(hidden_size=8, intermediate_size=16))
    for name, child in list(mlp.named_children()):
        if isinstance(child, nn.Linear):
            sizes = (child.in_features, child.out_features)
            quantized = AutoBitLinear(*sizes, bias=False, online_quant=True)
            quantized.weight = child.weight
            setattr(mlp, name, quantized)
    model.to(x.device)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert "mlp.gate_proj is a transformers.integrations.bitnet.AutoBitLinear" in reason(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("with_kernel", [False, True])
def test_layers_of_transformers_are_checkpointed_as_before_with_the_right_gradients(
    device: str, use_reentrant: bool, with_kernel: bool
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device).train()
    tokens = torch.arange(6, device=device)[None]
    options = {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    twin = copy.deepcopy(model)
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        name = "Kernel" if with_kernel else None
        paths = ["**.layers.*.post_attention_layernorm", "**.layers.*.mlp"]
        fuse_modules(model, paths, kernel=name)
    counts: list[list[int]] = []
    for either in (model, twin):
        counts.append([])
        query = either.model.layers[0].self_attn.q_proj
        query.register_forward_hook(lambda *_, count=counts[-1]: count.append(1))
        either(tokens, labels=tokens).loss.backward()
    assert counts == [[1, 1], [1, 1]]
    assert runs(kernel) == (4 if with_kernel else 0)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    # What is hooked in the forward alone is run again without the kernel, as it ran.
    for either in (model, twin):
        either.zero_grad()
        hook = either.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        loss = either(tokens, labels=tokens).loss
        hook.remove()
        loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_peft_model_around_a_fused_model_and_fused_through_it(x: Tensor) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(x.device)
    tokens = torch.arange(6, device=x.device)[None]
    settings = LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    twin = get_peft_model(copy.deepcopy(base), settings)
    torch.manual_seed(1)
    wrapped = get_peft_model(base, settings)
    expected = twin(tokens).logits
    fuse_modules(wrapped, ["**.post_attention_layernorm", "**.mlp"])
    assert torch.equal(wrapped(tokens).logits, expected)
    with wrapped.disable_adapter(), twin.disable_adapter():
        assert torch.equal(wrapped(tokens).logits, twin(tokens).logits)
    merged = wrapped.merge_and_unload()
    assert torch.equal(merged(tokens).logits, twin.merge_and_unload()(tokens).logits)
    unfuse_modules(merged)
    assert not report(merged).groups


def test_accelerate_hooks_on_members_before_and_after_fusing(model: Model, x: Tensor) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Count(ModelHook):
        def __init__(self) -> None:
            self.calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    expected = model(x)
    hooks = [Count(), Count(), Count()]
    add_hook_to_module(model.layers[0].norm, hooks[0])
    fuse(model)
    add_hook_to_module(model.layers[0].mlp.up_proj, hooks[1])
    add_hook_to_module(model.layers[1].mlp, hooks[2])
    assert torch.equal(model(x), expected)
    assert [hook.calls for hook in hooks] == [1, 1, 1]
    assert [group.kernel_calls for group in report(model).groups] == [0, 0]
    remove_hook_from_module(model.layers[1].mlp)
    unfuse_modules(model)
    assert torch.equal(model(x), expected)
    assert [hook.calls for hook in hooks] == [2, 2, 1]


def test_accelerate_offload_loads_the_weights_it_moved_away(model: Model, x: Tensor) -> None:
    from accelerate import cpu_offload

    expected = model(x)
    fuse(model)
    cpu_offload(model, execution_device=x.device)
    assert torch.equal(model(x), expected)


def test_torchao_int8_weights_are_read_by_their_module(model: Model, x: Tensor) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    twin = copy.deepcopy(model)
    fuse(model)
    for quantized in (model, twin):
        quantize_(quantized, Int8WeightOnlyConfig())
    assert torch.equal(model(x), twin(x))
    assert "weight of type" in reason(model)
    unfuse_modules(model)
    assert torch.equal(model(x), twin(x))


Change = Callable[[Model], Any]
CHANGES: dict[str, Change] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m.layers[0].mlp.up_proj),
    "orthogonal": lambda m: parametrizations.orthogonal(m.layers[0].mlp.up_proj),
    "old weight_norm": lambda m: nn.utils.weight_norm(m.layers[0].mlp.up_proj),
    "prune": lambda m: prune.l1_unstructured(m.layers[0].mlp.up_proj, "weight", 0.5),
    "parametrized norm": lambda m: parametrize.register_parametrization(
        m.layers[0].norm, "weight", nn.Softplus()
    ),
    "parametrized mlp child": lambda m: parametrize.register_parametrization(
        m.layers[0].mlp.gate_proj, "weight", nn.Tanh()
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_parametrizations_and_pruning_after_fusing(model: Model, x: Tensor, change: str) -> None:
    twin = copy.deepcopy(model)
    fuse(model)
    torch.manual_seed(3)
    CHANGES[change](model)
    torch.manual_seed(3)
    CHANGES[change](twin)
    assert torch.equal(model(x), twin(x))
    assert report(model).groups[0].kernel_calls == 0
    if change == "parametrized norm":
        with pytest.raises(UnfuseError, match=r"Undo first what changed it"):
            unfuse_modules(model)
        parametrize.remove_parametrizations(model.layers[0].norm, "weight")
        parametrize.remove_parametrizations(twin.layers[0].norm, "weight")
    unfuse_modules(model)
    assert torch.equal(model(x), twin(x))


def test_a_parametrization_that_was_taken_off_again_leaves_the_kernel_running(x: Tensor) -> None:
    """It leaves the parameters in another order."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).to(x.device)
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(model, {"a": "0.0", "b": "0.1"}, kernel="Kernel")
    parametrize.register_parametrization(model[0][0], "weight", nn.Identity())
    parametrize.remove_parametrizations(model[0][0], "weight")
    assert list(model[0][0]._parameters) == ["bias", "weight"]
    model(x)
    assert runs(kernel) == 1


class Weighted(Block):
    """A parent with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.weight)


def test_a_parametrized_member_is_refused_and_a_parametrized_parent_passed_over(x: Tensor) -> None:
    """Removing a parametrization takes the module's class apart, which fusing would be in."""
    model = Model(1)
    model.layers[0] = Weighted()
    model.to(x.device)
    block: Any = model.layers[0]
    parametrize.register_parametrization(block.norm, "weight", nn.Softplus())
    before = structure(model)
    with pytest.raises(NotFusableError, match=r"'layers.0.norm' is parametrized itself"):
        fuse(model)
    assert structure(model) == before
    parametrize.remove_parametrizations(block.norm, "weight")
    parametrize.register_parametrization(block, "weight", nn.Softplus())
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert report(model).groups[0].kernel_calls == 1
    parametrize.remove_parametrizations(block, "weight")
    assert torch.equal(model(x), expected)
    unfuse_modules(model)
    assert type(block) is Weighted
    assert torch.equal(model(x), expected)


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("fuse_first", [True, False])
@pytest.mark.parametrize("unit", ["members", "blocks"])
def test_fully_shard_before_and_after_fusing(mesh: Any, fuse_first: bool, unit: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, x = Model(2), torch.randn(2, 3, 8)
    expected = model(x)
    if fuse_first:
        fuse(model)
    for block in model.layers:
        for sharded in [block] if unit == "blocks" else [block.norm, block.mlp]:
            fully_shard(sharded, mesh=mesh)
    if not fuse_first:
        fuse(model)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if fuse_first:
        with pytest.raises(UnfuseError, match="FSDP"):
            unfuse_modules(model)
    else:
        unfuse_modules(model)
    assert torch.equal(model(x), expected)


def test_tensor_parallel_members_run_themselves(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    model, x = Model(2), torch.randn(2, 3, 8)
    expected = model(x)
    fuse(model)
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    for block in model.layers:
        parallelize_module(block.mlp, mesh, {**plan, "down_proj": RowwiseParallel()})
    assert torch.equal(model(x), expected)
    assert [group.kernel_calls for group in report(model).groups] == [0, 0]


def test_ddp_around_a_fused_model_and_a_model_fused_inside(mesh: Any) -> None:
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model, x = Model(2), torch.randn(2, 3, 8)
    twin = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    fuse(model)
    wrapped(x).sum().backward()
    twin(x).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    fuse(wrapped, ["module.layers.*.norm", "module.layers.*.mlp"])
    assert torch.equal(wrapped(x), twin(x))


def test_a_class_patched_for_the_whole_process_after_fusing_is_what_runs(
    model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import Norm

    fuse(model)
    monkeypatch.setattr(Norm, "forward", lambda self, x: 2 * x)
    got = model(x)
    assert "whose forward was replaced" in reason(model)
    unfuse_modules(model)
    assert torch.equal(model(x), got)
