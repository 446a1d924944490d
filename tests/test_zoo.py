"""Architectures of different topologies: whatever is fused, nothing changes.

The checks are those of `benchmarks/zoo`, which goes over every architecture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from zoo import check, discover
from zoo.build import Built, build
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


@pytest.mark.filterwarnings("ignore")
def test_a_kernel_that_is_wrong_in_one_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_wrong(inputs: int) -> type[nn.Module]:
        layer = right(inputs)
        forward = layer.forward
        layer.forward = lambda self, a0: forward(self, a0) * (1 + 2**-23)
        return layer

    right = check.members_kernel
    monkeypatch.setattr(check, "members_kernel", slightly_wrong)
    built = build("llama")
    pair = ("model.layers.*.post_attention_layernorm", "model.layers.*.mlp")
    with pytest.raises(check.Fault, match="outputs differ with a kernel"):
        check.check_pair(built, check.expectation(built), pair)


class GatedMlp(nn.Module):
    """One whose parts have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.a(x).chunk(2, -1)
        return self.b(one * F.gelu(two))


class Pair(nn.Module):
    def __init__(self, norm: nn.Module, is_used_twice: bool) -> None:
        super().__init__()
        self.first, self.second, self.is_used_twice = norm, GatedMlp(), is_used_twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.second(y) + (y if self.is_used_twice else x)


@pytest.mark.parametrize(
    ("norm", "is_used_twice", "found"),
    [
        (nn.RMSNorm(8), False, [("first", "second")]),
        (nn.RMSNorm(8), True, []),
        (nn.LayerNorm(8), False, []),
    ],
)
def test_the_count_of_norms_before_gated_mlps_needs_no_names(
    norm: nn.Module, is_used_twice: bool, found: list[tuple[str, str]]
) -> None:
    built = Built(Pair(norm, is_used_twice), {"x": torch.randn(2, 3, 8)}, "all")
    assert discover.norms_before_mlps(built) == found
