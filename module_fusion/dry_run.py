"""What `dry_run=True` does: fuse, read the report, and take everything back.

A fuse that was only planned could not say whether the kernel loads, refuses the members or is
accurate enough. So it is done, and what was there before is put back as the very same objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .comparison import attributes_put_back
from .errors import FusionError
from .inventory import chains_in, modules_in, states_of
from .modules import KEY, state_of
from .report import FusionReport
from .seat import around_prepare
from .verifying.structures import same_bits


def try_to(fuse: Callable[[], FusionReport], model: nn.Module) -> FusionReport:
    """The report of fusing a model, which is left as it was.

    Raises:
        FusionError: what `fuse` raises; or a kernel wrote to a parameter when it was prepared.
    """
    written: dict[int, list[str]] = {}
    token = around_prepare.set(partial(_parameters_put_back, written))
    try:
        with _taken_back(model), _quiet():
            report = fuse()
    finally:
        around_prepare.reset(token)
    names = [n + what for n, p in model.named_parameters() for what in written.get(id(p), ())]
    if names:
        raise FusionError(
            f"A kernel wrote to {', '.join(map(repr, names))} when it was prepared. The dry run "
            f"has put that back; a call without dry_run would not. A kernel's prepare may read "
            f"the members, and return what it makes of them."
        )
    would = {"fused": "would fuse"}
    return FusionReport(
        [row._replace(action=would.get(row.action, row.action)) for row in report.groups]
    )


@contextmanager
def _taken_back(model: nn.Module) -> Iterator[None]:
    """On leaving, classes, chains, kernels, attributes, buffers and random state are as before.

    A kernel's `prepare` gets the members themselves, and may have written to them.
    """
    modules = [(module, type(module), state_of(module)) for module in modules_in(model)]
    owners: list[Any] = [state for _, _, state in modules if state is not None]
    for found in chains_in(model):
        owners += [*states_of(found), found.chain]
        owners += [] if found.chain.seat is None else [found.chain.seat]
    owners += [owner.speculation for owner in owners if hasattr(owner, "speculation")]
    saved = [(owner, dict(owner.__dict__)) for owner in owners]
    # Of a module: parameters, buffers, modules inside, hooks, by their names.
    entries = [
        (value, dict(value))
        for module, _, _ in modules
        for value in module.__dict__.values()
        if isinstance(value, dict)
    ]
    try:
        with attributes_put_back(model):
            yield
    finally:
        for value, before in entries:
            same_values = map(id, value.values()), map(id, before.values())
            if [list(value), *same_values[0]] != [list(before), *same_values[1]]:
                value.clear()
                value.update(before)
        for owner, attributes in saved:
            # Past a seat's `__setattr__`, which would look at the members anew.
            owner.__dict__.clear()
            owner.__dict__.update(attributes)
        for module, cls, state in modules:
            if type(module) is not cls:
                object.__setattr__(module, "__class__", cls)
            if state is None and state_of(module) is not None:
                del module.__dict__[KEY]


@contextmanager
def _parameters_put_back(
    written: dict[int, list[str]], members: Sequence[nn.Module]
) -> Iterator[None]:
    """On leaving, the parameters of one chain are as before; what was not is noted.

    Args:
        written: by the parameter's id, what of it was changed.
        members: those that a kernel is prepared for. There is room for one more copy of their
            weights, which there need not be of the whole model's.
    """
    parameters = {id(p): p for member in members for p in member.parameters()}
    steps = [(key, _restorer(parameter)) for key, parameter in parameters.items()]
    try:
        yield
    finally:
        for key, put_back in steps:
            if changed := put_back():
                written[key] = changed


def _restorer(parameter: nn.Parameter) -> Callable[[], list[str]]:
    """A function that makes a parameter what it is now, and says what of it was not."""
    data, value, is_wanted = parameter.data, parameter.detach().clone(), parameter.requires_grad
    gradient = parameter.grad
    its_value = None if gradient is None else gradient.clone()
    hooks = parameter._backward_hooks
    hooked = None if hooks is None else dict(hooks)

    def put_back() -> list[str]:
        changed = []
        is_same = parameter.data.untyped_storage()._cdata == data.untyped_storage()._cdata
        if not is_same or not same_bits(parameter, value):
            changed.append("")
            parameter.data = data
            _write(parameter.data, value)
        if parameter.requires_grad is not is_wanted:
            changed.append(".requires_grad")
            parameter.requires_grad_(is_wanted)
        moved = False
        if gradient is not None and its_value is not None and not same_bits(gradient, its_value):
            moved = True
            _write(gradient, its_value)
        if parameter.grad is not gradient or moved:
            changed.append(".grad")
            parameter.grad = gradient
        if parameter._backward_hooks != hooked:
            changed.append("'s hooks")
            parameter._backward_hooks = hooked
        return changed

    return put_back


def _write(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """What the `kernels` library logs is in the report; the call itself will log it again."""
    logger = logging.getLogger("kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
