"""What is checked for one model: pairs fused by path, `fuse`, and its undoing."""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from structure import structure
from support import mapped, members_kernel, runs
from torch import Tensor, nn

from module_fusion import FusionError, fuse, fuse_modules, report, unfuse_modules
from module_fusion.spec import forward_signature, infer_specs, make_plan

from .build import Built, run, seed
from .flat import flat, gradients_of, relative_error, same_bits
from .order import called_pairs, norm_and_mlp_pairs

LIMIT = 1.1
Pair = tuple[str, str]


class Fault(Exception):
    """Something that must not happen; the message says what."""


class Expected(NamedTuple):
    """What the unfused model gives."""

    outputs: list[Any]
    with_grad: list[Any]
    gradients: dict[str, Tensor | None] | None
    why_no_gradients: str | None
    state: dict[str, Tensor]
    structure: Any


def expectation(built: Built) -> Expected:
    """Run the unfused model; a `ValueError` if it gives other bits each time."""
    model, inputs = built.model, built.inputs
    outputs = flat(run(model, inputs))
    if not same_bits(flat(run(model, inputs)), outputs):
        raise ValueError("two runs of the unfused model differ")
    why = None
    with_grad: list[Any] = outputs
    gradients = None
    try:
        seed()
        with_grad, gradients = gradients_of(model, inputs)
        seed()
        again = gradients_of(model, inputs)
        if not same_bits([*again[1].values()], [*gradients.values()]):
            why, gradients = "two backward passes of the unfused model differ", None
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:150]}"
    model.zero_grad(set_to_none=True)
    state = {name: tensor.clone() for name, tensor in _tensors_of(model).items()}
    return Expected(outputs, with_grad, gradients, why, state, structure(model))


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def pairs_of(built: Built, seen: set[Any] | None = None) -> list[tuple[Pair, bool]]:
    """Every pair to fuse, blocks that are alike as one, and whether it is called in that order.

    Pairs that lie in some of the blocks only are named without wildcards.

    Args:
        built: the model.
        seen: pairs of other models, by `kind_of_pair`; they are left out, and new ones are added.
    """
    called = called_pairs(built)
    pairs = dict.fromkeys(called, True)
    for pair in norm_and_mlp_pairs(built.model):
        pairs.setdefault(pair, False)
    modules = dict(built.model.named_modules())
    if seen is not None:
        kinds = {pair: kind_of_pair(modules, pair) for pair in pairs}
        pairs = {pair: follows for pair, follows in pairs.items() if kinds[pair] not in seen}
        seen.update(kinds.values())
    known: dict[Any, tuple[Pair, bool]] = {}
    folds: dict[Pair, set[Any]] = {}
    for pair, follows in pairs.items():
        classes = tuple(type(modules[path]) for path in pair)
        fold = folded(pair)
        folds.setdefault(fold, set()).add(classes)
        known.setdefault((fold, classes), (pair, follows))
    # One path for blocks of different classes would have one kernel for all of them.
    return [
        (fold if len(folds[fold]) == 1 and _is_everywhere(modules, fold) else pair, follows)
        for (fold, _), (pair, follows) in known.items()
    ]


def kind_of_pair(modules: dict[str, nn.Module], pair: Pair) -> Any:
    """The class around both members, what they are called in it, and their classes."""
    first, second = (path.split(".") for path in pair)
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    parent = modules[".".join(first[:shared])]
    names = (".".join(first[shared:]), ".".join(second[shared:]))
    return (type(parent), *names, *(type(modules[path]) for path in pair))


def _is_everywhere(modules: dict[str, nn.Module], pair: Pair) -> bool:
    """Whether the wildcards of both paths match in the same blocks."""
    first, second = (_pattern(path) for path in pair)
    blocks = [
        {found.groups() for name in modules if (found := pattern.fullmatch(name))}
        for pattern in (first, second)
    ]
    return blocks[0] == blocks[1]


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\*", r"(\d+)"))


def folded(pair: Pair) -> Pair:
    """The pair with `*` for the numbers of the blocks around both members."""
    first, second = (path.split(".") for path in pair)
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    around = ["*" if part.isdigit() else part for part in first[:shared]]
    return ".".join([*around, *first[shared:]]), ".".join([*around, *second[shared:]])


