"""What is checked for one model: pairs fused by path, `fuse`, and its undoing."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support import mapped, members_kernel, runs
from torch import nn

from module_fusion import FusionError, fuse, fuse_modules, report, unfuse_modules
from module_fusion.seat import NEEDS_GRADIENTS
from module_fusion.spec import forward_signature, infer_specs, make_plan

from .build import Built, run, seed
from .compare import (
    Expected,
    Fault,
    check_alike,
    check_drawn,
    check_outputs,
    check_state,
    check_untouched,
    is_out_of_memory,
    noted,
    told,
)
from .flat import flat, gradients_of, same_bits
from .pairs import Pair, first_match, pairs_of
from .rounding import ANOTHER_KERNEL, ANOTHER_ORDER, check_accuracy, check_gradients

Gradients = dict[str, Any]
# Why a kernel that runs without gradients may leave a call with them to the members.
REASONS_WITH_GRADIENTS = (NEEDS_GRADIENTS, "the members are called under different grad modes")


def check_pair(built: Built, expected: Expected, pair: Pair) -> dict[str, Any]:
    """Fuse one pair without and with a kernel that runs the members, and take it back.

    Returns:
        `{"outcome": ..., "reason": ...}`, of which the outcome is `"kernel"`,
        `"kernel in some blocks"`, `"members"`, `"not called"`, `"refused"`,
        `"refused at the call"` or `"out of memory"`.

    Raises:
        Fault: a different bit, or an error that is not typed.
    """
    result: dict[str, Any] = {}
    faults = []
    try:
        result = _fused_and_undone(built, expected, pair)
    except Exception as error:
        if is_out_of_memory(error):
            result = {"outcome": "out of memory"}
        else:
            faults.append(error)
    try:
        built.model.zero_grad(set_to_none=True)
        unfuse_modules(built.model)
    except Exception as error:
        faults.append(error)
    if faults:
        raise Fault("; then ".join(map(told, faults))) from faults[0]
    return result


def _fused_and_undone(built: Built, expected: Expected, pair: Pair) -> dict[str, Any]:
    model = built.model
    paths = dict(zip(("first", "second"), pair, strict=True))
    try:
        fuse_modules(model, paths)
    except FusionError as error:
        check_untouched(expected, "a refusal")
        return {"outcome": "refused", "reason": _kind(error)}
    check_state(expected, "the state dict is not as it was without a kernel")
    if _compare(built, expected, "without a kernel") is not None:
        raise Fault("gradients differ without a kernel")
    unfuse_modules(model)
    check_untouched(expected, "undoing")
    kernel = _kernel_for(model, pair)
    try:
        with mapped(MembersKernel=kernel):
            fuse_modules(model, paths, kernel="MembersKernel")
    except FusionError as error:
        check_untouched(expected, "a refusal")
        return {"outcome": "refused", "reason": _kind(error)}
    check_state(expected, "the state dict is not as it was with a kernel")
    result: dict[str, Any] = {}
    gradients = None
    try:
        gradients = _compare(built, expected, "with a kernel")
    except FusionError as error:
        result = {"outcome": "refused at the call", "reason": _kind(error)}
    reasons = Counter(general(str(g.reason)) for g in report(model).fused if g.member_calls)
    unfuse_modules(model)
    check_untouched(expected, "undoing")
    if gradients is not None:
        check_gradients(gradients, expected, ANOTHER_ORDER, "with a kernel")
        result["gradients"] = "summed in another order"
    if "outcome" not in result:
        result["outcome"] = _outcome(bool(runs(kernel)), bool(reasons))
        if reasons:
            result["reason"] = reasons.most_common(1)[0][0]
    return result


def _outcome(kernel_ran: bool, members_ran: bool) -> str:
    if kernel_ran:
        return "kernel in some blocks" if members_ran else "kernel"
    return "members" if members_ran else "not called"


@contextmanager
def fused_by_path(built: Built, pair: Pair) -> Iterator[type[nn.Module]]:
    """Inside, the pair is fused with a kernel that runs the members."""
    kernel = _kernel_for(built.model, pair)
    paths = dict(zip(("first", "second"), pair, strict=True))
    with mapped(MembersKernel=kernel):
        fuse_modules(built.model, paths, kernel="MembersKernel")
    try:
        yield kernel
    finally:
        unfuse_modules(built.model)


def _kernel_for(model: nn.Module, pair: Pair) -> type[nn.Module]:
    first = [first_match(model, path) for path in pair]
    signatures = [forward_signature(type(model.get_submodule(path))) for path in first]
    plan = make_plan(signatures, infer_specs(signatures), first)
    return members_kernel(len(plan.signature.parameters))


def _compare(built: Built, expected: Expected, how: str) -> Gradients | None:
    """Compare the outputs; the gradients if they are not the same to the bit."""
    of_inputs = expected.with_inputs is not None
    backward = expected.backward(of_inputs)
    check_outputs(flat(run(built.model, built.inputs)), expected.outputs, how)
    check_drawn(expected.drawn, how)
    if backward is None:
        return None
    seed()
    outputs, gradients = gradients_of(built.model, built.inputs, of_inputs)
    check_drawn(backward.drawn, f"{how} with gradients")
    check_outputs(outputs, backward.outputs, f"{how} with gradients")
    same_names = list(gradients) == list(backward.gradients)
    if same_names and same_bits([*gradients.values()], [*backward.gradients.values()]):
        return None
    return gradients


def _kind(error: FusionError) -> str:
    return f"{type(error).__name__}: {general(str(error))}"


def general(reason: str) -> str:
    """A reason without the names, paths and numbers of one model."""
    reason = re.sub(r"'[^']*'", "'…'", reason.splitlines()[0])
    reason = re.sub(r"\b[\w*]+(\.[\w*]+)+(\(\))?", "…", reason)
    reason = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", reason)
    return reason[:160]


@contextmanager
def all_families(built: Built, expected: Expected) -> Iterator[Any]:
    """`fuse` inside; on leaving the model must be exactly as before."""
    try:
        yield fuse(built.model)
    finally:
        unfuse_modules(built.model)
        built.model.zero_grad(set_to_none=True)
    check_untouched(expected, "undoing `fuse`")


def check_fuse(built: Built, expected: Expected) -> dict[str, Any]:
    """`fuse` with every family.

    Returns:
        `{"groups": ..., "reference": ..., "gradients": ...}`: what became of each group, what the
        outputs were compared with, by `rounding.check_accuracy`, and by how much of its own
        largest element a gradient differs most.

    Raises:
        Fault: something is not what it was, up to rounding; or any error, of whatever type.
    """
    backwards = []
    with all_families(built, expected) as found:
        outputs = flat(run(built.model, built.inputs))
        check_drawn(expected.drawn, "with `fuse`")
        ran = _groups(built)
        check_state(expected, "`fuse` changed the state dict")
        check_alike(outputs, expected.outputs, "with `fuse`")
        for of_inputs in (False, True) if ran else ():
            backward = expected.backward(of_inputs)
            if backward is not None:
                seed()
                with_grad, now = gradients_of(built.model, built.inputs, of_inputs)
                check_drawn(backward.drawn, "with `fuse` and gradients")
                check_alike(with_grad, backward.outputs, "with `fuse` and gradients")
                backwards.append((backward, with_grad, now))
        then = _groups(built) if backwards else {}
    exact = expected.exact_outputs
    reference = check_accuracy(outputs, expected.outputs, exact)
    shares = []
    for backward, with_grad, now in backwards:
        check_accuracy(with_grad, backward.outputs, exact, "of `fuse`, with gradients")
        shares.append(check_gradients(now, expected, ANOTHER_KERNEL, "with `fuse`"))
    rows = [_row(group, ran, then) for group in found.groups]
    check_ran_with_gradients(rows)
    return {"groups": rows, "reference": reference, "gradients": max(shares, default=0.0)}


def _groups(built: Built) -> dict[tuple[str, ...], Any]:
    return {group.paths: group for group in report(built.model).groups}


def _row(
    group: Any, ran: dict[tuple[str, ...], Any], then: dict[tuple[str, ...], Any]
) -> dict[str, Any]:
    """What became of a group in the run without gradients, and in those with them after it."""
    row = {"family": group.family, "paths": list(group.paths), "reason": group.reason}
    row["outcome"] = "skipped"
    if group.paths in ran and group.action != "skipped":
        now = ran[group.paths]
        row["outcome"] = _ran(now.kernel_calls, now.member_calls)
        row["reason"] = now.reason
        later = then.get(group.paths)
        if later is not None:
            calls = later.member_calls - now.member_calls
            row["with_gradients"] = _ran(later.kernel_calls - now.kernel_calls, calls)
            if calls:
                row["reason_with_gradients"] = later.reason
    return row


def _ran(kernel_calls: int, member_calls: int) -> str:
    if member_calls:
        return "members"
    return "kernel" if kernel_calls else "not called"


def check_ran_with_gradients(rows: list[dict[str, Any]]) -> None:
    """The kernels that ran without gradients ran with them too.

    Raises:
        Fault: one did not, for a reason that gradients are none for.
    """
    for row in rows:
        if row["outcome"] == "kernel" and row.get("with_gradients") == "members":
            reason = str(row["reason_with_gradients"])
            if not reason.startswith(REASONS_WITH_GRADIENTS):
                where = " -> ".join(row["paths"])
                raise Fault(f"the kernel of {where} does not run with gradients: {reason}")


def check(
    built: Built, expected: Expected, deadline: float, seen: set[Any] | None = None
) -> dict[str, Any]:
    """Everything for one model, as plain data; faults are in it, not raised.

    No pair is begun once the process has used `deadline` seconds of processor time. Pairs in
    `seen` are left out, and the others are added to it.
    """
    result: dict[str, Any] = {"faults": [], "no_gradients": expected.why_no_gradients}
    result.update(groups=[], pairs=[], of_pairs=0)
    with noted("fuse", result):
        result.update(check_fuse(built, expected))
    with noted("pairs", result):
        check_pairs(built, expected, pairs_of(built, seen), deadline, result)
    return result


def check_pairs(
    built: Built,
    expected: Expected,
    pairs: list[tuple[Pair, bool]],
    deadline: float,
    result: dict[str, Any],
) -> None:
    """What becomes of each pair; it and the faults are added to the result."""
    rows: list[dict[str, Any]] = []
    result.update(pairs=rows, of_pairs=len(pairs))
    for pair, follows in pairs:
        if time.process_time() > deadline:
            break
        row: dict[str, Any] = {"pair": list(pair), "follows": follows, "outcome": "fault"}
        with noted(" -> ".join(pair), result):
            row.update(check_pair(built, expected, pair))
        rows.append(row)
    with noted("model", result):
        outputs = flat(run(built.model, built.inputs))
        check_outputs(outputs, expected.outputs, "after all was undone")
        check_untouched(expected, "all was undone")
