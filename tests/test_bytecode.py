"""What functions load and store is read alike from the bytecode of every version of Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from module_fusion.bytecode import loads_in, returns_none, stores_in


class Base:
    def method(self, x: Any) -> Any:
        return x


class Written(Base):
    """Methods whose loads and stores are known."""

    a: Any
    b: Any
    training: bool
    other: Any

    def calls_super(self, x: Any) -> Any:
        return super().method(x)

    def calls_itself_after_a_store(self, x: Any) -> Any:
        y = math.sin(x)
        return self.other(y)

    def calls_itself_with_a_local(self, x: Any) -> Any:
        return self.other(x)

    def gives_training(self, x: Any) -> Any:
        return math.dist(self.a(x), self.training)

    def gives_the_result_of_a_local(self, x: Any) -> Any:
        f = self.b
        return math.dist(f(x), self.training)

    def gives_keywords(self, x: Any) -> Any:
        return math.dist(x, q=self.training)

    def gives_what_a_condition_says(self, x: Any) -> Any:
        return math.dist(x, 1 if self.training else 0), self.a

    def comprehends(self, x: Any) -> Any:
        return [self.other(y) for y in x]

    def defines(self, x: Any) -> Any:
        return (lambda y: self.other.deep(y))(x)

    def adds(self, x: Any) -> None:
        self.a += 1

    def adds_a_value(self, x: Any) -> None:
        self.a += x

    def takes_off(self, x: Any) -> None:
        self.a -= 1

    def adds_elsewhere(self, x: Any) -> Any:
        self.other.a += 1
        return self.a

    def adds_to_a_variable(self, x: Any) -> Any:
        other = self.other
        other.a += 1
        return self.a

    def stores_in_itself_of_another(self, x: Any) -> None:
        x.self.a = x

    def adds_what_is_compared(self, x: Any) -> None:
        self.a += 1 if 0 < x.a < 2 and [y.a for y in x] else (z := x.b) and z.b

    def adds_in_a_lambda(self, x: Any) -> Any:
        def add() -> None:
            self.a += 1

        return add

    def adds_in_a_lambda_with_its_own_self(self, x: Any) -> Any:
        def add(self: Any) -> None:
            self.a += 1

        return add, self.a

    def adds_as_another(self, x: Any) -> None:
        self = x
        self.a += 1

    def replaces(self, x: Any) -> None:
        self.a = self.a + x

    def chains(self, x: Any) -> None:
        y = self.a = x
        self.b = y

    def stores_elsewhere(self, x: Any) -> None:
        self.other.a = 1

    def stores_items(self, x: Any) -> None:
        self.a[0] = x

    def stores_slices(self, x: Any) -> None:
        self.a[1:2] = x

    def adds_to_a_local(self, x: Any) -> Any:
        x += 1
        return self.other(x)

    def adds_to_an_item(self, x: Any) -> None:
        x[0] += 1

    def names_out(self, x: Any) -> None:
        math.dist(x, out=x)

    def only_computes(self, x: Any) -> Any:
        y = x + 1
        z = y * self.a
        return [y for y in z if y == x and y >= 1]


@pytest.mark.parametrize(
    ("method", "own"),
    [
        (Written.calls_itself_after_a_store, {("other",)}),
        (Written.calls_itself_with_a_local, {("other",)}),
        (Written.gives_training, {("a",), ("training",)}),
        (Written.comprehends, {("other",)}),
        (Written.defines, {("other", "deep")}),
        (Written.adds, {("a",)}),
        (Written.replaces, {("a",)}),
        (Written.stores_elsewhere, {("other",)}),
        (Written.adds_to_a_local, {("other",)}),
        (Written.only_computes, {("a",)}),
    ],
)
def test_attributes_of_self_are_found(method: Callable[..., Any], own: set[Any]) -> None:
    loads = loads_in(method.__code__, "self")
    assert {load.attributes for load in loads if load.kind == "own"} == own


@pytest.mark.parametrize(
    ("method", "given", "arguments"),
    [
        (Written.gives_training, {"self.training", "self.a", "local x"}, 2),
        (Written.gives_the_result_of_a_local, {"self.training", "local f", "local x"}, 2),
        (Written.gives_keywords, {"self.training", "local x"}, 2),
        (Written.gives_what_a_condition_says, None, None),
        (Written.calls_itself_after_a_store, {"local x"}, 1),
    ],
)
def test_what_a_function_is_given_is_found(
    method: Callable[..., Any], given: set[str] | None, arguments: int | None
) -> None:
    load = next(load for load in loads_in(method.__code__, "self") if load.name == "math")
    assert load.given == given
    assert load.arguments == arguments


def test_a_method_of_a_base_class_is_found() -> None:
    loads = loads_in(Written.calls_super.__code__, "self")
    found = [load for load in loads if load.attributes == ("method",)]
    assert [load.kind in ("value", "super") for load in found] == [True]
    rest = {load.name for load in loads if load not in found}
    assert rest <= {"super", "__class__"}


@pytest.mark.parametrize(
    ("method", "stores"),
    [
        (Written.adds, [("count", "a")]),
        (Written.adds_a_value, [("own", "a")]),
        (Written.takes_off, [("own", "a")]),
        (Written.adds_elsewhere, [("attribute", "a")]),
        (Written.adds_to_a_variable, [("attribute", "a")]),
        (Written.stores_in_itself_of_another, [("attribute", "a")]),
        (Written.adds_what_is_compared, [("own", "a")]),
        (Written.adds_in_a_lambda, [("count", "a")]),
        (Written.adds_in_a_lambda_with_its_own_self, [("attribute", "a")]),
        (Written.adds_as_another, [("local", "self"), ("count", "a")]),
        (Written.replaces, [("own", "a")]),
        (Written.chains, [("own", "a"), ("own", "b")]),
        (Written.stores_elsewhere, [("attribute", "a")]),
        (Written.stores_items, [("item", "")]),
        (Written.stores_slices, [("item", "")]),
        (Written.adds_to_an_item, [("item", "")]),
        (Written.names_out, [("keyword", "out")]),
        (Written.only_computes, []),
        (Written.calls_itself_after_a_store, []),
    ],
)
def test_what_is_stored_in_place_is_found(
    method: Callable[..., Any], stores: list[tuple[str, str]]
) -> None:
    assert [tuple(store) for store in stores_in(method.__code__, "self")] == stores


def test_an_addition_to_a_local_is_found() -> None:
    stores = stores_in(Written.adds_to_a_local.__code__, "self")
    assert [store.kind for store in stores] == ["local"]


def returns_in_a_branch(x: Any) -> Any:
    if x:
        return x
    math.sin(x)
    return None


def returns_a_condition(x: Any) -> Any:
    return x if x else None


def returns_nothing(x: Any) -> None:
    with x:
        math.sin(x)


def returns_nothing_where_it_fails(x: Any) -> Any:
    try:
        return math.sin(x)
    except ValueError:
        math.cos(x)


def returns(x: Any) -> Any:
    for _ in x:
        pass
    return x


def returns_in_a_with(x: Any) -> Any:
    with x:
        return x


def returns_in_a_try(x: Any) -> Any:
    try:
        return x
    finally:
        math.sin(x)


def raises(x: Any) -> Any:
    raise ValueError(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (returns_in_a_branch, True),
        (returns_a_condition, True),
        (returns_nothing, True),
        (returns_nothing_where_it_fails, True),
        (returns, False),
        (returns_in_a_with, False),
        (returns_in_a_try, False),
        (raises, False),
    ],
)
def test_a_function_that_may_return_none_is_known(
    function: Callable[..., Any], expected: bool
) -> None:
    assert returns_none(function.__code__) == expected
