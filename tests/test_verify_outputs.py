"""Outputs of every kind, and memory that a model or a kernel uses again, under `verify`."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import PATHS, Model, WeightKernel, mapped
from torch import Tensor, nn
from transformers.utils import ModelOutput

from module_fusion import benchmark, fuse_modules, verify
from module_fusion.verifying.differences import difference, differences
from module_fusion.verifying.structures import snapshot, tensors_in
from module_fusion.verifying.watching import equal


class Off(WeightKernel):
    """Some units in the last place away."""

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x) * (1 + 2**-20)


class Far(WeightKernel):
    """A tenth away."""

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x) * 1.1


class Returns(nn.Module):
    """Gives the output of a model in another form."""

    def __init__(self, model: Model, form: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self, self.model(x))


def fused_with(kernel: type[nn.Module], model: nn.Module) -> nn.Module:
    with mapped(K=kernel):
        fuse_modules(model, PATHS, kernel="K")
    return model


def static_tensor(owner: Any, y: Tensor) -> Tensor:
    memory = owner.__dict__.setdefault("memory", torch.zeros_like(y))
    return memory.copy_(y.detach())


def static_array(owner: Any, y: Tensor) -> Any:
    memory = owner.__dict__.setdefault("memory", np.zeros(y.shape, np.float32))
    memory[...] = y.detach().cpu().numpy()
    return memory


STATIC_BYTES = bytearray()


def static_bytes(owner: Any, y: Tensor) -> bytearray:
    STATIC_BYTES[:] = y.detach().cpu().numpy().tobytes()
    return STATIC_BYTES


@pytest.mark.parametrize("form", [static_tensor, static_array, static_bytes])
def test_memory_that_every_run_writes_is_compared_as_it_was_after_each(
    model: Model, x: Tensor, form: Any
):
    outer = Returns(model, form)
    form(outer, model(x))  # The memory is there before, as in a model that ran once.
    fused_with(Far, model)
    found = verify(outer, x)
    assert not found.equal
    assert [d.equal for d in found.outputs] == [False]


@dataclasses.dataclass
class Boxed:
    value: Tensor


def test_what_a_member_returns_is_kept_on_its_own_memory_inside_an_object_too():
    memory, same = torch.zeros(3), object()
    for value in (Boxed(memory), [Boxed(memory)], ModelOutput(y=memory), {"a": (Boxed(memory),)}):
        kept = snapshot(value)
        assert type(kept) is type(value)
        assert tensors_in(kept)[0] is not memory
        assert equal(kept, value)
        memory += 1
        assert not equal(kept, value)
    assert snapshot(same) is same


class Transposed(WeightKernel):
    """The same numbers, in other strides."""

    def forward(self, x: Tensor) -> Tensor:
        y = WeightKernel.forward(self, x)
        return y.transpose(-1, -2).contiguous().transpose(-1, -2)


def test_a_kernel_whose_output_has_other_strides_does_not_pass(model: Model, x: Tensor):
    found = verify(fused_with(Transposed, model), torch.randn(4, 8, device=x.device))
    assert not found.passed
    assert not found.groups[0].difference.equal
    assert found.groups[0].problem == "the kernel's output: strides (1, 4) fused, (8, 1) unfused"


def test_an_output_in_other_strides_is_a_difference():
    y = torch.randn(3, 4)
    found = difference(y.t().contiguous().t(), y)
    assert (found.equal, found.problem) == (False, "strides (1, 3) fused, (4, 1) unfused")
    assert difference(y[:, :1], y[:, :1].clone()).problem == "strides (4, 0) fused, (1, 0) unfused"
    # No step is taken along a dimension of one element.
    one = torch.randn(1, 4)
    assert difference(one, one.t().contiguous().t()).equal
    # What accumulates into `.grad` has the parameter's.
    assert difference(y.t().contiguous().t(), y, strides=False).equal


FORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "complex": lambda m, y: torch.complex(y, -y).conj(),
    "nested": lambda m, y: torch.nested.nested_tensor(
        [y.detach(), y.detach()[:1]], layout=torch.strided
    ),
    "jagged": lambda m, y: torch.nested.nested_tensor(
        [y.detach(), y.detach()[:1]], layout=torch.jagged
    ),
    "sparse": lambda m, y: y.to_sparse(),
    "sparse rows": lambda m, y: y.to_sparse_csr(),
    "objects": lambda m, y: np.array([y.sum().item(), None, "a"], dtype=object),
    "no dimension": lambda m, y: np.array(y.sum().item()).astype(object),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FORMS)
def test_outputs_of_every_kind_are_compared(model: Model, x: Tensor, name: str):
    outer = Returns(model, FORMS[name])
    fused_with(WeightKernel, model)
    found = verify(outer, x)
    assert found.passed, found
    assert found.equal
    assert sum(group.kernel_calls for group in found.groups) == 2
    other = Model(2).to(x.device)
    other.load_state_dict(model.state_dict())
    assert not verify(Returns(fused_with(Far, other), FORMS[name]), x).equal


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_of_a_quantized_output_numbers_and_scale_are_compared(x: Tensor):
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs a torch built with the onednn engine for quantized tensors")

    def quantized(scale: float) -> Tensor:
        return torch.quantize_per_tensor(torch.arange(4.0), scale, 0, torch.qint8)

    assert difference(quantized(0.5), quantized(0.5)).equal
    found = difference(quantized(0.4), quantized(0.5))
    assert not found.equal
    assert found.max_abs > 0


def test_of_an_output_without_values_shape_and_dtype_are_compared(model: Model, x: Tensor):
    assert verify(Returns(fused_with(WeightKernel, model), lambda m, y: y.to("meta")), x).equal
    meta = torch.empty(2, 3, device="meta")
    assert not difference(meta, meta.double()).equal
    assert not difference(meta, torch.empty(2, 3)).equal


def test_arrays_of_objects_are_compared_by_what_is_in_them():
    assert all(d.equal for d in differences(np.array([1, None]), np.array([1, None])))
    found = differences(np.array([2, None]), np.array([1, None]))
    assert [d.problem for d in found] == ["2 fused, 1 unfused"]
    assert differences(np.array([[1, None]]), np.array([1, None]))


class ComplexModel(nn.Module):
    """Two members whose values are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False, dtype=torch.complex64)
        self.last = nn.Linear(8, 8, bias=False, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


class ComplexKernel(nn.Module):
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        first, last = self.first.weight, self.last.weight
        return (input @ first.T @ last.T) * (1 + ERROR[0])


ERROR = [0.0]


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (1e-7, True), (1e-2, False)])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_kernel_with_complex_values_is_judged_by_its_error(
    error: float, passes: bool, gradients: bool
):
    torch.manual_seed(0)
    model = ComplexModel()
    with mapped(K=ComplexKernel):
        fuse_modules(model, {"first": "first", "last": "last"}, kernel="K")
    ERROR[0] = error
    found = verify(model, torch.randn(64, 8, dtype=torch.complex64), gradients=gradients)
    assert found.passed is passes, found
    assert found.groups[0].kernel_calls == 1
    if not passes:
        assert "less accurate than the modules: relative error 1.00e-02" in found.problems[0]


