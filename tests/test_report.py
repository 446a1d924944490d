"""`FusionReport`: what was fused, what was skipped, which path ran and why."""

from __future__ import annotations

import copy
import json
import pickle
import re
from typing import Any

import pytest
import torch
from kernels import Mode
from support import PATHS, Mlp, Model, Norm, mapped, members_kernel
from torch import Tensor, nn

from module_fusion import (
    FusionReport,
    ModuleSpec,
    benchmark,
    fuse_modules,
    fused,
    report,
    unfuse_modules,
    verify,
)
from module_fusion.rendering.folding import Modules
from module_fusion.report import Feed, GroupReport

X = torch.ones(1, 8)
THREE_BLOCKS = """\
3 fused:
          modules                    classes      kernel  calls      note
--------  -------------------------  -----------  ------  ---------  ---------
fused x3  layers.[0-2]: norm -> mlp  Norm -> Mlp  -       members 0  no kernel
"""


def table(text: object) -> list[list[str]]:
    """The rows of a report's table without header and summary, notes where their numbers are."""
    summary, header, rule, *rows = str(text).splitlines()
    notes = "\n".join(row for row in rows if row.startswith(("[", "    ")))
    rows = [row for row in rows if not row.startswith(("[", "    "))]
    texts = {note[:3]: " ".join(note[3:].split()) for note in re.split(r"\n(?=\[)", notes)}
    assert summary.endswith(":")
    ends = [len(part) for part in rule.split("  ")]
    starts = [sum(ends[:i]) + 2 * i for i in range(len(ends))]
    cells = [
        [row[start : start + width].strip() for start, width in zip(starts, ends, strict=True)]
        for row in [header, *rows]
    ]
    cells = [[*row[:-1], texts.get(row[-1], row[-1])] for row in cells]
    assert cells[0] == ["", "modules", "classes", "kernel", "calls", "note"]
    return cells[1:]


def test_repeated_blocks_are_one_row() -> None:
    assert f"{fuse_modules(Model(3), PATHS)}\n" == THREE_BLOCKS


def test_one_block_is_a_row_with_its_own_paths() -> None:
    assert table(fuse_modules(Model(3), ["layers.1.norm", "layers.1.mlp"])) == [
        ["fused", "layers.1: norm -> mlp", "Norm -> Mlp", "-", "members 0", "no kernel"]
    ]


@pytest.mark.parametrize(
    ("slices", "span"),
    [("[:]", "[0-11]"), ("[::2]", "[0,2,4,6,8,10]"), ("[9:]", "[9-11]"), ("[2:4]", "[2-3]")],
)
def test_blocks_are_folded_into_ranges(slices: str, span: str) -> None:
    result = fuse_modules(Model(12), [f"layers.{slices}.norm", f"layers.{slices}.mlp"])
    assert table(result)[0][1] == f"layers.{span}: norm -> mlp"


def test_ranges_have_gaps_and_single_blocks() -> None:
    model = Model(8)
    fuse_modules(model, PATHS)
    unfuse_modules(model, ["layers.1.mlp", "layers.5.mlp"])
    assert table(report(model))[0][1] == "layers.[0,2-4,6-7]: norm -> mlp"


def test_two_numbers_in_a_path_fold_each_by_itself() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"mlp": Mlp()}) for _ in range(2))

    model = nn.Sequential(Experts(), Experts(), Experts())
    (row,) = table(fuse_modules(model, ["*.experts.*.mlp"]))
    assert row[:2] == ["fused x6", "[0-2].experts.[0-1].mlp"]


