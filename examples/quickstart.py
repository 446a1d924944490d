"""Fuse norm and MLP in every block of a Qwen3, try a kernel on them, and take it all back.

Run: python examples/quickstart.py
The model has random weights, so nothing is downloaded; its text is token numbers.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from kernels import use_kernel_mapping
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from module_fusion import fuse_modules, fused, report, unfuse_modules

PATHS = ["model.layers.*.post_attention_layernorm", "model.layers.*.mlp"]
ROLES = dict(zip(["norm", "mlp"], PATHS, strict=True))


class RMSNormMLP(nn.Module):
    """A kernel for the two members together: their own arithmetic, on their own weights."""

    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        x = norm.weight * x.to(hidden_states.dtype)
        gate, up = F.linear(x, mlp.gate_proj.weight), F.linear(x, mlp.up_proj.weight)
        return F.linear(F.silu(gate) * up, mlp.down_proj.weight)


class FromThisFile:
    """A repository of the `kernels` library that needs no network."""

    def load(self) -> type[nn.Module]:
        return RMSNormMLP


def build_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval()


def generate(model: Qwen3ForCausalLM) -> list[int]:
    prompt = torch.arange(1, 9)[None]
    tokens = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return tokens[0, prompt.shape[1] :].tolist()


def cost_of_fusing(model: Qwen3ForCausalLM, rounds: int = 40) -> tuple[float, float]:
    """Median milliseconds of a forward pass, unfused and fused, measured in turns."""
    tokens = torch.arange(1, 9)[None]

    def once() -> float:
        start = time.perf_counter()
        model(tokens)
        return 1e3 * (time.perf_counter() - start)

    unfused_ms, fused_ms = [], []
    with torch.no_grad():
        for _ in range(rounds):
            unfused_ms.append(once())
            with fused(model, PATHS):
                fused_ms.append(once())
    return median(unfused_ms), median(fused_ms)


def main() -> None:
    model = build_model()
    before = generate(model)
    print("before: ", before)

    start = time.perf_counter()
    fuse_modules(model, PATHS)
    fusing_ms = 1e3 * (time.perf_counter() - start)
    while_fused = generate(model)
    print("fused:  ", while_fused)
    print(report(model), "\n")
    unfuse_modules(model)

    with use_kernel_mapping({"RMSNormMLP": {"cpu": FromThisFile()}}):
        fuse_modules(model, ROLES, kernel="RMSNormMLP")
    with_kernel = generate(model)
    print("kernel: ", with_kernel)
    print(report(model), "\n")
    print(model.model.layers[0], "\n")

    unfuse_modules(model)
    after = generate(model)
    print("unfused:", after)
    assert before == while_fused == with_kernel == after, "fusion changed a result"
    print("All four are the same tokens.")

    unfused_ms, fused_ms = cost_of_fusing(model)
    print(
        f"Fusing 4 blocks took {fusing_ms:.1f} ms. A forward pass of 8 tokens takes "
        f"{unfused_ms:.2f} ms unfused and {fused_ms:.2f} ms fused without a kernel, measured in "
        f"turns: {fused_ms / unfused_ms:.3f} times."
    )


if __name__ == "__main__":
    main()
