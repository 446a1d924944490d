"""Architectures of different topologies: whatever is fused, nothing changes.

The checks are those of `benchmarks/zoo`, which goes over every architecture.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch._dynamo.comptime import comptime
from torch._dynamo.exc import RestartAnalysis
from torch.nn import functional as F
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from support import Model
from zoo import (
    check,
    compare,
    discover,
    extras,
    heads,
    pairs,
    rounding,
    sources,
    sweep,
    table,
    worker,
)
from zoo.build import Built, build, perturbed, run
from zoo.classes import all_classes_of
from zoo.configs import small
from zoo.exceptions import CONFIGS, INPUTS
from zoo.flat import flat, same_bits
from zoo.heads import NOT_REACHED, check_others
from zoo.parts import called_inside
from zoo.reasons import why
from zoo.subset import SUBSET

from module_fusion import UnfuseError
from module_fusion.chain import Chain
from module_fusion.modules import FusedModule, state_of
from module_fusion.seat import NEEDS_GRADIENTS, FusedKernel

FOREVER = float("inf")
# How many norms before gated MLPs, and patch embeddings, those that have any have.
THERE = {
    "llama": (2, 0), "qwen3": (2, 0), "gemma2": (2, 0), "phi3": (2, 0), "glm4": (2, 0),
    "deepseek_v3": (1, 0), "jamba": (1, 0), "qwen2_5_vl_vision": (2, 1), "vit": (0, 1),
    "convnext": (0, 4), "clip": (0, 1), "wav2vec2": (0, 2),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", SUBSET)
def test_every_pair_and_every_family_changes_no_bit_and_is_undone_exactly(
    architecture: str,
) -> None:
    built = build(architecture)
    expected = compare.expectation(built)
    found = check.check(built, expected, FOREVER)
    assert found["faults"] == []
    assert len(found["pairs"]) == found["of_pairs"] > 0
    on_kernel = {tuple(g["paths"]) for g in found["groups"] if g["outcome"] == "kernel"}
    norms, patches = discover.norms_before_mlps(built), discover.patch_embeddings(built)
    assert (len(norms), len(patches)) == THERE.get(architecture, (0, 0))
    assert {*norms, *((path,) for path in patches)} <= on_kernel


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
    with pytest.raises(compare.Fault, match="outputs differ with a kernel"):
        check.check_pair(built, compare.expectation(built), pair)


@pytest.mark.filterwarnings("ignore")
def test_other_classes_of_a_type_are_checked_for_the_pairs_that_they_alone_have() -> None:
    built = build("bert")
    seen: set[object] = set()
    assert pairs.pairs_of(built, seen) == pairs.pairs_of(built)
    assert pairs.pairs_of(built, seen) == []
    rows = check_others("bert", built, seen, FOREVER)
    assert [row["class"] for row in rows] == [
        name for name in all_classes_of("bert") if name != type(built.model).__name__
    ]
    assert [row for row in rows if "error" in row] == []
    found = {row["class"]: row for row in rows}
    named = [pair["pair"] for pair in found["BertForTokenClassification"]["pairs"]]
    assert ["dropout", "classifier"] in named
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


def test_a_backbone_in_a_small_model_has_the_stages_that_were_chosen() -> None:
    config = small(CONFIG_MAPPING["depth_anything"], "all", {})
    assert config.backbone_config.num_hidden_layers == 4
    assert list(config.backbone_config.out_indices) == [1, 2, 3, 4]
    config = small(CONFIG_MAPPING["rt_detr"], "all", {})
    assert list(config.backbone_config.out_indices) == [2, 3, 4]


def test_a_part_has_its_own_settings_in_the_model_around_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(CONFIGS, "clip_text_model", {"hidden_size": 24, "vocab_size": 99})
    config = small(CONFIG_MAPPING["clip"], "all", {"text_config": {"vocab_size": 77}})
    assert (config.text_config.hidden_size, config.text_config.vocab_size) == (24, 77)


def test_known_inputs_are_always_given_and_none_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[3, 4, 5]])
    monkeypatch.setitem(INPUTS, "llama", {"input_ids": ids, "attention_mask": torch.ones(1, 3)})
    assert build("llama").inputs.keys() == {"input_ids", "attention_mask"}
    assert build("llama").inputs["input_ids"] is ids
    monkeypatch.setitem(INPUTS, "llama", {"input_ids": None, "inputs_embeds": torch.ones(1, 3, 32)})
    assert build("llama").inputs.keys() == {"inputs_embeds"}


def test_results_of_several_versions_have_tables_of_their_own(tmp_path: Path) -> None:
    pair = {"pair": ["a", "b"], "follows": True, "outcome": "kernel"}
    row = {
        "architecture": "bert", "status": "checked", "class": "BertModel", "pairs": [pair],
        "of_pairs": 2, "faults": [], "no_gradients": "no output requires one",
        "groups": [{"family": "f", "outcome": "skipped", "reason": "'a.b' is small"}] * 2,
        "others": [
            {"class": "A", "pairs": [pair], "of_pairs": 1, "reference": "same bits",
             "groups": [{"outcome": "kernel"}], "gradients": 2e-5},
            {"class": "B", "error": "refused"},
            {"class": "C", "pairs": [], "of_pairs": 0},
        ],
    }  # fmt: skip
    table.write([row], tmp_path, "zoo-old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo-old.json", "zoo-old.md"]
    text = (tmp_path / "zoo-old.md").read_text()
    assert "| model classes checked | 2 |" in text
    assert "| other model classes, all of whose pairs had been checked in another | 1 |" in text
    assert "| model classes that were not built | 1 |" in text
    assert "| other model classes run with `fuse` | 1 |" in text
    assert "| of these, groups on the kernel | 1 |" in text
    assert "largest difference, of its own largest element | 2.0e-05 |" in text
    assert "| f | 2 | '…' is small | bert |" in text
    assert "| bert | no output requires one |" in text
    assert "| bert | B | refused |" in text
    assert "| pairs: kernel | 2 |" in text
    assert "| outputs of `fuse`: what they were compared with was not noted | 1 |" in text
    assert "| pairs fused by path | 2 of 3 |" in text
    assert "| pairs not reached: time | 1 |" in text
    assert (
        '"others": {"A": [[1, "kernel", null]], "B": "refused", "C": []}'
        in (tmp_path / "zoo-old.json").read_text()
    )


def test_what_a_sweep_that_follows_another_left_out_is_told(tmp_path: Path) -> None:
    table.write([], tmp_path, "zoo-old", {"bert"})
    text = (tmp_path / "zoo-old.md").read_text()
    assert "| llama | left out |  | not checked by the sweep that this one follows |" in text
    assert "| bert | not reached |  | not in this sweep |" in text


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


class Weightless(nn.Module):
    """An RMSNorm without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


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
        (Weightless(), False, [("first", "second")]),
        (nn.Identity(), False, []),
        (nn.RMSNorm(8), True, []),
        (nn.LayerNorm(8), False, []),
    ],
)
def test_the_count_of_norms_before_gated_mlps_needs_no_names(
    norm: nn.Module, is_used_twice: bool, found: list[tuple[str, str]]
) -> None:
    built = Built(Pair(norm, is_used_twice), {"x": torch.randn(2, 3, 8)}, "all")
    assert discover.norms_before_mlps(built) == found


