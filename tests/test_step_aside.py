"""What happens to the members of a built-in kernel after fusing, or before: the unfused result.

Each case changes a Llama in its own way. A twin that was never fused goes through the same, and
has to give the same bits wherever the members run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from module_fusion import fuse, fuse_modules, report, unfuse_modules

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mlp_of(model: nn.Module) -> Any:
    return next(m for m in model.modules() if m.__class__.__name__.endswith(("MLP", "MLP]")))


def add_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["gate_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def merge(model: Any) -> nn.Module:
    model.merge_adapter()
    return model


def unmerge(model: Any) -> nn.Module:
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def unload(model: Any) -> nn.Module:
    return model.unload()


def quantize(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, path: path.endswith("up_proj"))
    return model


def hook(model: nn.Module) -> nn.Module:
    mlp_of(model).up_proj.register_forward_hook(lambda module, args, output: output * 2)
    return model


def weight_norm(model: nn.Module) -> nn.Module:
    torch.nn.utils.parametrizations.weight_norm(mlp_of(model).down_proj)
    return model


def double(model: nn.Module) -> nn.Module:
    return model.double()


class Marked(Tensor):
    """A tensor subclass."""


def subclass(model: nn.Module) -> nn.Module:
    mlp = mlp_of(model)
    weight = mlp.gate_proj.weight.detach().as_subclass(Marked)
    mlp.gate_proj._parameters["weight"] = nn.Parameter(weight)
    return model


def forward_of_its_own(model: nn.Module) -> nn.Module:
    mlp = mlp_of(model)
    mlp.down_proj.forward = lambda x: nn.functional.linear(x, mlp.down_proj.weight) * 3
    return model


def export(model: nn.Module) -> nn.Module:
    mlp = mlp_of(model)
    x = torch.randn(2, 6, 64, device=mlp.down_proj.weight.device)
    mlp.down_proj = torch.export.export(mlp.down_proj, (x,)).module()
    return model


@dataclass(frozen=True)
class Case:
    """A change, and the reasons the report has to give.

    Args:
        after: where the change comes after fusing, None where the kernel runs; a part of it.
        already: where it is there before; the whole of it.
        before: another change, that is there before.
    """

    change: Callable[[nn.Module], nn.Module]
    after: str | None
    already: str | None = None
    before: Callable[[nn.Module], nn.Module] | None = None


BECAME_LORA = "mlp.gate_proj is a peft.tuners.lora.layer.Linear, was a torch.nn.modules.linear.Lin"
IS_LORA = (
    "mlp.gate_proj is a peft.tuners.lora.layer.Linear, which a kernel for the member may not know"
)
CASES = {
    "LoRA": Case(add_lora, BECAME_LORA, IS_LORA),
    "LoRA, merged": Case(lambda m: merge(add_lora(m)), BECAME_LORA, IS_LORA),
    "LoRA, merged and unmerged": Case(lambda m: unmerge(add_lora(m)), BECAME_LORA, IS_LORA),
    "LoRA, removed": Case(lambda m: unload(add_lora(m)), None),
    "LoRA, removed after fusing": Case(
        unload, f"Llama{IS_LORA.replace('mlp', 'MLP')}", None, add_lora
    ),
    "int8 weights": Case(
        quantize,
        "mlp.up_proj has a weight of type {weight}",
        "mlp.up_proj has a weight of type {weight}",
    ),
    "a hook": Case(hook, "mlp.up_proj has a hook", "mlp.up_proj has a hook"),
    "weight norm": Case(
        weight_norm,
        "mlp.down_proj is a ParametrizedLinear, was a Linear",
        "mlp.down_proj has a parametrization, which computes its weight at each use",
    ),
    "float64": Case(
        double,
        "mlp.gate_proj has a weight in torch.float64 on {device}; the kernel was chosen for "
        "torch.float32 on {device}, call kernelize again",
        "the weights are in torch.float64; the kernel takes torch.bfloat16, torch.float16, "
        "torch.float32",
    ),
    "a tensor subclass": Case(
        subclass,
        "mlp.gate_proj has a weight of type Marked",
        "mlp.gate_proj has a weight of type Marked",
    ),
    "a forward of its own": Case(
        forward_of_its_own,
        "mlp.down_proj has an instance-level forward",
        "a Linear has a forward of its own",
    ),
    "an exported layer": Case(
        export,
        "mlp.down_proj is a GraphModule, was a Linear",
        "mlp.down_proj is a graph, made by torch.fx or torch.export, which runs generated code",
    ),
}


def build(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(device)


def logits(model: nn.Module) -> Tensor:
    device = next(model.parameters()).device
    return model(torch.arange(12, device=device).view(2, 6)).logits


def groups(model: nn.Module) -> list[Any]:
    return list(report(model).groups)


def said(reason: str, model: nn.Module) -> str:
    """A reason with what depends on the machine and on the version of torchao."""
    weights = [p for name, p in model.named_parameters() if name.endswith("up_proj.weight")]
    names = [type(weight).__name__ for weight in weights]
    return reason.format(device=next(model.parameters()).device, weight=",".join(names))


@pytest.mark.parametrize("name", CASES)
def test_a_change_after_fusing_gives_what_it_gives_unfused_and_the_reason(
    device: str, name: str
) -> None:
    case = CASES[name]
    model, twin = build(device), build(device)
    if case.before is not None:
        model, twin = case.before(model), case.before(twin)
    fuse_modules(
        model,
        {"norm": "**.layers.*.post_attention_layernorm", "mlp": "**.layers.*.mlp"},
        kernel="RMSNormMLP",
    )
    model, twin = case.change(model), case.change(twin)
    got, expected = logits(model), logits(twin)
    (group,) = groups(model)
    if case.after is None:
        assert (group.kernel_calls, group.member_calls) == (1, 0)
        torch.testing.assert_close(got, expected)
    else:
        assert (group.kernel_calls, group.member_calls) == (0, 1)
        assert torch.equal(got, expected)
        assert said(case.after, model) in str(group.reason)
    unfuse_modules(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.already])
def test_what_is_there_already_is_not_fused_by_family(device: str, name: str) -> None:
    case = CASES[name]
    model, twin = case.change(build(device)), case.change(build(device))
    result = fuse(model, {"rms_norm_mlp": True})
    reason = said(str(case.already), model)
    assert [(g.action, g.reason) for g in result.groups] == [("skipped", reason)]
    assert torch.equal(logits(model), logits(twin))


def test_under_autocast_the_modules_run(device: str) -> None:
    model, twin = build(device), build(device)
    assert len(fuse(model).fused) == 1
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(twin))
    assert "autocast is on" in str(groups(model)[0].reason)


def test_training_a_lora_beside_the_kernel_gives_the_same_gradients(device: str) -> None:
    models = [build(device), build(device)]
    fuse(models[0])
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    found = []
    for model in models:
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, copy.deepcopy(config)).train()
        logits(adapted).float().sum().backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)
    assert groups(models[0])[0].kernel_calls == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two kinds of devices")
def test_a_weight_on_another_device_is_not_fused_by_family() -> None:
    model = build("cuda")
    mlp_of(model).gate_proj.to("cpu")
    result = fuse(model, {"rms_norm_mlp": True})
    assert [group.action for group in result.groups] == ["skipped"]
    assert result.groups[0].reason == "the weights are on several devices: cpu, cuda:0"
