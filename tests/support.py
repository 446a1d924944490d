"""Kernels and models that several tests use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kernels import use_kernel_mapping
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion.inventory import chains_in
from module_fusion.seat import FusedKernel


class InMemoryRepository:
    """A kernel repository that serves a layer class from memory."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer
        self.loads = 0

    def load(self) -> type[nn.Module]:
        self.loads += 1
        return self.layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InMemoryRepository) and other.layer is self.layer

    def __hash__(self) -> int:
        return hash(self.layer)


@contextmanager
def mapped(**layers: type[nn.Module]) -> Iterator[None]:
    """Map kernel names to layer classes on every device the tests run on."""
    repositories = {name: InMemoryRepository(layer) for name, layer in layers.items()}
    with use_kernel_mapping(
        {name: {"cpu": repo, "cuda": repo} for name, repo in repositories.items()},
        inherit_mapping=False,
    ):
        yield


def passing(change: Callable[[Tensor], Tensor]) -> type[torch.autograd.Function]:
    """Passes its input on, and a change of the gradient that arrives."""

    class Passing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return change(gradient)

    return Passing


def members_kernel(inputs: int) -> type[nn.Module]:
    """A kernel that runs the members themselves: the same bits, through captured calls.

    Its class counts how often it ran: `kernel.runs`.
    """
    names = ", ".join(f"a{i}" for i in range(inputs))
    namespace: dict[str, Any] = {"count": None}
    runs: list[int] = [0]

    def count() -> None:
        if not torch.compiler.is_compiling():
            runs[0] += 1

    namespace["count"] = count
    exec(
        f"def forward(self, {names}):\n    count()\n    return type(self).forward(self, {names})",
        namespace,
    )
    layer = type(
        "MembersKernel",
        (nn.Module,),
        {"forward": namespace["forward"], "can_torch_compile": True, "has_backward": True},
    )
    RUNS[layer] = runs
    return layer


RUNS: dict[type[nn.Module], list[int]] = {}


def runs(layer: type[nn.Module]) -> int:
    """How often a kernel made by `members_kernel` ran in eager mode."""
    return RUNS[layer][0]


def functions_in_seats(model: nn.Module) -> set[Any]:
    """What is in the seats of all chains, None for an empty one."""
    return {found.chain.seat.kernel for found in chains_in(model)}  # type: ignore[union-attr]


def computed_in(graph: torch.fx.GraphModule, members: Collection[str]) -> set[str]:
    """In which members a graph computes something, other than in the seat of their kernel.

    What a call does to be captured is no computation: it asks for the context, and copies inputs.
    """
    captures = {"clone", "_are_functorch_transforms_active"}
    found: set[str] = set()
    for node in graph.graph.nodes:
        frames = list(node.meta.get("nn_module_stack", {}).values())
        name = getattr(node.target, "__name__", node.target)
        if node.op in ("placeholder", "get_attr", "output") or name in captures or not frames:
            continue
        # What a kernel calls would be inside of its seat.
        if not issubclass(frames[-1][1], FusedKernel):
            found.update(path.removeprefix("L['self'].") for path, _ in frames)
    return found.intersection(members)


class Norm(nn.Module):
    """RMSNorm that counts its calls."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(hidden) + 0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Mlp(nn.Module):
    """Gated MLP that counts its calls."""

    def __init__(self, hidden: int = 8, intermediate: int = 16) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """`x + mlp(norm(x))`."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.mlp = Mlp(hidden)
        self.norm = Norm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """A stack of blocks."""

    def __init__(self, blocks: int = 3, hidden: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def calls(self) -> list[tuple[int, int]]:
        """How often the members of each block ran themselves."""
        return [(block.norm.calls, block.mlp.calls) for block in self.layers]


class WeightKernel(nn.Module):
    """Reads the members' weights, as a real kernel does; the same operations, so the same bits."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        norm, mlp = self.norm, self.mlp
        x = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return F.linear(gate, mlp.down_proj.weight)


def noise(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def doubled_tensor(value: Any) -> Any:
    return value * 2 if type(value) is Tensor else value


PATHS = ["layers.*.norm", "layers.*.mlp"]