def test_a_kernel_that_ran_in_some_blocks_is_counted_apart(tmp_path: Path) -> None:
    mixed = {"pair": ["a", "b"], "outcome": "kernel", "reason": "why"}  # Of an earlier sweep.
    row = {
        "architecture": "bert", "status": "checked", "class": "A", "of_pairs": 2, "groups": [],
        "pairs": [mixed, {**mixed, "outcome": "kernel in some blocks"}], "faults": [],
        "no_gradients": None, "reference": "unfused", "out_of_memory": ["fuse"],
    }  # fmt: skip
    table.write([row], tmp_path)
    text = (tmp_path / "zoo.md").read_text()
    assert "| pairs: kernel in some blocks | 2 |" in text
    assert "| 2 | why |" in text
    assert "there being no float64 twin | 1 |" in text
    assert "| architectures in which a check ran out of memory | 1 |" in text
    assert "the kernel was called. On a CPU in float32 the one of `patch_embeddings` itself" in text
    said = "1 of the architectures were checked by an earlier state of the package"
    assert said in text
    table.write([{**row, "sources": sources.digest()}], tmp_path)
    assert said not in (tmp_path / "zoo.md").read_text()


def test_groups_that_leave_the_kernel_with_gradients_are_counted(tmp_path: Path) -> None:
    group = {"family": "patch_embeddings", "paths": ["a"], "outcome": "kernel", "reason": None}
    groups = [
        {**group, "with_gradients": "kernel"}, {**group, "with_gradients": "members"}, group,
        {**group, "outcome": "members", "with_gradients": "members"},
    ]  # fmt: skip
    row = {
        "architecture": "bert", "status": "checked", "class": "A", "of_pairs": 0, "pairs": [],
        "groups": groups, "faults": [], "no_gradients": None,
    }  # fmt: skip
    table.write([row], tmp_path)
    text = (tmp_path / "zoo.md").read_text()
    assert "| patch_embeddings: groups fused, on the kernel | 3 of 4 (75.0 %) |" in text
    assert "on it with gradients too, of those run with gradients | 1 of 2 (50.0 %) |" in text


