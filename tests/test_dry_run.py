"""A dry run says what the call would say, and leaves nothing behind."""

from __future__ import annotations

import functools
import gc
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import packed
import pytest
import torch
from packed import PackedNormMLP, PackedNormMLPFamily
from structure import Identity, Structure, structure
from support import PATHS, Mlp, Model, Norm, WeightKernel, mapped, members_kernel, runs
from torch import Tensor, nn

from module_fusion import (
    AlreadyFusedError,
    FusionError,
    FusionReport,
    ModuleSpec,
    NotFusableError,
    PathNotFoundError,
    fuse,
    fuse_modules,
    fused,
    report,
    surgery,
    unfuse_modules,
)
from module_fusion.families import family, register_family
from module_fusion.inventory import chains_in
from module_fusion.modules import state_of

ROLES = dict(zip(["norm", "mlp"], PATHS, strict=True))
PACKED = {"packed_norm_mlp": True}


@dataclass(frozen=True)
class Everything:
    """All that a dry run must leave alone, to compare before and after."""

    structure: Structure
    attributes: dict[str, dict[str, Identity]]
    fusion: list[dict[str, Identity]]
    tensors: list[tuple[int, int, int, int, Identity, bytes]]
    random: bytes
    rows: FusionReport


def everything(model: nn.Module) -> Everything:
    modules = dict(model.named_modules())
    owners: list[Any] = [state for m in modules.values() if (state := state_of(m)) is not None]
    for found in chains_in(model):
        owners += [found.chain, *([found.chain.seat] if found.chain.seat is not None else [])]
    return Everything(
        structure(model),
        {path: identities(module) for path, module in modules.items()},
        [identities(owner) for owner in owners],
        [
            (
                t.data_ptr(),
                t.untyped_storage()._cdata,
                t.untyped_storage().nbytes(),
                t._version,
                Identity(t.grad),
                t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(),
            )
            for t in (*model.parameters(), *model.buffers())
        ],
        torch.get_rng_state().numpy().tobytes(),
        report(model),
    )


def identities(owner: object) -> dict[str, Identity]:
    """Every attribute; numbers and texts by value."""
    return {
        name: value if isinstance(value, (int, str)) else Identity(value)
        for name, value in vars(owner).items()
    }


def check(model: nn.Module, call: Callable[..., FusionReport]) -> FusionReport:
    """A dry run of the call changes nothing and says what the call then says."""
    before = everything(model)
    dry = call(dry_run=True)
    assert everything(model) == before
    real = call()
    would = {"fused": "would fuse"}
    expected = [row._replace(action=would.get(row.action, row.action)) for row in real.groups]
    assert list(dry.groups) == expected
    assert (dry.fused == []) == all(row.action != "already fused" for row in real.groups)
    return dry


def test_modules_without_a_kernel(model: Model) -> None:
    dry = check(model, lambda **dry: fuse_modules(model, PATHS, **dry))
    assert [row.action for row in dry.groups] == ["would fuse", "would fuse"]
    assert dry.would_fuse == list(dry.groups)
    assert str(dry).startswith("2 would fuse:\n")


def test_modules_with_a_kernel_that_loads(model: Model, x: Tensor) -> None:
    layer = members_kernel(1)
    with mapped(Fast=layer):
        dry = check(model, lambda **dry: fuse_modules(model, ROLES, kernel="Fast", **dry))
    assert {(row.path, row.reason) for row in dry.groups} == {("kernel", None)}
    assert runs(layer) == 0
    model(x)
    assert runs(layer) == 2


def test_a_dry_run_in_between_does_not_change_which_path_runs(model: Model, x: Tensor) -> None:
    layer = members_kernel(1)
    with mapped(Fast=layer):
        fuse_modules(model, ROLES, kernel="Fast", dry_run=True)
    model(x)
    assert runs(layer) == 0
    assert model.calls() == [(1, 1), (1, 1)]


