"""What `dry_run=True` does: fuse, read the report, and take everything back.

A fuse that was only planned could not say whether the kernel loads, refuses the members or is
accurate enough. So it is done, and what was there before is put back as the very same objects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .comparison import attributes_put_back
from .errors import FusionError
from .inventory import chains_in, modules_in, states_of
from .modules import KEY, state_of
from .report import FusionReport


def try_to(fuse: Callable[[], FusionReport], model: nn.Module) -> FusionReport:
    """The report of fusing a model, which is left as it was.

    Raises:
        FusionError: what `fuse` raises; or a kernel wrote to a parameter when it was prepared,
            of which there is no copy.
    """
    versions = _versions(model)
    with _taken_back(model), _quiet():
        report = fuse()
    written = [name for name, version in _versions(model).items() if versions[name] != version]
    if written:
        raise FusionError(
            f"A kernel wrote to {', '.join(map(repr, written))} when it was prepared. The dry run "
            f"has no copy of the weights, so this is not undone: load them again. A kernel's "
            f"prepare may read the members, and return what it makes of them."
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


def _versions(model: nn.Module) -> dict[str, int]:
    """How often each parameter was written to, where PyTorch counts it."""
    return {n: p._version for n, p in model.named_parameters() if not p.is_inference()}


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
