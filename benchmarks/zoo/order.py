"""Which modules are called one after the other, and which siblings look like norm and MLP."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .build import Built, run

NORM = re.compile("norm|^ln", re.IGNORECASE)
MLP = re.compile("mlp|ffn|feed|ff$|intermediate|moe|dense|expert|fc", re.IGNORECASE)


def called_pairs(built: Built) -> list[tuple[str, str]]:
    """Modules called one after the other by the same module, or by the model's own code."""
    names = {module: name for name, module in built.model.named_modules()}
    pairs: dict[tuple[str, str], None] = {}
    last: list[str | None] = [None]  # What each module that is running has called last.

    def before(module: nn.Module, args: Any) -> None:
        name = names[module]
        if name and last[-1] and last[-1] != name and not _nested(last[-1], name):
            pairs[last[-1], name] = None
        last[-1] = name
        last.append(None)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        last.pop()

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        run(built.model, built.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(pairs)


def _nested(first: str, second: str) -> bool:
    return first.startswith(f"{second}.") or second.startswith(f"{first}.")


def norm_and_mlp_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Every norm-like and MLP-like child of one parent, in both orders."""
    pairs = []
    for path, parent in model.named_modules():
        prefix = f"{path}." if path else ""
        for norm, first in parent.named_children():
            for mlp, second in parent.named_children():
                if norm != mlp and _is(NORM, norm, first) and _is(MLP, mlp, second):
                    pairs.append((prefix + norm, prefix + mlp))
                    pairs.append((prefix + mlp, prefix + norm))
    return pairs


def _is(pattern: re.Pattern[str], name: str, module: nn.Module) -> bool:
    container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return not container and bool(pattern.search(name) or pattern.search(type(module).__name__))
