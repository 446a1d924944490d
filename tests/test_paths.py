"""Glob paths: what each form matches, how wildcards bind, and what a wrong path is told."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Model, Norm
from torch import nn

from module_fusion import (
    NotFusableError,
    PathNotFoundError,
    SpecMismatchError,
    fuse_modules,
    report,
    unfuse_modules,
)
from module_fusion.paths import find_groups, find_modules

Tree = dict[str, Any]


def tree(children: Tree) -> nn.Module:
    """A module whose children have these names; a module stands for itself."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child if isinstance(child, nn.Module) else tree(child))
    return module


def stack(blocks: int, **children: Tree) -> nn.Module:
    """`layers.0`, `layers.1`, ... with the same children each."""
    return tree({"layers": {str(index): dict(children) for index in range(blocks)}})


def matched(model: nn.Module, *paths: str) -> list[str]:
    return list(find_modules(model, paths))


def grouped(model: nn.Module, *paths: str) -> list[tuple[str, ...]]:
    return [group.paths for group in find_groups(model, paths)[0]]


def message(model: nn.Module, *paths: str) -> str:
    with pytest.raises(PathNotFoundError) as caught:
        find_groups(model, paths)
    return str(caught.value)


def test_a_path_without_wildcards_is_one_module() -> None:
    model = Model(2)
    assert find_modules(model, ["layers.1.mlp"]) == {"layers.1.mlp": model.layers[1].mlp}


def test_a_star_matches_any_text_within_one_segment() -> None:
    model = tree({"norm": {}, "norm1": {}, "my_norm": {"norm": {}}, "mlp": {}})
    assert matched(model, "norm*") == ["norm", "norm1"]
    assert matched(model, "*norm") == ["norm", "my_norm"]
    assert matched(model, "*o*") == ["norm", "norm1", "my_norm"]
    assert matched(model, "*.*") == ["my_norm.norm"]


def test_a_question_mark_matches_exactly_one_character() -> None:
    model = tree({"norm": {}, "norm1": {}, "norm12": {}})
    assert matched(model, "norm?") == ["norm1"]
    assert matched(model, "norm??") == ["norm12"]


def test_brackets_match_one_of_the_characters_or_none_of_them() -> None:
    model = tree({"norm_a": {}, "norm_b": {}, "norm_c": {}, "norm_": {}})
    assert matched(model, "norm_[ab]") == ["norm_a", "norm_b"]
    assert matched(model, "norm_[!ab]") == ["norm_c"]
    assert matched(model, "norm_[b-z]") == ["norm_b", "norm_c"]


def test_digits_in_brackets_are_characters_where_no_child_has_the_name_before_them() -> None:
    assert matched(tree({"norm1": {}, "norm2": {}, "norm3": {}}), "norm[12]") == ["norm1", "norm2"]


def test_two_stars_match_any_number_of_segments_and_none() -> None:
    model = tree({"norm": {}, "a": {"norm": {}, "b": {"norm": {}}}})
    assert matched(model, "**.norm") == ["norm", "a.norm", "a.b.norm"]
    assert matched(model, "a.**.norm") == ["a.norm", "a.b.norm"]
    assert matched(model, "a.**") == ["a", "a.norm", "a.b", "a.b.norm"]


def test_two_stars_never_match_the_model_itself() -> None:
    assert matched(tree({"a": {"b": {}}}), "**") == ["a", "a.b"]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("4:8", [4, 5, 6, 7]),
        ("::2", [0, 2, 4, 6, 8, 10]),
        ("-1", [10]),
        ("0", [0]),
        ("-11", [0]),
        (":2", [0, 1]),
        ("9:", [9, 10]),
        ("-2:", [9, 10]),
        ("9:99", [9, 10]),
        ("1:8:3", [1, 4, 7]),
        ("::-5", [10, 5, 0]),
    ],
)
def test_a_slice_selects_numbered_children_as_a_list_does(text: str, blocks: list[int]) -> None:
    model = stack(11, mlp={})
    expected = [f"layers.{block}.mlp" for block in blocks]
    assert matched(model, f"layers.[{text}].mlp") == expected
    assert matched(model, f"layers[{text}].mlp") == expected


def test_a_slice_counts_the_numbered_children_by_number_and_no_others() -> None:
    model = tree({"layers": {"10": {}, "norm": {}, "2": {}, "1": {}}})
    assert matched(model, "layers.[:2]") == ["layers.1", "layers.2"]
    assert matched(model, "layers[-1]") == ["layers.10"]


