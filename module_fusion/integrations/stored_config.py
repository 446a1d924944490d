"""A fusion config as JSON holds it, and fusing again what one says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kernels import Mode
from torch import nn

from ..errors import FusionError, NotFusableError
from ..families import fuse
from ..report import FusionReport

LOG = logging.getLogger("module_fusion")


def encoded(families: bool | Mapping[str, Any]) -> Any:
    """What JSON can hold of an argument of `fuse`.

    Names and options are a list of pairs, because config files sort the keys of mappings.

    Examples:
        >>> stored = encoded({"rms_norm_mlp": {"mode": Mode.INFERENCE | Mode.TORCH_COMPILE}})
        >>> stored
        [['rms_norm_mlp', {'mode': 'INFERENCE|TORCH_COMPILE'}]]
        >>> decoded(stored)["rms_norm_mlp"]["mode"] == Mode.INFERENCE | Mode.TORCH_COMPILE
        True
    """
    if isinstance(families, bool):
        return families
    return [[name, _encoded_options(options)] for name, options in families.items()]


def _encoded_options(options: Any) -> Any:
    if not isinstance(options, Mapping):
        return bool(options)
    kept = dict(options)
    for name in ("include", "exclude"):
        if kept.get(name) is not None and not isinstance(kept[name], str):
            kept[name] = list(kept[name])
    if isinstance(kept.get("mode"), Mode):
        names = [n for n, mode in Mode.__members__.items() if mode.value and mode in kept["mode"]]
        kept["mode"] = "|".join(names)
    return kept


def decoded(families: Any) -> Any:
    """The argument of `fuse` that was encoded; what is neither is left for `fuse` to refuse."""
    if isinstance(families, list):
        pairs = [pair for pair in families if isinstance(pair, (list, tuple)) and len(pair) == 2]
        if len(pairs) < len(families) or not all(isinstance(name, str) for name, _ in pairs):
            raise FusionError(f"it is no list of names with options: {families!r}")
        families = {name: options for name, options in pairs}  # noqa: C416
    if not isinstance(families, Mapping):
        return families
    return {
        name: {**options, "mode": _mode(options["mode"])}
        if isinstance(options, Mapping) and "mode" in options
        else options
        for name, options in families.items()
    }


def _mode(value: Any) -> Any:
    """The `kernels.Mode` of a name such as `"INFERENCE|TORCH_COMPILE"`; anything else itself."""
    names = value.split("|") if isinstance(value, str) else []
    if not names or any(name not in Mode.__members__ for name in names):
        return value
    mode = Mode[names[0]]
    for name in names[1:]:
        mode |= Mode[name]
    return mode


def check_mode(mode: Any) -> None:
    """Refuse what is no mode, before a model is loaded for it."""
    if mode is not None and not isinstance(mode, Mode):
        raise NotFusableError(
            f"mode is a kernels.Mode, such as Mode.INFERENCE, or its name, not {mode!r}."
        )


def fuse_stored(model: nn.Module, stored: Any) -> list[str]:
    """Fuse what a stored config says, each family by itself.

    Returns:
        What could not be fused and why; a config that cannot be read is a reason too.
    """
    try:
        if not isinstance(stored, Mapping) or "families" not in stored:
            raise FusionError(f"it is {stored!r}, which names no families")
        families = decoded(stored["families"])
        if not isinstance(families, (bool, Mapping)):
            raise FusionError(f"it is {families!r}")
    except FusionError as error:
        return [f"the stored config cannot be read ({error})"]
    parts = [families] if isinstance(families, bool) else [{k: v} for k, v in families.items()]
    problems = []
    for part in parts:
        try:
            done = fuse(model, part)
        except FusionError as error:
            which = repr(next(iter(part))) if isinstance(part, dict) else "any family"
            problems.append(f"{which} ({str(error).rstrip('.')})")
        else:
            problems += without_groups(part, done)
            LOG.info("%s", done)
    return problems


def without_groups(families: bool | Mapping[str, Any], done: FusionReport) -> list[str]:
    """The families that were asked for and fused nothing, each with its first reason."""
    if isinstance(families, bool):
        return ["any family (nothing fits)"] if families and not done.fused else []
    fused = {group.family for group in done.fused}
    problems = []
    for name, options in families.items():
        if options is not False and options is not None and name not in fused:
            reasons = [group.reason for group in done.skipped if group.family == name]
            problems.append(f"{name!r} ({reasons[0] if reasons else 'no group fits'})")
    return problems