def test_a_kernel_that_nobody_mapped_is_told_and_not_logged(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with mapped(), caplog.at_level(logging.DEBUG):
        dry = fuse_modules(model, ROLES, kernel="Fast", dry_run=True)
        assert not caplog.records
        fuse_modules(model, ROLES, kernel="Fast")
        assert caplog.records
    assert {row.reason for row in dry.groups} == {"no kernel was loaded for 'Fast'"}


def test_places_without_a_partner_are_skipped_with_the_same_words(model: Model) -> None:
    model.head = nn.Module()
    model.head.norm = Norm()
    dry = check(model, lambda **dry: fuse_modules(model, ["**.norm", "**.mlp"], **dry))
    assert [row.action for row in dry.groups] == ["would fuse", "would fuse", "skipped"]


def test_what_is_fused_already_stays_so_with_its_counts(model: Model, x: Tensor) -> None:
    with mapped(Fast=members_kernel(1)):
        fuse_modules(model, [path.replace("*", "0") for path in PATHS], kernel="Fast")
        model(x)
        dry = check(model, lambda **dry: fuse_modules(model, PATHS, kernel="Fast", **dry))
    assert [row.action for row in dry.groups] == ["already fused", "would fuse"]
    assert [row.kernel_calls for row in dry.groups] == [1, 0]
    assert len(dry.fused) == len(dry.would_fuse) == 1


def test_a_chain_fused_before_keeps_the_kernel_it_had_and_what_it_knew(
    model: Model, x: Tensor
) -> None:
    first, second = members_kernel(1), members_kernel(1)
    with mapped(Fast=first):
        fuse_modules(model, ROLES, kernel="Fast")
    model.layers[0].norm.calls = 7  # A member is looked at again when a kernel takes its seat.
    before = everything(model)
    with mapped(Fast=second):
        fuse_modules(model, ROLES, kernel="Fast", dry_run=True)
    assert everything(model) == before
    model(x)
    assert (runs(first), runs(second)) == (2, 0)


class Refusing(WeightKernel):
    """A kernel that looks at its members, and cannot have those of another width."""

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x)


def _prepare(norm: nn.Module, mlp: nn.Module) -> str:
    if norm.weight.numel() != 8:
        raise ValueError(f"{norm.weight.numel()} is not 8")
    return "prepared"


setattr(Refusing.forward, "prepare", functools.cache(_prepare))


def test_a_kernel_that_refuses_the_members_says_so() -> None:
    model = nn.ModuleList([Model(1), Model(1, hidden=12)])
    paths = [f"*.{path}" for path in PATHS]
    with mapped(Fast=Refusing):
        dry = check(model, lambda **dry: fuse_modules(model, paths, kernel="Fast", **dry))
    assert [row.path for row in dry.groups] == ["kernel", "members"]
    assert dry.groups[1].reason == "the kernel refuses: 12 is not 8"


@pytest.mark.parametrize(
    ("paths", "options", "error"),
    [
        (["layers.*.norm", "layers.*.mpl"], {}, PathNotFoundError),
        (["layers.*.norm", "head"], {}, PathNotFoundError),
        ("layers.*.norm", {}, PathNotFoundError),
        (["layers.*.mlp", "layers.*.norm"], {}, FusionError),
        (PATHS, {"specs": [ModuleSpec(["x"])]}, FusionError),
        (PATHS, {"kernel": "Fast", "use_fallback": False}, NotFusableError),
        (PATHS, {"kernel": ""}, NotFusableError),
        (["layers.*.mlp"], {}, AlreadyFusedError),
    ],
)
def test_it_raises_what_the_call_would_raise(
    model: Model, paths: Any, options: Any, error: type[FusionError]
) -> None:
    if error is AlreadyFusedError:
        fuse_modules(model, PATHS)
    before = everything(model)
    messages = []
    with mapped():
        for dry in ({"dry_run": True}, {}):
            with pytest.raises(error) as raised:
                fuse_modules(model, paths, **options, **dry)
            messages.append((type(raised.value), str(raised.value)))
            assert everything(model) == before
    assert messages[0] == messages[1]