class Stateful(nn.Module):
    """Around a model; what it has besides parameters and buffers goes into its output."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.count = torch.zeros(1)
        self.counts = [torch.zeros(1)]
        self.alias = [model.layers[0].norm.weight]
        self.generator = torch.Generator().manual_seed(1)
        self.others = {
            "python": random.Random(1),
            "numpy": np.random.default_rng(1),
            "legacy": np.random.RandomState(1),
        }

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.counts[0] += 1
        drawn = torch.rand(1, generator=self.generator).item() + self.others["python"].random()
        drawn += self.others["numpy"].random() + self.others["legacy"].rand()
        return self.model(x) * (self.count + self.counts[0] + float(drawn)).to(x.device)

    def state(self) -> list[Any]:
        return [
            self.count.item(),
            self.counts[0].item(),
            self.generator.get_state().tolist(),
            self.others["python"].getstate(),
            json.dumps(self.others["numpy"].bit_generator.state),
            str(self.others["legacy"].get_state()),
        ]


@pytest.mark.parametrize("look", [verify, lambda m, x: benchmark(m, x, seconds=0.01)])
def test_tensors_and_generators_that_modules_have_are_put_back(model: Model, x: Tensor, look: Any):
    outer = Stateful(fused_with(WeightKernel, model))
    before, kept = outer.state(), (outer.count, outer.counts[0])
    found = look(outer, x)
    if look is verify:
        assert found.passed, found
        assert found.equal
    assert outer.state() == before
    assert (outer.count, outer.counts[0]) == kept
    outer(x)
    assert outer.state() != before


class Layer:
    """As a layer of a cache: tensors in an object, one written to and one replaced."""

    def __init__(self) -> None:
        self.keys, self.steps = torch.zeros(3), torch.zeros(1)

    def update(self) -> None:
        self.keys += 1
        self.steps = self.steps + 1


class Cache:
    def __init__(self) -> None:
        self.layers = [Layer()]
        self.seen = 0

    def update(self) -> int:
        self.seen += 1
        if self.seen % 3 == 2:
            self.layers.append(Layer())
        for layer in self.layers:
            layer.update()
        sums = [float(layer.keys.sum() + layer.steps) for layer in self.layers]
        return self.seen + int(sum(sums))


def counted(counter: Any) -> int:
    counter["a"] += 1
    return counter["a"]


def grown(many: Any) -> int:
    many.append(len(many))
    return len(many)


def entered(entries: Any) -> int:
    entries[len(entries)] = 1
    return len(entries)


def raised(space: Any) -> int:
    space.n += 1
    return space.n


def deep(entries: Any) -> int:
    entries["k"][0] += 1
    return int(entries["k"][0].sum())


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (Cache, Cache.update),
        (collections.deque, grown),
        (lambda: {"k": []}, lambda state: grown(state["k"])),
        (collections.OrderedDict, entered),
        (lambda: collections.defaultdict(list), lambda state: grown(state["k"])),
        (collections.Counter, counted),
        (lambda: types.SimpleNamespace(n=0), raised),
        (lambda: (torch.zeros(3), [0]), lambda state: grown(state[1])),
        (lambda: {"k": [torch.zeros(3)]}, deep),
    ],
)
@pytest.mark.parametrize("look", [verify, lambda m, x: benchmark(m, x, seconds=0.01)])
def test_what_modules_keep_in_containers_and_objects_is_put_back(
    model: Model, x: Tensor, make: Any, step: Any, look: Any
):
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.kept = fused_with(WeightKernel, model), make()

        def forward(self, x: Tensor) -> Any:
            return self.model(x), step(self.kept)

    outer = Keeping()
    outer(x)  # One that was called before has something in it.
    before = copy.deepcopy(outer.kept)
    found = look(outer, x)
    if look is verify:
        assert found.passed, found
        assert found.equal
    assert not [d for d in differences(outer.kept, before) if not d.equal]
    assert step(outer.kept) == step(before)


def test_what_the_parts_of_an_attribute_refer_to_in_a_circle_is_followed_once(
    model: Model, x: Tensor
):
    outer = Returns(fused_with(WeightKernel, model), lambda m, y: y)
    outer.circle = types.SimpleNamespace(module=outer, items=[])
    outer.circle.items.append(outer.circle)
    assert verify(outer, x).passed
    assert outer.circle.items == [outer.circle]


def test_a_generator_among_the_inputs_is_copied_for_every_run(model: Model, x: Tensor):
    outer = Returns(fused_with(WeightKernel, model), lambda m, y: y)
    outer.forward = lambda x, generator: outer.model(x) + torch.rand(1, generator=generator).item()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert verify(outer, x, generator=generator).equal
    assert torch.equal(generator.get_state(), before)


def test_a_model_that_writes_to_its_parameters_is_told_so(model: Model, x: Tensor):
    def form(outer: Any, y: Tensor) -> Tensor:
        with torch.no_grad():
            outer.model.layers[0].norm.weight.add_(1)
        return y

    outer = Returns(fused_with(WeightKernel, model), form)
    found = verify(outer, x)
    assert not found.passed
    assert found.problems == (
        "the unfused model writes to its own parameter 'model.layers.0.norm.weight' when it is "
        "called, so no two runs begin alike, and nothing can be said about the fused one",
    )
    assert found.notes[-1] == (
        "the parameter 'model.layers.0.norm.weight' was changed by the runs and stays so: verify "
        "keeps no second copy of the weights. Load it again"
    )


class Raises(WeightKernel):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("the kernel's own words")


@pytest.mark.parametrize(
    "call", [verify, benchmark, lambda model, x: model(x)], ids=["verify", "benchmark", "a call"]
)
def test_a_kernel_that_raises_is_named_with_its_group(model: Model, x: Tensor, call: Any):
    fused_with(Raises, model)
    with pytest.raises(ZeroDivisionError, match="the kernel's own words") as raised:
        call(model, x)
    said = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert "in the kernel 'K', in the place of layers.0.norm -> layers.0.mlp" in said
    assert raised.value.__traceback__ is not None


def marking(buffer: Tensor, mark: int) -> type[nn.Module]:
    """A kernel that writes to a buffer of the model's."""

    class Marks(WeightKernel):
        def forward(self, x: Tensor) -> Tensor:
            buffer.fill_(mark)
            return WeightKernel.forward(self, x)

    return Marks


@pytest.mark.parametrize("dtype", ["bits8", "bits16", "uint4", "int2", "float4_e2m1fn_x2"])
@pytest.mark.parametrize("mark", [0, 1])
def test_what_is_kept_in_a_dtype_without_operations_is_compared_by_its_bits(
    dtype: str, mark: int, model: Model, x: Tensor
) -> None:
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    zeros = torch.zeros(4, 2, dtype=torch.uint8, device=x.device)
    whole = Returns(fused_with(marking(zeros, mark), model), lambda self, y: (y, self.kept))
    whole.register_buffer("kept", zeros.view(getattr(torch, dtype)))
    found = verify(whole, x)
    rows = [d for d in found.outputs if d.dtype == dtype]
    assert [(d.equal, d.max_abs > 0) for d in rows] == [(not mark, bool(mark))]
    assert not zeros.any(), "buffers are put back"
    # On a GPU a conversion of such a dtype fails by an assertion, and so does all that comes after.
    assert bool((x + 1).isfinite().all())
