"""The RMSNormMLP kernel against its members, torch.compile and Liger.

On a GPU: a stack of blocks `x + mlp(norm(x))` whose weights exceed the L2 cache, bfloat16. Per
block the GPU time in a CUDA graph and the wall time of eager calls, then forward + backward.
On a CPU: a small table of the members and the kernel. All variants are timed in turn in every
round, in one process; the numbers are medians.

    python benchmarks/rms_norm_mlp.py
    python benchmarks/rms_norm_mlp.py --shapes 0.6B --tokens 1 16 --skip-training
    python benchmarks/rms_norm_mlp.py --cpu --save
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from common import Repository, in_turn, machine, print_table, saved
from kernels import Mode, use_kernel_mapping
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from module_fusion import fuse_modules, report
from module_fusion.kernels.rms_norm_mlp.layers import RMSNormMLP

SHAPES = {"8B": (4096, 14336), "1B": (2048, 8192), "0.6B": (1024, 3072)}
TOKENS = [1, 16, 64, 512, 4096, 16384]
TRAINED = {"8B": [4096, 16384], "1B": [4096], "0.6B": [16384]}
CPU_SHAPES = {"0.6B": (1024, 3072), "small": (256, 768)}
CPU_TOKENS = [1, 16, 128]
# Several times the 60 MB of an H200, so that no weight is found there again.
STACK_BYTES = 600e6


class Block(nn.Module):
    """`x + mlp(norm(x))`."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        config = SimpleNamespace(
            hidden_size=hidden, intermediate_size=intermediate, mlp_bias=False, hidden_act="silu"
        )
        self.norm = LlamaRMSNorm(hidden)
        self.mlp = LlamaMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def fused(stack: Stack) -> Stack:
    stack = copy.deepcopy(stack)
    repository = Repository(RMSNormMLP)
    devices = {"cpu": repository, "cuda": repository}
    with use_kernel_mapping({"RMSNormMLP": devices}, inherit_mapping=False):
        fuse_modules(
            stack,
            {"norm": "blocks.*.norm", "mlp": "blocks.*.mlp"},
            kernel="RMSNormMLP",
            mode=Mode.TRAINING,
        )
    return stack


def compiled(stack: Stack) -> Stack:
    stack = copy.deepcopy(stack)
    for block in stack.blocks:
        block.compile(dynamic=False)
    return stack