def check_pair(built: Built, expected: Expected, pair: Pair) -> dict[str, Any]:
    """Fuse one pair without and with a kernel that runs the members, and take it back.

    Returns:
        `{"outcome": "kernel" | "members" | "refused", "reason": ...}`.

    Raises:
        Fault: a different bit, or an error that is not typed.
    """
    model = built.model
    try:
        paths = dict(zip(("first", "second"), pair, strict=True))
        try:
            fuse_modules(model, paths)
        except FusionError as error:
            _check_untouched(built, expected, "a refusal")
            return {"outcome": "refused", "reason": _kind(error)}
        _compare(built, expected, "without a kernel")
        unfuse_modules(model)
        kernel = _kernel_for(model, pair)
        try:
            with mapped(MembersKernel=kernel):
                fuse_modules(model, paths, kernel="MembersKernel")
        except FusionError as error:
            _check_untouched(built, expected, "a refusal")
            return {"outcome": "refused", "reason": _kind(error)}
        result: dict[str, Any] = {}
        try:
            result = _compare(built, expected, "with a kernel")
        except FusionError as error:
            result = {"outcome": "refused at the call", "reason": _kind(error)}
        reasons = Counter(general(str(g.reason)) for g in report(model).fused if g.member_calls)
        unfuse_modules(model)
        _check_untouched(built, expected, "undoing")
        if "outcome" not in result:
            result["outcome"] = "kernel" if runs(kernel) else "members" if reasons else "not called"
            if reasons:
                result["reason"] = reasons.most_common(1)[0][0]
        return result
    except Fault:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return {"outcome": "out of memory"}
        raise Fault(f"{type(error).__name__}: {str(error)[:300]}") from error
    finally:
        _clean(model)


def _clean(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)
    unfuse_modules(model)


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
    first = [_first_match(model, path) for path in pair]
    signatures = [forward_signature(type(model.get_submodule(path))) for path in first]
    plan = make_plan(signatures, infer_specs(signatures), first)
    return members_kernel(len(plan.signature.parameters))


def _first_match(model: nn.Module, path: str) -> str:
    return next(name for name, _ in model.named_modules() if _pattern(path).fullmatch(name))


def _compare(built: Built, expected: Expected, how: str) -> dict[str, Any]:
    if how == "with a kernel" or expected.gradients is None:
        found = flat(run(built.model, built.inputs))
        if not same_bits(found, expected.outputs):
            raise Fault(f"outputs differ {how}: {_distance(found, expected.outputs)}")
    if expected.gradients is not None:
        seed()
        outputs, gradients = gradients_of(built.model, built.inputs)
        if not same_bits(outputs, expected.with_grad):
            raise Fault(f"outputs differ {how} with gradients")
        if not same_bits([*gradients.values()], [*expected.gradients.values()]):
            _check_rounding(gradients, expected.gradients, how)
            return {"gradients": "summed in another order"}
    return {}


def _check_rounding(found: dict[str, Any], expected: dict[str, Any], how: str) -> None:
    """Gradients summed in another order move by a few units; a lost term moves by its size."""
    if how == "without a kernel":
        raise Fault("gradients differ without a kernel")
    expected = {name: g for name, g in expected.items() if g is None or g.numel()}
    largest = max((g.abs().max() for g in expected.values() if g is not None), default=0)
    for name, gradient in expected.items():
        other = found[name]
        if (gradient is None) != (other is None):
            raise Fault(f"the gradient of {name} is {'there' if gradient is None else 'missing'}")
        if gradient is None:
            continue
        error = (other - gradient).abs().max()
        if not error <= 100 * torch.finfo(gradient.dtype).eps * largest:
            raise Fault(f"the gradient of {name} differs {how} by {error:.1e} of {largest:.1e}")


def _distance(found: list[Any], expected: list[Any]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} values for {len(expected)}"
    for ours, theirs in zip(found, expected, strict=True):
        if not same_bits([ours], [theirs]):
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                return f"relative error {relative_error([ours], [theirs]):.1e}"
            return f"{type(ours).__name__} for {type(theirs).__name__}"
    return "not at all"


