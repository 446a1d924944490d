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

from .comparison import random_state
from .inventory import chains_in, modules_in, states_of
from .modules import KEY, state_of
from .report import FusionReport


def try_to(fuse: Callable[[], FusionReport], model: nn.Module) -> FusionReport:
    """The report of fusing a model, which is left as it was.

    Raises:
        FusionError: what `fuse` raises.
    """
    with _taken_back(model), _quiet():
        report = fuse()
    would = {"fused": "would fuse"}
    return FusionReport(
        [row._replace(action=would.get(row.action, row.action)) for row in report.groups]
    )


@contextmanager
def _taken_back(model: nn.Module) -> Iterator[None]:
    """On leaving, classes, chains, kernels and random state are what they were before."""
    modules = [(module, type(module), state_of(module)) for module in modules_in(model)]
    owners: list[Any] = [state for _, _, state in modules if state is not None]
    for found in chains_in(model):
        owners += [*states_of(found), found.chain]
        owners += [] if found.chain.seat is None else [found.chain.seat]
    saved = [(owner, dict(owner.__dict__)) for owner in owners]
    put_random_state_back = random_state()
    try:
        yield
    finally:
        put_random_state_back()
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
def _quiet() -> Iterator[None]:
    """What the `kernels` library logs is in the report; the call itself will log it again."""
    logger = logging.getLogger("kernels")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