def test_a_slice_can_end_a_path_and_stand_under_a_wildcard() -> None:
    model = tree({"a": {"0": {}, "1": {}}, "b": {"0": {}, "1": {}, "2": {}}})
    assert matched(model, "*.[-1]") == ["a.1", "b.2"]


def test_a_child_that_is_none_is_no_module() -> None:
    model = tree({"a": {}})
    model.register_module("b", None)
    assert matched(model, "*") == ["a"]
    assert "no 'b' in Module" in message(model, "b")


def test_names_with_characters_of_regular_expressions_are_literal() -> None:
    model = nn.ModuleDict({"a+b": nn.Identity(), "aab": nn.Identity(), "a(b": nn.Identity()})
    assert matched(model, "a+*") == ["a+b"]
    assert matched(model, "a(?") == ["a(b"]


def test_members_of_the_same_block_are_grouped_in_the_order_of_the_paths() -> None:
    model = Model(2)
    groups, skipped = find_groups(model, ["layers.*.norm", "layers.*.mlp"])
    assert [group.paths for group in groups] == [
        ("layers.0.norm", "layers.0.mlp"),
        ("layers.1.norm", "layers.1.mlp"),
    ]
    assert groups[1].modules == (model.layers[1].norm, model.layers[1].mlp)
    assert skipped == []


def test_wildcards_bind_the_same_number_in_a_name() -> None:
    model = tree({"norm1": {}, "norm2": {}, "mlp2": {}, "mlp1": {}})
    assert grouped(model, "norm*", "mlp*") == [("norm1", "mlp1"), ("norm2", "mlp2")]
    assert grouped(model, "norm?", "mlp?") == [("norm1", "mlp1"), ("norm2", "mlp2")]
    assert grouped(model, "norm[1-9]", "mlp[1-9]") == [("norm1", "mlp1"), ("norm2", "mlp2")]


def test_wildcards_of_different_kinds_bind_the_same_block() -> None:
    model = stack(3, a={}, b={})
    expected = [("layers.0.a", "layers.0.b"), ("layers.1.a", "layers.1.b")]
    assert grouped(model, "layers.[0:2].a", "layers[0:2].b") == expected
    assert grouped(model, "layers[-1].a", "layers.[2].b") == [("layers.2.a", "layers.2.b")]


def test_every_wildcard_of_a_path_binds() -> None:
    inner = {"1": {"a": {}, "b": {}}, "2": {"a": {}, "b": {}}}
    model = tree({"x": inner, "y": inner})
    assert grouped(model, "*.*.a", "*.*.b") == [
        (f"{outer}.{number}.a", f"{outer}.{number}.b") for outer in "xy" for number in "12"
    ]


def test_members_need_not_share_a_parent() -> None:
    model = tree({"norms": {"0": {}, "1": {}}, "mlps": {"0": {}, "1": {}}})
    assert grouped(model, "norms.*", "mlps.*") == [("norms.0", "mlps.0"), ("norms.1", "mlps.1")]


def test_a_literal_path_joins_every_match_of_a_wildcard_path() -> None:
    model = tree({"embed": {}, "layers": {"0": {"mlp": {}}, "1": {"mlp": {}}}})
    assert grouped(model, "embed", "layers.*.mlp") == [
        ("embed", "layers.0.mlp"),
        ("embed", "layers.1.mlp"),
    ]


def test_literal_paths_are_one_group() -> None:
    assert grouped(Model(2), "layers.0.norm", "layers.1.mlp") == [("layers.0.norm", "layers.1.mlp")]


def test_groups_come_in_the_order_of_the_model() -> None:
    model = tree({"layers": {"1": {"a": {}, "b": {}}, "0": {"a": {}, "b": {}}}})
    assert grouped(model, "layers.*.b", "layers.*.a") == [
        ("layers.1.b", "layers.1.a"),
        ("layers.0.b", "layers.0.a"),
    ]


def test_two_stars_skip_places_that_lack_a_member_and_report_them() -> None:
    model = Model(3)
    model.head = nn.Module()
    model.head.norm = Norm()
    del model.layers[1].mlp
    result = fuse_modules(model, ["**.norm", "**.mlp"])
    assert [group.paths for group in result.fused] == [
        ("layers.0.norm", "layers.0.mlp"),
        ("layers.2.norm", "layers.2.mlp"),
    ]
    assert [group.reason for group in result.skipped] == [
        "'layers.1.norm' has no partner for '**.mlp'",
        "'head.norm' has no partner for '**.mlp'",
    ]