def tiny() -> Built:
    """Two blocks, each with a norm before a gated MLP."""
    torch.manual_seed(0)
    model = Model(2)
    model.layers[0].norm.sizes = (8, 1e-6)
    return Built(perturbed(model), {"x": torch.randn(2, 3, 8)}, "all", part_of="a test")


def faults_of(built: Built) -> list[dict[str, str]]:
    faults: list[dict[str, str]] = check.check(built, compare.expectation(built), FOREVER)["faults"]
    return faults


def test_the_small_model_of_these_tests_has_no_fault() -> None:
    built = tiny()
    found = check.check(built, compare.expectation(built), FOREVER)
    assert found["faults"] == []
    assert [group["outcome"] for group in found["groups"]] == ["kernel", "kernel"]
    assert [group["with_gradients"] for group in found["groups"]] == ["kernel", "kernel"]
    assert [pair["outcome"] for pair in found["pairs"]].count("kernel") == 2
    assert found["reference"] == "same bits"


Plant = Callable[[pytest.MonkeyPatch], None]


def _after_kernels(is_family: bool, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """Changes what the kernels of families, or of groups named by paths, give."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def run_kernel(self: Chain, inputs: list[Any]) -> Any:
            output = real(self, inputs)
            return change(output) if bool(self.family) == is_family else output

        real = Chain.run_kernel
        monkeypatch.setattr(Chain, "run_kernel", run_kernel)

    return plant


def _gradient_times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(output: torch.Tensor) -> torch.Tensor:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)
        return output

    return change


def _off_with_gradients(by: float, every: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of so many outputs the last is off where gradients are recorded; its gradient is not."""

    def change(output: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or next(calls) % every:
            return output
        return output + by * output.detach()

    calls = itertools.count(1)
    return change


def _drawing(draw: Callable[[], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(output: torch.Tensor) -> torch.Tensor:
        draw()
        return output

    return change


def _never_where(condition: Callable[[], bool], reason: str) -> Plant:
    """Leaves calls to the members."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def why_not_these(self: FusedKernel, inputs: list[Any], weights: list[Any]) -> str | None:
            return reason if condition() else real(self, inputs, weights)

        real = FusedKernel.why_not_these
        monkeypatch.setattr(FusedKernel, "why_not_these", why_not_these)

    return plant


def _lose_the_gradient_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the caller gave."""

    def run_kernel(self: Chain, inputs: list[Any]) -> Any:
        return real(self, [x.detach() if x.is_leaf else x for x in inputs])

    real = Chain.run_kernel
    monkeypatch.setattr(Chain, "run_kernel", run_kernel)


class Marked(torch.Tensor):
    """Another kind of tensor; what is computed from it is one too."""


def _marked(output: torch.Tensor) -> torch.Tensor:
    return output.as_subclass(Marked)


def _without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of what the last member gives."""

    def call(self: FusedModule, *args: Any, **kwargs: Any) -> Any:
        output = real(self, *args, **kwargs)
        state = state_of(self)
        by_itself = state is not None and state.chain is not None and state.chain.kernel is None
        return output * (1 + 2**-23) if by_itself else output

    real = FusedModule.__call__
    monkeypatch.setattr(FusedModule, "__call__", call)


def _without_a_kernel_or_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no gradients are recorded alone."""

    def call(self: FusedModule, *args: Any, **kwargs: Any) -> Any:
        by_itself = now if torch.is_grad_enabled() else planted
        return by_itself(self, *args, **kwargs)

    now = FusedModule.__call__
    _without_a_kernel(monkeypatch)
    planted = FusedModule.__call__
    monkeypatch.setattr(FusedModule, "__call__", call)


def _another_key(with_a_kernel: bool) -> Plant:
    """One more in the state dict of a model that is fused by path."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def add(module: nn.Module, state: dict[str, Any], *args: Any) -> None:
            state["stray"] = torch.zeros(1)

        def fuse_modules(model: nn.Module, paths: Any, **options: Any) -> Any:
            result = fuse(model, paths, **options)
            if ("kernel" in options) is with_a_kernel:
                handles.append(model.register_state_dict_post_hook(add))
            return result

        def unfuse_modules(model: nn.Module) -> Any:
            while handles:
                handles.pop().remove()
            return unfuse(model)

        handles: list[Any] = []
        fuse, unfuse = check.fuse_modules, check.unfuse_modules
        monkeypatch.setattr(check, "fuse_modules", fuse_modules)
        monkeypatch.setattr(check, "unfuse_modules", unfuse_modules)

    return plant


def _undoing(change: Callable[[nn.Module], object]) -> Plant:
    """Changes the model after it was unfused."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def unfuse(model: nn.Module) -> Any:
            result = real(model)
            change(model)
            return result

        real = check.unfuse_modules
        monkeypatch.setattr(check, "unfuse_modules", unfuse)

    return plant


def _leave_an_attribute(model: nn.Module) -> None:
    model.layers[0].norm.left = 1


def _change_a_value(model: nn.Module) -> None:
    model.layers[0].norm.sizes = (8, 1e-5)


def _leave_a_hook(model: nn.Module) -> None:
    model.layers[0].norm.register_forward_hook(lambda *args: None)


def _change_a_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.layers[0].norm.weight[0] *= 1 + 2**-23


def _raise(model: nn.Module) -> None:
    raise UnfuseError("the class was changed")


@pytest.mark.parametrize(
    ("plant", "where", "fault"),
    [
        (_after_kernels(False, _gradient_times(1 + 1e-4)), "->", "the gradient of .* differs with"),
        (_after_kernels(False, _gradient_times(0)), "->", "the gradient of .* differs with a kern"),
        (_after_kernels(True, _gradient_times(1 + 5e-5)), "fuse", "the gradient of .* with `fuse`"),
        (_after_kernels(True, _gradient_times(0)), "fuse", "the gradient of .* with `fuse`"),
        (_after_kernels(True, lambda y: y * (1 + 1e-4)), "fuse", "accuracy of `fuse`"),
        (_after_kernels(True, _off_with_gradients(1, 2)), "fuse", "accuracy of `fuse`, with grad"),
        (_after_kernels(True, _off_with_gradients(1e-5, 1)), "fuse", "accuracy of `fuse`, with"),
        (_after_kernels(True, _marked), "fuse", "outputs differ with `fuse`: Marked .* for Tensor"),
        (_without_a_kernel, "->", "outputs differ without a kernel"),
        (_without_a_kernel_or_gradients, "->", "outputs differ without a kernel"),
        (_another_key(False), "->", "the state dict is not as it was without a kernel"),
        (_another_key(True), "->", "the state dict is not as it was with a kernel"),
        (_undoing(_leave_an_attribute), "fuse", "after undoing `fuse` the model is not as it was"),
        (_undoing(_leave_an_attribute), "->", "after undoing the model is not as it was"),
        (_after_kernels(True, _drawing(lambda: torch.rand(1))), "fuse", "other random numbers"),
        (_after_kernels(False, _drawing(lambda: torch.rand(1))), "->", "other random numbers"),
        (_after_kernels(True, _drawing(numpy.random.rand)), "fuse", "other random numbers"),
        (_after_kernels(True, _drawing(random.random)), "fuse", "other random numbers"),
        (_never_where(torch.is_grad_enabled, "why"), "fuse", "does not run with gradients: why"),
        (_lose_the_gradient_of_inputs, "fuse", "the gradient of input x differs with `fuse`"),
        (_lose_the_gradient_of_inputs, "->", "the gradient of input x differs with a kernel"),
        (_undoing(_change_a_value), "fuse", r"layers.0.norm.sizes is \(8, 1e-05\), it was \(8, 1e"),
        (_undoing(_change_a_value), "->", r"layers.0.norm.sizes is \(8, 1e-05\), it was"),
        (_undoing(_leave_a_hook), "->", "after undoing the model is not as it was"),
        (_undoing(_change_a_weight), "fuse", "after undoing `fuse` the state dict is not as it"),
        (_undoing(_raise), "fuse", "UnfuseError: the class was changed"),
        (_undoing(_raise), "->", "UnfuseError: the class was changed"),
    ],
)  # fmt: skip
def test_a_fault_of_the_library_is_found(
    plant: Plant, where: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tiny()
    with monkeypatch.context() as planted:
        plant(planted)
        faults = faults_of(built)
    assert [f for f in faults if where in f["what"] and re.search(fault, f["fault"])], faults


def test_a_kernel_without_a_backward_is_no_fault_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = tiny()
    expected = compare.expectation(built)
    _never_where(torch.is_grad_enabled, f"{NEEDS_GRADIENTS} and it has none")(monkeypatch)
    found = check.check(built, expected, FOREVER)
    assert found["faults"] == []
    assert [(g["outcome"], g["with_gradients"]) for g in found["groups"]] == [
        ("kernel", "members")
    ] * 2


class Talking(Model):
    """Gives one token after the other."""

    def __init__(self) -> None:
        super().__init__(2)
        self.embed = nn.Embedding(8, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embed(input_ids))

    def can_generate(self) -> bool:
        return True

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **options: Any) -> Any:
        logits = []
        for _ in range(max_new_tokens):
            logits.append(self(input_ids[:, -1:])[:, -1])
            input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], 1)
        return SimpleNamespace(sequences=input_ids, logits=tuple(logits))


def talking() -> Built:
    torch.manual_seed(0)
    return Built(perturbed(Talking()), {"input_ids": torch.tensor([[3, 1, 2]])}, "all")


PAIR = ("layers.*.norm", "layers.*.mlp")


@pytest.mark.parametrize(
    ("checked", "plant", "fault"),
    [
        (
            extras.check_generate,
            _after_kernels(True, lambda y: y * (1 + 1e-4) if y.shape[1] == 1 else y),
            "generate, with `fuse`: accuracy of `fuse`",
        ),
        (
            extras.check_compiled,
            _after_kernels(
                True, lambda y: y * (1 + 1e-5) if torch.compiler.is_dynamo_compiling() else y
            ),
            "compiled, with `fuse`: accuracy of `fuse`",
        ),
        (
            extras.check_compiled,
            _never_where(torch.compiler.is_dynamo_compiling, "why"),
            "compiled, with `fuse`: 0 of 2 calls of kernels are in the graph",
        ),
    ],
)
def test_a_fault_in_steps_of_one_token_or_in_a_graph_is_found(
    checked: Callable[..., Any], plant: Plant, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = talking()
    expected = compare.expectation(built)
    assert checked(built, expected, PAIR) == "same"
    plant(monkeypatch)
    with pytest.raises(compare.Fault, match=fault):
        checked(built, expected, PAIR)


class Drawing(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.rand(()) * numpy.random.rand())


class NoGradientOfInputs(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.from_numpy(x.numpy()))


@pytest.mark.parametrize(("cls", "has_them"), [(Drawing, True), (NoGradientOfInputs, False)])
def test_models_that_draw_or_give_inputs_no_gradients_have_no_fault(
    cls: type[Model], has_them: bool
) -> None:
    torch.manual_seed(0)
    built = Built(perturbed(cls(2)), {"x": torch.randn(2, 3, 8)}, "all")
    expected = compare.expectation(built)
    assert expected.gradients is not None
    assert (expected.with_inputs is not None) is has_them
    found = check.check(built, expected, FOREVER)
    assert found["faults"] == []
    assert [group["with_gradients"] for group in found["groups"]] == ["kernel", "kernel"]


def test_an_error_while_undoing_does_not_hide_what_was_wrong_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = tiny()
    expected = compare.expectation(built)
    _without_a_kernel(monkeypatch)
    _undoing(_raise)(monkeypatch)
    with pytest.raises(compare.Fault, match=r"without a kernel.*; then UnfuseError: the class"):
        check.check_pair(built, expected, ("layers.*.norm", "layers.*.mlp"))


@pytest.mark.parametrize("plant", [_without_a_kernel, _undoing(_raise)])
def test_a_fault_is_one_in_the_row_of_the_architecture_and_of_other_classes(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.build, "build", lambda *args: tiny())
    monkeypatch.setattr(heads, "build", lambda *args: tiny())
    monkeypatch.setattr(worker.extras, "in_sample", lambda *args: False)
    monkeypatch.setattr(heads, "all_classes_of", lambda name: ["Model", "Other"])
    assert worker.examine("llama", FOREVER)["faults"] == []
    assert [row["faults"] for row in check_others("llama", tiny(), set(), FOREVER)] == [[]]
    plant(monkeypatch)
    row = worker.examine("llama", FOREVER)
    assert row["status"] == "checked"
    assert row["faults"]
    (other,) = check_others("llama", tiny(), set(), FOREVER)
    assert "error" not in other
    assert other["faults"]


def test_a_class_without_pairs_of_its_own_runs_with_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "build", lambda *args: tiny())
    monkeypatch.setattr(heads, "all_classes_of", lambda name: ["Model", "Other"])
    seen: set[object] = set()
    assert pairs.pairs_of(tiny(), seen)
    (other,) = check_others("llama", tiny(), seen, FOREVER)
    assert (other["of_pairs"], other["faults"]) == (0, [])
    assert [group["outcome"] for group in other["groups"]] == ["kernel", "kernel"]
    _after_kernels(True, lambda y: y * 2)(monkeypatch)
    (other,) = check_others("llama", tiny(), seen, FOREVER)
    assert [fault["what"] for fault in other["faults"]] == ["Other: fuse"]


def test_a_gradient_of_a_graph_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    built = tiny()
    expected = compare.expectation(built)
    assert extras.check_compiled(built, expected, PAIR, True) == "same, gradients too"

    def another_gradient(y: torch.Tensor) -> torch.Tensor:
        is_traced = torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()
        return y + 0.01 * (y - y.detach()) if is_traced else y

    for is_family, how in ((True, "with `fuse`"), (False, "fused")):
        with monkeypatch.context() as planted:
            _after_kernels(is_family, another_gradient)(planted)
            with pytest.raises(compare.Fault, match=f"the gradient of .* differs compiled.*{how}"):
                extras.check_compiled(built, expected, PAIR, True)


def _traced_with_gradients() -> bool:
    return torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()


def _off_where_traced(y: torch.Tensor) -> torch.Tensor:
    return y + 1e-5 * y.detach() if _traced_with_gradients() else y


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (_after_kernels(True, _off_where_traced), "with gradients, with `fuse`: accuracy of"),
        (
            _after_kernels(False, _off_where_traced),
            "outputs differ compiled, with gradients, with .* fused",
        ),
        (
            _never_where(_traced_with_gradients, "why"),
            "with gradients, with `fuse`: 0 of 2 calls of kernels are in the graph",
        ),
    ],
)
def test_a_fault_in_a_graph_with_gradients_alone_is_found(
    plant: Plant, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tiny()
    expected = compare.expectation(built)
    plant(monkeypatch)
    assert extras.check_compiled(built, expected, PAIR) == "same"
    with pytest.raises(compare.Fault, match=fault):
        extras.check_compiled(built, expected, PAIR, True)


def test_a_sweep_goes_on_after_a_row_that_was_not_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answering:
        def ask(self, name: str, seconds: float) -> dict[str, Any]:
            return {"architecture": name, "status": "checked"}

        def end(self) -> None:
            pass

    results = tmp_path / "zoo.jsonl"
    results.write_text('{"architecture": "a", "status": "checked"}\n{"archi')
    assert [row["architecture"] for row in sweep.read(results)] == ["a"]
    monkeypatch.setattr(sweep, "Worker", Answering)
    sweep.sweep(["b"], results, 1, FOREVER, lambda row: None)
    assert [row["architecture"] for row in sweep.read(results)] == ["a", "b"]


@pytest.mark.parametrize("name", ["check_generate", "check_compiled"])
def test_an_error_in_the_sample_is_a_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise UnfuseError("the class was changed")

    monkeypatch.setattr(worker.build, "build", lambda *args: tiny())
    monkeypatch.setattr(worker.extras, "in_sample", lambda *args: name == "check_compiled")
    monkeypatch.setattr(worker.extras, name, failing)
    row = worker.examine("llama", FOREVER)
    what = name.removeprefix("check_")
    assert row["faults"] == [{"what": what, "fault": "UnfuseError: the class was changed"}]


def test_a_model_that_gives_something_else_each_time_is_not_comparable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    counting = Built(Counting(), {"x": torch.zeros(2)}, "all", part_of="a test")
    with pytest.raises(compare.NotComparable, match="two runs of the unfused model differ"):
        compare.expectation(counting)
    monkeypatch.setattr(worker.build, "build", lambda *args: counting)
    assert worker.examine("llama", FOREVER)["status"] == "not comparable"


def test_memory_that_does_not_suffice_is_no_fault_and_is_in_the_row() -> None:
    result: dict[str, Any] = {"faults": []}
    with compare.noted("fuse", result):
        raise MemoryError
    assert result == {"faults": [], "out_of_memory": ["fuse"]}


class Uneven(nn.Module):
    """A parameter of small gradients, one whose gradient is only rounding, one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.shift, self.unused = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x + self.shift, -1) * self.large + 1e-6 * x * self.small


def test_each_gradient_is_compared_by_its_own_size() -> None:
    torch.manual_seed(0)
    expected = compare.expectation(Built(Uneven(), {"x": torch.randn(64, 8)}, "all"))
    right = dict(expected.gradients or {})
    for within in (rounding.ANOTHER_ORDER, rounding.ANOTHER_KERNEL):

        def checked(within: float = within, **changed: Any) -> None:
            rounding.check_gradients({**right, **changed}, expected, within, "now")

        checked()
        checked(large=right["large"] * (1 + within / 2), shift=-right["shift"])
        for name, factor in (("large", 1 + 2 * within), ("small", 1.1)):
            for wrong in (right[name] * factor, torch.zeros(8), right[name].double()):
                with pytest.raises(compare.Fault, match=f"the gradient of {name}"):
                    checked(**{name: wrong})
        with pytest.raises(compare.Fault, match="the gradient of shift differs"):
            checked(shift=right["shift"] + 1e-3)
        with pytest.raises(compare.Fault, match="the gradient of small is missing"):
            checked(small=None)
        with pytest.raises(compare.Fault, match="the gradient of unused is there"):
            checked(unused=torch.zeros(1))


def test_beside_an_infinite_gradient_the_others_are_compared_as_ever() -> None:
    torch.manual_seed(0)
    expected = compare.expectation(Built(Uneven(), {"x": torch.randn(64, 8)}, "all"))
    right = dict(expected.gradients or {})
    infinite = torch.full((8,), torch.inf)
    infinite[:4] = right["small"][:4]
    expected.gradients = {**right, "small": infinite}
    rounding.check_gradients({**right, "small": infinite.clone()}, expected, 1e-3, "now")
    for name, wrong in (
        ("large", right["large"] * 2),
        ("small", -infinite),
        ("small", torch.full((8,), torch.inf)),
        ("small", torch.where(infinite.isinf(), infinite, infinite * 2)),
        ("small", torch.full((8,), torch.nan)),
    ):
        found = {**right, "small": infinite, name: wrong}
        with pytest.raises(compare.Fault, match=f"the gradient of {name} differs"):
            rounding.check_gradients(found, expected, 1e-3, "now")


class Large(nn.Module):
    """A large output and a small one."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.exp(x) * 1e3, torch.tanh(x) * 1e-3


def test_a_small_output_is_compared_beside_a_large_one() -> None:
    torch.manual_seed(0)
    expected = compare.expectation(Built(Large(), {"x": torch.randn(64, 8)}, "all"))
    places = [i for i, v in enumerate(expected.outputs) if isinstance(v, torch.Tensor)]

    def outputs(*new: torch.Tensor) -> list[Any]:
        values = dict(zip(places, new, strict=True))
        return [values.get(i, value) for i, value in enumerate(expected.outputs)]

    large, small = (expected.outputs[place] for place in places)
    for exact in (expected.exact_outputs, lambda: None):
        near, far = (1 + 2**-23) * large, torch.zeros_like(small)
        rounding.check_accuracy(outputs(near, small), expected.outputs, exact)
        with pytest.raises(compare.Fault, match=r"of output \d alone"):
            rounding.check_accuracy(outputs(large, far), expected.outputs, exact)


def test_a_twin_without_finite_gradients_tells_nothing_of_their_rounding() -> None:
    torch.manual_seed(0)
    expected = compare.expectation(Built(Uneven(), {"x": torch.randn(64, 8)}, "all"))
    right = dict(expected.gradients or {})
    assert set(right) > set(compare._noise(expected.built, right)) >= {"large", "shift"}
    overflowing = {**right, "shift": torch.full((1,), torch.nan)}
    assert "shift" not in compare._noise(expected.built, overflowing)


def test_outputs_of_fuse_are_the_same_but_for_the_values_of_real_numbers() -> None:
    real = torch.rand(3)
    compare.check_alike(flat((real, 1)), flat((real + 1e-6, 1)), "now")
    for wrong in ((real, 2), [real, 1], (real,), (real.double(), 1), (real[:2], 1)):
        with pytest.raises(compare.Fault, match="outputs differ now"):
            compare.check_alike(flat(wrong), flat((real, 1)), "now")
    with pytest.raises(compare.Fault, match="outputs differ now"):
        compare.check_alike([torch.tensor([1])], [torch.tensor([2])], "now")


def test_without_a_float64_twin_the_outputs_of_fuse_are_compared_with_the_unfused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = tiny()
    expected = compare.expectation(built)
    near, far = ([expected.outputs[0] * (1 + by)] for by in (2**-23, 1e-4))
    outputs, exact = expected.outputs, expected.exact_outputs
    assert rounding.check_accuracy(near, outputs, exact) == "float64"
    exact = dataclasses.replace(expected).exact_outputs
    monkeypatch.setattr(compare, "FAR", 0.0)
    assert rounding.check_accuracy(near, outputs, exact) == "unfused"
    with pytest.raises(compare.Fault, match="accuracy of `fuse`"):
        rounding.check_accuracy(far, outputs, exact)


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclasses.dataclass
class Data:
    value: Any


class SomeCache(Holder):
    pass


def nested(value: Any, times: int = 40) -> Any:
    return value if times == 0 else (nested(value, times - 1),)


a, b = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Holder(a), Holder(b)), (Slotted(a), Slotted(b)), (Data(a), Data(b)),
        (SomeCache([a]), SomeCache([b])), (SimpleNamespace(t=a), SimpleNamespace(t=b)),
        (deque([a]), deque([b])), ({1}, {2}), (numpy.zeros(3), numpy.ones(3)),
        (numpy.float32(1), numpy.float32(2)), (numpy.array(["x"]), numpy.array(["y"])),
        (torch.distributions.Normal(a, b), torch.distributions.Normal(b, b)),
        (nested(a), nested(b)), ((None, a), (a, None)), ({"x": a}, {"y": a}), ((a,), [a]),
        (a, a.clone().requires_grad_()), (a.requires_grad_(False), nn.Parameter(a, False)),
        (torch.zeros(2, 3), torch.zeros(3, 2).T), (a, a.double()), (a, -a), (Holder(a), None),
        (torch.float32, torch.float64), (1, True), (1, 1.0), ([a, [a]], [a, a]),
    ],
)  # fmt: skip
def test_what_differs_anywhere_in_what_a_model_returns_is_seen(one: Any, other: Any) -> None:
    assert same_bits(flat(one), flat(one))
    assert not same_bits(flat(one), flat(other))


