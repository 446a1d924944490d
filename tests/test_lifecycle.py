"""The life of a fused model: copies, files, dtypes, devices, optimizers, other patchers."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import io
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from structure import structure
from support import (
    PATHS,
    Block,
    Mlp,
    Model,
    Norm,
    WeightKernel,
    mapped,
    members_kernel,
    runs,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from module_fusion import (
    FusedModule,
    FusionError,
    NotFusableError,
    RegistryCollector,
    fuse_modules,
    report,
    unfuse_modules,
)


def fuse(model: nn.Module, kernel: type[nn.Module] = WeightKernel) -> None:
    with mapped(Kernel=kernel):
        fuse_modules(model, PATHS, kernel="Kernel")


def kernel_calls(model: nn.Module) -> list[int]:
    return [group.kernel_calls for group in report(model).groups]


def reset_calls(model: Model) -> None:
    for block in model.layers:
        block.norm.calls = block.mlp.calls = 0


def copies(model: nn.Module, how: str, tmp_path: Path) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]
    file = tmp_path / "model.pt"
    torch.save(model, file)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_fused_and_independent_of_the_original(
    model: Model, x: Tensor, how: str, tmp_path: Path
) -> None:
    plain = [(type(m), list(vars(m))) for m in model.modules()]
    fuse(model)
    expected = model(x)
    copied: Any = copies(model, how, tmp_path)
    del model
    gc.collect()
    assert all(repr(b.norm) == "RegistryCollector[Norm]()" for b in copied.layers)
    assert isinstance(copied.layers[0].mlp, FusedModule)
    assert isinstance(copied.layers[0].norm, RegistryCollector)
    reset_calls(copied)
    assert torch.equal(copied(x), expected)
    assert copied.calls() == [(0, 0), (0, 0)]
    assert kernel_calls(copied) == [2, 2]
    with torch.no_grad():
        copied.layers[0].norm.weight.mul_(2)
    changed = copied(x)
    unfuse_modules(copied)
    assert torch.equal(copied(x), changed)
    assert [(type(m), list(vars(m))) for m in copied.modules()] == plain


def test_a_copy_made_before_is_not_touched_and_the_original_not_by_its_copy(
    model: Model, x: Tensor
) -> None:
    before = copy.deepcopy(model)
    expected = model(x)
    fuse(model)
    copied = copy.deepcopy(model)
    unfuse_modules(copied)
    assert type(before.layers[0].mlp) is type(copied.layers[0].mlp) is Mlp
    assert kernel_calls(model) == [0, 0]
    assert torch.equal(model(x), expected)
    assert kernel_calls(model) == [1, 1]


def test_members_copied_alone_work_alone(model: Model, x: Tensor) -> None:
    norm, mlp = model.layers[0].norm, model.layers[0].mlp
    expected = norm(x), mlp(x)
    fuse(model)
    for copied in (copy.deepcopy(norm), copy.copy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(copied(x)) is Tensor
        assert torch.equal(copied(x), expected[0])
        unfuse_modules(copied)
        assert type(copied) is Norm
    for copied in (copy.deepcopy(mlp), copy.copy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert torch.equal(copied(x), expected[1])
        unfuse_modules(copied)
        assert type(copied) is Mlp
    model(x)
    assert kernel_calls(model) == [1, 1]


def test_a_class_with_its_own_reduce_is_refused_with_a_reason() -> None:
    class Own(nn.Linear):
        def __reduce__(self) -> Any:
            return Own, (8, 8)

    model = nn.Sequential(nn.LayerNorm(8), Own(8, 8))
    fuse_modules(model, ["0", "1"])
    with pytest.raises(FusionError, match=r"'1' cannot be copied or pickled while it is fused"):
        copy.deepcopy(model)


def test_state_dicts_load_both_ways(model: Model, x: Tensor) -> None:
    other = Model(2).to(x.device)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    fuse(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert list(loaded) == list(plain)
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    assert other.load_state_dict(loaded) == ([], [])
    assert torch.equal(other(x), expected)
    fuse(other)
    assert other.load_state_dict(Model(2).to(x.device).state_dict()) == ([], [])
    assert other.load_state_dict(plain) == ([], [])
    assert torch.equal(other(x), expected)


def test_names_objects_and_order_stay(model: Model) -> None:
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    modules = [(name, id(m)) for name, m in model.named_modules()]
    children = [list(map(id, module.children())) for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    fuse(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert [(n, id(m)) for n, m in model.named_modules() if "fused_kernel" not in n] == modules
    plain = [m for n, m in model.named_modules() if "fused_kernel" not in n]
    assert [list(map(id, module.children())) for module in plain] == children
    assert all(isinstance(m, cls) for m, cls in zip(plain, classes, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_change_of_dtype_runs_the_members_until_the_kernel_is_chosen_again(
    model: Model, x: Tensor, dtype: torch.dtype
) -> None:
    fuse(model)
    model.to(dtype)
    got = model(x.to(dtype))
    assert kernel_calls(model) == [0, 0]
    assert "call kernelize again" in str(report(model).groups[0].reason)
    fuse(model)
    assert torch.equal(model(x.to(dtype)), got)
    assert kernel_calls(model) == [1, 1]
    unfuse_modules(model)
    assert torch.equal(model(x.to(dtype)), got)


def test_a_model_fused_on_meta_can_be_filled(x: Tensor) -> None:
    source = Model(2).to(x.device)
    with torch.device("meta"):
        model = Model(2)
    fuse(model)
    model.to_empty(device=x.device)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(x), source(x))
    fuse(model)
    assert torch.equal(model(x), source(x))
    assert kernel_calls(model) == [1, 1]
    unfuse_modules(model)
    assert torch.equal(model(x), source(x))


def test_requires_grad_stays_and_can_be_changed(model: Model, x: Tensor) -> None:
    model.layers[0].norm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    fuse(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    model.requires_grad_(False)
    assert not model(x).requires_grad
    model.layers[1].requires_grad_()
    model(x).sum().backward()
    unfuse_modules(model)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("with_kernel", [False, True])
def test_training_through_fuse_and_unfuse_is_training_unfused(
    model: Model, x: Tensor, with_kernel: bool
) -> None:
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]

    def step() -> None:
        for trained, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            trained(x).pow(2).sum().backward()
            optimizer.step()

    for _ in range(3):
        step()
        if with_kernel:
            fuse(model)
        else:
            fuse_modules(model, PATHS)
        step()
        unfuse_modules(model)
    step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    saved, loaded = (optimizer.state_dict()["state"] for optimizer in optimizers)
    assert saved.keys() == loaded.keys()


def test_averaged_models_and_train_eval_flips_work(model: Model, x: Tensor) -> None:
    fuse(model)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged(x), model(x))
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


def test_other_models_other_layers_and_the_classes_are_untouched(model: Model, x: Tensor) -> None:
    other = Model(2).to(x.device)
    before = structure(other)
    classes = {cls: dict(vars(cls)) for cls in (Norm, Mlp, Block, nn.Linear, nn.Module)}
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, ["layers.0.norm", "layers.0.mlp"], kernel="Kernel")
    model(x)
    assert structure(other) == before
    assert type(model.layers[1].mlp) is Mlp
    assert {cls: dict(vars(cls)) for cls in classes} == classes


def test_registries_that_know_classes_by_their_text_know_the_swapped_ones(model: Model) -> None:
    modules = list(model.modules())
    texts = [str(type(module)) for module in modules]
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, PATHS, kernel="Kernel")
    assert [str(type(module)) for module in modules] == texts
    assert type(model.layers[0].mlp).__name__ == "Mlp"
    assert isinstance(model.layers[0].mlp, FusedModule)


def test_swapped_classes_are_made_once_and_freed_with_the_last_module(x: Tensor) -> None:
    class Local(nn.Linear):
        pass

    model = nn.Sequential(nn.LayerNorm(8), Local(8, 8), nn.LayerNorm(8), Local(8, 8))
    fuse_modules(model, ["0", "1"])
    fuse_modules(model, ["2", "3"])
    assert type(model[1]) is type(model[3])
    alive = weakref.ref(type(model[1]))
    del model
    gc.collect()
    assert alive() is None


def test_a_second_class_swap_on_top_works_and_is_undone_first(model: Model, x: Tensor) -> None:
    from module_fusion import UnfuseError

    expected = model(x)
    fuse(model)
    member = model.layers[0].mlp
    swapped = type(member)
    member.__class__ = type("Outer", (swapped,), {})
    assert torch.equal(model(x), expected)
    assert kernel_calls(model)[0] == 0
    before = structure(model)
    with pytest.raises(UnfuseError, match=r"The class of 'layers.0.mlp' is Outer; it was "):
        unfuse_modules(model)
    assert structure(model) == before
    member.__class__ = swapped
    unfuse_modules(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("around", "paths"),
    [
        ("layers.0", {"a": "layers.0", "b": "layers.1"}),
        ("layers.0.mlp", {"a": "layers.0.mlp.up_proj", "b": "layers.0.mlp.down_proj"}),
    ],
    ids=["as a member", "as the module around"],
)
def test_a_second_class_swap_on_top_is_not_taken_off_by_fusing_another_chain(
    model: Model, x: Tensor, around: str, paths: dict[str, str]
) -> None:
    expected = model(x)
    fuse(model)
    module = model.get_submodule(around)
    module.__class__ = type("Outer", (type(module),), {})
    before = structure(model)
    with (
        mapped(Kernel=members_kernel(1)),
        pytest.raises(NotFusableError, match=rf"The class of '{around}' is Outer; it was "),
    ):
        fuse_modules(model, paths, kernel="Kernel")
    assert structure(model) == before
    assert torch.equal(model(x), expected)


class CopiesItself(Norm):
    """Copies as `torch.nn.utils.parametrize` lets its classes do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