def test_two_stars_that_never_meet_are_an_error_that_says_why() -> None:
    model = tree({"a": {"norm": {}}, "b": {"mlp": {}}})
    assert message(model, "**.norm", "**.mlp") == (
        "No place in the model has all of these modules: '**.norm', '**.mlp'. "
        "'a.norm' has no partner for '**.mlp'; 'b.mlp' has no partner for '**.norm'. "
        "Wildcards at the same position must match the same text in every path."
    )


def test_other_partial_matches_name_every_parent_that_lacks_a_member() -> None:
    model = Model(4)
    del model.layers[1].mlp
    del model.layers[3].mlp
    text = message(model, "layers.*.norm", "layers.*.mlp")
    assert text.startswith("The paths match only in part: ")
    assert "'layers.*.mlp'" in text
    assert "layers.1" in text
    assert "layers.3" in text
    assert "layers.0" not in text


def test_a_partial_match_says_how_to_leave_a_place_out() -> None:
    model = Model(2)
    del model.layers[0].mlp
    assert message(model, "layers.*.norm", "layers.*.mlp").endswith(
        " Leave it out with a slice, such as 'layers.[1:].mlp', or write '**' to take every place "
        "where all of them are."
    )


def test_different_slices_are_a_partial_match() -> None:
    assert (
        "'layers.2.mlp' has no partner for 'layers.[0:2].norm'"
        in message(Model(3), "layers.[0:2].norm", "layers.*.mlp")
    )  # fmt: skip


def test_two_stars_in_one_path_do_not_excuse_a_path_without_them() -> None:
    # `**` binds 'layers.0' and `*` binds '0', so the two never meet.
    text = message(Model(2), "layers.*.norm", "**.mlp")
    assert text.startswith("The paths match only in part: ")
    assert "Wildcards at the same position must match the same text in every path." in text


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        (
            "layer.*.norm",
            "'layer.*.norm' matches nothing: there is no 'layer' in Model. "
            "Did you mean 'layers.*.norm'?",
        ),
        (
            "layers.*.nrm",
            "'layers.*.nrm' matches nothing: there is no 'nrm' under 'layers.*'. "
            "Did you mean 'layers.*.norm'?",
        ),
        (
            "layers[1:].mpl.up_proj",
            "'layers[1:].mpl.up_proj' matches nothing: there is no 'mpl' under 'layers[1:]'. "
            "Did you mean 'layers[1:].mlp.up_proj'?",
        ),
        (
            "layers.*.mlp.gate_prj",
            "'layers.*.mlp.gate_prj' matches nothing: there is no 'gate_prj' under "
            "'layers.*.mlp'. Did you mean 'layers.*.mlp.gate_proj' or 'layers.*.mlp.up_proj'?",
        ),
        (
            "**.nrm",
            "'**.nrm' matches nothing: there is no 'nrm' under '**'. Did you mean '**.norm'?",
        ),
        (
            "xyz",
            "'xyz' matches nothing: there is no 'xyz' in Model. Nearest: 'layers'.",
        ),
    ],
)
def test_a_mistyped_path_is_told_the_nearest_real_one(path: str, sentence: str) -> None:
    assert message(Model(2), path) == sentence


def test_only_corrections_that_match_something_are_suggested() -> None:
    text = message(Model(2), "layer.*.nrm")
    assert text.startswith("'layer.*.nrm' matches nothing: there is no 'layer' in Model.")
    assert "'layers.*.nrm'" not in text
    assert "'layers.0.norm'" in text


@pytest.mark.parametrize("path", ["layers.5.norm", "layers.[5].norm", "layers[5:].norm"])
def test_a_block_that_is_not_there_is_told_which_are(path: str) -> None:
    text = message(Model(3), path)
    assert text.startswith(f"{path!r} matches nothing: there is no ")
    assert "'layers.2.norm'" in text


def test_a_model_without_submodules_says_so() -> None:
    assert message(Norm(), "norm") == "'norm' matches nothing: Norm has no submodules."


def test_the_nearest_path_is_named_also_where_children_are_shared() -> None:
    shared = nn.Identity()
    model = tree({"a": {"norm_out": shared}, "b": {"norm_in": shared}})
    assert message(model, "b.norm_inn").endswith("Did you mean 'b.norm_in'?")


