"""What `verify` and `benchmark` share: the model as if unfused, and nothing left behind."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import attributes_of, value_of
from .errors import FusionError
from .inventory import Found, chains_in, modules_in, states_of, strays_in
from .modules import KEY, ModuleState, has_expected_class
from .verifying.structures import same_bits

_COUNTS = ("kernel_calls", "member_calls", "reason", "holds")


def check_not_ambiguous(
    ours: Callable[..., Any], model: nn.Module, method: str, given: Mapping[str, Any]
) -> None:
    """Refuse a keyword that is set, and that could be for the model just as well.

    Args:
        ours: `verify` or `benchmark`.
        model: the model.
        method: the name of its method that is called.
        given: the values of the options of ours.

    Raises:
        FusionError: the method has a parameter of that name too.
    """
    try:
        taken = inspect.signature(getattr(model, method)).parameters
    except (AttributeError, TypeError, ValueError):
        return
    defaults = inspect.signature(ours).parameters
    for name, value in given.items():
        default = defaults[name].default
        is_set = value is not default and not (type(value) is type(default) and value == default)
        if name in taken and is_set:
            raise FusionError(
                f"{method} of {type(model).__name__} has a parameter {name!r}, and so has "
                f"{ours.__name__}: it is not clear which one {name}={value!r} is for. Give the "
                f"model's by position; or give {ours.__name__} a module around the model, whose "
                f"forward calls it and has another name for {name!r}."
            )


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Inside, every module has its original class, so the model runs as if never fused.

    The modules, their parameters and the chains stay as they are: nothing is copied, and
    fusing again costs nothing. Other threads must not run the model meanwhile.
    """
    chains = chains_in(model)
    states = [state for found in chains for state in states_of(found)]
    states += [stray.__dict__[KEY] for stray in strays_in(model, chains)]
    swapped: list[tuple[nn.Module, type, ModuleState]] = []
    try:
        for state in states:
            module = state.module() if state.module is not None else None
            # A class that someone else put on top stays: it may do more than fusion did.
            if module is not None and has_expected_class(module, state):
                swapped.append((module, type(module), state))
                object.__setattr__(module, "__class__", state.original)
        yield
    finally:
        for module, cls, state in swapped:
            if type(module) is state.original:
                object.__setattr__(module, "__class__", cls)


@contextmanager
def nothing_left_behind(model: nn.Module, *given: nn.Module) -> Iterator[Callable[[], None]]:
    """On leaving, random state, buffers, gradients and attributes are what they were before.

    Of containers and objects that a module has, what is in them too, as `attributes_of` says.
    There is no copy of parameters: a model that writes to those by itself stays changed.

    Args:
        model: the model.
        *given: modules among its inputs, which are put back too.

    Yields:
        A function that puts them back at once, for a second run from the same start.
    """
    steps: list[Callable[[], None]] = []
    with ExitStack() as stack:
        for module in (model, *given):
            gradients = _gradients(module)
            stack.callback(gradients)
            steps += [stack.enter_context(attributes_put_back(module)), gradients]

        def put_back() -> None:
            for step in steps:
                step()

        yield put_back


@contextmanager
def attributes_put_back(model: nn.Module) -> Iterator[Callable[[], None]]:
    """The same but for gradients."""
    steps = [
        random_state(),
        *attributes_of(model),
        *_buffers(model),
    ]

    def put_back() -> None:
        for step in steps:
            step()

    try:
        yield put_back
    finally:
        put_back()


@contextmanager
def counts_kept(found: Sequence[Found]) -> Iterator[None]:
    """On leaving, what `report` says of calls and reasons is what it said before."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for item in found:
        states = states_of(item)
        known = (state.__dict__.get("speculation") for state in states)
        owners = [item.chain, *states, *(own for own in known if own is not None)]
        kept += [(own, _counts_in(own)) for own in (owner.__dict__ for owner in owners)]
    try:
        yield
    finally:
        for own, before in kept:
            for name in _counts_in(own):
                del own[name]
            own.update(before)


def _counts_in(own: dict[str, Any]) -> dict[str, Any]:
    return {name: own[name] for name in _COUNTS if name in own}


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
            values = [value_of(buffer) for buffer in before.values() if buffer is not None]
            yield _restorer_of_buffers(module, before, values)


def _restorer_of_buffers(
    module: nn.Module, before: dict[str, Tensor | None], values: list[Callable[[], None]]
) -> Callable[[], None]:
    def put_back() -> None:
        for put_value_back in values:
            put_value_back()
        module._buffers.clear()
        module._buffers.update(before)

    return put_back


def _gradients(model: nn.Module) -> Callable[[], None]:
    before = [
        (p, p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad)
        for p in model.parameters()
    ]

    def put_back() -> None:
        for parameter, gradient, value, is_wanted in before:
            if gradient is not None and value is not None and not same_bits(gradient, value):
                with torch.no_grad():
                    gradient.copy_(value)
            parameter.grad = gradient
            if parameter.requires_grad is not is_wanted:
                parameter.requires_grad_(is_wanted)

    return put_back
