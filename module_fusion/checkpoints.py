"""What ran in a checkpoint, so that the same runs where the checkpoint runs it again.

`torch.utils.checkpoint` runs a part of the forward again in the backward, and knows the tensors
that are saved there by their order alone. A kernel saves other tensors than the members do. So
what each call ran is kept with the checkpoint; where that cannot be run again, an error says so.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from .errors import DeferredUseError

# What a collector ran if its call was captured. Text, so that a copy is equal.
CAPTURED = "captured"


class _Ran(NamedTuple):
    """What a call ran: something by which it can be known again, or the reason why the member."""

    what: Any
    reason: str | None


_NOT_FUSED = _Ran(None, "a checkpoint runs it again, and it had no kernel in the forward")


# Where the module was when it was fused, and its class: copies of it have the same.
_Key = tuple[str, type]


class _Record:
    """What the modules that are called in one checkpoint ran.

    Attributes:
        ran: what each of their calls ran in the forward, in order.
        repeated: how many of those calls a backward has repeated, by its pack hook.
        modules: in whose place a kernel ran.
    """

    def __init__(self) -> None:
        self.ran: dict[_Key, list[_Ran]] = {}
        self.repeated: weakref.WeakKeyDictionary[Any, Counter[_Key]] = weakref.WeakKeyDictionary()
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def next_of(self, key: _Key, pack: Any) -> _Ran:
        """What the call ran that is repeated now."""
        counts = self.repeated.setdefault(pack, Counter())
        position = counts[key]
        counts[key] += 1
        ran = self.ran.get(key, [])
        return ran[position] if position < len(ran) else _NOT_FUSED


_RECORDS: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()
_ADDING = threading.Lock()


class CheckpointedCall:
    """A call of a fused module in a checkpoint.

    Args:
        path: of the module, when it was fused.
        original: its class.
        record: of the checkpoint.
        pack: the hook for saved tensors of a backward that runs the call again, None if it is
            the first time.

    Attributes:
        is_repeated: whether the checkpoint runs the call again.
    """

    def __init__(
        self, module: nn.Module, path: str, original: type, record: _Record, pack: Any
    ) -> None:
        self.module = module
        self.key = path, original
        self.record = record
        self.is_repeated = pack is not None
        self.ran = record.next_of(self.key, pack) if self.is_repeated else _NOT_FUSED

    def decide(self, runs: Any, reason: str | None) -> str | None:
        """The reason why the call may not run what it could run now; None if it runs that.

        Args:
            runs: what it could run.
            reason: why it may not, None if it may.

        Raises:
            DeferredUseError: it ran in the forward, and cannot be run again.
        """
        if not self.is_repeated:
            self.record.ran.setdefault(self.key, []).append(_Ran(runs, reason))
            if reason is None:
                self.record.modules.add(self.module)
            return reason
        if self.ran.reason is not None:
            return self.ran.reason
        if reason is None and self.ran.what != runs:
            reason = "there is another kernel now"
        if reason is not None:
            raise DeferredUseError(
                f"A checkpoint runs {self.key[0]!r} again in the backward. A kernel ran in the "
                f"forward, and cannot now: {reason}. The members would save other tensors than "
                f"those that the backward looks for. Change the model, hooks and modes before the "
                f"forward or after the backward."
            )
        return None


def checkpointed_call(
    module: nn.Module, path: str, original: type, hooks: Any
) -> CheckpointedCall | None:
    """The call of a module that begins now, if it is in a checkpoint; None if it is not.

    Args:
        path: of the module, when it was fused.
        original: its class.
        hooks: for saved tensors, that are in force.
    """
    if getattr(hooks[0], "__module__", None) != "torch.utils.checkpoint":
        return None
    pack = inspect.unwrap(hooks[0])
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=False))
    is_repeated = "target_frame_ref" in cells
    if is_repeated:
        frame = cells["target_frame_ref"].cell_contents()
    else:
        frame = cells["frame"].cell_contents if "frame" in cells else None
    if frame is None:
        return None
    with _ADDING:
        record = _RECORDS.setdefault(frame, _Record())
    return CheckpointedCall(module, path, original, record, hooks[0] if is_repeated else None)


def refuse_to_repeat(modules: Iterable[nn.Module]) -> None:
    """Have the checkpoints in which a kernel ran for these modules raise in their backward."""
    gone = list(modules)
    with _ADDING:
        records = list(_RECORDS.items())
    for frame, record in records:
        if any(module in record.modules for module in gone):
            frame.recompute_fn = _refuse


def _refuse(*args: Any) -> None:
    raise DeferredUseError(
        "A checkpoint runs its part of the model again in the backward. A kernel ran in the "
        "forward, and has been unfused since: the members would save other tensors than those that "
        "the backward looks for. Unfuse before the forward or after the backward."
    )
