"""Weight layouts: parameters that lie in one packed tensor, which the kernel never reads stale."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import huggingface_hub
import pytest
import safetensors.torch
import torch
from packed import PackedNormMLP, PackedNormMLPFamily
from structure import structure
from support import Mlp, Model, Norm, mapped
from torch import Tensor, nn

from module_fusion import NotFusableError, fuse, fuse_modules, report, unfuse_modules
from module_fusion.families import FusionFamily, WeightLayout, register_family

WEIGHTS = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
FAMILY = {"packed_norm_mlp": True}
# So that a weight is no multiple of the 512 bytes to which CUDA's allocator rounds up.
HIDDEN = 20


@pytest.fixture
def model(device: str) -> Model:
    torch.manual_seed(1)
    return blocks_of_squares().to(device)


def blocks_of_squares() -> Model:
    """A model whose weights are all square."""
    model = Model(3, HIDDEN)
    for block in model.layers:
        block.mlp = Mlp(HIDDEN, HIDDEN)
    return model


@pytest.fixture
def x(device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, HIDDEN, device=device)


@pytest.fixture(autouse=True)
def _family() -> Iterator[None]:
    """The family is registered, and its kernel mapped, for one test."""
    register_family(PackedNormMLPFamily)
    with mapped(PackedNormMLP=PackedNormMLP, Unpacked=PackedNormMLP):
        yield


def layout_of(monkeypatch: pytest.MonkeyPatch, *layouts: WeightLayout) -> None:
    monkeypatch.setattr(PackedNormMLPFamily, "layouts", layouts)


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes by address of every storage under the parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {
        name: value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, value in model.state_dict().items()
    }


def runs(model: nn.Module) -> list[tuple[int, int]]:
    return [(group.kernel_calls, group.member_calls) for group in report(model).groups]


def kernel_runs(model: nn.Module, x: Tensor) -> bool:
    """Whether the next call runs the kernel in every block; in none otherwise."""
    before = runs(model)
    model(x)
    changed = {(a[0] > b[0], a[1] > b[1]) for a, b in zip(runs(model), before, strict=True)}
    assert len(changed) == 1
    return changed == {(True, False)}


def close(value: Tensor, expected: Tensor) -> bool:
    """One product of all rows instead of two of half of them: the same sums, a few roundings."""
    return torch.allclose(value, expected, rtol=1e-5, atol=1e-5)


def reasons(model: nn.Module) -> set[str | None]:
    return {group.reason for group in report(model).groups}


LEFT = {"the weights left the packed layout 'gate_up'; fuse again"}


def test_the_kernel_runs_on_the_packed_tensor_and_gives_the_same_values(
    model: Model, x: Tensor
) -> None:
    expected = model(x)
    done = fuse(model, FAMILY)
    assert len(done.fused) == 3
    assert not done.skipped
    assert kernel_runs(model, x)
    assert close(model(x), expected)
    packed = model.layers[0].mlp.fused_kernel.packed["gate_up"]
    mlp = model.layers[0].mlp
    assert torch.equal(packed, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    assert not packed.requires_grad


def test_parameters_stay_the_same_objects_with_the_same_names_and_bits(model: Model) -> None:
    model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before, data = structure(model), bits(model)
    shapes = [(p.shape, p.stride(), p.requires_grad, p.is_leaf) for p in model.parameters()]
    parameters = list(model.named_parameters())
    fuse(model, FAMILY)
    after = list(model.named_parameters())
    assert [(n, id(p)) for n, p in after] == [(n, id(p)) for n, p in parameters]
    assert [(p.shape, p.stride(), p.requires_grad, p.is_leaf) for p in model.parameters()] == shapes
    assert bits(model) == data
    assert list(model.state_dict()) == before.state_dict


def packed_memory(model: Any) -> list[tuple[int, int]]:
    """Address and size of every packed tensor, where there is one."""
    packings = [p for block in model.layers for p in block.mlp._fusion.chain.packings]
    found = [packing._memory() for packing in packings]
    return [(storage.data_ptr(), storage.nbytes()) for storage in found if storage is not None]


def is_packed(block: Any) -> bool:
    gate, up = block.mlp.gate_proj.weight, block.mlp.up_proj.weight
    return bool(up.data_ptr() - gate.data_ptr() == gate.nbytes)


def test_packing_takes_no_memory_and_undoing_it_neither(model: Model) -> None:
    before = sorted(storages(model).values())
    fuse(model, FAMILY)
    # The packed tensors are no more than the weights that lie in them, each in its place.
    mlp = model.layers[0].mlp
    one = mlp.gate_proj.weight.nbytes + mlp.up_proj.weight.nbytes
    starts = [block.mlp.gate_proj.weight.data_ptr() for block in model.layers]
    assert packed_memory(model) == [(start, one) for start in starts]
    assert all(is_packed(block) for block in model.layers)
    assert sorted(storages(model).values()) == before
    unfuse_modules(model)
    assert sorted(storages(model).values()) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU's allocator does not count")
def test_the_allocator_counts_no_more_than_before() -> None:
    model = Model(3, 512).cuda()
    gc.collect()  # What earlier tests left in cycles is freed at any time.
    before = torch.cuda.memory_allocated()
    fuse(model, FAMILY)
    assert torch.cuda.memory_allocated() == before
    unfuse_modules(model)
    assert torch.cuda.memory_allocated() == before


def test_nobody_but_the_parameters_keeps_the_packed_memory(model: Model) -> None:
    fuse(model, FAMILY)
    assert len(packed_memory(model)) == 3
    model.double()
    assert packed_memory(model) == []


def test_the_packed_memory_lives_as_long_as_one_of_its_weights(model: Model) -> None:
    fuse(model, FAMILY)
    weight = model.layers[0].mlp.up_proj.weight
    expected = weight.detach().clone()
    del model
    gc.collect()
    assert torch.equal(weight, expected)


def test_optimizer_steps_go_through_the_views_as_they_would_unfused(
    model: Model, x: Tensor
) -> None:
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    fuse(model, FAMILY)
    for _ in range(3):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    assert runs(model) == [(3, 0)] * 3
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-3)
    trained = bits(model)
    identities = list(map(id, model.parameters()))
    unfuse_modules(model)
    assert bits(model) == trained
    assert list(map(id, model.parameters())) == identities
    assert not any(is_packed(block) for block in model.layers)


def test_a_step_between_forward_and_backward_is_an_error_as_it_is_unfused(
    model: Model, x: Tensor
) -> None:
    fuse(model, FAMILY)
    loss = model(x).sum()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def move(model: Any, how: str) -> None:
    """Put weights elsewhere, in the ways people do."""
    if how == "data":
        for block in model.layers:
            block.mlp.up_proj.weight.data = block.mlp.up_proj.weight.data * 2
    elif how == "assign":
        state = {name: value.clone() * 2 for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    elif how == "replaced":
        for block in model.layers:
            block.mlp.gate_proj.weight = nn.Parameter(block.mlp.gate_proj.weight.detach() * 2)
    elif how == "swapped":
        for block in model.layers:
            gate, up = block.mlp.gate_proj.weight, block.mlp.up_proj.weight
            gate.data, up.data = up.data, gate.data
    elif how == "transposed":
        for block in model.layers:
            block.mlp.up_proj.weight.data = block.mlp.up_proj.weight.data.t()
    elif how == "vector":
        vector = nn.utils.parameters_to_vector(model.parameters()) * 2
        nn.utils.vector_to_parameters(vector.detach(), model.parameters())
    elif how == "elsewhere in a copy of the storage":
        for block in model.layers:
            packed = block.mlp.fused_kernel.packed["gate_up"].clone()
            block.mlp.up_proj.weight.data = packed[packed.shape[0] // 2 :].mul_(2)
    elif how == "converted and back":
        model.double().float()
        for parameter in model.parameters():
            parameter.data.mul_(2)


EXACTLY = {"rtol": 0, "atol": 0}
MOVES = [
    "data",
    "assign",
    "replaced",
    "swapped",
    "transposed",
    "vector",
    "elsewhere in a copy of the storage",
    "converted and back",
]


@pytest.mark.parametrize("how", MOVES)
def test_weights_that_left_the_packed_tensor_are_never_read_from_it(
    model: Model, x: Tensor, how: str
) -> None:
    fuse(model, FAMILY)
    model(x)
    twin = copy.deepcopy(model)
    unfuse_modules(twin)
    move(model, how)
    twin.load_state_dict(model.state_dict())
    assert not kernel_runs(model, x)
    assert reasons(model) == LEFT
    # Products with a transposed matrix are summed in another order.
    torch.testing.assert_close(model(x), twin(x), **({} if how == "transposed" else EXACTLY))
    if how in ("vector", "transposed", "elsewhere in a copy of the storage"):
        return  # They are views of something larger, or not contiguous, and cannot be packed.
    again = fuse(model, FAMILY)
    assert {group.action for group in again.groups} == {"already fused"}
    assert kernel_runs(model, x)
    assert close(model(x), twin(x))
    unfuse_modules(model)
    assert torch.equal(model(x), twin(x))


def test_the_same_memory_read_as_another_dtype_is_not_the_packed_weight(model: Any) -> None:
    fuse(model, FAMILY)
    block = model.layers[0]
    [packing] = block.mlp._fusion.chain.packings
    assert packing.is_current([block.norm, block.mlp])
    weight = block.mlp.up_proj.weight.requires_grad_(False)
    weight.data = weight.data.view(torch.int32)
    assert not packing.is_current([block.norm, block.mlp])
    assert packing.tensor([block.norm, block.mlp]) is None


def test_weights_that_cannot_be_packed_again_are_left_where_they_are(
    model: Model, x: Tensor
) -> None:
    fuse(model, FAMILY)
    move(model, "vector")
    where = [p.data_ptr() for p in model.parameters()]
    again = fuse(model, FAMILY)
    assert {group.reason for group in again.fused} == {
        "mlp.gate_proj.weight cannot be packed: it is a view of a larger storage"
    }
    assert [p.data_ptr() for p in model.parameters()] == where
    assert not kernel_runs(model, x)
    assert reasons(model) == {
        "the weights left the packed layout 'gate_up', and when fuse was called: "
        "mlp.gate_proj.weight cannot be packed: it is a view of a larger storage"
    }
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert not kernel_runs(model, x)
    assert reasons(model) == LEFT
    fuse(model, FAMILY)
    assert kernel_runs(model, x)


def test_why_weights_could_not_be_packed_again_is_taken_back_with_the_call(
    model: Model, x: Tensor
) -> None:
    fuse(model, FAMILY)
    move(model, "vector")
    fuse(model, FAMILY, dry_run=True)
    assert not kernel_runs(model, x)
    assert reasons(model) == LEFT
    with pytest.raises(ValueError, match=r"no\.such"):
        fuse(model, {**FAMILY, "patch_embeddings": {"include": "no.such.path"}})
    assert not kernel_runs(model, x)
    assert reasons(model) == LEFT
    fuse(model, FAMILY)
    twin = copy.deepcopy(model)
    assert not kernel_runs(twin, x)
    assert reasons(twin) == LEFT


def test_in_place_loads_go_through_the_views(model: Model, x: Tensor) -> None:
    torch.manual_seed(5)
    other = blocks_of_squares().to(x.device)
    fuse(model, FAMILY)
    model.load_state_dict(other.state_dict())
    assert kernel_runs(model, x)
    assert close(model(x), other(x))


def test_another_dtype_is_packed_again_by_fusing_again(model: Model, x: Tensor) -> None:
    fuse(model, FAMILY)
    model.double()
    assert not kernel_runs(model, x.double())
    fuse(model, FAMILY)
    assert kernel_runs(model, x.double())
    assert model.layers[0].mlp.fused_kernel.packed["gate_up"].dtype is torch.float64


def test_a_compiled_graph_holds_the_members_because_it_cannot_check(
    model: Model, x: Tensor
) -> None:
    expected = model(x)
    fuse(model, FAMILY)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    move(model, "data")
    moved = compiled(x)
    unfuse_modules(model)
    assert torch.equal(moved, model(x))
    fuse(model, FAMILY)
    assert reasons(model) == {
        "compiled graphs cannot check that the weights are packed: they run the members"
    }


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_never_reads_the_weights_of_its_original(
    model: Model, x: Tensor, how: str, tmp_path: Path
) -> None:
    fuse(model, FAMILY)
    if how == "deepcopy":
        copied: Any = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert bits(copied) == bits(model)
    with torch.no_grad():
        for block in copied.layers:
            block.mlp.up_proj.weight.mul_(2)
    plain = blocks_of_squares().to(x.device)
    plain.load_state_dict(copied.state_dict())
    assert close(copied(x), plain(x))
    assert not kernel_runs(copied, x)
    assert reasons(copied) == LEFT
    fuse(copied, FAMILY)
    assert kernel_runs(copied, x)
    assert close(copied(x), plain(x))
    unfuse_modules(copied)
    assert torch.equal(copied(x), plain(x))
    assert kernel_runs(model, x)


def test_a_partial_undo_separates_those_weights_alone(model: Model, x: Tensor) -> None:
    expected = model(x)
    fuse(model, FAMILY)
    unfuse_modules(model, "layers.1.mlp")
    assert [is_packed(block) for block in model.layers] == [True, False, True]
    assert kernel_runs(model, x)
    assert close(model(x), expected)
    unfuse_modules(model)
    assert torch.equal(model(x), expected)


def test_a_weight_that_an_adapter_moved_within_its_member_is_separated_too(model: Model) -> None:
    fuse(model, FAMILY)
    mlp: Any = model.layers[0].mlp
    mlp.gate_proj = nn.Sequential(mlp.gate_proj)
    packing = mlp._fusion.chain.packings[0]
    unfuse_modules(model)
    assert packing._memory() is None


def test_a_state_dict_saves_and_loads_as_that_of_an_unfused_model(
    model: Model, x: Tensor, tmp_path: Path
) -> None:
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    fuse(model, FAMILY)
    torch.save(model.state_dict(), tmp_path / "fused.pt")
    assert (tmp_path / "plain.pt").stat().st_size == (tmp_path / "fused.pt").stat().st_size
    plain, fused = (torch.load(tmp_path / f"{name}.pt") for name in ("plain", "fused"))
    assert list(plain) == list(fused)
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    other = blocks_of_squares().to(x.device)
    other.load_state_dict(fused)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("how", ["save_file", "save_model", "huggingface_hub", "accelerate"])
def test_savers_that_look_at_storages_keep_every_weight(
    model: Model, tmp_path: Path, how: str
) -> None:
    fuse(model, FAMILY)
    if how == "save_file":
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    elif how == "save_model":
        safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    elif how == "huggingface_hub":
        huggingface_hub.save_torch_model(model, tmp_path)
    else:
        accelerate.Accelerator().save_model(model, tmp_path)
    read = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {k: v.tolist() for k, v in read.items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }


def test_the_file_of_one_weight_has_no_other_in_it(model: Model, tmp_path: Path) -> None:
    fuse(model, FAMILY)
    weight = model.layers[0].mlp.up_proj.weight
    torch.save(weight, tmp_path / "weight.pt")
    assert (tmp_path / "weight.pt").stat().st_size < weight.nbytes + 2000


class TwoMlps(nn.Module):
    """One norm, whose output two MLPs get."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = Norm(HIDDEN), Mlp(HIDDEN), Mlp(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.add(self.left(x), self.right(x))


