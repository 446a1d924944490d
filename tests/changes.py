"""What the state machine does to modules, and the kernels that it fuses them with."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from generated import FunctionalNoise, Join, Mix, Optional, Scale, Split, flat
from support import RUNS, WeightKernel, mapped, members_kernel
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import FusionError, ModuleSpec
from module_fusion.families import WeightLayout, register_family
from module_fusion.families.rms_norm_mlp import RMSNormMLPFamily
from module_fusion.modules import call_as_itself
from module_fusion.originals import original_of
from module_fusion.paths import find_groups
from module_fusion.seat import run_members
from module_fusion.spec import forward_signature, infer_specs, make_plan


def bits(value: Any) -> Any:
    """A tensor's dtype, shape and bytes; anything else as it is."""
    if isinstance(value, Tensor):
        flat_bytes = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, tuple(value.shape), flat_bytes.numpy().tobytes()
    return value


class Planted(Exception):
    """Raised by a hook in the middle of a forward."""


class Log(threading.local):
    """What the hooks of this thread saw."""

    def __init__(self) -> None:
        self.entries: list[Any] = []


LOG = Log()


class Hook:
    """Logs the bits it is given; one of its kinds doubles the output, one raises."""

    def __init__(self, key: str, kind: str) -> None:
        self.key, self.kind = key, kind

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        LOG.entries.append((self.key, self.kind, [bits(leaf) for leaf in flat(list(given))]))
        if self.kind == "raise":
            raise Planted(self.key)
        return given[-1] * 2 if self.kind == "double" else None

    def register(self, module: nn.Module) -> Any:
        if self.kind in ("pre", "raise"):
            return module.register_forward_pre_hook(self, with_kwargs=self.kind == "pre")
        if self.kind == "backward pre":
            return module.register_full_backward_pre_hook(self)
        if self.kind == "backward":
            return module.register_full_backward_hook(self)
        always, kwargs = self.kind == "always", self.kind == "kwargs"
        return module.register_forward_hook(self, with_kwargs=kwargs, always_call=always)


HOOKS = ("forward", "double", "kwargs", "always", "pre", "backward", "backward pre")


def remove_hooks(module: nn.Module) -> None:
    for name, value in module.__dict__.items():
        if "_hooks" in name and name.startswith(("_forward", "_backward")):
            value.clear()
    module._is_full_backward_hook = None