@pytest.mark.parametrize("when", ["as a collector", "as the last"])
def test_a_copy_that_its_class_makes_is_unfused_and_fused_again(when: str, x: Tensor) -> None:
    members = [CopiesItself(), Norm()] if when == "as a collector" else [Norm(), CopiesItself()]
    model = Around(nn.Sequential(*members).to(x.device))
    before, expected = [type(module) for module in model.modules()], model(x)
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(model, {"a": "inner.0", "b": "inner.1"}, kernel="Kernel")
        copied = copy.deepcopy(model)
        assert torch.equal(copied(x), expected)
        fuse_modules(copied, {"a": "inner.0", "b": "inner.1"}, kernel="Kernel")
    ran = runs(kernel)
    assert torch.equal(copied(x), expected)
    assert runs(kernel) == ran + 1
    unfuse_modules(copied)
    assert [type(module) for module in copied.modules()] == before
    assert torch.equal(copied(x), expected)


def test_a_member_replaced_after_fusing_is_left_out_and_the_rest_is_restored(
    model: Model, x: Tensor
) -> None:
    fuse(model)
    model.layers[0].mlp = Mlp(8).to(x.device)
    got = model(x)
    assert len(report(model).groups) == 1
    unfuse_modules(model)
    assert type(model.layers[0].norm) is Norm
    assert type(model.layers[0]) is Block
    assert torch.equal(model(x), got)


