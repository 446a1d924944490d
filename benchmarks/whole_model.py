"""Whole models on a GPU, fused and not: tokens per second of `generate`, and the time of a prefill.

    python benchmarks/whole_model.py [--shapes 0.6B 1B] [--rounds 5]

Batch 1, bfloat16, random weights. `generate` is greedy, with a dynamic cache in eager mode, and
with a static cache, for which transformers compiles the decoding step. The variants take turns in
every round; a cell is the median.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial

import torch
from common import in_turn, machine, print_table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from module_fusion import fuse, report

PROMPT, NEW, PREFILL = 16, 64, 4096
MODELS: dict[str, Callable[[], nn.Module]] = {
    "0.6B": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
        )
    ),
    "1B": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
    ),
}  # fmt: skip


def generated(model: nn.Module, tokens: Tensor, cache: str) -> Tensor:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
    )


def seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def check_kernel_ran(model: nn.Module) -> None:
    for group in report(model).groups:
        if not group.kernel_calls or group.member_calls:
            raise RuntimeError(f"the kernel did not run: {group}")


@torch.no_grad()
def measured(shape: str, rounds: int) -> list[list[str]]:
    torch.manual_seed(0)
    torch.compiler.reset()
    with torch.device("cuda"):
        model = MODELS[shape]().to(torch.bfloat16).eval()
    models = {"HF eager": model, "ours": copy.deepcopy(model)}
    fuse(models["ours"])
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (1, PROMPT), device="cuda")
    rows = []
    for cache in ("dynamic", "static"):
        given = {name: generated(m, prompt, cache) for name, m in models.items()}
        same = int((given["HF eager"] == given["ours"]).cumprod(-1).sum()) - PROMPT
        timed = {
            name: partial(seconds, partial(generated, m, prompt, cache))
            for name, m in models.items()
        }
        times = in_turn(timed, rounds)
        rates = {name: NEW / t for name, t in times.items()}
        label = f"generate, {cache} cache, tokens/s"
        rows.append(
            [shape, label, f"{rates['HF eager']:.1f}", f"{rates['ours']:.1f}", "", "",
             f"{rates['ours'] / rates['HF eager']:.3f}", f"{same} of {NEW}"]
        )  # fmt: skip
        if cache == "dynamic":
            check_kernel_ran(models["ours"])
    prompt = torch.randint(vocabulary, (1, PREFILL), device="cuda")
    base = {name: m.model for name, m in models.items()}
    base |= {
        "torch.compile": torch.compile(base["HF eager"], dynamic=False),
        "ours, compiled": torch.compile(base["ours"], dynamic=False),
    }
    timed = {}
    for name, m in base.items():
        step = partial(m, prompt, use_cache=False)
        for _ in range(3):
            step()
        timed[name] = partial(seconds, step)
    times = {name: 1e3 * t for name, t in in_turn(timed, 4 * rounds).items()}
    ratio = times["HF eager"] / times["ours"]
    row = [shape, f"prefill of {PREFILL}, ms", *(f"{t:.2f}" for t in times.values())]
    return [*rows, [*row, f"{ratio:.3f}", ""]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    print(f"{torch.cuda.get_device_name()}\n")
    rows = [row for shape in arguments.shapes for row in measured(shape, arguments.rounds)]
    header = ["model", "", "HF eager", "ours", "torch.compile", "ours, compiled"]
    print_table([*header, "speed-up, eager", "same tokens"], rows, align=">")


if __name__ == "__main__":
    main()
