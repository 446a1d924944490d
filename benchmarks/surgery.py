"""Time and memory of `fuse_modules` and `unfuse_modules` by number of blocks.

python benchmarks/surgery.py
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable

import torch
from common import Repository, machine, print_table
from kernels import use_kernel_mapping
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import fuse_modules, unfuse_modules

TARGET_BLOCKS, TARGET_MS = 1000, 60.0
PATHS = ["layers.*.norm", "layers.*.mlp"]


class Mlp(nn.Module):
    """A gated MLP, small: surgery must not depend on the size of the weights."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, hidden, bias=False)
        self.up_proj = nn.Linear(hidden, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """`x + mlp(norm(x))`, with a buffer, so that buffers are looked at too."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.mlp = Mlp(hidden)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Repeated blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))


class Kernel(nn.Module):
    """Takes the seat; never runs here."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return x


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / 1e6


def milliseconds_without_gc(function: Callable[[], object]) -> float:
    """The work itself: a full collection walks the whole heap, which is not this library's."""
    gc.collect()
    gc.disable()
    try:
        return milliseconds(function)
    finally:
        gc.enable()


def data_pointers(model: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


def fuse(model: nn.Module, kernel: str | None) -> None:
    fuse_modules(model, PATHS, kernel=kernel)


def python_bytes(model: nn.Module, kernel: str | None) -> tuple[int, int]:
    """Python memory that fusing holds on to, and what is left of it after unfusing."""
    # Classes and caches that every model shares are made before, and not counted.
    fuse(model, kernel)
    unfuse_modules(model)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        fuse(model, kernel)
        gc.collect()
        fused = tracemalloc.get_traced_memory()[0]
        unfuse_modules(model)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return fused - before, after - before


def measure(blocks: int, kernel: str | None, rounds: int) -> tuple[str, ...]:
    model = Stack(blocks)
    pointers = data_pointers(model)
    fuse(model, kernel)
    copied = sum(a != b for a, b in zip(pointers, data_pointers(model), strict=True))
    unfuse_modules(model)
    fusing, unfusing, collecting = [], [], []
    for _ in range(rounds):
        fusing.append(milliseconds_without_gc(lambda: fuse(model, kernel)))
        unfusing.append(milliseconds_without_gc(lambda: unfuse_modules(model)))
    for _ in range(rounds):
        both = milliseconds(lambda: fuse(model, kernel))
        collecting.append(both + milliseconds(lambda: unfuse_modules(model)))
    held, left = python_bytes(model, kernel)
    both_ms = [a + b for a, b in zip(fusing, unfusing, strict=True)]
    total = statistics.median(both_ms)
    within = ""
    if blocks == TARGET_BLOCKS:
        within = "yes" if total <= TARGET_MS else "no"
    return (
        f"{blocks:,}",
        kernel or "-",
        f"{statistics.median(fusing):.2f}",
        f"{statistics.median(unfusing):.2f}",
        f"{total:.2f}",
        f"{min(both_ms):.2f} to {max(both_ms):.2f}",
        f"{total / blocks * 1e3:.1f}",
        within,
        f"{min(collecting):.2f} to {max(collecting):.2f}",
        str(copied),
        f"{held / blocks:,.0f}",
        f"{left / blocks:,.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print(
        f"Milliseconds, median of {arguments.rounds}, garbage collection off but in the column "
        f"that says so. Target: {TARGET_BLOCKS:,} blocks fused and unfused in {TARGET_MS:.0f} ms, "
        f"and linear. Bytes are Python memory per block.\n"
    )
    header = (
        "blocks", "kernel", "fuse", "unfuse", "both", "spread", "µs per block", "in target",
        "both with gc", "tensors copied", "bytes held", "bytes left",
    )  # fmt: skip
    rows = []
    with use_kernel_mapping({"Bench": {"cpu": Repository(Kernel)}}, inherit_mapping=False):
        for kernel in (None, "Bench"):
            for blocks in arguments.blocks:
                rows.append(measure(blocks, kernel, arguments.rounds))
    print_table(header, rows, align=">")


if __name__ == "__main__":
    main()