class Named(nn.Module):
    """A block whose members have any names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Mlp())

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize("names", [("01", "1"), ("00", "0"), ("\u0661", "1"), ("*", "1")])
def test_only_numbers_as_a_list_writes_them_are_folded(names: tuple[str, ...]) -> None:
    model = nn.ModuleDict({"d": nn.ModuleDict({name: Named("m", "n") for name in (*names, "2")})})
    result = fuse_modules(model, ["d.*.m", "d.*.n"])
    number = [*names, "2"][1:]
    assert [row[:2] for row in table(result)] == [
        ["fused", f"d.{names[0]}: m -> n"],
        ["fused x2", f"d.[{'-'.join(number) if number[0] == '1' else ','.join(number)}]: m -> n"],
    ]


class Refusing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("refused the members")


def _refuse(first: Any, last: Any) -> None:
    raise ValueError("no \ud800")


Refusing.forward.prepare = _refuse  # type: ignore[attr-defined]


@pytest.mark.parametrize("paths", [["a.b", "a.c"], ["norm", "mlp"]])
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_the_cell_of_a_chain_is_copied_and_pickled_as_it_is(paths: list[str], way: Any) -> None:
    cell = Modules(paths)
    again = way(cell)
    assert type(again) is Modules
    assert (again, again.place, again.members) == (str(cell), cell.place, cell.members)


def test_lone_surrogates_are_escaped_and_names_with_colons_stay_whole() -> None:
    model = nn.Sequential(Named("a: \ud800", "c"), Named("a: \ud800", "c"))
    for block in model:
        block.add_module("c", Named("e"))
    with mapped(K=Refusing):
        made = fuse_modules(model, {"first": "*.a: \ud800", "last": "*.c.e"}, kernel="K")
    x = torch.randn(2, 8)
    verified, measured = verify(model, x), benchmark(model, x, seconds=0, progress=False)
    for found in (made, verified, measured):
        for said in (str(found), found._repr_html_(), json.dumps(found.to_dict())):
            said.encode("utf-8")
            assert "the kernel refuses: no \\ud800" in said
    assert "no \\ud800" in measured.to_markdown()
    for found in (made, verified):
        assert "[0-1]: a: \\ud800 -> c.e" in str(found)
        markup = found._repr_html_()
        assert "[0-1]:</span></code>" in markup
        assert "a: \\ud800 \N{RIGHTWARDS ARROW} c.e</span></code>" in markup
    assert made.groups[0].paths[0] == "0.a: \ud800"


def test_blocks_of_other_classes_are_rows_of_their_own() -> None:
    class OtherMlp(Mlp):
        pass

    model = Model(3)
    model.layers[1].mlp = OtherMlp()
    assert [row[:3] for row in table(fuse_modules(model, PATHS))] == [
        ["fused x2", "layers.[0,2]: norm -> mlp", "Norm -> Mlp"],
        ["fused", "layers.1: norm -> mlp", "Norm -> OtherMlp"],
    ]


def test_blocks_with_another_path_or_reason_are_rows_of_their_own() -> None:
    model = Model(3)
    with mapped(Fast=members_kernel(1)):
        fuse_modules(model, PATHS, kernel="Fast")
    handle = model.layers[1].norm.register_forward_hook(lambda module, args, output: None)
    model(X)
    handle.remove()
    rows = table(report(model))
    assert [row[:2] for row in rows] == [
        ["fused x2", "layers.[0,2]: norm -> mlp"],
        ["fused", "layers.1: norm -> mlp"],
    ]
    assert [row[4] for row in rows] == ["kernel 2", "members 1"]
    assert rows[0][5] == ""
    assert rows[1][5].startswith("when the members ran last: norm has a hook")


def test_skipped_places_are_rows_with_their_reasons() -> None:
    model = Model(3)
    model.head = nn.Module()
    model.head.norm = Norm()
    del model.layers[1].mlp
    result = fuse_modules(model, ["**.norm", "**.mlp"])
    assert str(result).startswith("2 fused, 2 skipped:\n")
    rows = table(result)
    assert rows[0][:2] == ["fused x2", "layers.[0,2]: norm -> mlp"]
    assert [row[0] for row in rows[1:]] == ["skipped", "skipped"]
    assert [row[5] for row in rows[1:]] == [
        "'layers.1.norm' has no partner for '**.mlp'",
        "'head.norm' has no partner for '**.mlp'",
    ]
    assert [row[4] for row in rows[1:]] == ["", ""]
    assert [group.action for group in result.groups] == ["fused", "fused", "skipped", "skipped"]
    assert result.skipped == list(result.groups[2:])
    assert result.fused == list(result.groups[:2])


def test_every_call_says_what_it_did() -> None:
    model = Model(2)
    assert str(fuse_modules(model, ["layers.0.norm", "layers.0.mlp"])).startswith("1 fused:\n")
    assert str(fuse_modules(model, PATHS)).startswith("1 already fused, 1 fused:\n")
    assert str(report(model)).startswith("2 fused:\n")
    assert str(unfuse_modules(model)).startswith("2 unfused:\n")


@pytest.mark.parametrize("surgery", [report, unfuse_modules])
def test_a_model_with_nothing_fused_has_an_empty_report(surgery: object) -> None:
    result = surgery(Model(2))  # type: ignore[operator]
    assert str(result) == "Nothing is fused."
    assert not result.groups
    assert result.fused == []
    assert result.skipped == []
    assert result == FusionReport()


def test_a_report_reads_the_same_as_repr_and_as_text() -> None:
    result = fuse_modules(Model(2), PATHS)
    assert repr(result) == str(result)
    assert "2 fused" in f"{result}"


def test_a_group_without_a_kernel_counts_the_calls_of_its_members() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    model(X)
    model.layers[0](X)
    first, second = report(model).groups
    assert (first.kernel, first.path, first.reason) == (None, "members", "no kernel")
    assert (first.kernel_calls, first.member_calls) == (0, 2)
    assert (second.kernel_calls, second.member_calls) == (0, 1)
    assert table(report(model))[0][4] == "members 3"


def test_a_group_with_a_kernel_counts_its_calls() -> None:
    model = Model(2)
    with mapped(Fast=members_kernel(1)):
        fuse_modules(model, PATHS, kernel="Fast")
    group = report(model).groups[0]
    assert (group.kernel, group.path, group.reason) == ("Fast", "kernel", None)
    assert table(report(model))[0][3:] == ["Fast", "kernel 0", ""]
    for _ in range(3):
        model(X)
    assert table(report(model)) == [
        [
            "fused x2", "layers.[0-1]: norm -> mlp", "Norm -> Mlp", "Fast",
            "kernel 6", "",
        ]
    ]  # fmt: skip


def test_calls_of_kernel_and_members_are_both_told_with_the_last_reason() -> None:
    model = Model(1)
    with mapped(Fast=members_kernel(1)):
        fuse_modules(model, PATHS, kernel="Fast")
    model(X)
    with torch.autocast("cpu"):
        model(X)
        model(X)
    (row,) = table(report(model))
    assert row[4] == "kernel 1, members 2"
    assert row[5].startswith("when the members ran last: autocast is on")
    assert report(model).groups[0].reason.startswith("autocast is on")


def test_a_kernel_that_nobody_mapped_is_told() -> None:
    model = Model(1)
    with mapped():
        fuse_modules(model, PATHS, kernel="Fast")
    (group,) = report(model).groups
    assert (group.kernel, group.path) == ("Fast", "members")
    assert group.reason == "no kernel was loaded for 'Fast'"


def test_a_kernel_that_steps_aside_is_told() -> None:
    class NoBackward(members_kernel(1)):  # type: ignore[misc]
        has_backward = False

    model = Model(1)
    with mapped(Fast=NoBackward):
        fuse_modules(model, PATHS, kernel="Fast", mode=Mode.INFERENCE)
    model(X)
    (group,) = report(model).groups
    assert (group.kernel_calls, group.member_calls) == (0, 1)
    assert group.reason == "gradients are needed and the kernel has no backward"


def test_roles_and_classes_are_those_of_the_members() -> None:
    model = Model(1)
    roles = {"before": "layers.*.norm", "after": "layers.*.mlp"}
    (group,) = fuse_modules(model, roles).groups
    assert group.roles == ("before", "after")
    assert group.classes == ("Norm", "Mlp")


def test_paths_are_the_present_ones_after_the_model_moved() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    outer = nn.ModuleDict({"trunk": model})
    assert [group.paths for group in report(outer).groups] == [
        ("trunk.layers.0.norm", "trunk.layers.0.mlp"),
        ("trunk.layers.1.norm", "trunk.layers.1.mlp"),
    ]
    assert table(report(outer))[0][1] == (
        "trunk.layers.[0-1]: norm -> mlp"
    )  # fmt: skip
    assert report(model.layers[1]).groups[0].paths == ("norm", "mlp")
    unfused = unfuse_modules(outer)
    assert unfused.groups[0].paths == ("trunk.layers.0.norm", "trunk.layers.0.mlp")


def test_a_member_that_is_itself_the_module_asked_about_is_told_in_words() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    (group,) = report(model.layers[1].mlp).groups
    assert group.paths[0] == "outside: layers.1.norm"
    assert group.paths[1]
    assert not table(report(model.layers[1].mlp))[0][1].endswith("->")


def test_blocks_moved_to_a_new_order_are_reported_where_they_are() -> None:
    model = Model(3)
    fuse_modules(model, ["layers.0.norm", "layers.0.mlp"])
    model.layers = nn.ModuleList(reversed(list(model.layers)))
    assert report(model).groups[0].paths == ("layers.2.norm", "layers.2.mlp")


def test_the_report_in_a_with_block_is_that_of_fuse_modules() -> None:
    model = Model(2)
    with fused(model, PATHS) as inside:
        assert str(inside) == str(report(model))
    assert not report(model).groups


WIDE = """\
2 skipped, 1 fused:
         modules      classes      kernel      calls     note
