"""Generated parents: random dataflow between the members of a random chain.

A `Program` is a parent module whose `forward` interprets a list of steps. The strategies
draw the members, the steps, the specs and the hooks; `Case` is one draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from module_fusion import ModuleSpec

HIDDEN = 4


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Mix(Scale):
    """Takes an input from outside and an optional keyword."""

    def forward(self, x: Tensor, extra: Tensor, *, gain: float = 0.5) -> Tensor:
        return x * self.weight + extra * gain


class Optional(Scale):
    """Takes an input that may be left out."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return x * self.weight if shift is None else x * self.weight + shift


class Split(Scale):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, torch.tanh(x)


class Join(Scale):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b * self.weight


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))


class Noisy(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(HIDDEN, HIDDEN), nn.Dropout(0.5))


class FunctionalNoise(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) * self.weight


class Statistics(nn.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(HIDDEN)


class Holder(nn.Module):
    """A parent between the members: passes the call on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@dataclass
class Result:
    """What some parents return."""

    last: Any
    others: Any


class Call(NamedTuple):
    member: int
    args: tuple[str, ...]
    kwargs: tuple[tuple[str, str], ...]
    outs: tuple[str, ...]


class Op(NamedTuple):
    kind: str
    source: str
    out: str


IN_PLACE = ("add_", "iadd")
OPS = ("double", "view", "relu", "add", "cat", "store", "box", "draw", "look", "second", *IN_PLACE)


class Program(nn.Module):
    """A parent that runs its steps on named values."""

    def __init__(
        self, members: list[nn.Module], steps: list[Call | Op], returned: tuple[str, list[str]]
    ) -> None:
        super().__init__()
        for index, member in enumerate(members):
            self.add_module(f"m{index}", member)
        self.steps = steps
        self.returned = returned

    def forward(self, x: Tensor, extra: Tensor) -> Any:
        values: dict[str, Any] = {"x": x * 1, "extra": extra}
        for step in self.steps:
            if isinstance(step, Call):
                self._call(step, values)
            else:
                values[step.out] = self._op(step.kind, values[step.source], values)
        kind, names = self.returned
        outputs = [values[name] for name in names]
        if kind == "one":
            return outputs[0]
        if kind == "dict":
            return dict(zip(names, outputs, strict=True))
        if kind == "dataclass":
            return Result(outputs[0], {"others": outputs[1:]})
        return tuple(outputs) if kind == "tuple" else [outputs[:1], outputs[1:]]

    def _call(self, step: Call, values: dict[str, Any]) -> None:
        args = [values[name] for name in step.args]
        kwargs = {name: values[source] for name, source in step.kwargs}
        result = self.get_submodule(f"m{step.member}")(*args, **kwargs)
        if len(step.outs) == 1:
            values[step.outs[0]] = result
        else:
            values[step.outs[0]], values[step.outs[1]] = result

    def _op(self, kind: str, value: Any, values: dict[str, Any]) -> Any:
        if kind == "double":
            return 2 * value
        if kind == "view":
            return value.view(value.shape)
        if kind == "relu":
            return F.relu(value)
        if kind == "add":
            return values["x"] + value
        if kind == "cat":
            return torch.cat([value, values["x"]])[: value.shape[0]]
        if kind == "store":
            self.kept = value
            return self.kept
        if kind == "box":
            return {"list": [value]}["list"][0]
        if kind == "draw":
            values["drawn"] = torch.rand(1)
            return value
        if kind == "look":
            assert value.dim() == 2
            return value
        if kind == "second":
            values["x"] = values["x"] + value.mean()
            return value
        if kind == "add_":
            values["x"].add_(1)
            return value
        value += 1
        return value


class Stack(nn.Module):
    """Blocks of one program, one after the other."""

    def __init__(self, blocks: list[Program]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, extra: Tensor) -> list[Any]:
        outputs = []
        for block in self.blocks:
            outputs.append(block(x, extra))
            x = flat(outputs[-1])[0]
        return outputs


def flat(value: Any) -> list[Any]:
    """The leaves of a nested output, without looking at what they are."""
    if isinstance(value, Result):
        return flat(value.last) + flat(value.others)
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in flat(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value]


@dataclass
class Case:
    """One drawn model, how to fuse it and how to run it."""

    kinds: list[type[nn.Module]]
    steps: list[Call | Op]
    returned: tuple[str, list[str]]
    held: list[bool]
    share_first: bool
    specs: list[ModuleSpec] | None
    hooks: list[tuple[int, str]]
    training: bool
    gradients: bool
    with_kernel: bool
    seed: int
    paths: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, held in enumerate(self.held):
            self.paths[f"m{index}"] = f"blocks.*.m{index}" + (".inner" if held else "")

    def has(self, *kinds: str) -> bool:
        """Whether the parent does one of these."""
        return any(isinstance(step, Op) and step.kind in kinds for step in self.steps)

    @property
    def modifies_in_place(self) -> bool:
        return self.has(*IN_PLACE)

    @property
    def sums_gradients(self) -> bool:
        """Whether a value is used, or a member called, more than once in a block.

        Where a member runs later than at its call, such gradients are summed in another order.
        """
        used = list(self.returned[1])
        called = [step.member for step in self.steps if isinstance(step, Call)]
        boxed: dict[str, str] = {}
        for step in self.steps:
            if isinstance(step, Call):
                used += [*step.args, *dict(step.kwargs).values()]
            elif step.kind == "box":  # What comes out of a box is what went in.
                boxed[step.out] = boxed.get(step.source, step.source)
            else:
                used += [step.source, *(["x"] if step.kind in ("add", "cat", "second") else [])]
        used = [boxed.get(name, name) for name in used]
        return any(some.count(one) > 1 for some in (used, called) for one in some)

    def build(self) -> Stack:
        torch.manual_seed(self.seed)
        blocks: list[Program] = []
        for _ in range(2):
            members = [kind() for kind in self.kinds]
            if self.share_first and blocks:
                first = blocks[0].get_submodule("m0")
                members[0] = first.inner if isinstance(first, Holder) else first
            wrapped = [Holder(m) if held else m for m, held in zip(members, self.held, strict=True)]
            blocks.append(Program(wrapped, self.steps, self.returned))
        return Stack(blocks).train(self.training)


# The first four may be captured in training mode too, so they come up more often.
SIMPLE = (*(Scale, Mix, Optional, Deep) * 2, Noisy, FunctionalNoise, Statistics)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A random chain in a random parent."""
    kinds, specs = _members(draw)
    steps: list[Call | Op] = []
    registers = ["x"]
    previous: tuple[str, ...] = ("x",)
    order = list(range(len(kinds)))
    if draw(st.integers(0, 5)) == 0:
        order = draw(st.permutations(order))
    for position, member in enumerate(order):
        previous = _maybe_ops(draw, steps, previous, registers)
        call = _one_call(draw, kinds[member], member, position, previous, registers)
        steps.append(call)
        registers.extend(call.outs)
        previous = call.outs
    _maybe_ops(draw, steps, previous, registers)
    if draw(st.integers(0, 7)) == 0:
        again = draw(st.sampled_from(steps[:1] + [s for s in steps if isinstance(s, Call)]))
        if isinstance(again, Call):
            steps.append(again._replace(outs=tuple(f"{out}again" for out in again.outs)))
            registers.extend(steps[-1].outs)  # type: ignore[union-attr]
    last = registers[-1]
    others = draw(st.lists(st.sampled_from(registers), max_size=2))
    kind = draw(st.sampled_from(["one", "tuple", "list", "dict", "dataclass"]))
    members = st.integers(0, len(kinds) - 1)
    hook_kinds = st.sampled_from(["forward", "pre", "backward", "kwargs"])
    with_hooks = draw(st.integers(0, 3)) == 0
    return Case(
        kinds=kinds,
        steps=steps,
        returned=(kind, [last, *others]),
        held=[draw(st.integers(0, 4)) == 0 for _ in kinds],
        share_first=draw(st.integers(0, 5)) == 0,
        specs=specs,
        hooks=draw(st.lists(st.tuples(members, hook_kinds), max_size=3)) if with_hooks else [],
        training=draw(st.integers(0, 2)) == 0,
        gradients=draw(st.booleans()),
        with_kernel=draw(st.integers(0, 4)) < 4,
        seed=draw(st.integers(0, 2**16)),
    )


def _members(draw: st.DrawFn) -> tuple[list[type[nn.Module]], list[ModuleSpec] | None]:
    length = draw(st.integers(1, 4))
    if length >= 2 and draw(st.integers(0, 3)) == 0:
        wired = draw(st.sampled_from([("p", "q"), ("p", "_")]))
        after: type[nn.Module] = (
            Join if wired == ("p", "q") else draw(st.sampled_from([Scale, Deep]))
        )
        specs = [ModuleSpec(["x"], wired)]
        specs.append(ModuleSpec(["p", "q"] if after is Join else ["p"], ["y"]))
        rest = draw(st.lists(st.sampled_from([Scale, Deep]), max_size=length - 2))
        specs += [ModuleSpec(["y"], ["y"]) for _ in rest]
        return [Split, after, *rest], specs
    kinds = [draw(st.sampled_from(SIMPLE)) for _ in range(length)]
    if draw(st.booleans()):
        return kinds, None
    names = iter("abcd")
    specs, name = [], "x"
    for kind in kinds:
        inputs = [name]
        if kind is Mix:
            inputs.append(draw(st.sampled_from(["extra", "_"])))
        name = next(names)
        specs.append(ModuleSpec(inputs, [name]))
    return kinds, specs


def _maybe_ops(
    draw: st.DrawFn, steps: list[Call | Op], previous: tuple[str, ...], registers: list[str]
) -> tuple[str, ...]:
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        kind = draw(st.sampled_from(OPS))
        out = f"v{len(registers)}"
        steps.append(Op(kind, previous[0], out))
        registers.append(out)
        if draw(st.booleans()):
            previous = (out, *previous[1:])
    return previous


def _one_call(
    draw: st.DrawFn,
    kind: type[nn.Module],
    member: int,
    position: int,
    previous: tuple[str, ...],
    registers: list[str],
) -> Call:
    value = previous[0]
    if draw(st.integers(0, 6)) == 0:
        value = draw(st.sampled_from(registers))
    args: tuple[str, ...] = (value,)
    kwargs: tuple[tuple[str, str], ...] = ()
    if kind is Join:
        args = (value, previous[1] if len(previous) > 1 else "extra")
    elif kind is Mix and draw(st.booleans()):
        kwargs = (("extra", "extra"),)
    elif kind is Mix:
        args = (value, "extra")
    elif kind is Optional and draw(st.booleans()):
        kwargs = (("shift", "extra"),)
    if kind in (Scale, Mix, Optional) and not kwargs and len(args) == 1 and draw(st.booleans()):
        args, kwargs = (), (("x", value),)
    outs = (f"o{position}",) if kind is not Split else (f"o{position}", f"p{position}")
    return Call(member, args, kwargs, outs)