@pytest.mark.parametrize("path", ["", ".", "a..b", ".a", "a."])
def test_an_empty_segment_is_refused(path: str) -> None:
    with pytest.raises(PathNotFoundError) as caught:
        fuse_modules(Model(1), [path])
    assert str(caught.value) == (
        f"{path!r} is not a path: it names no module, or has an empty segment. "
        "The model itself cannot be a member; name modules inside it."
    )


@pytest.mark.parametrize("surgery", [fuse_modules, unfuse_modules])
def test_an_empty_list_is_refused(surgery: Any) -> None:
    with pytest.raises(PathNotFoundError) as caught:
        surgery(Model(1), [])
    assert str(caught.value) == "The list of paths is empty: name at least one module."


def test_a_string_instead_of_a_list_is_told_the_list() -> None:
    with pytest.raises(PathNotFoundError) as caught:
        fuse_modules(Model(1), "layers.*.mlp")
    assert str(caught.value) == "Paths are given as a list: ['layers.*.mlp'], not 'layers.*.mlp'."


@pytest.mark.parametrize(("paths", "kind"), [(None, "NoneType"), ({"a", "b"}, "set"), (3, "int")])
def test_what_is_not_a_list_is_refused(paths: Any, kind: str) -> None:
    with pytest.raises(PathNotFoundError) as caught:
        fuse_modules(Model(1), paths)
    assert str(caught.value) == (
        f"Paths are given as a list of strings or a mapping role -> path, not {kind}."
    )


def test_a_path_that_is_no_string_is_refused() -> None:
    with pytest.raises(PathNotFoundError) as caught:
        fuse_modules(Model(1), ["layers.*.norm", 3])  # type: ignore[list-item]
    assert str(caught.value) == "A path is a string such as 'layers.*.mlp', not int: 3."


def test_brackets_that_are_no_set_of_characters_are_refused() -> None:
    with pytest.raises(PathNotFoundError) as caught:
        fuse_modules(Model(1), ["layers.[b-a].norm"])
    # The rest of the sentence is Python's, and counts positions in a regular expression.
    assert str(caught.value).startswith("'[b-a]' is not a glob segment: bad character range b-a")


def test_a_slice_is_a_slice_also_where_a_module_has_no_such_child() -> None:
    model = stack(2, mlp={})
    assert matched(model, "**.layers[::-1].mlp") == ["layers.1.mlp", "layers.0.mlp"]
    assert matched(tree({"a": {"layers": {"0": {}}}, "layers0": {}}), "**.layers[0:2]") == [
        "a.layers.0"
    ]
    assert message(model, "layer[::-1].mlp") == (
        "'layer[::-1].mlp' matches nothing: there is no 'layer[::-1]' in Module. "
        "Did you mean 'layers[::-1].mlp'?"
    )


@pytest.mark.parametrize("path", ["layers.[::0].norm", "layers[::0].norm"])
def test_a_slice_with_step_zero_is_refused(path: str) -> None:
    with pytest.raises(PathNotFoundError, match="step"):
        fuse_modules(Model(1), [path])


@pytest.mark.parametrize(
    "segment", ["[b-a]", "x[b-a]", "[::0]", "x[::0]", "[::0][1:]", "[b-a][1:]"]
)
def test_a_path_that_is_none_is_refused_as_such_where_nothing_around_it_matches(
    segment: str,
) -> None:
    with pytest.raises(PathNotFoundError, match=r"is not a (slice|glob segment): "):
        fuse_modules(Model(1), [f"nowhere.{segment}.norm"])


def test_different_numbers_of_wildcards_are_refused() -> None:
    with pytest.raises(SpecMismatchError) as caught:
        fuse_modules(Model(1), ["*.*.norm", "layers.*.mlp"])
    assert str(caught.value) == (
        "Wildcards bind from left to right, so the paths of one chain need the same number of "
        "them, or none: '*.*.norm' has 2, 'layers.*.mlp' has 1."
    )


@pytest.mark.parametrize(
    ("path", "count"), [("**.a", 1), ("a?[bc]*", 3), ("[0:2].a[1]", 2), ("a*[12]", 2), ("*.**", 2)]
)
def test_every_kind_of_wildcard_counts(path: str, count: int) -> None:
    pair = {"0": {}, "1": {}}
    model = tree({"aab1": {}, "0": {"a": pair}, "zzzz": {}})
    with pytest.raises(SpecMismatchError) as caught:
        find_groups(model, [path, "[z][z][z][z]*"])
    assert f"{path!r} has {count}, '[z][z][z][z]*' has 5" in str(caught.value)