def test_what_served_a_chain_that_is_gone_and_another_that_is_not_is_restored(x: Tensor) -> None:
    model = Around(nn.Sequential(Norm(), Mlp(), Norm()).to(x.device))
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, {"a": "inner.0", "b": "inner.1"}, kernel="Kernel")
        fuse_modules(model, {"a": "inner.1.gate_proj", "b": "inner.1.down_proj"}, kernel="Kernel")
    model.inner[1].down_proj = nn.Linear(16, 8, bias=False).to(x.device)
    unfuse_modules(model)
    assert [type(module) for module in model.modules()] == [
        *(Around, nn.Sequential, Norm, Mlp, nn.Linear, nn.Linear, nn.Linear, Norm)
    ]


def test_a_kernel_of_another_model_is_not_run(model: Model, x: Tensor) -> None:
    fuse(model)
    other = copy.deepcopy(model)
    model.layers[0].norm = other.layers[0].norm
    got = model(x)
    assert kernel_calls(model) == [0, 1]
    unfuse_modules(model)
    assert torch.equal(model(x), got)


def test_an_instance_made_from_a_swapped_class_is_not_fused(model: Model, x: Tensor) -> None:
    fuse(model)
    for fused_module in (model.layers[0].norm, model.layers[0].mlp, model.layers[0]):
        made = type(fused_module)(8).to(x.device)
        assert made.eval()(x).shape == x.shape
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            copied.load_state_dict(made.state_dict())
            assert torch.equal(copied(x), made(x))
        unfuse_modules(made)
        assert not list(report(made).groups)


@pytest.mark.filterwarnings("ignore")
def test_a_model_fused_without_a_kernel_can_be_scripted(x: Tensor) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).to(x.device)
    expected = model(x)
    fuse_modules(model, ["0", "1"])
    assert torch.equal(torch.jit.script(model)(x), expected)


