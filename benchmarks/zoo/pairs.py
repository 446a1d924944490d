"""Which pairs of a model are fused."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .build import Built
from .order import called_pairs, norm_and_mlp_pairs

Pair = tuple[str, str]


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


def first_match(model: nn.Module, path: str) -> str:
    """The first module that a path with wildcards names."""
    return next(name for name, _ in model.named_modules() if _pattern(path).fullmatch(name))
