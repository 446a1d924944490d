"""A model and its never-fused twin that go through the same steps, and what has to be equal."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from changes import LOG, Planted, bits
from generated import HIDDEN, Case, Program, flat
from hypothesis import reject
from support import Block
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint

from module_fusion import DeferredUseError, FusionError
from module_fusion.modules import state_of


class Mixed(nn.Module):
    """Blocks of a norm and an MLP, which a family finds, before a generated stack."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(HIDDEN) for _ in range(2))
        self.stack = stack

    def forward(self, x: Tensor, extra: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.stack(x, extra)


@contextmanager
def global_hook() -> Iterator[None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        LOG.entries.append(bits(flat(output)[0]))

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


CONTEXTS: dict[str, Callable[[], Any]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "global hook": global_hook,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
    "functional_call": nullcontext,
    "checkpoint": nullcontext,
}


@dataclass
class Side:
    """One of the two models, with all that belongs to it."""

    model: nn.Module
    optimizer: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    def forward(self, x: Tensor, extra: Tensor, how: str = "plain", seed: int = 0) -> list[Any]:
        """What comes out, and the bits of what the blocks kept."""
        torch.manual_seed(seed)
        model: Any = self.model
        try:
            with CONTEXTS[how]():
                if how == "functional_call":
                    weights = {name: p * 2 for name, p in model.named_parameters()}
                    # Tied, a module at two paths would keep the weights of the call.
                    output = functional_call(model, weights, (x, extra), tie_weights=False)
                elif how == "checkpoint":
                    output = checkpoint(model, x, extra, use_reentrant=False)
                else:
                    output = model(x, extra)
            leaves = flat(output)
        except BaseException:
            self._kept()
            raise
        kept = [bits(value) for value in self._kept()]
        self.outputs = [leaf for leaf in leaves if leaf.requires_grad]
        self.inputs = [x, extra]
        return [(type(leaf), leaf.requires_grad, bits(leaf)) for leaf in leaves] + kept

    def _kept(self) -> list[Any]:
        blocks = [m for m in self.model.modules() if isinstance(m, Program)]
        return [m.__dict__.pop("kept") for m in blocks if "kept" in m.__dict__]

    def backward(self) -> list[Any]:
        outputs, self.outputs = self.outputs, []
        if outputs:
            sum(leaf.float().sum() for leaf in outputs).backward()
        return [bits(x.grad) for x in self.inputs]


class Twins:
    """`ours` may be fused, `twin` never is; every step is taken by both and compared."""

    def __init__(self, case: Case, gradients: bool = True) -> None:
        self.case, self.gradients = case, gradients
        torch.manual_seed(case.seed)
        model = Mixed(case.build()).eval()
        self.ours, self.twin = Side(copy.deepcopy(model)), Side(model)

    def both(self, step: Callable[[Side], Any]) -> bool:
        """Take a step with both; whether it went well. Both fail with the same error or none."""
        with torch.set_grad_enabled(self.gradients):
            return self._both(step)

    def _both(self, step: Callable[[Side], Any]) -> bool:
        before = torch.get_rng_state()
        wanted = outcome(self.twin, step)
        torch.set_rng_state(before)
        try:
            got = outcome(self.ours, step)
        except DeferredUseError as error:
            # The limits: an input modified in place; a hook that is an autograd function; a
            # checkpoint whose model was changed before it runs it again.
            if "A checkpoint runs" in str(error):
                reject()
            modules = self.twin.model.modules()
            hooked = any(m._backward_hooks or m._backward_pre_hooks for m in modules)
            if not (hooked or self.case.modifies_in_place):
                raise
            reject()
        if CheckpointError in (got[0], wanted[0]):
            # Of a model that was changed meanwhile, a checkpoint runs what it gets to.
            assert None not in (got[0], wanted[0])
        else:
            assert got == wanted
        return wanted[0] is None

    def paths(self, wanted: Callable[[nn.Module], bool]) -> list[str]:
        """Paths of the modules of a kind, as the twin has them."""
        return [path for path, m in self.twin.model.named_modules() if path and wanted(m)]

    def check(self) -> None:
        """Everything that can be seen of the two models is the same."""
        assert contents(self.ours.model) == contents(self.twin.model)
        for module in self.ours.model.modules():
            state = state_of(module)
            assert state is None or not (state.running or getattr(state, "inside", None))

    def check_unfused(self) -> None:
        """After the last unfuse nothing tells the two apart."""
        ours, theirs = form(self.ours.model), form(self.twin.model)
        assert list(ours) == list(theirs)
        for path, expected in theirs.items():
            assert ours[path] == expected, path


def outcome(side: Side, step: Callable[[Side], Any]) -> tuple[Any, ...]:
    """The error's type, or None, and all that can be told of what happened."""
    LOG.entries = []
    error, result = None, None
    try:
        result = step(side)
    except Planted:
        error = Planted
    except FusionError:
        raise
    except Exception as raised:
        # A captured member raises where its output is used, so what happened before may differ.
        return (type(raised),)
    return error, result, LOG.entries, bits(torch.get_rng_state())


def in_threads(model: nn.Module, inputs: list[list[Tensor]]) -> list[Any]:
    """What forwards of one model give that run at the same time."""
    results: list[Any] = [None] * len(inputs)
    start = threading.Barrier(len(inputs))

    def run(index: int) -> None:
        start.wait()
        try:
            results[index] = outcome(Side(model), lambda side: side.forward(*inputs[index]))
        except FusionError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(inputs))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, FusionError):
            raise result
    return results


def contents(model: nn.Module) -> dict[str, Any]:
    """Names, order and bits of parameters, gradients and buffers; keys; what trains."""
    return {
        "parameters": [
            (name, p.requires_grad, bits(p), bits(p.grad))
            for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "buffers": [(name, bits(b)) for name, b in model.named_buffers(remove_duplicate=False)],
        "state dict": list(model.state_dict()),
        "training": [(path, m.training) for path, m in model.named_modules() if own(path)],
    }


def own(path: str) -> bool:
    return "fused_kernel" not in path


def form(model: nn.Module) -> dict[str, Any]:
    """All that `structure` looks at, without the identities, which two models do not share."""
    places: dict[int, str] = {}
    modules = {}
    for path, module in model.named_modules(remove_duplicate=False):
        attributes = module.__dict__
        tensors = {**module._parameters, **module._buffers}
        modules[path] = (
            places.setdefault(id(module), path),
            type(module).__qualname__ if parametrize.is_parametrized(module) else type(module),
            list(attributes),
            list(module._modules),
            [(n, type(t), places.setdefault(id(t), f"{path}.{n}")) for n, t in tensors.items()],
            [
                (name, [(hook.key, hook.kind) for hook in value.values()])
                for name, value in attributes.items()
                if name.endswith(("_hooks", "_pre_hooks")) and isinstance(value, dict)
                if "state_dict" not in name
            ],
            module.training,
        )
    return modules