-------  -----------  -----------  ----------  --------  ----
skipped  a: b -> c.d  Norm -> Mlp  RMSNormMLP            [1]
skipped  a: b -> c.e  Norm -> Mlp  RMSNormMLP            [1]
fused    f            Mlp          -           kernel 3  [2]
[1] the modules are not what the kernel knows, because the first has a weight of a shape that it
    cannot have, such as this
[2] mlp has a hook
"""


def test_notes_that_would_make_the_table_too_wide_are_below_it_once() -> None:
    long = (
        "the modules are not what the kernel knows, because the first has a weight of a shape "
        "that it cannot have, such as this"
    )
    shared = {"classes": ("Norm", "Mlp"), "kernel": "RMSNormMLP", "reason": long}
    groups = [
        GroupReport("skipped", paths=("a.b", "a.c.d"), **shared),
        GroupReport("skipped", paths=("a.b", "a.c.e"), **shared),
        GroupReport("fused", ("f",), ("f",), ("Mlp",), kernel_calls=3, reason="mlp has a hook"),
    ]
    assert f"{FusionReport(groups)}\n" == WIDE


def test_wires_are_told_where_they_do_not_go_straight_on() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, residual: Tensor, scale: float = 1.0) -> Tensor:
            return x * scale + residual

    model = nn.ModuleDict({"norm": Norm(), "mlp": Mlp(), "add": Add()})
    (straight,) = fuse_modules(model, ["norm", "mlp"]).groups
    assert straight.wires == (Feed(None, 0, "x"), Feed(0, 1, "x"))
    assert " takes " not in str(report(model))
    unfuse_modules(model)
    (inferred,) = fuse_modules(model, ["norm", "mlp", "add"]).groups
    assert inferred.wires == (
        Feed(None, 0, "x"),
        Feed(0, 1, "x"),
        Feed(1, 2, "x"),
        Feed(None, 2, "residual"),
        Feed(None, 2, "scale", optional=True),
    )
    assert table(report(model))[0][5] == "no kernel; add takes residual from outside"
    unfuse_modules(model)
    specs = [ModuleSpec(["x"], ["a"]), ModuleSpec(["a"], ["b"]), ModuleSpec(["b", "a"])]
    fuse_modules(model, ["norm", "mlp", "add"], specs)
    assert table(report(model))[0][5] == "no kernel; add takes residual from norm"


def test_chains_that_are_wired_differently_are_rows_of_their_own() -> None:
    groups = [
        GroupReport("fused", (f"layers.{i}.mlp",), ("mlp",), ("Mlp",), wires=(Feed(None, 0, name),))
        for i, name in enumerate(["x", "x", "y"])
    ]
    rows = [row[:2] for row in table(FusionReport(groups))]
    assert rows == [["fused x2", "layers.[0-1].mlp"], ["fused", "layers.2.mlp"]]


def test_a_printed_model_shows_the_roles_of_the_members() -> None:
    model = Model(2)
    plain = repr(model)
    fuse_modules(model, PATHS)
    text = repr(model)
    assert "(norm): RegistryCollector[Norm]()" in text
    assert "(mlp): FusedModule[Mlp](" in text
    assert "fused_kernel" not in text
    assert text.replace("RegistryCollector[Norm]", "Norm").replace(
        "FusedModule[Mlp]", "Mlp"
    ) == plain  # fmt: skip
    unfuse_modules(model)
    assert repr(model) == plain


def test_a_printed_model_keeps_what_members_say_of_themselves() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    fuse_modules(model, ["0", "1"])
    assert repr(model) == (
        "Sequential(\n"
        "  (0): RegistryCollector[Linear](in_features=8, out_features=8, bias=True)\n"
        "  (1): FusedModule[Linear](in_features=8, out_features=4, bias=True)\n"
        ")"
    )


def test_a_printed_model_shows_the_kernel_and_whether_it_is_there() -> None:
    model = Model(2)
    with mapped(Fast=members_kernel(1)):
        fuse_modules(model, ["layers.0.norm", "layers.0.mlp"], kernel="Fast")
    with mapped():
        fuse_modules(model, ["layers.1.norm", "layers.1.mlp"], kernel="Fast")
    first, second = (repr(block) for block in model.layers)
    assert "(fused_kernel): Fast()" in first
    assert "(fused_kernel): Fast(no kernel)" in second
    # Around a chain with a kernel is a boundary, which keeps the name of its class.
    assert first.startswith("Block(")


def test_a_report_of_a_wide_model_keeps_every_chain() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index in range(3):
                self.add_module(f"norm{index}", Norm())
                self.add_module(f"mlp{index}", Mlp())

        def forward(self, x: Tensor) -> Tensor:
            return x

    result = fuse_modules(Wide(), ["norm*", "mlp*"], [ModuleSpec(["x"], ["y"]), ModuleSpec(["y"])])
    assert [row[1] for row in table(result)] == [f"norm{i} -> mlp{i}" for i in range(3)]