def test_an_object_that_holds_itself_is_looked_into_once() -> None:
    first, second = Holder(a), Holder(a)
    first.again, second.again = first, second
    assert same_bits(flat(first), flat(second))
    second.again = Holder(a)
    assert not same_bits(flat(first), flat(second))


def test_rows_know_the_sources_that_their_checks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("module_fusion/chain.py", "module_fusion/verify.py", "benchmarks/zoo/check.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert all((sources.ROOT / other).exists() for other in sources.OTHERS)
    monkeypatch.setattr(sources, "ROOT", tmp_path)

    def after(name: str) -> str:
        (tmp_path / name).write_text(f"# {name}")
        return sources.digest.__wrapped__()

    before = sources.digest.__wrapped__()
    assert after("module_fusion/verify.py") == before
    changed = after("module_fusion/chain.py")
    assert changed != before
    assert after("benchmarks/zoo/check.py") not in (before, changed)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128, torch.int64,
     torch.int8, torch.float8_e4m3fn],
    ids=str,
)  # fmt: skip
def test_one_other_bit_anywhere_in_a_tensor_is_seen(dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    for count, start in itertools.product((0, 1, 2, 3, 8, 9), (0, 1, 2, 8)):
        # Whatever the bits are, NaN and -0.0 among them, they are the same as themselves.
        tensors = [torch.full(((count + start) * size,), 255, dtype=torch.uint8) for _ in range(2)]
        first, second = (t.view(dtype)[start:] if len(t) else t.view(dtype) for t in tensors)
        assert same_bits([first], [second])
        for place in range(start * size, (start + count) * size):
            tensors[1][place] ^= 128
            assert not same_bits([first], [second])
            tensors[1][place] ^= 128


def test_views_are_compared_by_what_they_show() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    assert same_bits([value.conj()], [torch.tensor([1 - 2j, 3 + 4j])])
    assert not same_bits([value.conj()], [value])
    assert same_bits([value.conj().imag], [torch.tensor([1 - 2j, 3 + 4j]).imag])
    assert not same_bits([value.conj().imag], [value.imag])
    negative = torch._neg_view(torch.ones(4))
    assert same_bits([negative], [-torch.ones(4)])
    assert not same_bits([negative], [torch.ones(4)])
    assert not same_bits([torch.tensor(0j)], [torch.tensor(complex(-0.0, 0.0))])


def _start_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every kernel but the first, as the trace of a graph does that was wrong."""
    traces: set[int] = set()

    def start_again(context: Any) -> None:
        trace = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
        if len(traces) < 2:
            traces.add(len(traces))
            if len(traces) == 2:
                trace.speculation_log.clear()
                raise RestartAnalysis(restart_reason="a test")

    def change(y: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            comptime(start_again)
        return y

    _after_kernels(True, change)(monkeypatch)


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        (None, None),
        (lambda: not torch.compiler.is_dynamo_compiling(), "2 of 0"),
        (torch.compiler.is_dynamo_compiling, "0 of 2"),
    ],
)
def test_kernels_in_a_graph_are_counted_once_where_its_trace_started_again(
    where: Callable[[], bool] | None, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tiny()
    expected = compare.expectation(built)
    with monkeypatch.context() as patch:
        _start_again_once(patch)
        if where is None:
            assert extras.check_compiled(built, expected, None) == "same"
            assert len(extras._TRACED) == 4
            assert len(extras._MADE) == 1
            return
        _never_where(where, "why")(patch)
        with pytest.raises(compare.Fault, match=f"{fault} calls of kernels are in the graph"):
            extras.check_compiled(built, expected, None)
