"""Bad input: one typed error with a pinned message, and a model that is as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels import use_kernel_mapping
from structure import structure
from support import PATHS, InMemoryRepository, Mlp, Model, Norm, mapped, members_kernel
from torch import Tensor, nn

import module_fusion
from module_fusion import (
    AlreadyFusedError,
    FusedModule,
    FusionError,
    ModuleSpec,
    NotFusableError,
    PathNotFoundError,
    SpecMismatchError,
    UnfuseError,
    fuse_modules,
    fused,
    report,
    unfuse_modules,
)

Kernel = members_kernel(1)


def refused(
    error: type[FusionError], model: nn.Module, call: Callable[[], object], text: str
) -> None:
    """The call raises this very error with this very text and changes nothing."""
    before = structure(model)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, ValueError)
    assert str(caught.value) == text
    assert structure(model) == before


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(8, 8))  # type: ignore[no-any-return]


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Linear(8, 8), torch.ones(1, 8))  # type: ignore[no-any-return]


def swap_class(model: Model) -> None:
    model.layers[1].mlp.__class__ = type("Other", (Mlp,), {})


def add_attribute(model: Model) -> None:
    model.layers[0].norm.note = "here"


def reorder_attributes(model: Model) -> None:
    own = model.layers[0].norm.__dict__
    own["training"] = own.pop("training")


def add_forward(model: Model) -> None:
    model.layers[0].norm.forward = model.layers[0].norm.forward


def reorder_children(model: Model) -> None:
    block = model.layers[0]
    block._modules["mlp"] = block._modules.pop("mlp")


def replace_child(model: Model) -> None:
    model.layers[0].norm = Norm()


def replace_parameter(model: Model) -> None:
    model.layers[0].norm.weight = nn.Parameter(model.layers[0].norm.weight.detach().clone())


def freeze_parameter(model: Model) -> None:
    model.layers[0].norm.weight.requires_grad_(False)


def add_buffer(model: Model) -> None:
    model.layers[0].register_buffer("scale", torch.ones(1))


def add_unsaved_buffer(model: Model) -> None:
    model.layers[0].register_buffer("scale", torch.ones(1), persistent=False)


def add_hook(model: Model) -> None:
    model.layers[0].norm.register_forward_hook(lambda module, args, output: None)


def replace_hooks(model: Model) -> None:
    norm = model.layers[0].norm
    norm._forward_hooks = type(norm._forward_hooks)()


def change_mode(model: Model) -> None:
    model.layers[0].norm.eval()


def share_child(model: Model) -> None:
    model.layers[0].other = model.layers[0].norm


@pytest.mark.parametrize(
    "change",
    [
        swap_class, add_attribute, reorder_attributes, add_forward, reorder_children,
        replace_child, replace_parameter, freeze_parameter, add_buffer, add_unsaved_buffer,
        add_hook, replace_hooks, change_mode, share_child,
    ],
)  # fmt: skip
def test_a_structure_differs_after_any_change(change: Callable[[Model], None]) -> None:
    model = Model(2)
    before = structure(model)
    assert structure(model) == before
    change(model)
    assert structure(model) != before


def test_a_structure_differs_while_modules_are_fused() -> None:
    model = Model(2)
    before = structure(model)
    fuse_modules(model, PATHS)
    assert structure(model) != before


@pytest.mark.parametrize("model", [None, 3, nn.Linear, {"a": nn.Linear(2, 2)}])
def test_what_is_no_module_is_refused(model: Any) -> None:
    kind = type(model).__name__
    for name, call in {
        "fuse_modules": lambda: fuse_modules(model, PATHS),
        "unfuse_modules": lambda: unfuse_modules(model),
        "report": lambda: report(model),
    }.items():
        with pytest.raises(FusionError) as caught:
            call()
        assert str(caught.value) == f"{name} takes a torch.nn.Module, not {kind}."
    with pytest.raises(FusionError, match=f"takes a torch.nn.Module, not {kind}"), fused(model, []):
        pass


@pytest.mark.parametrize("make", [scripted, traced])
def test_a_scripted_model_is_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(NotFusableError) as caught:
        fuse_modules(model, ["a"])
    assert str(caught.value) == (
        "A scripted or traced module runs compiled code, not its submodules. Fuse the model "
        "first, then trace it."
    )


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        (
            ["layers.*.norm", "layers.*.mpl"],
            "'layers.*.mpl' matches nothing: there is no 'mpl' under 'layers.*'. "
            "Did you mean 'layers.*.mlp'?",
        ),
        (
            ["layer.*.norm", "layers.*.mlp"],
            "'layer.*.norm' matches nothing: there is no 'layer' in Model. "
            "Did you mean 'layers.*.norm'?",
        ),
        ([], "The list of paths is empty: name at least one module."),
        ({}, "The list of paths is empty: name at least one module."),
        (
            ["layers.*.norm", 7],
            "A path is a string such as 'layers.*.mlp', not int: 7.",
        ),
        (
            {"norm": "layers.*.norm", "mlp": None},
            "A path is a string such as 'layers.*.mlp', not NoneType: None.",
        ),
        (
            "layers.*.mlp",
            "Paths are given as a list: ['layers.*.mlp'], not 'layers.*.mlp'.",
        ),
        (
            None,
            "Paths are given as a list of strings or a mapping role -> path, not NoneType.",
        ),
        (
            ["layers.*.norm", ""],
            "'' is not a path: it names no module, or has an empty segment. The model itself "
            "cannot be a member; name modules inside it.",
        ),
    ],
)
def test_a_wrong_path_is_refused(paths: Any, text: str) -> None:
    model = Model(2)
    refused(PathNotFoundError, model, lambda: fuse_modules(model, paths), text)


def test_a_path_that_matches_in_some_blocks_only_is_refused() -> None:
    model = Model(3)
    del model.layers[1].mlp
    before = structure(model)
    with pytest.raises(PathNotFoundError, match=r"^The paths match only in part: .*layers\.1"):
        fuse_modules(model, PATHS)
    assert structure(model) == before


def test_different_numbers_of_wildcards_are_refused() -> None:
    model = Model(2)
    refused(
        SpecMismatchError,
        model,
        lambda: fuse_modules(model, ["layers.*.norm", "*.*.mlp"]),
        "Wildcards bind from left to right, so the paths of one chain need the same number of "
        "them, or none: 'layers.*.norm' has 1, '*.*.mlp' has 2.",
    )


def test_a_path_to_unfuse_that_matches_nothing_is_refused() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    refused(
        PathNotFoundError,
        model,
        lambda: unfuse_modules(model, ["layers.0.norm", "layers.*.mpl"]),
        "'layers.*.mpl' matches nothing: there is no 'mpl' under 'layers.*'. "
        "Did you mean 'layers.*.mlp'?",
    )


def test_a_wrong_number_of_specs_is_refused() -> None:
    model = Model(2)
    refused(
        SpecMismatchError,
        model,
        lambda: fuse_modules(model, PATHS, [ModuleSpec(["x"], ["x"])]),
        "There are 1 specs for 2 modules, 'layers.0.norm', 'layers.0.mlp'. Give one ModuleSpec "
        "per module, or none.",
    )


def test_specs_that_do_not_meet_are_refused() -> None:
    model = Model(2)
    specs = [ModuleSpec(["x"], ["normed"]), ModuleSpec(["hidden_states"])]
    refused(
        SpecMismatchError,
        model,
        lambda: fuse_modules(model, PATHS, specs),
        "No later member takes an output of 'layers.0.norm'. Give the output and the input it "
        "feeds the same name: specs=[ModuleSpec(inputs=[..], outputs=[..]), ..].",
    )


def test_specs_that_fit_the_first_classes_alone_are_refused_before_anything_changes() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    model = Model(2)
    model.layers[1].mlp = Masked()
    before = structure(model)
    specs = [ModuleSpec(["x"], ["y"]), ModuleSpec(["y"])]
    with pytest.raises(SpecMismatchError, match=r"^The spec of 'layers.1.mlp' leaves out 'mask'"):
        fuse_modules(model, PATHS, specs)
    assert structure(model) == before


@pytest.mark.parametrize("role", ["training", "forward", "a b", "3", "_modules", "_plan"])
def test_a_role_that_a_kernel_cannot_reach_is_refused(role: str) -> None:
    model = Model(2)
    roles = {role: "layers.*.norm", "mlp": "layers.*.mlp"}
    with mapped(Fast=Kernel):
        refused(
            SpecMismatchError,
            model,
            lambda: fuse_modules(model, roles, kernel="Fast"),
            f"{role!r} cannot be the name by which a kernel reaches a member: it must be an "
            "identifier, used once, and no attribute of nn.Module. Give the roles yourself: "
            "fuse_modules(model, {'norm': 'path.of.first', 'mlp': 'path.of.second'}, ...).",
        )


def test_two_members_with_the_same_last_segment_need_roles_for_a_kernel() -> None:
    model = nn.Sequential()
    model.a, model.b = nn.Sequential(), nn.Sequential()
    model.a.norm, model.b.norm = Norm(), Norm()
    with mapped(Fast=Kernel):
        refused(
            SpecMismatchError,
            model,
            lambda: fuse_modules(model, ["a.norm", "b.norm"], kernel="Fast"),
            "'norm' cannot be the name by which a kernel reaches a member: it must be an "
            "identifier, used once, and no attribute of nn.Module. Give the roles yourself: "
            "fuse_modules(model, {'norm': 'path.of.first', 'mlp': 'path.of.second'}, ...).",
        )
        roles = {"first": "a.norm", "second": "b.norm"}
        assert len(fuse_modules(model, roles, kernel="Fast").fused) == 1


@pytest.mark.parametrize(
    ("container", "kind"),
    [
        (nn.ModuleList([nn.Linear(8, 8)]), "ModuleList"),
        (nn.ModuleDict({"a": nn.Linear(8, 8)}), "ModuleDict"),
        (nn.Module(), "Module"),
    ],
)
def test_a_container_is_refused(container: nn.Module, kind: str) -> None:
    model = nn.Sequential(Norm(), container)
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, ["0", "1"]),
        f"'1' is a {kind}, a container that is never called. Name the modules in it, such as "
        "'1.*'.",
    )


@pytest.mark.parametrize("make", [scripted, traced])
def test_a_scripted_member_is_refused(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(Norm(), make())
    kinds = [type(module) for module in model]
    with pytest.raises(NotFusableError) as caught:
        fuse_modules(model, ["0", "1"])
    assert str(caught.value) == "'1' is a scripted or traced module, which runs compiled code."
    assert [type(module) for module in model] == kinds


@pytest.mark.parametrize("paths", [["0", "0.norm"], ["0.norm", "0"]])
def test_a_member_inside_another_is_refused(paths: list[str]) -> None:
    model = Model(2).layers
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, paths),
        "'0.norm' is inside '0': a chain is made of modules beside each other.",
    )


def test_the_same_path_twice_is_refused() -> None:
    model = Model(2)
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, ["layers.*.norm", "layers.*.norm"]),
        "'layers.0.norm' and 'layers.0.norm' are the same module.",
    )


def test_the_same_module_at_two_paths_is_refused() -> None:
    model = Model(2)
    model.layers[1].norm = model.layers[0].norm
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, ["layers.0.norm", "layers.1.norm"]),
        "'layers.0.norm' and 'layers.1.norm' are the same module.",
    )


@pytest.mark.parametrize("name", ["_fusion", "fused_kernel"])
def test_a_name_that_fusing_needs_and_a_module_has_is_refused(name: str) -> None:
    model = Model(2)
    model.layers[1].mlp.__dict__[name] = "taken"
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, PATHS),
        f"'layers.1.mlp' has an attribute {name!r} already.",
    )


def test_a_class_that_allows_no_subclass_is_refused() -> None:
    class Sealed(type):
        def __new__(meta, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> Any:
            if any(isinstance(base, Sealed) for base in bases):
                raise TypeError("Final is final")
            return super().__new__(meta, name, bases, space)

    class Final(nn.Module, metaclass=Sealed):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Norm(), Final())
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, ["0", "1"]),
        "'1' cannot be fused: no subclass of Final can take its place (Final is final).",
    )


def test_a_register_of_subclasses_does_not_hear_of_the_swapped_class() -> None:
    heard: list[str] = []

    class Registered(nn.Module):
        def __init_subclass__(cls, **options: Any) -> None:
            heard.append(cls.__name__)

        def forward(self, x: Tensor) -> Tensor:
            return x

    fuse_modules(nn.Sequential(Norm(), Registered()), ["0", "1"])
    assert heard == []


def test_a_class_that_guards_its_attributes_is_fused_and_taken_back_all_the_same() -> None:
    class Guarded(nn.Module):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise TypeError("the class is fixed")
            super().__setattr__(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.Sequential(Norm(), Guarded())
    before = structure(model)
    fuse_modules(model, ["0", "1"])
    assert isinstance(model[1], FusedModule)
    unfuse_modules(model)
    assert structure(model) == before


def test_the_same_call_twice_is_reported_as_already_fused() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    before = structure(model)
    result = fuse_modules(model, PATHS)
    assert structure(model) == before
    assert [group.action for group in result.groups] == ["already fused"] * 2
    assert len(result.fused) == 2
    unfuse_modules(model)
    assert not report(model).groups


def test_the_same_call_after_one_block_was_taken_back_fuses_that_block() -> None:
    model = Model(3)
    fuse_modules(model, PATHS)
    unfuse_modules(model, ["layers.1.mlp"])
    result = fuse_modules(model, PATHS)
    assert [group.action for group in result.groups] == ["already fused", "fused", "already fused"]


@pytest.mark.parametrize(
    ("paths", "member"),
    [
        (["layers.*.norm"], "RegistryCollector[Norm]"),
        (["layers.*.mlp"], "FusedModule[Mlp]"),
    ],
)
def test_another_chain_over_fused_members_is_refused(paths: list[str], member: str) -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    path = paths[0].replace("*", "0")
    refused(
        AlreadyFusedError,
        model,
        lambda: fuse_modules(model, paths),
        f"{path!r} belongs to another chain: it is a {member}. Take that one back first: "
        f"unfuse_modules(model, [{path!r}]).",
    )


@pytest.mark.parametrize("kernel", [None, "Kernel"])
def test_modules_that_are_not_called_in_the_order_given_are_refused(kernel: str | None) -> None:
    model = Model(2)
    refused(
        SpecMismatchError,
        model,
        lambda: fuse_modules(model, ["layers.*.mlp", "layers.*.norm"], kernel=kernel),
        "'layers.0.norm' runs before 'layers.0.mlp': Block.forward calls self.norm first. Give "
        "the modules in the order in which they run: [..., 'layers.0.norm', 'layers.0.mlp', ...].",
    )


def test_the_same_members_with_a_kernel_are_told_what_they_are_fused_with() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    before = structure(model)
    with mapped(Fast=Kernel), pytest.raises(AlreadyFusedError) as caught:
        fuse_modules(model, PATHS, kernel="Fast")
    assert structure(model) == before
    # They are no other chain: what differs is the kernel, and the message has both.
    assert "without a kernel" in str(caught.value)
    assert "'Fast'" in str(caught.value)
    assert "unfuse_modules(model" in str(caught.value)


def test_an_overlap_in_a_later_block_alone_is_refused() -> None:
    model = Model(3)
    fuse_modules(model, ["layers.2.mlp"])
    refused(
        AlreadyFusedError,
        model,
        lambda: fuse_modules(model, PATHS),
        "'layers.2.mlp' belongs to another chain: it is a FusedModule[Mlp]. Take that one back "
        "first: unfuse_modules(model, ['layers.2.mlp']).",
    )


def test_two_chains_of_one_call_cannot_end_in_one_module() -> None:
    model = Model(2)
    refused(
        AlreadyFusedError,
        model,
        lambda: fuse_modules(model, ["layers.*.norm", "layers.0.mlp"]),
        "Two groups end in the same module: layers.0.norm -> layers.0.mlp; "
        "layers.1.norm -> layers.0.mlp. A module can be the last of one chain only.",
    )


def test_the_groups_that_end_in_one_module_are_the_ones_named() -> None:
    model = Model(7)
    model.layers[6].mlp = model.layers[5].mlp
    refused(
        AlreadyFusedError,
        model,
        lambda: fuse_modules(model, PATHS),
        "Two groups end in the same module: layers.5.norm -> layers.5.mlp; "
        "layers.6.norm -> layers.6.mlp. A module can be the last of one chain only.",
    )


def test_a_module_cannot_end_one_chain_of_a_call_and_begin_another() -> None:
    model = Model(2)
    model.layers[1].norm = model.layers[0].mlp
    before = structure(model)
    with pytest.raises(AlreadyFusedError, match="last module of one chain and an earlier one of"):
        fuse_modules(model, PATHS)
    assert structure(model) == before


@pytest.mark.parametrize("kernel", ["", 3, Kernel])
def test_a_kernel_that_is_no_name_is_refused(kernel: Any) -> None:
    model = Model(2)
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, PATHS, kernel=kernel),
        f"kernel is the layer name in a kernel mapping, such as 'RMSNormMLP', not {kernel!r}.",
    )


@pytest.mark.parametrize("mode", ["inference", 1, True])
def test_a_mode_that_is_none_of_kernels_is_refused(mode: Any) -> None:
    model = Model(2)
    refused(
        NotFusableError,
        model,
        lambda: fuse_modules(model, PATHS, kernel="Fast", mode=mode),
        f"mode is a kernels.Mode, such as Mode.INFERENCE, not {mode!r}.",
    )


def test_a_kernel_that_nobody_mapped_is_refused_without_a_fallback() -> None:
    model = Model(2)
    with mapped():
        refused(
            NotFusableError,
            model,
            lambda: fuse_modules(model, PATHS, kernel="Fast", use_fallback=False),
            "The kernel 'Fast' cannot take over layers.0.norm -> layers.0.mlp: No layer mapping "
            "for `Fast`. The model is as it was before the call.",
        )


def test_a_device_that_the_kernels_library_does_not_know_is_refused() -> None:
    model = Model(2)
    before = structure(model)
    with mapped(Fast=Kernel), pytest.raises(NotFusableError) as caught:
        fuse_modules(model, PATHS, kernel="Fast", device="quantum")
    assert str(caught.value).startswith(
        "The kernel 'Fast' cannot take over layers.0.norm -> layers.0.mlp: "
        "Unsupported device type 'quantum'. "
    )
    assert str(caught.value).endswith(". The model is as it was before the call.")
    assert structure(model) == before


class BrokenRepository(InMemoryRepository):
    """Loads a number of times, then fails."""

    def __init__(self, error: BaseException, after: int = 0) -> None:
        super().__init__(members_kernel(1))
        self.error = error
        self.after = after

    def load(self) -> type[nn.Module]:
        if self.loads >= self.after:
            raise self.error
        return super().load()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def test_a_kernel_that_does_not_load_is_refused_with_its_reason() -> None:
    model = Model(3)
    repository = BrokenRepository(FileNotFoundError("no build for this machine"))
    with use_kernel_mapping({"Fast": {"cpu": repository}}, inherit_mapping=False):
        refused(
            NotFusableError,
            model,
            lambda: fuse_modules(model, PATHS, kernel="Fast", use_fallback=False),
            "The kernel 'Fast' cannot take over layers.0.norm -> layers.0.mlp: no build for this "
            "machine. The model is as it was before the call.",
        )


@pytest.mark.parametrize("use_fallback", [True, False])
def test_an_interrupted_call_leaves_the_model_as_it_was(use_fallback: bool) -> None:
    model = Model(3)
    before = structure(model)
    repository = BrokenRepository(KeyboardInterrupt())
    with (
        use_kernel_mapping({"Fast": {"cpu": repository}}, inherit_mapping=False),
        pytest.raises(KeyboardInterrupt),
    ):
        fuse_modules(model, PATHS, kernel="Fast", use_fallback=use_fallback)
    assert structure(model) == before
    assert not report(model).groups


def test_a_kernel_that_fails_for_a_later_group_leaves_the_earlier_ones_as_they_were() -> None:
    model = Model(3)
    # The kernels library has no kernel for this device, so the last group is the one that fails.
    model.layers[2].to("meta")
    with mapped(Fast=Kernel):
        fuse_modules(model, ["layers.0.norm", "layers.0.mlp"], kernel="Fast")
        kept = report(model).groups
        before = structure(model)
        with pytest.raises(NotFusableError, match=r"cannot take over layers\.2\.norm -> "):
            fuse_modules(model, PATHS, kernel="Fast", use_fallback=False)
    assert structure(model) == before
    assert list(report(model).groups) == list(kept)
    # The chain fused before still has its kernel, and the other block never got one.
    model.layers[1](model.layers[0](torch.ones(1, 8)))
    (group,) = report(model).groups
    assert (group.kernel_calls, group.member_calls) == (1, 0)
    assert model.calls()[:2] == [(1, 1), (1, 1)]


def swap_on_top(module: nn.Module) -> type[nn.Module]:
    module.__class__ = type("Wrapped", (type(module),), {})
    return type(module)


@pytest.mark.parametrize("member", ["norm", "mlp"])
def test_a_class_that_was_exchanged_since_is_not_taken_back(member: str) -> None:
    model = Model(3)
    fuse_modules(model, PATHS)
    role = {"norm": "RegistryCollector[Norm]", "mlp": "FusedModule[Mlp]"}[member]
    module = model.layers[1].get_submodule(member)
    fused_class = type(module)
    swap_on_top(module)
    text = (
        f"The class of 'layers.1.{member}' is Wrapped; it was {role} when it was fused. Undo "
        "first what changed it since, then unfuse."
    )
    refused(UnfuseError, model, lambda: unfuse_modules(model), text)
    refused(UnfuseError, model, lambda: unfuse_modules(model, [f"layers.1.{member}"]), text)
    # What it says to do works.
    module.__class__ = fused_class
    unfuse_modules(model)
    assert not report(model).groups


def test_the_other_chains_can_be_taken_back_by_path() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    swap_on_top(model.layers[1].mlp)
    unfuse_modules(model, ["layers.0.mlp"])
    assert [group.paths for group in report(model).groups] == [("layers.1.norm", "layers.1.mlp")]


def test_a_class_around_a_kernel_chain_that_was_exchanged_is_not_taken_back() -> None:
    model = Model(2)
    with mapped(Fast=Kernel):
        fuse_modules(model, PATHS, kernel="Fast")
    swap_on_top(model.layers[0])
    refused(
        UnfuseError,
        model,
        lambda: unfuse_modules(model),
        "The class of 'layers.0' is Wrapped; it was Block when it was fused. Undo first what "
        "changed it since, then unfuse.",
    )


def test_the_path_in_the_message_is_where_the_module_is_now() -> None:
    model = Model(2)
    fuse_modules(model, PATHS)
    outer = nn.Sequential(nn.Identity(), model)
    swap_on_top(model.layers[0].mlp)
    refused(
        UnfuseError,
        outer,
        lambda: unfuse_modules(outer),
        "The class of '1.layers.0.mlp' is Wrapped; it was FusedModule[Mlp] when it was fused. "
        "Undo first what changed it since, then unfuse.",
    )


def test_a_context_whose_end_cannot_be_exact_says_so() -> None:
    model = Model(2)
    with (
        pytest.raises(UnfuseError, match=r"^The class of 'layers.0.mlp' is Wrapped"),
        fused(model, PATHS),
    ):
        swap_on_top(model.layers[0].mlp)


def test_an_error_when_a_context_is_entered_changes_nothing() -> None:
    model = Model(2)

    def enter() -> None:
        with fused(model, ["layers.*.nrm"]):
            raise AssertionError("the block must not run")

    refused(
        PathNotFoundError,
        model,
        enter,
        "'layers.*.nrm' matches nothing: there is no 'nrm' under 'layers.*'. "
        "Did you mean 'layers.*.norm'?",
    )


def test_every_error_is_a_fusion_error_and_a_value_error() -> None:
    errors = {name for name in module_fusion.__all__ if name.endswith("Error")}
    assert errors == {
        "AlreadyFusedError",
        "DeferredUseError",
        "FusionError",
        "MissingPackageError",
        "NotFusableError",
        "PathNotFoundError",
        "SpecMismatchError",
        "UnfuseError",
    }
    for name in errors:
        error = getattr(module_fusion, name)
        assert issubclass(error, FusionError)
        assert issubclass(error, ValueError)
        assert error is FusionError or error.__bases__ == (FusionError,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask for")
def test_a_device_that_the_modules_are_not_on_is_named() -> None:
    model = Model(1)
    with pytest.raises(NotFusableError, match="asked for on cuda, the modules are on cpu"):
        fuse_modules(
            model,
            {"norm": "layers.0.norm", "mlp": "layers.0.mlp"},
            kernel="RMSNormMLP",
            device="cuda",
        )
    assert not report(model).groups
