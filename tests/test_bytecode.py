"""What functions load and store is read alike from the bytecode of every version of Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from module_fusion.bytecode import loads_in, returns_none, stores_in
from module_fusion.specials import specials_in
from module_fusion.stack import advances, asks_super_first


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

    def adds_a_value_or_a_number(self, x: Any) -> None:
        self.a += x or 1

    def adds_to_another_or_itself(self, x: Any) -> None:
        (x or self).a += 1

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
        (Written.adds_a_value_or_a_number, [("own", "a")]),
        (Written.adds_to_another_or_itself, [("attribute", "a")]),
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


class Asks:
    """Methods that only call attributes of `self`, or ask something of them."""

    a: Any
    b: Any

    def calls(self, x: Any, *more: Any, **named: Any) -> Any:
        y = self.a(x), self.a(x, y=1), self.a(x, *more), self.a(x, y=2, **named)
        return y, self.a(self.b(x) * self.b(x)), self.a.b(x)

    def compares_with_none(self, x: Any) -> Any:
        if self.a is None:
            return x
        return x if self.b is not None else 2 * x

    def asks_whether_it_is_true(self, x: Any) -> Any:
        return x if not self.a else 2 * x

    def asks_for_its_kind(self, x: Any) -> Any:
        return isinstance(self.a, math.__class__) and hasattr(self, "b") and callable(self.b)

    def asks_for_its_length(self, x: Any) -> Any:
        return len(self.a) * x

    def stores(self, x: Any) -> Any:
        self.a = x

    def calls_a_variable(self, x: Any) -> Any:
        a, me = self.a, self
        b = self.b
        return a(x), me.b(x), b.a(x), b is None

    def asks_super(self, x: Any) -> Any:
        return super().__eq__(x), super().__eq__(x)

    def defines(self, x: Any) -> Any:
        return [self.a(y) for y in x], lambda: self.b(x)


def given(*values: Any, **named: Any) -> Any:
    return values, named


class LetsGo:
    """Methods that have what `self` holds, or `self`, as a value."""

    a: Any
    b: Any

    def in_a_variable(self, x: Any) -> Any:
        a = self.a
        if x:
            a = self.b
        return a(x)

    def by_another_name(self, x: Any) -> Any:
        me = self
        return given(me, x)

    def in_an_argument(self, x: Any) -> Any:
        x = self.a
        return x(1)

    def of_a_variable(self, x: Any) -> Any:
        a = self.a
        return given(a, x)

    def first_in_a_call(self, x: Any) -> Any:
        return given(self.a, x)

    def last_in_a_call(self, x: Any) -> Any:
        return given(x, self)

    def by_keyword(self, x: Any) -> Any:
        return given(x, a=self.a)

    def to_another(self, x: Any) -> Any:
        return self.b(self.a)

    def unpacked(self, x: Any) -> Any:
        return self.b(*self.a)

    def in_items(self, x: Any) -> Any:
        return self.a[0](x)

    def in_the_length_of_an_item(self, x: Any) -> Any:
        return len(self.a[0])

    def in_the_kind_of_an_item(self, x: Any) -> Any:
        return isinstance(self.a[0], int)

    def to_a_builtin_of_a_builtin(self, x: Any) -> Any:
        return list(map(type, self.a))

    def in_a_choice(self, x: Any) -> Any:
        return (self.a or self.b)(x)

    def in_a_loop(self, x: Any) -> Any:
        for a in self.a:
            x = a(x)
        return x

    def in_a_comprehension(self, x: Any) -> Any:
        return [a(x) for a in self.a]

    def as_a_default(self, x: Any) -> Any:
        return (lambda me=self: me.a)()

    def in_a_closure(self, x: Any) -> Any:
        return (lambda: self)().a

    def on_another(self, x: Any) -> Any:
        x.a = self.a

    def in_a_text(self, x: Any) -> Any:
        return f"{self.a}"

    def on_the_way(self, x: Any) -> Any:
        return (a := self.a)(x), a

    def to_one_of_two(self, x: Any) -> Any:
        return given(self.a if x else 1)

    def to_a_variable_that_is_one_of_two(self, x: Any) -> Any:
        y = x or self.a
        return y.b

    def to_an_attribute_of_one_of_two(self, x: Any) -> Any:
        return (x or self.a).b

    def to_its_class(self, x: Any) -> Any:
        return type(self.a).b

    def to_what_takes_an_item(self, x: Any) -> Any:
        return callable(self.a[len("")])

    def to_what_takes_all_items(self, x: Any) -> Any:
        return isinstance(*self.a)

    def to_one_of_two_functions(self, x: Any) -> Any:
        return (x if x else callable)(self.a)


@pytest.mark.parametrize("cls", [Asks, LetsGo])
def test_what_code_may_keep_is_told_from_what_it_only_calls(cls: type) -> None:
    methods = [value for value in vars(cls).values() if callable(value)]
    assert len(methods) > 7
    found = {
        method.__name__: any(
            load.asked is None
            for load in loads_in(method.__code__, "self")
            if load.kind in ("own", "me")
        )
        for method in methods
    }
    assert found == dict.fromkeys(found, cls is LetsGo)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: next(x.parameters()).device, False),
        (lambda x: next(iter(x), None), False),
        (lambda x: next(y for y in x), False),
        (lambda x: next(x), True),
        (lambda x: next(x.steps), True),
        (lambda x: next(x[x()]), True),
        (lambda x: next(x, x()), True),
        (lambda x: map(next, x), True),
        (lambda x: [next(x) for _ in x], True),
    ],
)
def test_an_iterator_that_may_be_kept_is_told_from_one_made_for_the_call(
    function: Any, kept: bool
) -> None:
    assert advances(function.__code__) == kept


@pytest.mark.parametrize(
    ("function", "called", "other"),
    [
        (lambda x: [y for y in x if y], "__iter__", "__str__"),
        (lambda x: x + 1, "__add__", "__iter__"),
        (lambda x: x[0], "__getitem__", "__str__"),
        (lambda x: f"{x}", "__format__", "__add__"),
        (lambda x: "%s" % x, "__str__", "__iter__"),  # noqa: UP031
        (lambda x: {x}, "__hash__", "__iter__"),
        (lambda x: x < 1, "__lt__", "__iter__"),
        (lambda x: 1 if x else 2, "__bool__", "__iter__"),
        (lambda x: x(x.a), None, "__bool__"),
    ],
)
def test_the_special_methods_that_operators_call_are_found(
    function: Any, called: str | None, other: str
) -> None:
    found = specials_in(function.__code__)
    assert called is None or called in found
    assert other not in found


class Delegates(Base):
    other: Any

    def asks_first(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            return getattr(self.other, name)

    def counts_first(self, name: str) -> Any:
        self.__dict__["calls"] += 1
        return super().__getattr__(name)  # type: ignore[misc]

    def asks_another_first(self, name: str) -> Any:
        return self.other.__getattr__(name)

    def asks_for_another_name(self, name: str) -> Any:
        return super().__getattr__(name[1:])  # type: ignore[misc]


@pytest.mark.parametrize(
    "name", [name for name in vars(Delegates) if "asks" in name or "_f" in name]
)
def test_a_getattr_that_asks_the_next_class_first_is_told_from_others(name: str) -> None:
    assert asks_super_first(vars(Delegates)[name].__code__) == (name == "asks_first")
