"""What code gives away of the output of a child that it calls, read from its bytecode."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import PATHS, Block, Model, WeightKernel, mapped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from module_fusion import DeferredUseError, fuse_modules, fused, report
from module_fusion.uses import gives_away

Output = namedtuple("Output", "hidden pooled")


class Keeps:
    """Methods that use the output of `norm` themselves."""

    norm: Any
    mlp: Any
    other: Any
    flag: bool

    def in_place_of_the_input(self, x: Any) -> Any:
        h = self.norm(x)
        h = self.mlp(h)
        return h + x

    def in_a_sum(self, x: Any) -> Any:
        h = self.norm(x)
        y = self.mlp(h)
        return y + h

    def in_a_call(self, x: Any) -> Any:
        return x + self.mlp(self.norm(x))

    def as_another_input(self, x: Any) -> Any:
        h = self.norm(x)
        residual = h if self.flag else x
        return self.mlp(h, residual)

    def in_one_of_two_ways(self, x: Any) -> Any:
        h = self.norm(x)
        if self.flag:
            return self.mlp(h)
        return self.other(h)

    def in_a_with(self, x: Any) -> Any:
        with self.other:
            h = self.norm(x)
            return x + self.mlp(h)

    def in_a_list_for_a_function(self, x: Any) -> Any:
        h = self.norm(x)
        y = torch.cat([h, self.mlp(h)])
        return y + x


class GivesAway(Keeps):
    """Methods that return or keep it."""

    def returned(self, x: Any) -> Any:
        h = self.norm(x)
        return self.mlp(h), h

    def in_an_output(self, x: Any) -> Any:
        h = self.norm(x)
        pooled = self.mlp(h) if self.mlp is not None else None
        return Output(hidden=h, pooled=pooled)

    def by_another_name(self, x: Any) -> Any:
        h = kept = self.norm(x)
        y = self.mlp(h)
        return y, kept

    def after_a_variable(self, x: Any) -> Any:
        h = self.norm(x)
        outputs = (self.mlp(h), h)
        assert outputs
        return outputs

    def on_itself(self, x: Any) -> Any:
        h = self.norm(x)
        self.last = h
        return self.mlp(h)

    def in_a_list(self, x: Any) -> Any:
        found: list[Any] = []
        h = self.norm(x)
        found += [h]
        return self.mlp(h), found

    def in_a_dict(self, x: Any) -> Any:
        h = self.norm(x)
        return {"y": self.mlp(h), "h": h}

    def of_several(self, x: Any) -> Any:
        first, second = self.norm(x)
        return self.mlp(first, second), second

    def in_an_item(self, x: Any) -> Any:
        found: dict[str, Any] = {}
        found["h"] = self.norm(x)
        return self.mlp(found["h"]), found

    def on_another_object(self, x: Any) -> Any:
        self.other.last = self.norm(x)
        return self.mlp(self.other.last)

    def in_two_places(self, x: Any) -> Any:
        self.other.last = h = self.norm(x)
        return self.mlp(h)

    def out_of_a_with(self, x: Any) -> Any:
        with self.other:
            h = self.norm(x)
            return self.mlp(h), h

    def after_a_with(self, x: Any) -> Any:
        with self.other:
            h = self.norm(x)
        try:
            y = self.mlp(h)
        finally:
            self.other(x)
        return y, h

    def out_of_a_try(self, x: Any) -> Any:
        try:
            h = self.norm(x)
            return self.mlp(h), h
        finally:
            self.other(x)

    def with_a_hook(self, x: Any) -> Any:
        h = self.norm(x)
        y = self.mlp(h)
        h.register_hook(print)
        return y

    def to_an_inner_function(self, x: Any) -> Any:
        h = self.norm(x)
        return self.mlp(h), lambda: h


@pytest.mark.parametrize("cls", [Keeps, GivesAway])
def test_what_is_given_away_is_told_from_what_is_used(cls: type) -> None:
    methods = [value for value in vars(cls).values() if callable(value)]
    assert len(methods) >= 6
    found = {method.__name__: gives_away(method, "norm") for method in methods}
    assert found == dict.fromkeys(found, cls is GivesAway)


def model_with(forward: Callable[..., Any], x: Tensor, is_fused: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Model(1).to(x.device)
    model.layers[0].__class__ = type("Other", (Block,), {"forward": forward})
    if is_fused:
        with mapped(K=WeightKernel):
            fuse_modules(model, PATHS, kernel="K")
    block: nn.Module = model.layers[0]
    return block


def gradients_of(block: nn.Module, x: Tensor) -> Tensor:
    y, h = block(x)
    (found,) = torch.autograd.grad(y.square().sum(), h)
    return found


def test_the_gradient_of_a_value_that_is_returned_is_that_of_the_members(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = self.norm(x)
        return x + self.mlp(h), h

    block = model_with(forward, x)
    h = block.norm(x).detach().requires_grad_()
    expected = torch.autograd.grad((x + block.mlp(h)).square().sum(), h)[0]
    torch.testing.assert_close(gradients_of(block, x), expected)
    (group,) = report(block).groups
    assert group.kernel_calls == 0
    assert "gradients are recorded, and the output of norm is given to others" in str(group.reason)
    with torch.no_grad():
        block(x)
    assert report(block).groups[0].kernel_calls == 1


class Returning(Block):
    def forward(self, x: Tensor) -> Any:
        h = self.norm(x)
        return x + self.mlp(h), h


def test_a_copy_gives_away_what_its_original_does(x: Tensor) -> None:
    model = nn.Sequential(Returning()).to(x.device)
    with mapped(K=WeightKernel):
        fuse_modules(model, ["0.norm", "0.mlp"], kernel="K")
    copied = copy.deepcopy(model)
    torch.testing.assert_close(gradients_of(copied, x), gradients_of(model, x), rtol=0, atol=0)
    assert report(copied).groups[0].member_calls == 1


# It is said once.
GIVEN = pytest.warns(UserWarning, match="'.*norm' is given to others, where the code did not tell")


def through_a_method(self: Any, x: Tensor) -> Any:
    found: list[Tensor] = []
    h = self.norm(x)
    found.append(h)
    return x + self.mlp(h), found[0]


def as_the_same_dtype(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return h + self.mlp(h), h.float()


def through_a_dropout(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return h + self.mlp(h), nn.functional.dropout(h, 0.1, training=False)


def on_the_module_by_a_function(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    y = h + self.mlp(h)
    self.__dict__.update(last=h)
    return y, y


def as_the_same_shape(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return h + self.mlp(h), h.flatten(h.dim() - 1)


def as_its_real_part(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return h + self.mlp(h), h.real


def with_a_sign(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return h + self.mlp(h), +h


def among_several(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return h + self.mlp(h), torch.atleast_2d([x, h])[1]


def by_a_keyword(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    return h + self.mlp(h), nn.functional.dropout(input=h, training=False)


@dataclass(slots=True)
class Slots:
    first: Any
    second: Any

    def __iter__(self) -> Any:
        return iter((self.first, self.second))


def in_slots(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    both = Slots(x, h)
    both.first = h + self.mlp(h)
    return both


@pytest.mark.parametrize(
    "forward",
    [
        as_the_same_dtype, through_a_dropout, as_the_same_shape, as_its_real_part, with_a_sign,
        among_several, by_a_keyword, in_slots,
    ],
)  # fmt: skip
def test_a_value_that_an_operation_gives_back_itself_is_the_members_from_the_next_call_on(
    forward: Callable[..., Any], x: Tensor
) -> None:
    fused, members = model_with(forward, x), model_with(forward, x, is_fused=False)
    with GIVEN:
        fused(x.clone().requires_grad_())
    assert report(fused).groups[0].kernel_calls == 1
    torch.testing.assert_close(gradients_of(fused, x), gradients_of(members, x), rtol=0, atol=0)
    assert report(fused).groups[0].member_calls == 1


def test_a_value_that_is_kept_unseen_is_that_of_the_members_from_the_next_call_on(
    x: Tensor,
) -> None:
    results = []
    for is_fused in (True, False):
        block = model_with(on_the_module_by_a_function, x, is_fused)
        with GIVEN if is_fused else nullcontext():
            block(x.clone().requires_grad_())
        y, _ = block(x.clone().requires_grad_())
        results.append(torch.autograd.grad(y.square().sum(), block.last))
        if is_fused:
            assert [(g.kernel_calls, g.member_calls) for g in report(block).groups] == [(1, 1)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_value_that_is_only_computed_with_keeps_the_kernel(x: Tensor) -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = self.norm(x)
        return self.mlp(h) + h.double().float(), x

    fused = model_with(forward, x)
    for _ in range(2):
        fused(x.clone().requires_grad_())
    assert report(fused).groups[0].kernel_calls == 2


def with_its_gradient(self: Any, x: Tensor) -> Any:
    h = self.norm(x)
    y = self.mlp(h)
    (slope,) = torch.autograd.grad(y.sum(), h, create_graph=True)
    return y + slope, x


def with_a_hook(self: Any, x: Tensor) -> Any:
    (h,) = [norm(x) for norm in [self.norm]]
    y = self.mlp(h)
    h.register_hook(lambda gradient: 0.1 * gradient)
    return y, x


def test_a_value_that_leaves_unseen_is_that_of_the_members_from_the_next_call_on(
    x: Tensor,
) -> None:
    results = []
    for is_fused in (False, True):
        block, given = model_with(through_a_method, x, is_fused), x.clone().requires_grad_()
        if is_fused:
            with GIVEN:
                y, h = block(given)
            assert torch.autograd.grad(y.sum(), h, allow_unused=True) == (None,)
        y, h = block(given)
        results.append(torch.autograd.grad(y.square().sum(), (h, given)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert [(g.kernel_calls, g.member_calls) for g in report(block).groups] == [(1, 1)]


@pytest.mark.parametrize("forward", [through_a_method, on_the_module_by_a_function])
def test_a_value_that_leaves_unseen_in_a_checkpoint_is_a_warning_and_its_gradients_are_right(
    forward: Callable[..., Any], x: Tensor
) -> None:
    results = []
    for is_fused in (False, True, True):
        if len(results) < 2:
            block = model_with(forward, x, is_fused)
        given = x.clone().requires_grad_()
        with GIVEN if len(results) == 1 else nullcontext():
            y, h = checkpoint(block, given, use_reentrant=False)
        wanted = [given, *block.parameters()]
        results.append(torch.autograd.grad(y.square().sum() + h.sum(), wanted))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)
    counts = [(g.kernel_calls, g.member_calls) for g in report(block).groups]
    assert counts == [(2, 2)]


def dry_run(model: nn.Module) -> None:
    with mapped(K=WeightKernel):
        fuse_modules(model, ["norm", "mlp"], kernel="K", dry_run=True)


def fused_for_a_while(model: nn.Module) -> None:
    with mapped(K=WeightKernel), fused(model, ["norm", "mlp"], kernel="K"):
        pass


@pytest.mark.parametrize("between", [dry_run, fused_for_a_while])
def test_that_a_value_leaves_unseen_is_not_forgotten(
    between: Callable[[nn.Module], None], x: Tensor
) -> None:
    block = model_with(through_a_method, x)
    with GIVEN:
        block(x.clone().requires_grad_())
    between(block)
    members = model_with(through_a_method, x, is_fused=False)
    torch.testing.assert_close(gradients_of(block, x), gradients_of(members, x), rtol=0, atol=0)
    assert report(block).groups[0].member_calls == 1


def test_where_saved_tensors_are_only_kept_elsewhere_it_is_a_warning(x: Tensor) -> None:
    block = model_with(through_a_method, x)
    with GIVEN, torch.autograd.graph.save_on_cpu():
        block(x.clone().requires_grad_())


@pytest.mark.parametrize("forward", [with_its_gradient, with_a_hook])
def test_what_the_code_does_not_tell_is_an_error_once_and_then_right(
    forward: Callable[..., Any], x: Tensor
) -> None:
    results = []
    for is_fused in (False, True):
        block, given = model_with(forward, x, is_fused), x.clone().requires_grad_()
        if is_fused:
            with pytest.raises(DeferredUseError, match="call the model again, or under"):
                block(given)
        y, h = block(given)
        results.append(torch.autograd.grad(y.square().sum(), (h, given)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
