"""Where a model has an RMSNorm before a gated MLP, or a patch embedding, found by running it.

Nothing of the package is used: this is what its discovery is measured with.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .build import Built, run

_ACTIVATIONS = (
    F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu, torch.sigmoid, torch.tanh,
    lambda x: F.relu(x).square(), lambda x: x * torch.sigmoid(1.702 * x), lambda x: x,
)  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CLOSE = 1e-3
Stack = tuple[str, ...]


def norms_before_mlps(built: Built) -> list[tuple[str, str]]:
    """Paths of an RMSNorm and a gated MLP whose input is the norm's output, used nowhere else."""
    modules = dict(built.model.named_modules())
    uses = _Uses(built.model)
    with uses:
        run(built.model, built.inputs)
    found = []
    for norm, shape in uses.shapes.items():
        users = uses.users_of(norm)
        if len(users) != 1:
            continue
        mlp = users.pop()
        if mlp and is_rms_norm(modules[norm], shape) and is_gated_mlp(modules[mlp], shape):
            found.append((norm, mlp))
    return found


def patch_embeddings(built: Built) -> list[str]:
    """Paths of convolutions that ran, over patches that do not overlap."""
    uses = _Uses(built.model)
    with uses:
        run(built.model, built.inputs)
    return [
        path
        for path, module in built.model.named_modules()
        if path in uses.called and isinstance(module, _CONVOLUTIONS) and _takes_patches(module)
    ]


def _takes_patches(module: Any) -> bool:
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding != "same"
    plain = plain and (module.padding == "valid" or set(module.padding) == {0})
    return plain and tuple(module.stride) == tuple(module.kernel_size) != (1,) * len(module.stride)


class _Uses(TorchFunctionMode):
    """Notes which modules use the output of modules that keep the shape of their only input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self.called: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        self.made: dict[int, tuple[str, Stack]] = {}
        self.uses: dict[str, list[str | None]] = {}
        self.kept: list[Tensor] = []  # So that no identity is used twice.

    def __enter__(self) -> _Uses:
        self.handles = [
            handle
            for module in self.names
            for handle in (
                module.register_forward_pre_hook(self._before),
                module.register_forward_hook(self._after, always_call=True),
            )
        ]
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for handle in self.handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.names[module])
        self.called.add(self.stack[-1])

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self.stack.pop()
        takes = [arg for arg in args if isinstance(arg, Tensor)]
        alike = isinstance(output, Tensor) and len(takes) <= 1 and output.dim() > 1
        if alike and output.is_floating_point() and not any(True for _ in module.children()):
            self.shapes[name] = output.shape
            self.kept.append(output)
            self.made[id(output)] = (name, tuple(self.stack))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") not in ("__get__", "size", "dim", "__set__"):
            flat = itertools.chain(args, (kwargs or {}).values())
            for value in flat:
                for item in value if isinstance(value, (list, tuple)) else (value,):
                    if isinstance(item, Tensor) and id(item) in self.made:
                        self._note(*self.made[id(item)])
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, caller: Stack) -> None:
        shared = 0
        while shared < min(len(caller), len(self.stack)) and caller[shared] == self.stack[shared]:
            shared += 1
        inside = shared == len(caller) and len(self.stack) > shared
        self.uses.setdefault(name, []).append(self.stack[shared] if inside else None)

    def users_of(self, name: str) -> set[str | None]:
        """Modules beside it that use its output; None for the code around it."""
        return set(self.uses.get(name, []))


def is_rms_norm(module: nn.Module, shape: torch.Size) -> bool:
    """Whether it divides by the root mean square and scales each feature, on random input."""
    x = torch.randn(64, shape[-1], generator=torch.Generator().manual_seed(5)) + 0.5
    out = _output(module, x, shape)
    if out is None:
        return False
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    scale = (out * unit).sum(0) / unit.square().sum(0)
    return bool((out - scale * unit).norm() < _CLOSE * out.norm())


def is_gated_mlp(module: nn.Module, shape: torch.Size) -> bool:
    """Whether it computes `down(act(gate(x)) * up(x))` with matrices of its own."""
    small = torch.randn(16, shape[-1], generator=torch.Generator().manual_seed(6))
    # Large ones show a clamp.
    return _is_gated_mlp_on(small, module, shape) and _is_gated_mlp_on(1e3 * small, module, shape)


def _is_gated_mlp_on(x: Tensor, module: nn.Module, shape: torch.Size) -> bool:
    out = _output(module, x, shape)
    if out is None or any(p.dim() > 2 for p in module.parameters()):
        return False
    layers = [
        (p, getattr(owner, "bias", None))
        for owner in module.modules()
        for p in owner._parameters.values()
        if p is not None and p.dim() == 2
    ]
    if not 2 <= len(layers) <= 3:
        return False
    return any(
        candidate.shape == out.shape and (candidate - out).norm() < _CLOSE * out.norm()
        for candidate in _gated(x, layers)
    )


def _output(module: nn.Module, x: Tensor, shape: torch.Size) -> Tensor | None:
    """What it makes of rows `(rows, features)`, given in the number of dimensions it takes."""
    try:
        with torch.no_grad():
            # Of a copy: some keep what they were given for the next call.
            out = copy.deepcopy(module)(x.view(*(1,) * (len(shape) - 2), *x.shape))
    except Exception:
        return None
    return out.reshape(x.shape) if isinstance(out, Tensor) and out.numel() == x.numel() else None


@torch.no_grad()
def _gated(x: Tensor, layers: list[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
    for order in itertools.permutations(layers):
        *first, down = order
        projected = [y for layer in first if (y := _linear(x, layer)) is not None]
        if len(projected) != len(first):
            continue
        halves = [projected, projected[::-1]]
        if len(projected) == 1:
            if projected[0].shape[-1] % 2:
                continue
            parts = list(projected[0].chunk(2, dim=-1))
            halves = [parts, parts[::-1]]
        for (gate, up), act in itertools.product(halves, _ACTIVATIONS):
            if gate.shape == up.shape:
                out = _linear(act(gate) * up, down)
                if out is not None:
                    yield out


def _linear(x: Tensor, layer: tuple[Tensor, Tensor | None]) -> Tensor | None:
    weight, bias = layer
    if weight.shape[1] != x.shape[-1]:
        weight = weight.T
    if weight.shape[1] != x.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return F.linear(x, weight, bias)


def share(found: int, there: int) -> str:
    """`found` of `there`, with percent."""
    percent = f" ({math.floor(1000 * found / there) / 10} %)" if there else ""
    return f"{found} of {there}{percent}"