class Adapter(nn.Module):
    """Wraps a module, as LoRA layers do, and scales what it returns."""

    def __init__(self, base: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = nn.Parameter(torch.rand(1, dtype=dtype) + 0.5)
        self.is_pair = isinstance(base, Split)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.is_pair:
            return output[0] * self.scale, output[1] * self.scale
        return output * self.scale


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def tripled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """An instance-level forward, in the manner of accelerate's."""
    output = type(module).forward(module, *args, **kwargs)
    return (output[0] * 3, output[1]) if isinstance(module, Split) else output * 3


def flip_forward(module: nn.Module) -> None:
    """Give the module a forward of its own, or take it away."""
    if "forward" in module.__dict__:
        del module.forward
    else:
        module.forward = functools.partial(tripled, module)


def disturb(module: nn.Module, seed: int, how: str) -> None:
    """Change the parameters or buffers of a module in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in module.buffers() if how == "buffers" else module.parameters():
            factor = torch.rand(tensor.shape) + 0.5
            if how == "set":
                tensor.data = tensor.data * factor.to(tensor.dtype)
            elif tensor.is_floating_point():
                (tensor.data if how == "data" else tensor).mul_(factor)


COUNT = [0]


class OtherScale(Scale):
    """In the place of a `Scale` it has the same parameters, and gives something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


OTHERS: dict[type[nn.Module], type[nn.Module]] = {Scale: OtherScale, nn.Linear: OtherLinear}


def bare(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a kernel computes that knows a member: from its weights, past every call of it."""
    x = args[0] if args else kwargs.get("x")
    if isinstance(module, nn.Sequential):
        for child in module:
            x = bare(child, (x,), {})
        return x
    if isinstance(module, nn.Linear):
        return F.linear(x, module.weight, module.bias)
    if isinstance(module, nn.Dropout):
        return x
    if isinstance(module, nn.BatchNorm1d):
        statistics, weights = (
            (module.running_mean, module.running_var),
            (module.weight, module.bias),
        )
        return F.batch_norm(x, *statistics, *weights, eps=module.eps)
    if isinstance(module, FunctionalNoise):
        return x * module.weight
    for kind in (Mix, Optional, Split, Join, Scale):
        if isinstance(module, kind):
            return kind.forward(module, *args, **kwargs)
    return call_as_itself(module, args, kwargs)


def weights_kernel(inputs: int) -> type[nn.Module]:
    """A kernel that reads the members' weights, whatever they are."""
    names = ", ".join(f"a{i}" for i in range(inputs))
    namespace: dict[str, Any] = {"run": run_bare}
    exec(f"def forward(self, {names}):\n    return run(self, [{names}])", namespace)
    namespace["forward"].prepare = know
    return type("Weights", (nn.Module,), {"forward": namespace["forward"]})


def know(*members: nn.Module) -> None:
    """Refuse members that `bare` takes for something else; parts of them it need not know."""
    if any(isinstance(member, (OtherScale, OtherLinear)) for member in members):
        raise ValueError("another class")


def run_bare(seat: Any, inputs: list[Any]) -> Any:
    COUNT[0] += 1
    with torch.autocast("cpu", enabled=False):
        return run_members(seat._plan, seat.members(), bare, inputs)


def weights_kernel_without_backward(inputs: int) -> type[nn.Module]:
    kernel = weights_kernel(inputs)
    forward = torch.no_grad()(kernel.forward)
    return type("NoBackward", (nn.Module,), {"forward": forward, "has_backward": False})


class ExactKernel(WeightKernel):
    """Reads the packed weights where there are any and no gradient is needed."""

    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        COUNT[0] += 1
        packed = self.packed.get("gate_up")
        if packed is None or torch.is_grad_enabled():
            return WeightKernel.forward(self, x)
        gate, up = packed.chunk(2)
        norm, mlp = self.norm, self.mlp
        x = norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        hidden = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return F.linear(hidden, mlp.down_proj.weight)


class ExactFamily(RMSNormMLPFamily):
    """The built-in family with a kernel that gives the members' own bits."""

    name = "exact"
    kernel = "Exact"
    layouts = (WeightLayout("gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),)

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        return super().samples(members, generator)[:1]


MEMBERS = {f"Members{n}": members_kernel(n) for n in range(7)}
NO_BACKWARD = {f"NoBackward{n}": weights_kernel_without_backward(n) for n in range(7)}
WEIGHTS = {f"Weights{n}": weights_kernel(n) for n in range(7)}
KERNELS = {**MEMBERS, **NO_BACKWARD, **WEIGHTS, "Exact": ExactKernel}


def kernel_runs() -> int:
    """How often a kernel ran so far."""
    return COUNT[0] + sum(count for (count,) in RUNS.values())


def inputs_of(model: nn.Module, paths: dict[str, str], specs: list[ModuleSpec] | None) -> int:
    """The number of inputs a kernel for these members takes; 1 where they cannot be a chain."""
    try:
        group = find_groups(model, list(paths.values()))[0][0]
        forwards = [forward_signature(original_of(type(member))) for member in group.modules]
        plan = make_plan(forwards, specs or infer_specs(forwards), group.paths)
    except FusionError:
        return 1
    return len(plan.signature.parameters)


@contextmanager
def kernels_and_family() -> Iterator[None]:
    """The kernels are mapped and the family is registered."""
    register_family(ExactFamily)
    with mapped(**KERNELS):
        yield