def test_a_weight_is_packed_for_one_group_only(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(TwoMlps()).to(x.device)
    expected = model(x)
    monkeypatch.setattr(PackedNormMLPFamily, "paths", (("0.norm", "0.left"), ("0.norm", "0.right")))
    layout_of(monkeypatch, WeightLayout("gate_up", WEIGHTS), WeightLayout("n", ("norm.weight",)))
    done = fuse(model, FAMILY)
    assert len(done.fused) == 1
    assert [group.reason for group in done.skipped] == [
        "norm.weight cannot be packed: it is packed for another group"
    ]
    assert close(model(x), expected)
    assert [group.action for group in fuse(model, FAMILY).groups] == ["already fused", "skipped"]
    unfuse_modules(model)
    assert torch.equal(model(x), expected)


def test_a_layout_of_one_weight_is_a_view_of_it(
    model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = WeightLayout(
        "flat", ("norm.weight",), lambda w: w[0].view(1, -1), lambda p, shapes: [p.view(shapes[0])]
    )
    layout_of(monkeypatch, WeightLayout("gate_up", WEIGHTS), flat)
    fuse(model, FAMILY)
    assert kernel_runs(model, x)
    packed = model.layers[0].mlp.fused_kernel.packed["flat"]
    assert packed.shape == (1, HIDDEN)
    assert packed.data_ptr() == model.layers[0].norm.weight.data_ptr()
    move(model, "data")
    assert not kernel_runs(model, x)
    assert {group.action for group in fuse(model, FAMILY).groups} == {"already fused"}
    assert kernel_runs(model, x)


def interleaved(weights: Any) -> Tensor:
    return torch.stack(list(weights), dim=1)


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "a copy": (
        {
            "unpack": lambda packed, shapes: [
                v.clone() for v in packed.split([s[0] for s in shapes])
            ]
        },
        "the layout 'gate_up' is refused: unpack gave a copy, not a view of the packed tensor",
    ),
    "other bits": (
        {"pack": lambda weights: torch.cat([w + 1 for w in weights])},
        "the layout 'gate_up' is refused: unpack gave other values than the weights",
    ),
    "another order": (
        {"pack": lambda weights: torch.cat(list(reversed(weights)))},
        "the layout 'gate_up' is refused: unpack gave other values than the weights",
    ),
    "another dtype": (
        {"pack": lambda weights: torch.cat(list(weights)).double()},
        "the layout 'gate_up' is refused: pack gave no tensor in torch.float32 on {device}",
    ),
    "padding": (
        {
            "pack": lambda weights: torch.cat([*weights, weights[0]]),
            "unpack": lambda packed, shapes: packed.split(shapes[0][0])[:2],
        },
        "the layout 'gate_up' is refused: the packed tensor is not of the size of the weights "
        "together",
    ),
    "too few": (
        {"unpack": lambda packed, shapes: [packed]},
        "the layout 'gate_up' is refused: unpack gave 1 views for 2 weights",
    ),
    "other strides": (
        {"pack": interleaved, "unpack": lambda packed, shapes: packed.unbind(1)},
        "the layout 'gate_up' is refused: unpack gave a view of shape (20, 20) with strides "
        "(40, 1) for a weight of shape (20, 20) with strides (20, 1)",
    ),
    "an error": (
        {"pack": lambda weights: 1 / 0},
        "the layout 'gate_up' failed: ZeroDivisionError('division by zero')",
    ),
    "no such weight": (
        {"weights": ("mlp.gate_proj.weight", "mlp.nothing.weight")},
        "there is no parameter mlp.nothing.weight",
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_that_would_change_the_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: str
) -> None:
    model = nn.Module()
    model.layers = Model(2, HIDDEN).to(device).layers
    for block in model.layers:
        block.mlp.gate_proj = nn.Linear(HIDDEN, HIDDEN, bias=False, device=device)
        block.mlp.up_proj = nn.Linear(HIDDEN, HIDDEN, bias=False, device=device)
    options, reason = LAYOUTS[kind]
    layout_of(monkeypatch, WeightLayout("gate_up", **{"weights": WEIGHTS, **options}))
    before, data, where = structure(model), bits(model), [p.data_ptr() for p in model.parameters()]
    done = fuse(model, FAMILY)
    shown = reason.replace("{device}", str(next(model.parameters()).device))
    assert [group.reason for group in done.skipped] == [shown] * 2
    assert not done.fused
    assert structure(model) == before
    assert bits(model) == data
    assert [p.data_ptr() for p in model.parameters()] == where


def test_views_that_overlap_are_refused_even_where_the_weights_are_equal(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()
    first = lambda packed, shapes: [packed[: s[0]] for s in shapes]  # noqa: E731
    layout_of(monkeypatch, WeightLayout("gate_up", WEIGHTS, unpack=first))
    assert {group.reason for group in fuse(model, FAMILY).skipped} == {
        "the layout 'gate_up' is refused: unpack gave views that overlap"
    }


def test_a_view_that_starts_at_another_alignment_is_refused(device: str) -> None:
    model = Model(1, 6).to(device)
    model.layers[0].mlp.gate_proj = nn.Linear(6, 5, bias=False, device=device)
    model.layers[0].mlp.up_proj = nn.Linear(6, 5, bias=False, device=device)
    assert [group.reason for group in fuse(model, FAMILY).skipped] == [
        "the layout 'gate_up' is refused: a view would not start at a multiple of 64 bytes"
    ]


class Tagged(nn.Parameter):
    """A parameter of a class of its own."""


def spoil(model: Any, how: str) -> str:
    """Give the first block weights that cannot be packed; why they cannot."""
    mlp = model.layers[0].mlp
    gate, up = mlp.gate_proj, mlp.up_proj
    what = "mlp.up_proj.weight cannot be packed: it"
    if how == "tied within":
        up.weight = gate.weight
        return f"{what.replace('up', 'gate')} is shared with another parameter or buffer"
    if how == "tied to another block":
        model.layers[1].mlp.up_proj.weight = up.weight
        return f"{what} is shared with another parameter or buffer"
    if how == "a buffer of the same storage":
        model.register_buffer("alias", up.weight.data)
        return f"{what} is shared with another parameter or buffer"
    if how == "a view":
        up.weight.data = torch.cat([up.weight.data, up.weight.data])[: up.weight.shape[0]]
        return f"{what} is a view of a larger storage"
    if how == "another class":
        up.weight = Tagged(up.weight.data)
        return f"{what} is a Tagged"
    if how == "another dtype":
        up.double()
        device = gate.weight.device
        return (
            f"{what} is in torch.float64 on {device}, mlp.gate_proj.weight in torch.float32 on "
            f"{device}"
        )
    if how == "strides":
        up.weight.data = up.weight.data.t().contiguous().t()
        return f"{what} is empty, a single number, or not contiguous"
    if how == "inference mode":
        with torch.inference_mode():
            up.weight = nn.Parameter(up.weight.clone(), requires_grad=False)
        return f"{what} was made in inference mode"
    if how == "shared memory":
        up.weight.share_memory_()
        return f"{what} is in memory that other processes share"
    if how == "pinned":
        up.weight.data = up.weight.data.pin_memory()
        return f"{what} is in pinned memory"
    assert how == "meta"
    mlp.to("meta")
    return "mlp.gate_proj.weight is on the meta device: load the weights, then fuse"


SPOILS = [
    "tied within",
    "tied to another block",
    "a buffer of the same storage",
    "a view",
    "another class",
    "another dtype",
    "strides",
    "inference mode",
    "shared memory",
    "pinned",
    "meta",
]


@pytest.mark.parametrize("how", SPOILS)
def test_weights_that_cannot_be_moved_without_a_trace_are_left_alone(
    model: Model, how: str, device: str
) -> None:
    if how == "shared memory" and device != "cpu":
        pytest.skip("weights on a GPU are always in memory that processes can share")
    if how == "pinned" and not (torch.cuda.is_available() and device == "cpu"):
        pytest.skip("pinned memory needs weights on the CPU of a machine with a GPU")
    reason = spoil(model, how)
    where = [(id(p), p.data_ptr()) for p in model.layers[0].parameters()]
    done = fuse(model, FAMILY)
    assert {group.reason for group in done.skipped} == {reason}
    both = how == "tied to another block"
    assert len(done.fused) == (1 if both else 2)
    assert [(id(p), p.data_ptr()) for p in model.layers[0].parameters()] == where
    assert "_fusion" not in vars(model.layers[0].mlp)
    assert how != "shared memory" or model.layers[0].mlp.up_proj.weight.is_shared()


def test_weights_that_say_they_are_pinned_are_left_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    reasons = {group.reason for group in fuse(model, FAMILY).skipped}
    pinned = {"mlp.gate_proj.weight cannot be packed: it is in pinned memory"}
    assert reasons == (pinned if device == "cpu" else set())


@pytest.mark.parametrize("where", ["certificate", "later family"])
def test_a_failure_gives_the_parameters_their_old_storage_back(
    model: Model, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before, old = structure(model), [p.data_ptr() for p in model.parameters()]
    data = bits(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no more")

    families: dict[str, Any] = dict(FAMILY)
    if where == "certificate":
        monkeypatch.setattr("module_fusion.families.certificate._compare", fail)
    else:
        families["patch_embeddings"] = {"include": "no.such.path"}
    with pytest.raises((RuntimeError, ValueError), match=r"no more|no\.such"):
        fuse(model, families)
    assert structure(model) == before
    assert [p.data_ptr() for p in model.parameters()] == old
    assert bits(model) == data


def test_a_group_whose_kernel_does_not_load_has_its_old_storage_back(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no more")

    before, old = structure(model), [p.data_ptr() for p in model.parameters()]
    monkeypatch.setattr("module_fusion.surgery.kernelize", fail)
    done = fuse(model, FAMILY)
    assert len(done.skipped) == 3
    assert str(done.skipped[0].reason).endswith("cannot take over: no more")
    assert structure(model) == before
    assert [p.data_ptr() for p in model.parameters()] == old


def test_a_group_that_the_comparison_refuses_has_its_old_storage_back(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [p.data_ptr() for p in model.parameters()]
    monkeypatch.setattr("packed.ERROR", 1e-2)
    before = structure(model)
    done = fuse(model, FAMILY)
    assert len(done.skipped) == 3
    assert "less accurate" in str(done.skipped[0].reason)
    assert [p.data_ptr() for p in model.parameters()] == old
    assert structure(model) == before


def test_a_failure_while_packing_again_puts_everything_back(model: Model, x: Tensor) -> None:
    fuse(model, FAMILY)
    model.layers[0].mlp.up_proj.weight.data = model.layers[0].mlp.up_proj.weight.data * 2
    old = [(id(p), p.data_ptr()) for p in model.parameters()]
    expected = model(x)
    with pytest.raises(ValueError, match=r"no\.such"):
        fuse(model, {**FAMILY, "patch_embeddings": {"include": "no.such.path"}})
    assert [(id(p), p.data_ptr()) for p in model.parameters()] == old
    assert torch.equal(model(x), expected)
    assert [group.member_calls for group in report(model).groups] == [2, 0, 0]


def test_fusing_inside_inference_mode_leaves_weights_that_train(model: Model, x: Tensor) -> None:
    with torch.inference_mode():
        assert len(fuse(model, FAMILY).fused) == 3
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.inference_mode():
        unfuse_modules(model)
    model(x).sum().backward()


def test_a_kernel_that_reads_packed_weights_says_so_where_there_are_none(
    model: Model, x: Tensor
) -> None:
    fuse_modules(model, ["layers.*.norm", "layers.*.mlp"], kernel="Unpacked")
    with pytest.raises(NotFusableError) as error:
        model(x)
    assert str(error.value) == (
        "There is no packed tensor 'gate_up' here: no layout of that name, or a weight left it. "
        "Layouts belong to families: fuse(model, {family: True}) packs the weights, fuse_modules "
        "does not."
    )


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        (("gate_up",), "is a tuple of WeightLayout, each with a name of its own"),
        ((WeightLayout("a", WEIGHTS), WeightLayout("a", ("norm.weight",))), "name of its own"),
        ((WeightLayout("a", ("attention.weight",)),), "starting with a role of the family 'bad'"),
        ((WeightLayout("a", ("mlp",)),), "has to be the path of a parameter"),
        ((WeightLayout("a", ()),), "names no weight"),
        ((WeightLayout("a", WEIGHTS), WeightLayout("b", WEIGHTS[1:])), "packed already"),
    ],
)
def test_a_family_with_a_wrong_layout_is_not_registered(layouts: Any, message: str) -> None:
    bad = type("Bad", (FusionFamily,), {"name": "bad", "kernel": "K", "roles": ("norm", "mlp")})
    bad.layouts = layouts  # type: ignore[attr-defined]
    with pytest.raises(NotFusableError, match=message):
        register_family(bad)
    with pytest.raises(NotFusableError, match="no family 'bad'"):
        fuse(nn.Module(), {"bad": True})
