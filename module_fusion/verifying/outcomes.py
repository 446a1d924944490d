"""What a run of `verify` gave, and what of it differs from another run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .differences import USED_UP, Difference, between, difference, is_unseen
from .report import GroupVerification
from .structures import Leaf, leaves, same_bits

_UNKNOWN = (
    "{}: as calls from other threads are not followed, it is not known whether that follows from "
    "rounding"
)


@dataclass
class Ask:
    """What to run: a method of a model on inputs, in a dtype."""

    model: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradients: bool
    dtype: torch.dtype | None

    @property
    def run(self) -> str | None:
        """The name of the dtype, where one was asked for."""
        return None if self.dtype is None else str(self.dtype).removeprefix("torch.")


@dataclass
class Result:
    """What was found in one dtype."""

    outputs: list[Difference] = field(default_factory=list)
    gradients: list[Difference] = field(default_factory=list)
    groups: list[GroupVerification] = field(default_factory=list)
    first: GroupVerification | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Ran:
    """One run: its output, its inputs as it left them, its gradients, and what it left behind.

    `left` is from before the backward, and `changed` what that changed of it. `tracked` are the
    tensors of the output that require a gradient.
    """

    output: list[Leaf]
    given: list[Leaf]
    gradients: dict[str, Tensor | None]
    left: dict[str, Any]
    changed: set[str]
    tracked: set[str]


def output_rows(ask: Ask, ours: Ran, theirs: Ran) -> list[Difference]:
    """The differences of outputs, and of inputs that the runs changed."""
    found = between(ours.output, theirs.output)
    untouched = {leaf.path: leaf.value for leaf in leaves({"args": ask.args, "kwargs": ask.kwargs})}
    for d in between(ours.given, theirs.given):
        value = untouched.get(d.name)
        if isinstance(value, Tensor) and value.is_floating_point() and ask.dtype is not None:
            value = value.to(ask.dtype)
        after = next((leaf.value for leaf in theirs.given if leaf.path == d.name), None)
        is_kept = (
            isinstance(value, Tensor) and isinstance(after, Tensor) and same_bits(value, after)
        )
        if (not d.equal or not is_kept) and not is_unseen(d):
            found.append(d)
    return found


def gradient_rows(ours: Ran, theirs: Ran) -> list[Difference]:
    found = []
    for name, theirs_ in theirs.gradients.items():
        ours_ = ours.gradients[name]
        if ours_ is not None and theirs_ is not None:
            found.append(difference(ours_, theirs_, name, strides=False))
        elif ours_ is not None or theirs_ is not None:
            where = "unfused" if ours_ is None else "fused"
            problem = f"only the {where} run has a gradient"
            found.append(Difference(name, equal=False, problem=problem))
    return found


def is_same(ours: Ran, theirs: Ran) -> bool:
    rows = [*between(ours.output, theirs.output), *gradient_rows(ours, theirs)]
    return all(d.equal or is_unseen(d) or str(d.problem).endswith(USED_UP) for d in rows)


def left_behind(
    model: nn.Module, ours: Ran, theirs: Ran, followed: Ran | None, rounded: bool
) -> list[str]:
    """What the fused run left in another way than a run that has the kernels' outputs."""
    expected = dict(theirs.left)
    if followed is not None:
        # But for parameters: what a kernel wrote to one is still there.
        weights = {name for name, _ in model.named_parameters()}
        expected.update({k: v for k, v in followed.left.items() if k not in weights})
    floats = {name for name, b in model.named_buffers() if b.is_floating_point()}
    unlike = [k for k in {**expected, **ours.left} if ours.left.get(k) != expected.get(k)]
    unlike = [name for name in unlike if not (rounded and name in floats)]
    unlike += [name for name in ours.changed ^ theirs.changed if name not in unlike]
    return [
        f"{name} is not as the unfused run left it: the fused run changed it in another way"
        for name in unlike
    ]


def differing(
    result: Result, ours: Ran, theirs: Ran, followed: Ran | None, rounded: bool
) -> Iterator[str]:
    """What differs in another way than by the rounding of a kernel."""
    for d in result.gradients:
        if d.problem:
            yield f"the gradient of {d.name}: {d.problem}"
    for name in sorted(ours.tracked ^ theirs.tracked):
        where = "unfused" if name in theirs.tracked else "fused"
        yield f"{name}: requires a gradient in the {where} run alone"
    left_over = None if followed is None else _left_over(ours, followed)
    yield from left_over or ()
    if left_over == []:
        return  # It follows from what the kernels returned, and those are judged by themselves.
    for d in result.outputs:
        if d.problem and rounded and d.dtype in ("int", "float", "complex", "bool"):
            result.notes.append(_UNKNOWN.format(f"{d.name}: {d.problem}"))
        elif d.problem and not is_unseen(d):
            yield f"{d.name}: {d.problem}"


def _left_over(ours: Ran, followed: Ran) -> list[str]:
    """What differs from the unfused model even with the kernels' outputs in their places."""
    rows = [*between(ours.output, followed.output), *between(ours.given, followed.given)]
    return [
        f"{d.name}: differs in another place than the kernels' outputs; with those in their "
        f"places the unfused model gives other bits"
        for d in rows
        if not d.equal and not is_unseen(d)
    ][:1]
