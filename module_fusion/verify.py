"""`verify`: the fused model against the unfused one, on the user's own inputs.

The unfused model runs first, then the fused one, from the same random state, buffers and copies
of the inputs. Where a kernel ran and something differs, the unfused model runs once more and
continues with what the kernels returned: then nothing else may differ, not in one bit, and every
kernel is judged by itself against float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .code import is_compiled
from .comparison import check_not_ambiguous, counts_kept
from .context import check_not_fake
from .errors import FusionError
from .inventory import chains_in, modules_in
from .verifying.casting import in_dtype
from .verifying.outcomes import Ask
from .verifying.replaced import notes_on, replaced_in
from .verifying.report import VerificationReport
from .verifying.runs import compare

_COMPILED = (
    "compiled modules ran in eager mode here: what a compiler changes is not looked at, and calls "
    "inside a compiled graph are not counted"
)


def verify(
    model: nn.Module,
    /,
    *args: Any,
    method: str = "forward",
    gradients: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
    **kwargs: Any,
) -> VerificationReport:
    """Compare the fused model with the unfused one on your own inputs.

    Nothing is left behind: random state, buffers, gradients, call counts and your inputs are as
    before, and so is what modules have as attributes, such as counters and caches. There is no
    second copy of the model's weights, so a parameter that the model writes to when it is called
    stays changed, and the report says which. Needs room for the inputs and
    outputs of all fused groups, and for one group at a time in float64.

    A model that draws random numbers draws the same ones in both runs. Compiled modules run in
    eager mode. Gradients are recorded where the caller records them: a kernel without a backward
    is checked under `torch.no_grad()` alone, and the report says where it was not.

    Args:
        model: a model with fused modules.
        *args: what the method takes; copied for every run.
        method: the name of the method to call, such as `"generate"`.
        gradients: whether to compare gradients of all parameters, and of the inputs that require
            one: of the output's `loss`, or where it has none, of a fixed random combination of
            all its floating tensors. Hooks on parameters do not run, those of modules do, and
            nothing is added to any `.grad`. Needs room for the gradients twice.
        dtypes: run in each of these dtypes, with floating inputs and weights cast, instead of in
            the model's own. Needs room for the weights in that dtype.
        **kwargs: as `args`. Where the method has a parameter with the name of an option, the
            option is meant: give the model's by position, or verify a module around the model
            whose `forward` has another name for it.

    Returns:
        A report, true if fusion kept its promise: where no kernel ran the same bits, and where
        one ran at most 1.1 times the members' error against float64, as far as these inputs
        can tell. In few rows, and in float32 where the order of a sum decides, some times as
        much is within rounding; the report has both errors.

    Raises:
        FusionError: nothing is fused, or an argument is not usable.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from module_fusion import fuse_modules
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        >>> _ = fuse_modules(model, ["0", "1"])
        >>> found = verify(model, torch.randn(2, 8))
        >>> found.passed, found.equal
        (True, True)
        >>> found.verdict
        'Passed, equal to the bit: no kernel ran'
    """
    _check(model, method, gradients, dtypes)
    found = chains_in(model)
    replaced = replaced_in(model, found)
    if not found and not replaced:
        raise FusionError(
            "Nothing is fused in this model, so there is nothing to verify. Fuse it first: "
            "fuse(model), or fuse_modules(model, [...], kernel=...)."
        )
    results = []
    with counts_kept(found), _eagerly(gradients), _without_hooks_on(model.parameters()):
        for dtype in [None] if dtypes is None else dtypes:
            ask = Ask(model, method, args, kwargs, gradients, dtype)
            with in_dtype(model, found, dtype):
                results.append(compare(ask, found))
    notes = [*notes_on(found), *([_COMPILED] if _is_compiled(model) else [])]
    return VerificationReport(
        outputs=tuple(d for r in results for d in r.outputs),
        gradients=tuple(d for r in results for d in r.gradients),
        groups=tuple(g for r in results for g in r.groups),
        first_difference=next((r.first for r in results if r.first), None),
        problems=tuple(dict.fromkeys([*replaced, *(p for r in results for p in r.problems)])),
        notes=tuple(dict.fromkeys([*notes, *(n for r in results for n in r.notes)])),
    )


def _check(model: Any, method: Any, gradients: Any, dtypes: Any) -> None:
    if not isinstance(model, nn.Module):
        raise FusionError(f"verify takes a torch.nn.Module, not {type(model).__name__}.")
    if not isinstance(method, str) or not callable(getattr(model, method, None)):
        raise FusionError(
            f"method is the name of a method of the model, such as 'generate'; "
            f"{type(model).__name__} has no method {method!r}."
        )
    if dtypes is not None and (
        not isinstance(dtypes, (list, tuple))
        or not dtypes
        or not all(isinstance(d, torch.dtype) and d.is_floating_point for d in dtypes)
    ):
        raise FusionError(
            f"dtypes is a list of floating dtypes, such as [torch.float32, torch.bfloat16], not "
            f"{dtypes!r}."
        )
    for dtype in (d for d in dtypes or () if d.itemsize == 1):
        raise FusionError(
            f"dtypes has {dtype}, in which modules keep numbers and do not compute, so the model "
            f"cannot run in it. Weights and outputs of that dtype are compared in any run: leave "
            f"it out, or give what the model computes in, such as [torch.bfloat16]."
        )
    if not isinstance(gradients, bool):
        raise FusionError(f"gradients is True or False, not {gradients!r}.")
    given = {"method": method, "gradients": gradients, "dtypes": dtypes}
    check_not_ambiguous(verify, model, method, given)
    check_not_fake(model, "verify")


@contextmanager
def _without_hooks_on(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, hooks on the gradients of parameters do not run: they may log, count or send."""
    hooks: list[dict[Any, Any]] = [p._backward_hooks for p in parameters if p._backward_hooks]
    kept = [dict(own) for own in hooks]
    try:
        for own in hooks:
            own.clear()
        yield
    finally:
        for own, before in zip(hooks, kept, strict=True):
            own.clear()
            own.update(before)


@contextmanager
def _eagerly(gradients: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if gradients:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        yield


def _is_compiled(model: nn.Module) -> bool:
    return any(map(is_compiled, modules_in(model)))
