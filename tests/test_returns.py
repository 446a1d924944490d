"""What a function returns, as its bytecode tells, and what is captured because of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Mlp, Norm, mapped, members_kernel, runs
from torch import Tensor, nn
from written import PATHS, path_of

from module_fusion import ModuleSpec, fuse_modules
from module_fusion.returns import may_return_none, values_returned

# ruff: noqa: RET504


def product(self: Any, x: Tensor) -> Tensor:
    return self.weight * x.to(x.dtype)


def variable_that_may_be_none(self: Any, x: Tensor) -> Any:
    out = None
    if self.flag:
        out = x
    return out


def choice_of_none(self: Any, x: Tensor) -> Any:
    out = None if self.flag else x + 1
    return out


def returned_choice_of_none(self: Any, x: Tensor) -> Any:
    return None if self.flag else x


def attribute(self: Any, x: Tensor) -> Any:
    return self.bias


def transposed(self: Any, x: Tensor) -> Any:
    return (x + 1).T


def argument_that_is_none_by_default(self: Any, x: Tensor, context: Any = None) -> Any:
    return context


def keyword_that_is_none_by_default(self: Any, x: Tensor, *, context: Any = None) -> Any:
    return context


def argument(self: Any, x: Tensor) -> Tensor:
    return x


def steps(self: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = self.act(x)
    first, _ = x.chunk(2)
    return first


def assigned_together(self: Any, x: Tensor) -> Any:
    a = b = None
    a = x  # noqa: F841
    return b


def in_a_with(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def outer(value: Any) -> Callable[..., Any]:
    def closure(self: Any, x: Tensor) -> Any:
        return value

    return closure


def pair(self: Any, x: Tensor) -> Any:
    y = x.float()
    return y, y.mean()


def pair_by_super(self: Any, x: Tensor) -> Any:
    return max(x, key=lambda value: value), x.mean()


def pair_with_a_default(self: Any, x: Tensor, context: Any = None) -> Any:
    return x, context


def pair_with_an_attribute(self: Any, x: Tensor) -> Any:
    return x, self.bias


def pair_with_a_choice(self: Any, x: Tensor) -> Any:
    return x, (x if self.flag else None)


def pair_sometimes(self: Any, x: Tensor) -> Any:
    if self.flag:
        return x, x + 1
    return x


def pair_or_three(self: Any, x: Tensor) -> Any:
    if self.flag:
        return x, x + 1
    return x, x, x


def pair_in_a_variable(self: Any, x: Tensor) -> Any:
    both = x, x
    return both


@pytest.mark.parametrize(
    ("function", "none", "values"),
    [
        (product, False, None),
        (variable_that_may_be_none, True, None),
        (choice_of_none, True, None),
        (returned_choice_of_none, True, None),
        (attribute, True, None),
        (transposed, False, None),
        (argument_that_is_none_by_default, True, None),
        (keyword_that_is_none_by_default, True, None),
        (argument, False, None),
        (steps, False, None),
        (assigned_together, True, None),
        (in_a_with, False, None),
        (outer(None), True, None),
        (pair, False, 2),
        (pair_by_super, False, 2),
        (pair_with_a_default, False, None),
        (pair_with_an_attribute, False, None),
        (pair_with_a_choice, False, None),
        (pair_sometimes, False, None),
        (pair_or_three, False, None),
        (pair_in_a_variable, False, None),
    ],
)
def test_what_may_be_none_and_how_many_values_there_are_is_known(
    function: Any, none: bool, values: int | None
) -> None:
    assert may_return_none(function) is none
    assert values_returned(function) == values


class Flagged(Norm):
    """Has what the functions above read."""

    def __init__(self) -> None:
        super().__init__()
        self.flag = False
        self.register_parameter("bias", None)


class Asking(nn.Module):
    """Asks whether there is a value, with `is`."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, Mlp()

    def forward(self, x: Tensor) -> Tensor:
        value = self.norm(x)
        return self.mlp(x if value is None else x + 1)


class Parting(Asking):
    """Takes two values apart, and asks for the second."""

    def forward(self, x: Tensor) -> Tensor:
        h, other = self.norm(x)
        return self.mlp(h) * (1 if other is None else 2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "forward",
    [
        variable_that_may_be_none,
        choice_of_none,
        attribute,
        argument_that_is_none_by_default,
        keyword_that_is_none_by_default,
    ],
)
def test_a_member_that_may_return_none_runs_at_its_call(
    x: Tensor, forward: Any, compiled: bool
) -> None:
    norm = type("Member", (Flagged,), {"forward": forward})()
    norm.flag = forward is choice_of_none
    model = nn.ModuleList([Asking(norm)]).to(x.device)
    run: Any = model[0]
    expected = run(x)
    specs = [ModuleSpec(["x"], ["h"]), ModuleSpec(["h"])]
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, PATHS, specs, kernel="Kernel")
    if compiled:
        run = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(run(x), expected)
    assert compiled or "may return None" in str(path_of(model)[2])


@pytest.mark.parametrize(
    ("forward", "captured"),
    [
        (pair, True),
        (pair_with_a_default, False),
        (pair_with_an_attribute, False),
        (pair_or_three, False),
    ],
)
def test_a_tuple_is_captured_where_every_return_spells_it_out(
    x: Tensor, forward: Any, captured: bool
) -> None:
    norm = type("Member", (Flagged,), {"forward": forward})()
    norm.flag = True
    model = nn.ModuleList([Parting(norm)]).to(x.device)
    expected = model[0](x)
    kernel = members_kernel(1)
    with mapped(Kernel=kernel):
        fuse_modules(
            model, PATHS, [ModuleSpec(["x"], ["h", "_"]), ModuleSpec(["h"])], kernel="Kernel"
        )
    for count in (1, 2):
        assert torch.equal(model[0](x), expected)
        assert runs(kernel) == (count if captured else 0)
    text = "may return None, or another number of values than its spec names outputs"
    assert captured or text in str(path_of(model)[2])


def test_an_argument_that_is_a_tuple_with_none_is_not_captured(x: Tensor) -> None:
    class First(Norm):
        def forward(self, values: Any) -> Any:  # type: ignore[override]
            return values[0]

    class Boxing(Asking):
        def forward(self, x: Tensor) -> Tensor:
            value = self.norm((None, x))
            return self.mlp(x if value is None else x + 1)

    model = nn.ModuleList([Boxing(First())]).to(x.device)
    expected = model[0](x)
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, PATHS, kernel="Kernel")
    assert torch.equal(model[0](x), expected)
