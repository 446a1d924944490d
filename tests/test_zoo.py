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

from zoo import check, discover, table
from zoo.build import Built, build, run
from zoo.classes import all_classes_of
from zoo.heads import NOT_REACHED, check_others
from zoo.parts import called_inside
from zoo.reasons import why
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


@pytest.mark.filterwarnings("ignore")
def test_other_classes_of_a_type_are_checked_for_the_pairs_that_they_alone_have() -> None:
    built = build("bert")
    seen: set[object] = set()
    assert check.pairs_of(built, seen) == check.pairs_of(built)
    assert check.pairs_of(built, seen) == []
    rows = check_others("bert", built, seen, FOREVER)
    assert [row["class"] for row in rows] == [
        name for name in all_classes_of("bert") if name != type(built.model).__name__
    ]
    assert [row for row in rows if "error" in row] == []
    found = {row["class"]: row for row in rows}
    pairs = [pair["pair"] for pair in found["BertForTokenClassification"]["pairs"]]
    assert ["dropout", "classifier"] in pairs
    assert all(len(row["pairs"]) == row["of_pairs"] and not row["faults"] for row in rows)
    assert all(row["of_pairs"] == 0 for row in check_others("bert", built, seen, FOREVER))


@pytest.mark.filterwarnings("ignore")
def test_classes_for_which_there_is_no_time_are_named() -> None:
    built = build("bert")
    rows = check_others("bert", built, set(), deadline=0)
    assert {row["error"] for row in rows} == {NOT_REACHED}


@pytest.mark.filterwarnings("ignore")
def test_a_part_of_a_model_runs_with_what_it_is_given_there() -> None:
    whole = build("llama")
    calls = dict(called_inside(whole.model, "llama", lambda: run(whole.model, whole.inputs)))
    part = whole.model.get_submodule("model")
    hidden = run(part, calls[part]).last_hidden_state
    logits = whole.model.get_submodule("lm_head")(hidden)
    assert torch.equal(logits, run(whole.model, whole.inputs).logits)


def test_results_of_several_versions_have_tables_of_their_own(tmp_path: Path) -> None:
    pair = {"pair": ["a", "b"], "follows": True, "outcome": "kernel"}
    row = {
        "architecture": "bert", "status": "checked", "class": "BertModel", "pairs": [pair],
        "of_pairs": 2, "groups": [], "faults": [], "no_gradients": None,
        "others": [
            {"class": "A", "pairs": [pair], "of_pairs": 1}, {"class": "B", "error": "refused"},
        ],
    }  # fmt: skip
    table.write([row], tmp_path, "zoo-old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo-old.json", "zoo-old.md"]
    text = (tmp_path / "zoo-old.md").read_text()
    assert "| model classes checked | 2 |" in text
    assert "| model classes that were not built | 1 |" in text
    assert "| pairs fused by path | 2 of 3 |" in text
    assert "| pairs not reached: time | 1 |" in text
    assert (
        '"others": {"A": [[1, "kernel", null]], "B": "refused"}'
        in (tmp_path / "zoo-old.json").read_text()
    )


@pytest.mark.parametrize(
    ("failures", "reason"),
    [
        ([], "transformers has no model class for it"),
        (["build: ImportError: X requires the natten library"], "needs natten, which is"),
        (["config (all): ValueError: sizes"], "the small config is refused"),
        (["build: ValueError: 45 million parameters"], "too large"),
    ],
)
def test_what_is_not_built_has_a_kind_of_reason(failures: list[str], reason: str) -> None:
    assert why(failures).startswith(reason)


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
