"""What `benchmark` compares: one model as itself, unfused, compiled, and with Liger's kernels.

All of them use the very same parameters and buffers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..code import is_compiled
from ..comparison import unfused
from ..errors import FusionError, NotFusableError, needed
from ..inventory import modules_in
from ..modules import KEY

UNFUSED, FUSED = "unfused", "fused"
UNFUSED_COMPILED, FUSED_COMPILED, LIGER = "unfused compiled", "fused compiled", "liger"
ON_REQUEST = (UNFUSED_COMPILED, FUSED_COMPILED, LIGER)

_COMPILED = "_compiled_call_impl"
_MISSING = object()


@dataclass(frozen=True)
class Candidate:
    """One thing to time.

    Attributes:
        module: what is called.
        active: a context in which a call runs this candidate. It is entered before the clock
            starts.
        compiled: whether torch.compile made it.
        fused: whether its calls go through the fused modules.
    """

    name: str
    module: nn.Module
    active: Callable[[], AbstractContextManager[None]] = nullcontext
    compiled: bool = False
    fused: bool = False


def candidates_of(
    model: nn.Module, names: Iterable[str], compile_options: Mapping[str, Any]
) -> list[Candidate]:
    """Unfused and fused, and those of the names that were asked for."""
    made = {
        UNFUSED_COMPILED: partial(_unfused_compiled, model, compile_options),
        FUSED_COMPILED: partial(_fused_compiled, model, compile_options),
        LIGER: partial(_liger, model),
    }
    return [
        Candidate(UNFUSED, model, partial(unfused, model)),
        Candidate(FUSED, model, fused=True),
        *(made[name]() for name in names),
    ]


def twin(model: nn.Module) -> nn.Module:
    """The model as if never fused, of modules of its own around the same parameters and buffers.

    Raises:
        FusionError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    states = (module.__dict__.get(KEY) for module in modules_in(model))
    memo.update({id(state): None for state in states if state is not None})
    with unfused(model):
        try:
            copied = copy.deepcopy(model, memo)
        except Exception as error:
            raise FusionError(
                f"{type(model).__name__} cannot be copied, which comparing with a compiled or "
                f"patched one needs: {type(error).__name__}: {error}"
            ) from error
    for module in modules_in(copied):
        module.__dict__.pop(KEY, None)
    return copied


def _unfused_compiled(model: nn.Module, options: Mapping[str, Any]) -> Candidate:
    # A twin keeps its classes, so that swapping those of the model touches no guard of it.
    copied = twin(model)
    nn.Module.compile(copied, **options)
    return Candidate(UNFUSED_COMPILED, copied, compiled=True)


def _fused_compiled(model: nn.Module, options: Mapping[str, Any]) -> Candidate:
    # A copy of a fused model does not capture calls, so it is the model itself.
    nn.Module.compile(model, **options)
    compiled = model.__dict__.pop(_COMPILED)

    @contextmanager
    def active() -> Iterator[None]:
        model.__dict__[_COMPILED] = compiled
        try:
            yield
        finally:
            model.__dict__.pop(_COMPILED, None)

    return Candidate(FUSED_COMPILED, model, active, compiled=True, fused=True)


def check_not_compiled(model: nn.Module) -> None:
    """A model that is compiled already has no eager run to compare with."""
    for module in modules_in(model):
        if is_compiled(module):
            raise FusionError(
                f"{type(module).__name__} is compiled already, so its eager time cannot be "
                f"measured. Give the model as it was before torch.compile, and ask for "
                f"compare={[UNFUSED_COMPILED, FUSED_COMPILED]!r}."
            )


class _Change(NamedTuple):
    """One name of a Python module or class, with and without a library's patch."""

    owner: Any
    name: str
    before: Any
    after: Any

    def set(self, value: Any) -> None:
        if value is _MISSING:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, value)


def _liger(model: nn.Module) -> Candidate:
    """A twin with Liger's kernels.

    Liger patches the modules of an instance, and besides them functions of the Python module
    that the model's classes come from, such as the rotary embedding. Those are in place only
    while this candidate runs.
    """
    liger = needed("liger_kernel.transformers.monkey_patch", "compare='liger'", "liger-kernel")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise NotFusableError(
            f"Liger has no kernels for {type(model).__name__}: its config's model_type is "
            f"{kind!r}, and Liger knows {', '.join(sorted(liger.MODEL_TYPE_TO_APPLY_LIGER_FN))}."
        )
    copied = twin(model)
    classes = {cls for module in modules_in(copied) for cls in type(module).__mro__}
    with _taken_back("liger_kernel", [*sys.modules.values(), *classes]) as changes:
        try:
            liger._apply_liger_kernel_to_instance(model=copied)
        except Exception as error:
            raise NotFusableError(
                f"Liger refuses {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
    return Candidate(LIGER, copied, partial(_in_place, changes))


@contextmanager
def _taken_back(package: str, owners: Sequence[Any]) -> Iterator[list[_Change]]:
    """Note what the package sets on the owners inside, and take it back at the end."""
    known = [
        (owner, dict(vars(owner)))
        for owner in owners
        if hasattr(owner, "__dict__") and not _is_of(package, getattr(owner, "__name__", None))
    ]
    changes: list[_Change] = []
    try:
        yield changes
    finally:
        for owner, before in known:
            for name, value in list(vars(owner).items()):
                old = before.get(name, _MISSING)
                if old is not value and _is_of(package, getattr(value, "__module__", None)):
                    changes.append(_Change(owner, name, old, value))
        for change in changes:
            change.set(change.before)


def _is_of(package: str, name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] == package


@contextmanager
def _in_place(changes: Sequence[_Change]) -> Iterator[None]:
    try:
        for change in changes:
            change.set(change.after)
        yield
    finally:
        for change in changes:
            change.set(change.before)
