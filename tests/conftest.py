"""Hypothesis profiles: `ci` by default, `deep` for a person with an hour."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("quick", max_examples=100, **_COMMON)
settings.register_profile("ci", max_examples=2500, **_COMMON)
settings.register_profile("deep", max_examples=200_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Graphs of other tests count towards the recompile limit of the code they share."""
    yield
    torch.compiler.reset()
