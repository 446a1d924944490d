"""Time of PatchEmbed against the convolution it replaces, and against a plain matrix product.

On a GPU against torch.compile of the convolution too.

    python benchmarks/patch_embed.py [cpu|cuda] [--save]

Candidates take turns; a cell is the median time of one call. On a GPU a call is a CUDA graph,
so that launches do not count, and inputs rotate through more memory than the L2 cache has.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import machine, print_table, saved
from torch import Tensor, nn

from module_fusion.kernels.patch_embed._geometry import PatchPlan
from module_fusion.kernels.patch_embed._torch import patches
from module_fusion.kernels.patch_embed.layers import PatchEmbed


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]
    patch: tuple[int, ...]
    channels: int
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16


GPU = [
    Case("Conv3d Qwen2-VL, 16,384 patches", (16384, 3, 2, 14, 14), (2, 14, 14), 1280, False),
    Case("Conv3d Qwen3-VL, 16,384 patches", (16384, 3, 2, 16, 16), (2, 16, 16), 1152),
    Case("Conv2d ViT-B/16, batch 128", (128, 3, 224, 224), (16, 16), 768),
    Case("Conv2d SigLIP-so400m/14, batch 128", (128, 3, 384, 384), (14, 14), 1152),
    Case("Conv2d DINOv2-g/14, batch 128", (128, 3, 518, 518), (14, 14), 1536),
    Case(
        "Conv3d Qwen2-VL, 16,384 patches", (16384, 3, 2, 14, 14), (2, 14, 14), 1280, False,
        torch.float32,
    ),
]  # fmt: skip
CPU = [
    Case(name, shape, patch, channels, bias, dtype)
    for name, shape, patch, channels, bias in [
        ("Conv3d Qwen2-VL, 1,024 patches", (1024, 3, 2, 14, 14), (2, 14, 14), 1280, False),
        ("Conv3d Qwen2-VL, 16 patches", (16, 3, 2, 14, 14), (2, 14, 14), 1280, False),
        ("Conv3d video, 8 frames", (1, 3, 8, 112, 112), (2, 14, 14), 1280, False),
        ("Conv2d Kimi-K2.5, 1,024 patches", (1024, 3, 14, 14), (14, 14), 1152, True),
        ("Conv2d ViT-B/16, batch 4", (4, 3, 224, 224), (16, 16), 768, True),
        ("Conv2d ViT-B/16, batch 1", (1, 3, 224, 224), (16, 16), 768, True),
        ("Conv2d 4 x 4 on 3 channels", (2, 3, 224, 224), (4, 4), 96, True),
    ]
    for dtype in (torch.float32, torch.bfloat16)
]


def candidates(case: Case, device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    dims = len(case.patch)
    proj = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        case.shape[1], case.channels, case.patch, case.patch, bias=case.bias
    ).to(device, case.dtype)
    plan = PatchPlan(case.patch, False)

    def bound(token_major: bool) -> Callable[[Tensor], Tensor]:
        prepared = PatchEmbed.forward.prepare(proj, token_major=token_major)
        seat = SimpleNamespace(proj=proj, prepared=prepared)
        return lambda x: PatchEmbed.forward(seat, x)

    def product(x: Tensor) -> Tensor:
        return F.linear(patches(x, plan), proj.weight.view(case.channels, -1), proj.bias)

    found = {"conv": proj, "PatchEmbed": bound(False)}
    if device == "cuda":
        torch.compiler.reset()
        compiled = torch.compile(proj, dynamic=False)
        found.update({"token major": bound(True), "torch.compile": compiled})
    return {**found, "patches + F.linear": product}


def on_cpu(case: Case) -> dict[str, float]:
    runs = candidates(case, "cpu")
    x = torch.randn(case.shape).to(case.dtype)
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + 4
    while time.perf_counter() < until and len(times["conv"]) < 200:
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:] or values) for name, values in times.items()}


def on_gpu(case: Case) -> dict[str, float]:
    runs, calls = candidates(case, "cuda"), 8
    xs = [torch.randn(case.shape, device="cuda").to(case.dtype) for _ in range(4)]
    graphs = {}
    for name, run in runs.items():
        run(xs[0])
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in range(calls):
                run(xs[call % len(xs)])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(15):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(1e3 * start.elapsed_time(end) / calls)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@torch.no_grad()
def measured(device: str) -> None:
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device == "cuda" else machine()
    print(f"{where}, {torch.get_num_threads()} threads, µs a call\n")
    measure, rows = (on_gpu, []) if device == "cuda" else (on_cpu, [])
    for case in GPU if device == "cuda" else CPU:
        times = measure(case)
        dtype = str(case.dtype).removeprefix("torch.")
        gain = times["conv"] / times["PatchEmbed"]
        rows.append([case.name, dtype, *(f"{t:.0f}" for t in times.values()), f"{gain:.2f}"])
    print_table(["", "dtype", *times, "conv / PatchEmbed"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("device", nargs="?", choices=["cpu", "cuda"], default=default)
    parser.add_argument(
        "--save", action="store_true", help="write results/kernels-cpu.md or kernels-gpu.md"
    )
    arguments = parser.parse_args()
    name = f"kernels-{'cpu' if arguments.device == 'cpu' else 'gpu'}.md"
    with saved(
        name if arguments.save else None,
        f"The kernels, {'CPU' if arguments.device == 'cpu' else 'GPU'}",
    ):
        measured(arguments.device)


if __name__ == "__main__":
    main()
