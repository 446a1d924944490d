"""What `verify` and `benchmark` share: the model as if unfused, and nothing left behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .inventory import chains_in, modules_in, states_of, strays_in
from .modules import KEY, ModuleState, expected_class
from .verifying.structures import same_bits

# What `nn.Module` itself has in every instance, or puts there when it is compiled.
_OF_EVERY_MODULE = (frozenset(vars(nn.Module())) - {"training"}) | {"_compiled_call_impl"}


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Inside, every module has its original class, so the model runs as if never fused.

    The modules, their parameters and the chains stay as they are: nothing is copied, and
    fusing again costs nothing. Other threads must not run the model meanwhile.
    """
    chains = chains_in(model)
    states = [state for found in chains for state in states_of(found)]
    states += [stray.__dict__[KEY] for stray in strays_in(model, chains)]
    swapped: list[tuple[nn.Module, ModuleState]] = []
    try:
        for state in states:
            module = state.module() if state.module is not None else None
            # A class that someone else put on top stays: it may do more than fusion did.
            if module is not None and type(module) is expected_class(state):
                swapped.append((module, state))
                object.__setattr__(module, "__class__", state.original)
        yield
    finally:
        for module, state in swapped:
            if type(module) is state.original:
                object.__setattr__(module, "__class__", expected_class(state))


@contextmanager
def nothing_left_behind(model: nn.Module) -> Iterator[Callable[[], None]]:
    """On leaving, random state, buffers, gradients and attributes are what they were before.

    Of a list, dict or set that a module has, the items too; what else a module's attributes
    hold is not looked into.

    Yields:
        A function that puts them back at once, for a second run from the same start.
    """
    with ExitStack() as stack:
        steps = [random_state(), *_buffers(model), *_attributes(model), _gradients(model)]

        def put_back() -> None:
            for step in steps:
                step()

        stack.callback(put_back)
        yield put_back


def random_state() -> Callable[[], None]:
    """A function that puts the random state of now back."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if "numpy" in sys.modules:
        numpy: Any = sys.modules["numpy"]
        states.append((numpy.random.set_state, numpy.random.get_state()))

    def put_back() -> None:
        for set_state, state in states:
            set_state(state)

    return put_back


def _buffers(model: nn.Module) -> Iterator[Callable[[], None]]:
    for module in modules_in(model):
        if module._buffers:
            before = dict(module._buffers)
            values = {k: b.detach().clone() for k, b in before.items() if b is not None}
            yield _restorer_of_buffers(module, before, values)


def _restorer_of_buffers(
    module: nn.Module, before: dict[str, Tensor | None], values: dict[str, Tensor]
) -> Callable[[], None]:
    def put_back() -> None:
        with torch.no_grad():
            for name, value in values.items():
                buffer = before[name]
                assert buffer is not None
                if not same_bits(buffer, value):
                    buffer.copy_(value)
        module._buffers.clear()
        module._buffers.update(before)

    return put_back


def _attributes(model: nn.Module) -> Iterator[Callable[[], None]]:
    for module in modules_in(model):
        before = {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE}
        items = [(v, v.copy()) for v in before.values() if type(v) in (list, dict, set)]
        yield _restorer_of_attributes(module, before, items)


def _restorer_of_attributes(
    module: nn.Module, before: dict[str, Any], items: list[tuple[Any, Any]]
) -> Callable[[], None]:
    def put_back() -> None:
        own = module.__dict__
        for name in [name for name in own if name not in before and name not in _OF_EVERY_MODULE]:
            del own[name]
        own.update(before)
        for value, kept in items:
            value.clear()
            (value.extend if type(value) is list else value.update)(kept)

    return put_back


def _gradients(model: nn.Module) -> Callable[[], None]:
    before = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]

    def put_back() -> None:
        for parameter, gradient, value in before:
            if gradient is not None and value is not None and not same_bits(gradient, value):
                with torch.no_grad():
                    gradient.copy_(value)
            parameter.grad = gradient

    return put_back
