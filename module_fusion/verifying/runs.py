"""The runs that `verify` compares, in one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from operator import not_
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..comparison import nothing_left_behind, unfused
from ..context import check_has_values
from ..errors import FusionError
from ..exact import seeded
from ..inventory import Found, members_of
from ..seat import NEEDS_GRADIENTS
from .differences import combined, differences, is_unseen
from .judging import is_left_by, judge
from .outcomes import (
    Ask,
    Ran,
    Result,
    differing,
    gradient_rows,
    is_same,
    left_behind,
    output_rows,
)
from .remains import left_in, sums_of
from .report import GroupVerification
from .statistics import Judgement
from .structures import fresh, frozen, leaves, modules_given, tensors_in
from .watching import WROTE, Call, Returned, equal, following, noted, watched

_ITSELF = (
    "the unfused model differs from itself: two runs from the same random state gave different "
    "bits, so nothing can be said about the fused one. Make it deterministic first, for instance "
    "with torch.use_deterministic_algorithms(True)"
)
_THREADS = (
    "modules were called from other threads: every kernel was judged by itself, and the calls "
    "were not followed through the model"
)
_WRITES = (
    "the unfused model writes to its own parameter {!r} when it is called, so no two runs begin "
    "alike, and nothing can be said about the fused one"
)
_CHANGED = (
    "the parameter {!r} was changed by the runs and stays so: verify keeps no second copy of the "
    "weights. Load it again"
)
_UNTRACKED = "the kernel's output does not require a gradient where that of the modules does"
_TRACKED = "the kernel's output requires a gradient where that of the modules does not"
_T = TypeVar("_T")


def compare(ask: Ask, found: Sequence[Found]) -> Result:
    """Run the model unfused and fused, and find out about every difference."""
    given = modules_given((ask.args, ask.kwargs))
    with nothing_left_behind(ask.model, *given) as again:
        at_first = sums_of(ask.model.named_parameters())
        with unfused(ask.model):
            theirs, before = _run(ask, noted(found))
        check_has_values(ask.model, tensors_in([leaf.value for leaf in theirs.output]), "verify")
        written = _changed_since(at_first, ask.model)
        again()
        ours, calls = _run(ask, watched(found), is_measure=False)
        again()
        result = Result(output_rows(ask, ours, theirs), gradient_rows(ours, theirs))
        # Not how many: one that has ended gives its number to the next.
        in_threads = any(call.thread != get_ident() for call in calls)
        pairs = [] if in_threads else _pairs(calls, before)
        kernels = any(call.path == "kernel" for call in calls)
        rows = [*result.outputs, *result.gradients]
        same = not (kernels and in_threads)
        same = same and all(d.equal or is_unseen(d) for d in rows)
        same = same and all(equal(call.output, other) for call, other in pairs)
        unseen = [d for d in result.outputs if is_unseen(d)]
        result.notes += [f"{d.name}: {d.problem}" for d in unseen]
        if same:
            # Then nothing is known to have another value than it has in the unfused run.
            result.outputs = [d for d in result.outputs if not is_unseen(d)]
        followed = None
        if in_threads:
            result.notes.append(_THREADS)
        elif kernels and not same:
            with unfused(ask.model):
                followed, _ = _run(ask, following(found, calls), gradients=False)
            again()
        for number, item in enumerate(found):
            mine = [call for call in calls if call.chain == number]
            judgement = _judgement(ask, item, mine, same)
            result.groups.append(_group(ask, item, mine, pairs, judgement))
        result.first = _first(result.groups, calls, pairs)
        if found and not calls and not in_threads:
            result.problems.append("none of the fused modules was called in this run")
        rounded = in_threads and any(call.is_rounded() for call in calls)
        result.problems += left_behind(ask.model, ours, theirs, followed, rounded)
        result.problems += differing(result, ours, theirs, followed, rounded)
        if not kernels and not same and not result.problems:
            result.problems.append(
                "no kernel ran, and still the fused model gives other bits than the unfused one"
            )
        broken = [group for group in result.groups if group.problem]
        told = [f"{' -> '.join(group.paths)}: {group.problem}" for group in broken]
        # What a kernel wrote to is what others were given: the rest follows from it.
        is_cause = [group.problem == WROTE for group in broken]
        result.problems[:0] = list(compress(told, is_cause))
        result.problems += compress(told, map(not_, is_cause))
        if written:
            # No two runs began alike, so there is nothing else to say.
            result.problems = [_WRITES.format(name) for name in written]
        elif result.problems and not same:
            again()
            with unfused(ask.model):
                once_more, _ = _run(ask, nullcontext())
            if not is_same(once_more, theirs):
                result.problems = [_ITSELF]
        result.notes += [_CHANGED.format(name) for name in _changed_since(at_first, ask.model)]
    if ask.run is not None:
        result.outputs = [d._replace(run=ask.run) for d in result.outputs]
        result.gradients = [d._replace(run=ask.run) for d in result.gradients]
        result.problems = [f"in {ask.run}, {problem}" for problem in result.problems]
    return result


def _run(
    ask: Ask, looking: AbstractContextManager[_T], gradients: bool = True, is_measure: bool = True
) -> tuple[Ran, _T]:
    """Run the method once, on inputs of its own; the measure has to have gradients."""
    args, kwargs = fresh((ask.args, ask.kwargs), ask.dtype)
    given = {"args": args, "kwargs": kwargs}
    gradients = gradients and ask.gradients
    wanted = _wanted(ask.model, given) if gradients else {}
    call = ask.model if ask.method == "forward" else getattr(ask.model, ask.method)
    with looking as seen:
        output = call(*args, **kwargs)
    left = left_in(ask.model)
    changed: set[str] = set()
    found: dict[str, Tensor | None] = {}
    if gradients:
        found = _gradients_of(output, wanted, is_measure)
        changed = {name for name, value in left_in(ask.model).items() if left.get(name) != value}
    tracked = {
        leaf.path or "output"
        for leaf in leaves(output)
        if isinstance(leaf.value, Tensor) and leaf.value.requires_grad
    }
    # A model may return its own buffers, which are put back.
    return Ran(frozen(output), frozen(given), found, left, changed, tracked), seen


def _changed_since(before: dict[str, int], model: nn.Module) -> list[str]:
    now = sums_of(model.named_parameters())
    return [name for name, value in before.items() if now.get(name, value) != value]


def _wanted(model: nn.Module, given: Any) -> dict[str, Tensor]:
    wanted: dict[str, Tensor] = dict(model.named_parameters())
    wanted = {name: p for name, p in wanted.items() if p.requires_grad}
    inputs = [leaf for leaf in leaves(given) if isinstance(leaf.value, Tensor)]
    wanted.update({leaf.path: leaf.value for leaf in inputs if leaf.value.requires_grad})
    return wanted


def _gradients_of(
    output: Any, wanted: dict[str, Tensor], is_measure: bool
) -> dict[str, Tensor | None]:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1:
        tensors = [loss]
    else:
        values = [leaf.value for leaf in leaves(output)]
        tensors = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    if not tensors and not is_measure:
        return dict.fromkeys(wanted)
    if not tensors or not wanted:
        raise FusionError(
            "verify(..., gradients=True) found no gradient to compare: no parameter and no input "
            "requires one, or no output depends on one. Call requires_grad_() on what should."
        )
    generator = seeded()
    cotangents = [
        torch.ones_like(t)
        if t is loss
        else torch.randn(t.shape, generator=generator, device="cpu").to(t.device, t.dtype)
        for t in tensors
    ]
    # Not `backward`: what is hooked to the accumulation of gradients may step an optimizer.
    found = torch.autograd.grad(tensors, list(wanted.values()), cotangents, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _pairs(calls: Sequence[Call], before: dict[int, list[Returned]]) -> list[tuple[Call, Any]]:
    """Calls in the fused run and the outputs in their places in the unfused one."""
    returned = {number: iter(values) for number, values in before.items()}
    pairs = []
    for call in calls:
        for output, cotangents in returned[call.chain]:
            ours, theirs = call.cotangents.keys(), cotangents.keys()
            if call.path == "kernel" and ours != theirs:
                call.problem = _TRACKED if ours > theirs else _UNTRACKED
            # A wrong kernel brings wrong ones to those before it.
            call.cotangents = cotangents
            pairs.append((call, output))
            break
    return pairs


def _first(
    groups: Sequence[GroupVerification], calls: Sequence[Call], pairs: Sequence[tuple[Call, Any]]
) -> GroupVerification | None:
    """The group of the first call that gives others something else than the modules do."""
    unlike = {id(call) for call, output in pairs if not equal(call.output, output)}
    found = (c.chain for c in calls if id(c) in unlike or c.problem == WROTE)
    return next((groups[number] for number in found), None)


def _judgement(ask: Ask, found: Found, calls: Sequence[Call], same: bool) -> Judgement:
    ran = [call for call in calls if call.path == "kernel"]
    for call in ran:
        if call.left is not None and not is_left_by(found.chain, members_of(found), call):
            call.problem = WROTE
    if same:
        for call in ran:
            call.theirs = call.output
    if not ran or (same and not ask.gradients):
        return Judgement()
    with torch.inference_mode(False):
        return judge(found.chain, members_of(found), ran, ask.gradients)


def _group(
    ask: Ask,
    found: Found,
    calls: Sequence[Call],
    pairs: Sequence[tuple[Call, Any]],
    judgement: Judgement,
) -> GroupVerification:
    paths = {call.path for call in calls}
    reasons = [call.reason for call in calls if call.reason]
    rows = [
        d
        for call, other in pairs
        if any(call is mine for mine in calls)
        for d in differences(call.output, other)
    ]
    return GroupVerification(
        paths=found.paths,
        kernel=found.chain.kernel,
        path="both" if len(paths) > 1 else str(next(iter(paths), "nothing")),
        kernel_calls=sum(call.path == "kernel" for call in calls),
        member_calls=sum(call.path == "members" for call in calls),
        reason=reasons[-1] if reasons else None,
        difference=combined(rows, "output") if rows else None,
        kernel_error=judgement.kernel_error,
        member_error=judgement.member_error,
        problem=next((call.problem for call in calls if call.problem), judgement.problem),
        run=ask.run,
        unchecked="kernel" not in paths and any(map(_is_for_gradients, reasons)),
    )


def _is_for_gradients(reason: str) -> bool:
    return reason.startswith(NEEDS_GRADIENTS)