def test_what_is_no_module_is_refused_in_the_same_words() -> None:
    for call in (
        lambda: fuse_modules(3, PATHS, dry_run=True),  # type: ignore[arg-type]
        lambda: fuse(3, dry_run=True),  # type: ignore[arg-type]
    ):
        with pytest.raises(FusionError, match=r"takes a torch.nn.Module, not int"):
            call()


def test_a_failure_after_the_first_change_leaves_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(model)
    apply, calls = surgery._apply, []

    def fails(job: Any, undo: Any) -> None:
        calls.append(job)
        if len(calls) == 2:
            raise RuntimeError("in the middle")
        apply(job, undo)

    monkeypatch.setattr(surgery, "_apply", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        fuse_modules(model, PATHS, dry_run=True)
    assert everything(model) == before


def test_fused_has_no_dry_run(model: Model) -> None:
    before = everything(model)
    with (
        pytest.raises(FusionError, match=r"fuse_modules\(model, \.\.\., dry_run=True\)"),
        fused(model, PATHS, dry_run=True),
    ):
        pass
    assert everything(model) == before


def test_no_class_and_no_chain_is_left_behind() -> None:
    class OwnNorm(Norm):
        pass

    model = Model(1)
    model.layers[0].norm = OwnNorm()
    seen: list[weakref.ref[Any]] = []

    class Watching(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x)

    def prepare(norm: nn.Module, mlp: nn.Module) -> None:
        seen.append(weakref.ref(state_of(mlp).chain))

    setattr(Watching.forward, "prepare", prepare)
    with mapped(Fast=Watching):
        fuse_modules(model, ROLES, kernel="Fast", dry_run=True)
    gc.collect()
    assert [reference() for reference in seen] == [None]
    assert OwnNorm.__subclasses__() == []


def test_a_model_in_training_keeps_its_graph_and_gradients(model: Model, x: Tensor) -> None:
    model(x).sum().backward()
    loss = model(x).sum()
    before = everything(model)
    with mapped(Fast=members_kernel(1)):
        fuse_modules(model, ROLES, kernel="Fast", dry_run=True)
    assert everything(model) == before
    loss.backward()


@pytest.fixture
def _family() -> Iterator[None]:
    """The family whose kernel wants packed weights is registered for one test."""
    register_family(PackedNormMLPFamily)
    with mapped(PackedNormMLP=PackedNormMLP):
        yield


@pytest.mark.usefixtures("_family")
def test_weights_are_packed_and_put_back_where_they_were(device: str) -> None:
    model = Model(3, 16).to(device)
    dry = check(model, lambda **dry: fuse(model, PACKED, **dry))
    assert [row.action for row in dry.groups] == ["would fuse"] * 3
    assert {row.path for row in dry.groups} == {"kernel"}
    unfuse_modules(model)


@pytest.mark.usefixtures("_family")
def test_weights_that_left_their_layout_stay_where_they_are(device: str) -> None:
    model = Model(2, 16).to(device)
    fuse(model, PACKED)
    weight = model.layers[0].mlp.up_proj.weight
    weight.data = weight.detach().clone()
    dry = check(model, lambda **dry: fuse(model, PACKED, **dry))
    assert [row.action for row in dry.groups] == ["already fused"] * 2


@pytest.mark.usefixtures("_family")
def test_weights_that_cannot_be_packed_are_skipped(device: str) -> None:
    model = Model(2, 16).to(device)
    model.layers[1].mlp.up_proj.weight = model.layers[1].mlp.gate_proj.weight
    dry = check(model, lambda **dry: fuse(model, PACKED, **dry))
    assert [row.action for row in dry.groups] == ["would fuse", "skipped"]
    assert dry.groups[1].reason == (
        "mlp.gate_proj.weight cannot be packed: it is shared with another parameter or buffer"
    )


@pytest.mark.usefixtures("_family")
def test_a_kernel_that_is_less_accurate_is_refused_with_the_numbers(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "ERROR", 1e-3)
    model = Model(2, 16).to(device)
    dry = check(model, lambda **dry: fuse(model, PACKED, **dry))
    assert [row.action for row in dry.groups] == ["skipped"] * 2
    assert "relative error 1.00e-03 of the" in str(dry.groups[0].reason)


@pytest.mark.usefixtures("_family")
def test_the_weights_are_back_where_a_family_fails_halfway(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(2, 16).to(device)
    before = everything(model)

    def samples(*arguments: Any) -> None:
        assert everything(model).tensors != before.tensors  # They are packed at this moment.
        raise RuntimeError("no samples")

    monkeypatch.setattr(PackedNormMLPFamily, "samples", samples)
    with pytest.raises(FusionError, match="no samples"):
        fuse(model, PACKED, dry_run=True)
    assert everything(model) == before


@pytest.mark.usefixtures("_family")
def test_random_numbers_that_a_kernel_draws_are_given_back(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def samples(self: Any, members: Any, generator: Any) -> Any:
        drawn.append(torch.rand(1))
        return [(torch.randn(32, 16, generator=generator),)]

    monkeypatch.setattr(PackedNormMLPFamily, "samples", samples)
    model = Model(1, 16).to(device)
    check(model, lambda **dry: fuse(model, PACKED, **dry))
    assert len(drawn) == 2
    assert torch.equal(*drawn)


def test_the_built_in_families_say_what_they_would_do() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Conv2d(3, 64, 16, stride=16), nn.Flatten(2))
            self.small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x)

    model = Vision()
    dry = check(model, lambda **dry: fuse(model, **dry))
    assert "would fuse" in [row.action for row in dry.groups]
    assert dry.would_fuse[0].accuracy is not None


def test_a_kernel_forgets_the_copies_it_was_compared_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[nn.Module]] = []

    @functools.cache
    def prepare(norm: nn.Module, mlp: nn.Module) -> None:
        seen.append(weakref.ref(mlp))

    class Watching(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x)

    setattr(Watching.forward, "prepare", prepare)

    class Unpacked(PackedNormMLPFamily):
        name, kernel, layouts = "unpacked", "Unpacked", ()

    monkeypatch.setattr(family, "_FAMILIES", {"unpacked": Unpacked()})
    model = Model(1, 16)
    with mapped(Unpacked=Watching):
        check(model, lambda **dry: fuse(model, {"unpacked": True}, **dry))
    gc.collect()
    alive = [reference() for reference in seen]
    assert len(alive) > 2
    assert {id(mlp) for mlp in alive if mlp is not None} == {id(model.layers[0].mlp)}


