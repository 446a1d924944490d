"""Eager overhead per call of a fused chain of two, over the same pair unfused.

The members hand their input on and compute nothing, so what is left is the cost of the calls
themselves. All variants are timed in turn in every round, so that a slow moment of the machine
falls on all of them; each difference is taken within a round.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
from common import Repository, machine, print_table
from kernels import Mode, use_kernel_mapping
from torch import Tensor, nn

from module_fusion import fuse_modules, report

TARGET_US = 2.5


class Leaf(nn.Module):
    """Hands its input on; no parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class LeafWithParameter(Leaf):
    """Hands its input on; has a parameter, which is a hazard to check."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))


class Gated(LeafWithParameter):
    """Hands its input on; three children to check, as a gated MLP has."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 8, bias=False)
        self.up_proj = nn.Linear(8, 8, bias=False)
        self.down_proj = nn.Linear(8, 8, bias=False)


class Pair(nn.Module):
    """The parent of the chain."""

    def __init__(self, first: type[nn.Module], second: type[nn.Module]) -> None:
        super().__init__()
        self.first = first()
        self.second = second()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Kernel(nn.Module):
    """The members' own arithmetic, which is none."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        return x


class KernelWithoutBackward(nn.Module):
    """Steps aside at the last moment when gradients are needed: both calls are captured first."""

    can_torch_compile = True
    has_backward = False

    def forward(self, x: Tensor) -> Tensor:
        return x


MEMBERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "leaves without a parameter": (Leaf, Leaf),
    "leaves with a parameter": (LeafWithParameter, LeafWithParameter),
    "a leaf and a gated MLP": (LeafWithParameter, Gated),
}
# The path that each variant must have taken, so that no row measures something else.
VARIANTS: dict[str, tuple[type[nn.Module] | None, str]] = {
    "fused without a kernel": (None, "members"),
    "kernel steps aside late": (KernelWithoutBackward, "members"),
    "kernel runs": (Kernel, "kernel"),
}


def fused_pair(
    classes: tuple[type[nn.Module], type[nn.Module]], kernel: type[nn.Module] | None
) -> Pair:
    pair = Pair(*classes)
    if kernel is None:
        fuse_modules(pair, ["first", "second"])
        return pair
    with use_kernel_mapping({"Bench": {"cpu": Repository(kernel)}}, inherit_mapping=False):
        # In inference mode also a kernel without a backward takes the seat.
        fuse_modules(pair, ["first", "second"], kernel="Bench", mode=Mode.INFERENCE)
    return pair


def microseconds(function: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        function(x)
    return (time.perf_counter_ns() - start) / calls / 1e3


def check_path(pair: Pair, expected: str) -> None:
    (group,) = report(pair).groups
    ran = {"kernel": group.kernel_calls, "members": group.member_calls}
    other = "members" if expected == "kernel" else "kernel"
    if not ran[expected] or ran[other]:
        raise RuntimeError(f"expected the {expected} to run, and nothing else: {group}")


def measure(members: str, rounds: int, calls: int) -> list[tuple[str, ...]]:
    classes = MEMBERS[members]
    pairs = {"unfused": Pair(*classes), "unfused, again": Pair(*classes)}
    pairs |= {name: fused_pair(classes, kernel) for name, (kernel, _) in VARIANTS.items()}
    # Gradients are needed, which is what makes the kernel without a backward step aside.
    x = torch.ones(1, 8, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for pair in pairs.values():
        microseconds(pair, x, calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            order = list(pairs)
            # Whoever comes first in a round is not always the same.
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                times[name].append(microseconds(pairs[name], x, calls))
    finally:
        gc.enable()
    for name, (_, path) in VARIANTS.items():
        check_path(pairs[name], path)
    baseline = times.pop("unfused")
    rows = [(members, "unfused", f"{statistics.median(baseline):.2f}", "", "", "")]
    for name, own in times.items():
        extra = [mine - theirs for mine, theirs in zip(own, baseline, strict=True)]
        low, median, high = statistics.quantiles(extra, n=4)
        within = "yes" if median <= TARGET_US else "no"
        rows.append(
            (
                members,
                name,
                f"{statistics.median(own):.2f}",
                f"{median:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                "" if name.startswith("unfused") else within,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=2000, help="calls per variant and round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print(
        f"Microseconds per call of the parent; the extra is the median of {arguments.rounds} "
        f"rounds of {arguments.calls} calls. Target: at most {TARGET_US:+} µs.\n"
    )
    header = ("members", "variant", "µs", "extra", "middle half", "in target")
    rows = [
        row for members in MEMBERS for row in measure(members, arguments.rounds, arguments.calls)
    ]
    print_table(header, rows)


if __name__ == "__main__":
    main()