def with_liger(stack: Stack) -> Stack | None:
    """The same weights in Liger's modules, None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP
    except ImportError:
        return None
    stack = copy.deepcopy(stack)
    for block in stack.blocks:
        norm = LigerRMSNorm(block.norm.weight.numel(), eps=block.norm.variance_epsilon)
        mlp = LigerSwiGLUMLP(block.mlp.config)
        norm.load_state_dict(block.norm.state_dict(), assign=True)
        mlp.load_state_dict(block.mlp.state_dict(), assign=True)
        block.norm, block.mlp = norm, mlp
    return stack


def variants(stack: Stack, device: str) -> dict[str, Stack]:
    if device == "cpu":
        return {"members": stack, "ours": fused(stack)}
    found = {"HF eager": stack, "torch.compile": compiled(stack), "Liger": with_liger(stack)}
    found["ours"] = fused(stack)
    return {name: variant for name, variant in found.items() if variant is not None}


def stack_of(hidden: int, intermediate: int, blocks: int, device: str, dtype: torch.dtype) -> Stack:
    torch.manual_seed(0)
    return Stack([Block(hidden, intermediate).to(device, dtype) for _ in range(blocks)])


def gpu_time(function: Callable[[], Any], repeats: int) -> float:
    """Microseconds on the GPU per call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def wall_time(function: Callable[[], Any], repeats: int, synchronize: Callable[[], None]) -> float:
    """Microseconds per call as the caller sees them."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) * 1e6 / repeats


def captured(stack: Stack, x: Tensor) -> Callable[[], None]:
    """The stack as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            stack(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stack(x)
    return graph.replay


def check(stacks: dict[str, Stack], x: Tensor) -> None:
    """The kernel ran, and gives what the members give."""
    first, *others = (stack(x).float() for stack in stacks.values())
    for name, output in zip(list(stacks)[1:], others, strict=True):
        error = ((output - first).norm() / first.norm()).item()
        if not error < 0.02:
            raise RuntimeError(f"{name} is {error:.3f} off")
    for group in report(stacks["ours"]).groups:
        if not group.kernel_calls or group.member_calls:
            raise RuntimeError(f"the kernel did not run: {group}")


def row(label: tuple[str, ...], times: dict[str, float], blocks: int) -> tuple[str, ...]:
    """Microseconds per block, and the ratio of the last variant to the first."""
    values = list(times.values())
    return (*label, *(f"{value / blocks:.1f}" for value in values), f"{values[-1] / values[0]:.3f}")


def inference(shapes: list[str], tokens: list[int], rounds: int) -> None:
    rows = []
    header: tuple[str, ...] = ()
    for shape in shapes:
        hidden, intermediate = SHAPES[shape]
        blocks = max(2, round(STACK_BYTES / (6 * hidden * intermediate)))
        torch.compiler.reset()
        stacks = variants(stack_of(hidden, intermediate, blocks, "cuda", torch.bfloat16), "cuda")
        header = ("shape", "M", "time", *stacks, "ours / HF eager")
        for count in tokens:
            x = torch.randn(count, hidden, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                check(stacks, x)
                graphs = {name: captured(stack, x) for name, stack in stacks.items()}
                repeats = max(1, min(20, 16384 // (count * blocks)))
                timed = {n: partial(gpu_time, g, repeats) for n, g in graphs.items()}
                rows.append(row((shape, f"{count}", "GPU"), in_turn(timed, rounds), blocks))
                if count <= 64:
                    timed = {
                        n: partial(wall_time, partial(s, x), repeats, torch.cuda.synchronize)
                        for n, s in stacks.items()
                    }
                    rows.append(row((shape, f"{count}", "wall"), in_turn(timed, rounds), blocks))
            del graphs
    print("\nForward, µs per block\n")
    print_table(header, rows, align=">")


def training(shapes: list[str], rounds: int) -> None:
    rows = []
    header: tuple[str, ...] = ()
    for shape in shapes:
        hidden, intermediate = SHAPES[shape]
        blocks = 2
        torch.compiler.reset()
        stacks = variants(stack_of(hidden, intermediate, blocks, "cuda", torch.bfloat16), "cuda")
        header = ("shape", "M", "what", *stacks, "ours / HF eager")
        for count in TRAINED[shape]:
            x = torch.randn(count, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            dy = torch.randn_like(x)

            def step(stack: Stack, x: Tensor = x, dy: Tensor = dy) -> None:
                torch.autograd.grad(stack(x), [x, *stack.parameters()], dy)

            def saved(stack: Stack, x: Tensor = x) -> float:
                before = torch.cuda.memory_allocated()
                output = stack(x)
                return (torch.cuda.memory_allocated() - before - output.nbytes) / 2**20

            for stack in stacks.values():
                for _ in range(2):
                    step(stack)
            timed = {n: partial(gpu_time, partial(step, s), 2) for n, s in stacks.items()}
            rows.append(row((shape, f"{count}", "µs"), in_turn(timed, rounds), blocks))
            memory = {name: saved(stack) for name, stack in stacks.items()}
            rows.append(row((shape, f"{count}", "MiB saved"), memory, blocks))
    print("\nForward and backward, per block\n")
    print_table(header, rows, align=">")


class Alone(nn.Module):
    """The kernel on the very members that it is compared with, without a captured call."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        prepared = RMSNormMLP.forward.prepare(norm, mlp)
        self.__dict__.update(norm=norm, mlp=mlp, prepared=prepared)

    forward = RMSNormMLP.forward


def one_after_the_other(norm: nn.Module, mlp: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = mlp(norm(x))
    return output


def on_cpu(tokens: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape, (hidden, intermediate) in CPU_SHAPES.items():
            stacks = variants(stack_of(hidden, intermediate, 2, "cpu", dtype), "cpu")
            block = stacks["members"].blocks[0]
            kernel = Alone(block.norm, block.mlp)
            for count in tokens:
                x = torch.randn(count, hidden, dtype=dtype)
                functions = {
                    "members": partial(one_after_the_other, block.norm, block.mlp, x),
                    "kernel": partial(kernel, x),
                    "model": partial(stacks["members"], x),
                    "fused model": partial(stacks["ours"], x),
                }
                with torch.no_grad():
                    check(stacks, x)
                    timed = {
                        n: partial(wall_time, f, 20, lambda: None) for n, f in functions.items()
                    }
                    times = in_turn(timed, rounds)
                values = list(times.values())
                ratios = values[1] / values[0], values[3] / values[2]
                label = (f"{dtype}".removeprefix("torch."), shape, f"{count}")
                rows.append(
                    (*label, *(f"{v:.1f}" for v in values), *(f"{ratio:.3f}" for ratio in ratios))
                )
    print(
        "\nForward on the CPU, µs: the kernel against the members it stands for, and a model of two"
    )
    print("blocks, fused and not, the cost of the captured calls included\n")
    header = ("dtype", "shape", "M", *functions, "kernel / members", "fused / model")
    print_table(header, rows, align=">")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="rows of hidden states, M")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="the CPU table, also where a GPU is")
    parser.add_argument(
        "--save", action="store_true", help="write results/kernels-cpu.md or kernels-gpu.md"
    )
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu or not torch.cuda.is_available() else "gpu"
    name = f"kernels-{device}.md" if arguments.save else None
    with saved(name, f"The kernels, {device.upper()}"):
        print(machine())
        if device == "cpu":
            on_cpu(arguments.tokens or CPU_TOKENS, arguments.rounds)
            return
        print(torch.cuda.get_device_name())
        inference(arguments.shapes, arguments.tokens or TOKENS, arguments.rounds)
        if not arguments.skip_training:
            training(arguments.shapes, arguments.rounds)


if __name__ == "__main__":
    main()
