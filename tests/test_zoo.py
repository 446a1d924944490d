"""Architectures of different topologies: whatever is fused, nothing changes.

The checks are those of `benchmarks/zoo`, which goes over every architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from zoo import check, discover
from zoo.build import build
from zoo.subset import SUBSET

FOREVER = float("inf")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", SUBSET)
def test_every_pair_and_every_family_changes_no_bit_and_is_undone_exactly(
    architecture: str,
) -> None:
    built = build(architecture)
    expected = check.expectation(built)
    found = check.check(built, expected, FOREVER)
    assert found["faults"] == []
    assert len(found["pairs"]) == found["of_pairs"] > 0
    on_kernel = {tuple(g["paths"]) for g in found["groups"] if g["outcome"] == "kernel"}
    assert set(discover.norms_before_mlps(built)) <= on_kernel
    assert {(path,) for path in discover.patch_embeddings(built)} <= on_kernel
