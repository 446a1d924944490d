"""Steps that a model and its twin both take: changes by other code, training, copies, files."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from changes import HOOKS, OTHERS, Adapter, Doubled, Hook, disturb, flip_forward, remove_hooks
from generated import HIDDEN, Program, Stack
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from twins import Side, Twins

PICK = st.integers(0, 30)
SEED = st.integers(0, 99)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def is_called(module: nn.Module) -> bool:
    """A member or a part of one, or what holds one; no container and no parent."""
    return type(module).forward is not nn.Module.forward and not isinstance(
        module, (Program, Stack, parametrize.ParametrizationList, Doubled)
    )


def owns_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight")


def is_adapter(module: nn.Module) -> bool:
    return isinstance(module, (Adapter, BaseTunerLayer))


class Steps(RuleBasedStateMachine):
    """Whatever may happen to a model besides fusing."""

    twins: Twins
    dtype = torch.float32
    never_fused: Any = None

    @property
    def ours(self) -> Any:
        return self.twins.ours.model

    def is_any_parametrized(self) -> bool:
        return bool(self.twins.paths(is_parametrized))

    def both(self, step: Callable[[Side], Any]) -> None:
        """Take a step that changes what the models are made of."""
        self.never_fused = None
        self.twins.both(step)

    def forget_outputs(self) -> None:
        """Of weights that were written without autograd knowing, a backward takes any value."""
        for side in (self.twins.ours, self.twins.twin):
            side.outputs = []

    def inputs(self, seed: int, odd: str | None = None, gradient: bool = False) -> list[Tensor]:
        torch.manual_seed(seed)
        width = HIDDEN + 1 if odd == "shape" else HIDDEN
        dtype = torch.float16 if odd == "dtype" else self.dtype
        x, extra = torch.randn(3, width).to(dtype), torch.randn(3, HIDDEN).to(self.dtype)
        return [x.requires_grad_(gradient), extra]

    def picked(self, at: int, wanted: Any) -> str | None:
        """The path of a module of that kind, if there is one."""
        paths = self.twins.paths(wanted)
        if not paths:
            return None
        note(paths[at % len(paths)])
        return paths[at % len(paths)]

    def change(self, path: str | None, step: Callable[[Any], Any]) -> None:
        """Do something to the module at a path of both models."""

        def quietly(side: Side) -> None:
            step(side.model.get_submodule(path))

        if path is not None:
            self.both(quietly)

    def put(self, path: str | None, new: Callable[[nn.Module], nn.Module]) -> None:
        """Put another module in the place of the one at a path of both models."""
        if path is not None:
            self.both(
                lambda side: side.model.set_submodule(path, new(side.model.get_submodule(path)))
            )

    @rule(at=PICK, kind=st.sampled_from(HOOKS))
    def add_hook(self, at: int, kind: str) -> None:
        path = self.picked(at, lambda m: type(m).forward is not nn.Module.forward)
        self.change(path, Hook(path, kind).register)

    @rule()
    def remove_all_hooks(self) -> None:
        self.change("", lambda model: [remove_hooks(module) for module in model.modules()])

    @rule()
    def put_right(self) -> None:
        """Take off all that keeps a kernel from running."""
        self.remove_all_hooks()
        while self.twins.paths(is_adapter):
            self.remove_adapter(0)
        while self.is_any_parametrized():
            self.remove_parametrization(0, True)
        for path in self.twins.paths(lambda m: "forward" in m.__dict__):
            self.change(path, flip_forward)

    @rule(at=PICK, seed=SEED)
    def add_adapter(self, at: int, seed: int) -> None:
        def adapter(base: nn.Module) -> nn.Module:
            torch.manual_seed(seed)
            return Adapter(base, self.dtype)

        self.put(self.picked(at, is_called), adapter)

    @rule(at=PICK, seed=SEED)
    def add_lora(self, at: int, seed: int) -> None:
        path = self.picked(at, lambda m: type(m) is nn.Linear)
        config = LoraConfig(r=2, target_modules=[path], init_lora_weights=False)

        def step(side: Side) -> None:
            torch.manual_seed(seed)
            inject_adapter_in_model(config, side.model)

        if path is not None:
            self.both(step)

    @rule(at=PICK, merge=st.booleans())
    def merge_lora(self, at: int, merge: bool) -> None:
        path = self.picked(at, lambda m: isinstance(m, BaseTunerLayer))
        self.change(path, lambda m: m.merge() if merge else m.unmerge())
        self.forget_outputs()

    @rule(at=PICK)
    def remove_adapter(self, at: int) -> None:
        self.put(self.picked(at, is_adapter), lambda module: module.base_layer)

    @rule(at=PICK)
    def add_parametrization(self, at: int) -> None:
        path = self.picked(at, owns_weight)
        self.change(path, lambda m: parametrize.register_parametrization(m, "weight", Doubled()))

    @rule(at=PICK, leave=st.booleans())
    def remove_parametrization(self, at: int, leave: bool) -> None:
        self.change(
            self.picked(at, is_parametrized),
            lambda m: parametrize.remove_parametrizations(m, "weight", leave_parametrized=leave),
        )

    @rule(at=PICK)
    def flip_a_forward_of_its_own(self, at: int) -> None:
        path = self.picked(at, is_called)
        self.change(path, flip_forward)

    @rule(at=PICK, mode=st.booleans(), everywhere=st.booleans())
    def train_or_eval(self, at: int, mode: bool, everywhere: bool) -> None:
        path = "" if everywhere else self.picked(at, lambda m: True)
        self.change(path, lambda m: m.train(mode))

    @rule(at=PICK, flag=st.booleans())
    def requires_grad(self, at: int, flag: bool) -> None:
        path = self.picked(at, lambda m: True)
        self.change(path, lambda m: m.requires_grad_(flag))

    @rule(dtype=st.sampled_from(DTYPES))
    def to_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.change("", lambda m: m.to(dtype))

    @rule(at=PICK, seed=SEED, another_class=st.booleans())
    def replace(self, at: int, seed: int, another_class: bool) -> None:
        """Another module in the place of a member, or of a part of one."""

        def wanted(module: nn.Module) -> bool:
            if another_class:
                return type(module) in OTHERS
            # A copy of a parametrized module shares its class, and either takes that apart.
            return is_called(module) and not any(map(is_parametrized, module.modules()))

        path = self.picked(at, wanted)
        if path is not None:
            fresh = copy.deepcopy(self.twins.twin.model.get_submodule(path))
            disturb(fresh, seed, "mul")
            if another_class:
                fresh.__class__ = OTHERS[type(fresh)]
            self.put(path, lambda module: copy.deepcopy(fresh))

    @rule(at=PICK, first=PICK, second=PICK, objects=st.booleans())
    def reorder(self, at: int, first: int, second: int, objects: bool) -> None:
        """Exchange two children of a module, or move one to the end."""

        def step(module: nn.Module) -> None:
            names = list(module._modules)
            a, b = names[first % len(names)], names[second % len(names)]
            if objects:
                one, other = module._modules[a], module._modules[b]
                module._modules[a], module._modules[b] = other, one
            else:
                module._modules[a] = module._modules.pop(a)

        self.change(self.picked(at, lambda m: len(m._modules) > 1), step)

    @rule(at=PICK, seed=SEED, how=st.sampled_from(["mul", "data", "set", "buffers"]))
    def modify_weights(self, at: int, seed: int, how: str) -> None:
        self.change(self.picked(at, lambda m: True), partial(disturb, seed=seed, how=how))
        if how in ("data", "set"):
            self.forget_outputs()

    @rule(adam=st.booleans())
    def new_optimizer(self, adam: bool) -> None:
        def step(side: Side) -> None:
            kind = torch.optim.AdamW if adam else partial(torch.optim.SGD, momentum=0.9)
            side.optimizer = kind(side.model.parameters(), lr=0.1)

        self.both(step)

    @rule(zero=st.booleans())
    def optimizer_step(self, zero: bool) -> None:
        self.both(lambda side: side.optimizer.step())
        if zero:
            self.both(lambda side: side.optimizer.zero_grad())

    @rule(keep=st.booleans(), pickled=st.booleans(), seed=SEED)
    def copy_it(self, keep: bool, pickled: bool, seed: int) -> None:
        """Go on with a copy; or only run it, and go on with the original."""

        def step(side: Side) -> Any:
            one = pickle.loads(pickle.dumps(side.model)) if pickled else copy.deepcopy(side.model)
            if not keep:
                return Side(one).forward(*self.inputs(seed), seed=seed)
            side.model = one
            return None

        self.both(step)
        self.new_optimizer(False)

    @rule(seed=SEED, crossed=st.booleans(), assign=st.booleans())
    def load_state_dict(self, seed: int, crossed: bool, assign: bool) -> None:
        """A file of either model loads into both."""
        file = io.BytesIO()
        one = self.ours if crossed else self.twins.twin.model
        torch.save(one.state_dict(), file)

        def step(side: Side) -> None:
            file.seek(0)
            state = torch.load(file, weights_only=True)
            torch.manual_seed(seed)
            for value in state.values():
                if value.is_floating_point():
                    value += torch.rand(value.shape).to(value.dtype)
            side.model.load_state_dict(state, assign=assign)

        self.both(step)
