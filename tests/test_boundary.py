"""Captured values stay inside the `forward` of the module around the members."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import Block, mapped, members_kernel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from written import assert_same, fuse, gradients, model_of, path_of

from module_fusion import DeferredUseError, fuse_modules, report, unfuse_modules


@dataclass
class Pair:
    first: Any
    second: Any


Named = namedtuple("Named", ["first", "second"])


class Doubled(Named):
    """Its `__new__` makes other items of what it is given."""

    def __new__(cls, first: Any, second: Any) -> Doubled:
        return super().__new__(cls, first if second is None else (first, second), None)


class Labelled(tuple[Any, ...]):
    label = ""


class ReadOnly(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("nobody writes here")


CONTAINERS = {
    "value": lambda h: h,
    "tuple": lambda h: (h, 1),
    "list": lambda h: [h, [h]],
    "dict": lambda h: {"h": h, "nested": {"h": h}},
    "dataclass": lambda h: Pair(h, (h,)),
    "namedtuple": lambda h: Named(h, None),
    "namedtuple of its own": lambda h: Doubled(h, h),
    "dict that nobody writes to": lambda h: ReadOnly(h=h),
    "ModelOutput": lambda h: BaseModelOutput(last_hidden_state=h, hidden_states=(h, h)),
    "ModelOutput of one": lambda h: BaseModelOutput(last_hidden_state=h),
}
# A ModelOutput asks for the type of its only field, so the value is computed by then.
LOOKS_INSIDE = ("ModelOutput of one",)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Pair):
        return leaves(value.first) + leaves(value.second)
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value] if type(value) is Tensor else []


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_leaves_the_parent_is_a_real_tensor(x: Tensor, container: str) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return CONTAINERS[container](self.norm(x))

    model = model_of(forward, x.device)
    expected = model(x)
    fuse(model)
    seen: list[Any] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    got = model(x)
    assert type(got) is type(expected)
    assert len(leaves(got)) == len(leaves(expected)) > 0
    assert_same(leaves(got), leaves(expected))
    assert leaves(seen) == leaves(got)


@dataclass
class Refuses:
    kept: Any
    asked: Any = None

    def __getattribute__(self, name: str) -> Any:
        if name == "asked":
            raise ValueError("nobody asks for that")
        return super().__getattribute__(name)


def test_an_attribute_that_refuses_to_be_looked_into_is_left_alone(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.last = self.norm(x)
        return x + self.mlp(x)

    model = model_of(forward, x.device)
    model[0].config = Refuses(1)
    with torch.no_grad():
        expected = model(x)
        fuse(model)
        assert torch.equal(model(x), expected)
        assert type(model[0].last) is Tensor


def test_a_tuple_with_attributes_keeps_them(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        output = Labelled((self.norm(x), self.mlp(x)))
        output.label = "a"
        return output

    model = model_of(forward, x.device)
    fuse(model)
    with torch.no_grad():
        output = model(x)
    assert type(output) is Labelled
    assert type(output[0]) is Tensor
    assert output.label == "a"


def through_a_property(self: Any) -> Any:
    return lambda x: x + self.mlp(self.norm(x))


@functools.singledispatchmethod
def dispatched(self: Any, x: Any) -> Any:
    return x


@dispatched.register
def _(self: Any, x: Tensor) -> Any:
    return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("forward", [property(through_a_property), dispatched])
def test_a_forward_that_is_bound_in_a_way_of_its_own_runs_as_it_is(x: Tensor, forward: Any) -> None:
    model = model_of(Block.forward, x.device)
    model[0].__class__ = type("Bound", (Block,), {"forward": forward})
    with torch.no_grad():
        expected = model(x)
        fuse(model, members_kernel(1))
        assert torch.equal(model(x), expected)
        unfuse_modules(model)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_value_in_a_container_still_reaches_the_kernel(x: Tensor, container: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        box = CONTAINERS[container](self.norm(x))
        h = {
            "value": lambda: box,
            "tuple": lambda: box[0],
            "list": lambda: box[1][0],
            "dict": lambda: box["nested"]["h"],
            "dataclass": lambda: box.second[0],
            "namedtuple": lambda: box.first,
            "namedtuple of its own": lambda: box.first[0],
            "dict that nobody writes to": lambda: box["h"],
            "ModelOutput": lambda: box.last_hidden_state,
            "ModelOutput of one": lambda: box.last_hidden_state,
        }[container]()
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert path_of(model)[0] == (0 if container in LOOKS_INSIDE else 1)


def test_a_value_stored_on_the_parent_can_be_used_later(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.kept = self.norm(x)
        self.boxed = [self.norm(x)]
        return x + self.mlp(self.kept)

    model = model_of(forward, x.device)
    expected = model(x)
    kept = model[0].kept.clone()
    fuse(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].kept + 0, kept)
    assert torch.equal(model[0].boxed[0] + 0, kept)


def test_what_modules_keep_is_a_real_tensor_while_fused_and_after(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.cache = h = self.norm(x)
        self.mlp.seen = [(h, 1)]
        return x + self.mlp(h)

    model = model_of(forward, x.device)
    model[0].register_buffer("cache", torch.zeros(1))
    model(x)
    expected = pickle.loads(pickle.dumps(model[0].cache))
    for fused in (True, False):
        if fused:
            fuse(model)
            model(x)
        else:
            unfuse_modules(model)
        kept = [*model.buffers(), model[0].cache, model[0].mlp.seen[0][0]]
        assert all(type(value) is Tensor and torch.equal(value, expected) for value in kept)
    assert b"module_fusion" not in pickle.dumps(model[0].cache)


def test_a_captured_output_is_pickled_as_the_tensor_it_stands_for(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        pickles.append(pickle.dumps(h))
        return x + self.mlp(h)

    pickles: list[bytes] = []
    model = model_of(forward, x.device)
    with torch.no_grad():
        expected = model[0].norm(x)
        fuse(model)
        model(x)
    assert b"module_fusion" not in pickles[0]
    assert torch.equal(pickle.loads(pickles[0]), expected)


def test_a_member_called_by_hand_gives_a_real_tensor(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    expected = model[0].norm(x)
    fuse(model)
    value = model[0].norm(x)
    output = model[0].mlp(value)
    assert path_of(model)[2] == (
        "norm is called outside the forward of the module around it; it gave no deferred value "
        "for 'x' of 'mlp'"
    )
    assert type(value) is Tensor
    assert torch.equal(value, expected)
    assert torch.equal(x + output, model(x))


def test_a_compiled_member_called_by_hand_gives_a_real_tensor(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    expected = torch.compile(model[0].norm, backend="eager")(x)
    fuse(model)
    value = torch.compile(model[0].norm, backend="eager")(x)
    assert type(value) is Tensor
    assert torch.equal(value, expected)


def test_another_method_of_the_parent_gives_a_real_tensor(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    type(model[0]).normed = lambda self, x: [self.norm(x)]
    fuse(model)
    assert type(model[0].normed(x)[0]) is Tensor


def test_a_parent_that_is_a_generator_yields_real_tensors(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        yield self.norm(x)
        yield x + self.mlp(self.norm(x))

    block = type("Written", (Block,), {"forward": forward})
    model = nn.ModuleList([block()]).to(x.device)
    expected = list(model[0](x))
    holder = nn.Sequential()
    holder.add_module("0", model[0])
    fuse(holder)
    got = list(model[0](x))
    assert [type(value) for value in got] == [Tensor, Tensor]
    assert_same(got, expected)


def test_a_thread_that_the_parent_starts_gets_real_tensors(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(self.norm(x)))
        thread.start()
        thread.join()
        return self.mlp(found[0]), type(found[0])

    model = model_of(forward, x.device)
    expected = model(x)[0]
    fuse(model)
    got, kind = model(x)
    assert torch.equal(got, expected)
    assert kind is Tensor


class Box:
    """A container that nobody looks into."""

    def __init__(self, value: Any) -> None:
        self.value = value


@pytest.mark.parametrize("use", [False, True])
def test_a_value_kept_on_an_object_is_computed_when_the_parent_returns(
    x: Tensor, use: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        box = Box(self.norm(x))
        return (self.mlp(box.value) if use else x), box

    model = model_of(forward, x.device)
    expected = model(x)[1].value
    fuse(model)
    box = model(x)[1]
    assert model[0].norm.calls == 2
    with torch.no_grad():
        model[0].norm.weight.zero_()  # What comes later does not change it.
    assert torch.equal(box.value + 0, expected)
    assert model[0].norm.calls == 2


def test_a_kept_value_whose_input_was_modified_since_is_an_error_only_when_used(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = x * 1
        self.kept = Box(self.norm(x))
        y = self.mlp(self.kept.value)
        return x.add_(y.detach())

    model = model_of(forward, x.device)
    with torch.no_grad():
        expected = model(x)
        fuse(model)
        assert torch.equal(model(x), expected)
        with pytest.raises(DeferredUseError, match=r"modified in place or replaced"):
            model[0].kept.value + 0


def test_after_an_exception_a_member_called_by_hand_gives_a_real_tensor(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.norm(x)
        raise KeyError("inside")

    model = model_of(forward, x.device)
    fuse(model)
    with pytest.raises(KeyError):
        model(x)
    assert type(model[0].norm(x)) is Tensor


def test_a_dropped_value_is_freed_without_the_garbage_collector(x: Tensor) -> None:
    seen: list[Any] = []

    def forward(self: Any, x: Tensor) -> None:
        captured = x * 1
        alive = weakref.ref(captured)
        gc.disable()
        value = self.norm(captured)
        del captured, value
        seen.extend([self.norm.calls, alive()])
        gc.enable()

    model = model_of(forward, x.device)
    fuse(model)
    model(x)
    assert seen == [0, None]


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_hook_on_a_module_around_a_member_sees_the_real_value(x: Tensor, kind: str) -> None:
    model = model_of(Block.forward, x.device)
    model[0].norm = Wrapper(model[0].norm)
    seen: list[type] = []
    if kind == "forward":
        model[0].norm.register_forward_hook(lambda m, args, output: seen.append(type(output)))
    else:
        model[0].norm.register_full_backward_hook(lambda m, g, output: seen.append(type(output[0])))
    expected = gradients(model, x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, {"norm": "0.norm.inner", "mlp": "0.mlp"}, kernel="Kernel")
    assert_same(gradients(model, x), expected)
    assert seen == [Tensor, Tensor]
    assert path_of(model)[0] == 0


@pytest.mark.parametrize("kind", ["pre", "backward"])
def test_a_hook_on_a_module_around_a_later_member_sees_the_real_value(x: Tensor, kind: str) -> None:
    model = model_of(Block.forward, x.device)
    model[0].mlp = Wrapper(model[0].mlp)
    seen: list[type] = []
    if kind == "pre":
        model[0].mlp.register_forward_pre_hook(lambda m, args: seen.append(type(args[0])))
    else:
        model[0].mlp.register_full_backward_hook(lambda m, grad, _: seen.append(type(grad[0])))
    expected = gradients(model, x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, {"norm": "0.norm", "mlp": "0.mlp.inner"}, kernel="Kernel")
    assert_same(gradients(model, x), expected)
    assert seen == [Tensor, Tensor]
    assert report(model).groups[0].reason.startswith("a module around norm or another member has")


def test_an_instance_level_forward_on_the_parent_gets_real_values(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    fuse(model)
    block = model[0]
    block.forward = lambda x: block.norm(x)
    assert type(model(x)) is Tensor


def test_a_parent_that_returns_itself_in_a_cycle_is_returned(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        result: dict[str, Any] = {"h": self.norm(x)}
        result["self"] = result
        return result

    model = model_of(forward, x.device)
    fuse(model)
    assert type(model(x)["h"]) is Tensor


def test_a_root_with_an_instance_level_forward_before_fusing_returns_real_tensors(
    x: Tensor,
) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    root = model_of(lambda self, x: self.norm(x) if self.only_norm else x, x.device)[0]
    root.only_norm = True
    expected = root(x)
    add_hook_to_module(root, ModelHook())
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(root, ["norm", "mlp"], kernel="Kernel")
    value = root(x)
    assert type(value) is Tensor
    assert torch.equal(value, expected)
    assert report(root).groups[0].reason == (
        "no module around the members has a forward of its own class, to capture calls in"
    )


@pytest.mark.parametrize("fused_at", ["norm.inner", "again.inner"])
@pytest.mark.parametrize("called_at", ["norm", "again"])
def test_a_hook_on_either_module_around_a_shared_member_sees_the_real_value(
    x: Tensor, fused_at: str, called_at: str
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(getattr(self, called_at)(x))

    model = model_of(forward, x.device)
    block = model[0]
    block.again, block.norm = Wrapper(block.norm), Wrapper(block.norm)
    expected = model(x)
    seen: list[type] = []
    getattr(block, called_at).register_forward_hook(lambda m, args, out: seen.append(type(out)))
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, {"norm": f"0.{fused_at}", "mlp": "0.mlp"}, kernel="Kernel")
    assert torch.equal(model(x), expected)
    assert seen == [Tensor]


@dataclass(eq=False)
class Node:
    value: Any
    other: Any = None


def test_a_dataclass_that_holds_itself_is_returned_with_real_tensors(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        first, second = Node(self.norm(x)), Node(x)
        first.other, second.other = second, first
        return first

    model = model_of(forward, x.device)
    expected = model(x).value
    fuse(model)
    got = model(x)
    assert type(got.value) is Tensor
    assert torch.equal(got.value, expected)
    assert got.other.other is got


@pytest.mark.parametrize("kind", [list, dict, tuple, Pair])
def test_a_container_that_is_shared_is_looked_into_once(x: Tensor, kind: Any) -> None:
    looked = [0]

    class Counted(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            looked[0] += 1
            return super().__getitem__(index)

    def forward(self: Any, x: Tensor) -> Any:
        value: Any = Counted([self.norm(x)])
        for _ in range(40):
            value = {
                list: lambda value: [value, value],
                tuple: lambda value: (value, value),
                dict: lambda value: {"a": value, "b": value},
                Pair: lambda value: Pair(value, value),
            }[kind](value)
        return value

    model = model_of(forward, x.device)
    fuse(model)
    model(x)
    assert looked == [1]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_captured_output_is_a_copy_of_its_value(x: Tensor, copied: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        other = copied(h.detach() if copied is copy.deepcopy else h)
        other.data = torch.zeros_like(other)
        return self.mlp(h) + h + other

    model = model_of(forward, x.device)
    expected = gradients(model, x)
    fuse(model)
    assert_same(gradients(model, x), expected)
