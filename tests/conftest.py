"""Hypothesis profiles (`ci` by default, `deep` for a person with an hour) and common fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import Model
from torch import Tensor

from module_fusion.families.family import _FAMILIES

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("quick", max_examples=100, **_COMMON)
# The same examples in every run, so that a change is judged by what it changes.
settings.register_profile("ci", max_examples=2500, derandomize=True, **_COMMON)
settings.register_profile("deep", max_examples=200_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Graphs of other tests count towards the recompile limit of the code they share."""
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _families_as_before() -> Iterator[None]:
    """What a test, or a page of the documentation, registers is gone after it."""
    before = dict(_FAMILIES)
    yield
    _FAMILIES.clear()
    _FAMILIES.update(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small spend their time in waking threads, most of all in backward passes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is, one after the other."""
    return str(request.param)


@pytest.fixture
def x(device: str) -> Tensor:
    """Hidden states `(batch, tokens, hidden)`."""
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, device=device)


@pytest.fixture
def model(device: str) -> Model:
    torch.manual_seed(1)
    return Model(2).to(device)