def _check_untouched(built: Built, expected: Expected, what: str) -> None:
    if structure(built.model) != expected.structure:
        raise Fault(f"after {what} the model is not as it was")
    state = _tensors_of(built.model)
    if list(state) != list(expected.state) or not same_bits(
        [*state.values()], [*expected.state.values()]
    ):
        raise Fault(f"after {what} the state dict is not as it was")


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
    _check_untouched(built, expected, "undoing `fuse`")


def check_fuse(built: Built, expected: Expected) -> list[dict[str, Any]]:
    """`fuse` with every family: accuracy against float64, and what became of each group."""
    try:
        with all_families(built, expected) as found:
            fused = flat(run(built.model, built.inputs))
            state = _tensors_of(built.model)
            ran = {group.paths: group for group in report(built.model).groups}
            if not same_bits([*state.values()], [*expected.state.values()]):
                raise Fault("`fuse` changed the state dict")
            if expected.gradients is not None and ran:
                seed()
                gradients_of(built.model, built.inputs)
            _check_accuracy(built, expected, fused)
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"fuse: {type(error).__name__}: {str(error)[:300]}") from error
    rows = []
    for group in found.groups:
        row = {"family": group.family, "paths": list(group.paths), "reason": group.reason}
        row["outcome"] = "skipped"
        if group.paths in ran and group.action != "skipped":
            now = ran[group.paths]
            row["outcome"] = "kernel" if now.kernel_calls and not now.member_calls else "members"
            row["reason"] = now.reason
            if not now.kernel_calls and not now.member_calls:
                row["outcome"] = "not called"
        rows.append(row)
    return rows


def _check_accuracy(built: Built, expected: Expected, fused: list[Any]) -> None:
    if same_bits(fused, expected.outputs):
        return
    try:
        with unfused_copy(built) as wide:
            exact = flat(run(wide.model, wide.inputs))
        theirs = relative_error(expected.outputs, exact)
        ours = relative_error(fused, exact)
    except Exception:
        # Without a float64 reference: both are within rounding of each other.
        theirs, ours = 1e-6, relative_error(fused, expected.outputs)
    # The errors of a whole model are a matter of luck by some tens of percent.
    count = sum(v.numel() for v in fused if isinstance(v, Tensor) and v.is_floating_point())
    allowed = max(LIMIT * theirs, 2e-7) * (1 + 2 / max(count, 1) ** 0.5)
    if not ours <= allowed:
        raise Fault(f"accuracy of `fuse`: error {ours:.2e}, of the modules {theirs:.2e}")


@contextmanager
def unfused_copy(built: Built) -> Iterator[Built]:
    """A never-fused twin in float64."""
    unfuse_modules(built.model)
    model = copy.deepcopy(built.model).double()
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in built.inputs.items()
    }
    yield Built(model, wide, built.shrunk)


def check(
    built: Built, expected: Expected, deadline: float, seen: set[Any] | None = None
) -> dict[str, Any]:
    """Everything for one model, as plain data; faults are in it, not raised.

    No pair is begun once the process has used `deadline` seconds of processor time. Pairs in
    `seen` are left out, and the others are added to it.
    """
    result: dict[str, Any] = {"faults": [], "no_gradients": expected.why_no_gradients}
    try:
        result["groups"] = check_fuse(built, expected)
    except Fault as fault:
        result["faults"].append({"what": "fuse", "fault": str(fault)})
        result["groups"] = []
    result.update(check_pairs(built, expected, pairs_of(built, seen), deadline, result["faults"]))
    return result


def check_pairs(
    built: Built,
    expected: Expected,
    pairs: list[tuple[Pair, bool]],
    deadline: float,
    faults: list[dict[str, str]],
) -> dict[str, Any]:
    """What becomes of each pair; faults are added to the list."""
    rows: list[dict[str, Any]] = []
    for pair, follows in pairs:
        if time.process_time() > deadline:
            break
        row: dict[str, Any] = {"pair": list(pair), "follows": follows}
        try:
            row.update(check_pair(built, expected, pair))
        except Fault as fault:
            row["outcome"] = "fault"
            faults.append({"what": " -> ".join(pair), "fault": str(fault)})
        rows.append(row)
    if not same_bits(flat(run(built.model, built.inputs)), expected.outputs):
        faults.append({"what": "model", "fault": "outputs differ after all was undone"})
    return {"pairs": rows, "of_pairs": len(pairs)}