def test_other_models_are_not_touched() -> None:
    model, other = Model(1), Model(1)
    fuse_modules(other, PATHS)
    before = everything(other)
    fuse_modules(model, PATHS, dry_run=True)
    assert everything(other) == before
    assert type(model.layers[0].mlp) is Mlp


def _scale_buffer(norm: nn.Module, mlp: nn.Module) -> None:
    norm.seen += 1
    norm.table[0] = 5.0


def _set_attributes(norm: nn.Module, mlp: nn.Module) -> None:
    norm.note, norm.calls = "prepared", 9
    norm.options["fast"] = True
    del mlp.calls


def _register(norm: nn.Module, mlp: nn.Module) -> None:
    mlp.extra = nn.Linear(2, 2)
    norm.bias = nn.Parameter(torch.ones(2))
    mlp.up_proj.register_forward_hook(lambda *call: None)


@pytest.mark.parametrize("prepare", [_scale_buffer, _set_attributes, _register])
def test_what_a_kernel_writes_to_its_members_when_it_is_prepared_is_undone(
    model: Model, prepare: Callable[..., None]
) -> None:
    for block in model.layers:
        block.norm.register_buffer("seen", torch.zeros(2))
        block.norm.table, block.norm.options = torch.zeros(2), {}
    tables = [block.norm.table for block in model.layers]
    hooks = {path: dict(module._forward_hooks) for path, module in model.named_modules()}

    class Writing(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x)

    setattr(Writing.forward, "prepare", prepare)
    before = everything(model)
    with mapped(Fast=Writing):
        dry = fuse_modules(model, ROLES, kernel="Fast", dry_run=True)
    # Buffers that were put back were written to twice.
    after = everything(model)
    assert [tensor[:3] for tensor in after.tensors] == [tensor[:3] for tensor in before.tensors]
    assert [tensor[4:] for tensor in after.tensors] == [tensor[4:] for tensor in before.tensors]
    assert (after.structure, after.attributes, after.fusion) == (
        before.structure,
        before.attributes,
        before.fusion,
    )
    assert [table.tolist() for table in tables] == [[0.0, 0.0]] * len(tables)
    assert [block.norm.options for block in model.layers] == [{}] * len(tables)
    assert {p: dict(m._forward_hooks) for p, m in model.named_modules()} == hooks
    assert {row.path for row in dry.groups} == {"kernel"}