def test_a_parent_traced_by_fx_can_be_fused(model: Model, x: Tensor) -> None:
    traced = torch.fx.symbolic_trace(model, concrete_args=None)
    holder = nn.Sequential(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), traced).to(x.device)
    expected = holder(x)
    with mapped(Kernel=WeightKernel):
        fuse_modules(holder, {"a": "0.0", "b": "0.1"}, kernel="Kernel")
    unfuse_modules(holder)
    assert torch.equal(holder(x), expected)


MODULE_OF_A_KERNEL = """
import torch
from torch import nn
from support import WeightKernel

class Kernel(nn.Module):
    can_torch_compile = has_backward = True

    def forward(self, x):
        return WeightKernel.forward(self, x)
"""


def test_where_the_module_of_a_kernel_does_not_exist_a_pickle_opens_and_runs_the_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel_of_the_test.py").write_text(MODULE_OF_A_KERNEL)
    monkeypatch.syspath_prepend(tmp_path)
    kernel = importlib.import_module("kernel_of_the_test").Kernel
    model, x = Model(1), torch.randn(2, 8)
    fuse(model, kernel)
    expected = model(x)
    assert kernel_calls(model) == [1]
    torch.save((model, x, expected), tmp_path / "model.pt")
    script = (
        f"import torch; from module_fusion import report;"
        f"model, x, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        f"assert torch.equal(model(x), expected);"
        f"print(report(model).groups[0].reason)"
    )
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=tests.parent,
    )
    assert run.stdout.strip() == "no kernel was loaded for 'Kernel'", run.stderr


@pytest.mark.parametrize("lacks", ["module", "name"])
def test_with_a_kernel_that_has_no_module_or_no_name_a_pickle_opens_and_runs_the_members(
    lacks: str,
) -> None:
    model, x = Model(1), torch.randn(2, 8)
    expected = model(x)
    fuse(model)
    seat = model.layers[0].mlp.fused_kernel
    kernel = lambda x: WeightKernel.forward(seat, x)  # noqa: E731
    kernel.__module__ = None
    seat.forward = kernel if lacks == "module" else functools.partial(kernel)
    assert torch.equal(model(x), expected)
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(x), expected)
    assert report(copied).groups[0].path == "members"


def test_a_plain_function_in_the_seat_stays_there_in_a_copy(x: Tensor) -> None:
    model = Model(1).to(x.device)
    expected = model(x)
    fuse(model)
    seat = model.layers[0].mlp.fused_kernel
    seat.forward = lambda x: WeightKernel.forward(seat, x)
    copied = copy.deepcopy(model)
    reset_calls(copied)
    with torch.no_grad():
        assert torch.equal(copied(x), expected)
    assert kernel_calls(copied) == [1]
    assert copied.calls() == [(0, 0)]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("hooked", ["before", "after"])
def test_in_a_copy_a_hook_on_a_module_around_a_member_gets_the_real_value(
    x: Tensor, hooked: str
) -> None:
    model = Model(1).to(x.device)
    block = model.layers[0]
    block.norm = Around(block.norm)
    expected = model(x)
    seen: list[type] = []

    def watch(model: Model) -> None:
        model.layers[0].norm.register_forward_hook(lambda m, args, out: seen.append(type(out)))

    if hooked == "before":
        watch(model)
    with mapped(Kernel=WeightKernel):
        paths = {"norm": "layers.*.norm.inner", "mlp": "layers.*.mlp"}
        fuse_modules(model, paths, kernel="Kernel")
    copied = copy.deepcopy(model)
    if hooked == "after":
        watch(copied)
    assert torch.equal(copied(x), expected)
    assert seen == [Tensor]


def test_a_copy_with_a_module_around_a_member_is_fused_again_as_its_report_says(
    x: Tensor,
) -> None:
    model = Model(1).to(x.device)
    model.layers[0].norm = Around(model.layers[0].norm)
    paths = {"norm": "layers.*.norm.inner", "mlp": "layers.*.mlp"}
    with mapped(Kernel=WeightKernel):
        fuse_modules(model, paths, kernel="Kernel")
        copied = copy.deepcopy(model)
        expected = copied(x)
        assert "fuse the copy again" in report(copied).groups[0].reason
        assert kernel_calls(copied) == [0]
        fuse_modules(copied, paths, kernel="Kernel")
    assert torch.equal(copied(x), expected)
    assert kernel_calls(copied) == [1]