def test_the_root_cannot_be_a_member_by_way_of_a_child() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("loop", model)
    try:
        with pytest.raises(NotFusableError) as caught:
            fuse_modules(model, ["loop"])
    finally:
        # Left in, the cycle would make every later walk over the model endless.
        del model.loop
    assert str(caught.value) == "'loop' is the model itself, which cannot be a member."


def test_shared_members_at_several_paths_are_one_group() -> None:
    model = Model(1)
    model.layers.append(model.layers[0])
    result = fuse_modules(model, ["layers.*.norm", "layers.*.mlp"])
    assert [group.paths for group in result.groups] == [("layers.0.norm", "layers.0.mlp")]
    assert [group.paths for group in report(model).groups] == [("layers.0.norm", "layers.0.mlp")]
    unfuse_modules(model, ["layers.1.mlp"])
    assert not report(model).groups


NAMES = ("a", "b", "ab", "n1", "n2", "0", "1", "2", "10")
CHILDREN = st.lists(st.sampled_from(NAMES), max_size=4, unique=True)
TREES = st.recursive(
    CHILDREN.map(lambda names: {name: {} for name in names}),
    lambda below: st.dictionaries(st.sampled_from(NAMES), below, max_size=4),
    max_leaves=8,
)
BOUND = st.sampled_from(["", "0", "1", "2", "-1", "-2", "5"])
STEP = st.sampled_from(["", ":", ":1", ":2", ":-1"])
SLICES = st.one_of(
    st.sampled_from(["[0]", "[1]", "[-1]", "[7]"]),
    st.builds(lambda first, last, step: f"[{first}:{last}{step}]", BOUND, BOUND, STEP),
)
GLOBS = st.lists(
    st.sampled_from(["a", "b", "n", "1", "*", "?", "[ab]", "[!a]", "[a-n]"]),
    min_size=1,
    max_size=3,
).map("".join)
SEGMENTS = st.one_of(
    st.sampled_from(NAMES),
    st.just("*"),
    st.just("**"),
    GLOBS,
    SLICES,
    st.builds(str.__add__, st.sampled_from(["a", "b", "ab"]), SLICES),
)
PATTERNS = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


def naive_matches(children: Tree, segments: list[str], at: str = "") -> Iterator[str]:
    """Paths below `at` that the segments match, read off the tree one segment at a time."""
    if not segments:
        yield at.rstrip(".")
        return
    head, rest = segments[0], segments[1:]
    if head == "**":
        yield from naive_matches(children, rest, at)
        for name, below in children.items():
            yield from naive_matches(below, segments, f"{at}{name}.")
        return
    name, bracket, text = head.partition("[")
    if bracket and name in ("", "a", "b", "ab") and not set(text[:-1]) - set("0123456789:-"):
        if name:
            yield from naive_matches(children.get(name, {}), [f"[{text}", *rest], f"{at}{name}.")
            return
        numbers = sorted((child for child in children if child.isdigit()), key=int)
        if ":" in text:
            chosen = numbers[slice(*[int(n) if n else None for n in text[:-1].split(":")])]
        else:
            index = int(text[:-1])
            chosen = [n for i, n in enumerate(numbers) if index in (i, i - len(numbers))]
        for child in chosen:
            yield from naive_matches(children[child], rest, f"{at}{child}.")
        return
    for child, below in children.items():
        if fnmatch.fnmatchcase(child, head):
            yield from naive_matches(below, rest, f"{at}{child}.")


@given(children=TREES, pattern=PATTERNS)
def test_a_pattern_matches_what_a_naive_reading_of_it_matches(children: Tree, pattern: str) -> None:
    model = tree(children)
    expected = {path for path in naive_matches(children, pattern.split(".")) if path}
    if not expected:
        with pytest.raises(PathNotFoundError, match="matches nothing"):
            find_modules(model, [pattern])
        return
    found = find_modules(model, [pattern])
    assert set(found) == expected
    assert all(model.get_submodule(path) is module for path, module in found.items())


@given(children=TREES, pattern=PATTERNS)
def test_two_paths_with_the_same_wildcards_pair_every_match_with_its_twin(
    children: Tree, pattern: str
) -> None:
    """Joining a pattern with itself below two twins gives one group per match."""
    model = tree({"x": children, "y": children})
    expected = list(naive_matches(children, pattern.split(".")))
    if not expected:
        return
    found = grouped(model, f"x.{pattern}", f"y.{pattern}")
    assert set(found) == {(f"x.{path}".rstrip("."), f"y.{path}".rstrip(".")) for path in expected}
