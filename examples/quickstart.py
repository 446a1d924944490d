"""Fuse RMSNorm and MLP in every block of a Qwen3, check and measure it, and take it all back.

Run: python examples/quickstart.py
The model has random weights, so nothing is downloaded; its text is token numbers.
"""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from module_fusion import benchmark, fuse, report, unfuse_modules, verify


def build_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval()


def main() -> None:
    model = build_model()
    prompt = torch.arange(1, 9)[None]  # (batch, tokens)

    def generate() -> list[int]:
        tokens = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
        return tokens[0, prompt.shape[1] :].tolist()

    before = generate()
    print("Unfused:", before, "\n")

    print("What would be fused:\n")
    print(fuse(model, dry_run=True), "\n")

    fuse(model)
    while_fused = generate()
    print("Fused:  ", while_fused, "\n")
    print(report(model), "\n")
    print(model.model.layers[0].mlp, "\n")

    print("Fused against unfused, on these inputs:\n")
    verification = verify(model, prompt)
    print(verification, "\n")

    # The kernels are made for GPUs: where nothing gets faster, the report says what to expect.
    print(benchmark(model, prompt, seconds=2.0), "\n")

    unfuse_modules(model)
    after = generate()
    print("Unfused:", after, "\n")
    assert before == while_fused == after, "fusion changed a result"
    assert verification.passed, verification
    print("The same tokens fused and unfused, and the model is as it was.")


if __name__ == "__main__":
    main()