def _scale(norm: nn.Module, mlp: nn.Module) -> None:
    with torch.no_grad():
        norm.weight.mul_(2)


def _scale_data(norm: nn.Module, mlp: nn.Module) -> None:
    norm.weight.data.mul_(2)


def _other_data(norm: nn.Module, mlp: nn.Module) -> None:
    norm.weight.data = norm.weight.data * 2


def _freeze(norm: nn.Module, mlp: nn.Module) -> None:
    norm.requires_grad_(False)


def _backward(norm: nn.Module, mlp: nn.Module) -> None:
    with torch.enable_grad():
        norm(torch.ones(1, 8, device=norm.weight.device)).sum().backward()


def _hook(norm: nn.Module, mlp: nn.Module) -> None:
    norm.weight.register_hook(lambda gradient: gradient * 0)


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (_scale, ""),
        (_scale_data, ""),
        (_other_data, ""),
        (_freeze, ".requires_grad"),
        (_backward, ".grad"),
        (_hook, "'s hooks"),
    ],
)
@pytest.mark.parametrize("has_gradients", [False, True])
def test_what_a_kernel_does_to_weights_when_it_is_prepared_is_told_and_undone(
    model: Model, prepare: Callable[..., None], what: str, has_gradients: bool
) -> None:
    class Writing(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x)

    setattr(Writing.forward, "prepare", prepare)
    if has_gradients:
        device = model.layers[0].norm.weight.device
        model(torch.randn(2, 8, device=device)).sum().backward()

    def state() -> Any:
        return [
            (name, p.data_ptr(), p.tolist(), p.requires_grad, id(p.grad), str(p.grad))
            for name, p in model.named_parameters()
        ]

    before = state()
    classes = [type(module) for module in model.modules()]
    names = [repr(f"layers.{number}.norm.weight{what}") for number in range(len(model.layers))]
    with (
        mapped(Fast=Writing),
        pytest.raises(FusionError, match=re.escape(f"wrote to {', '.join(names)} when")),
    ):
        fuse_modules(model, ROLES, kernel="Fast", dry_run=True)
    assert [type(module) for module in model.modules()] == classes
    assert state() == before
    assert all(p._backward_hooks is None for p in model.parameters())


def test_a_prepare_outside_a_dry_run_is_left_alone(model: Model) -> None:
    class Writing(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            return WeightKernel.forward(self, x)

    setattr(Writing.forward, "prepare", _scale_data)
    before = model.layers[0].norm.weight.tolist()
    with mapped(Fast=Writing):
        fuse_modules(model, ROLES, kernel="Fast")
    assert model.layers[0].norm.weight.tolist() == [2 * value for value in before]
