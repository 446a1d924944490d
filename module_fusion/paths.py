"""Glob paths into groups of modules.

A path is a sequence of segments separated by dots, relative to the model. Within a
segment `*`, `?` and `[...]` match as in a shell. A segment of its own, or at the end
of one, `[4:8]`, `[::2]` and `[-1]` slice the children whose names are numbers. `**`
stands for any number of segments, none included.

Wildcards bind: every wildcard remembers the text it matched, and paths of one chain
match together only where their wildcards matched the same texts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from .errors import PathNotFoundError, SpecMismatchError

_SLICE = re.compile(r"^(?P<prefix>.*?)\[(?P<slice>-?\d+|-?\d*:-?\d*(?::-?\d*)?)\]$")
_MAGIC = re.compile(r"[*?\[]")
_NEAREST = 3
_PLACES = 8


@dataclass(frozen=True)
class Match:
    """One module a path matched, with the text each wildcard stood for."""

    bindings: tuple[str, ...]
    path: str
    module: nn.Module


@dataclass(frozen=True)
class Group:
    """Modules matched together, one per path, in the order of the paths."""

    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]


def find_groups(model: nn.Module, paths: Sequence[str]) -> tuple[list[Group], list[str]]:
    """Match the paths of one chain together.

    Returns:
        The groups in the order of the model, and one sentence for each place that a
        `**` found for some members but not for all.

    Raises:
        PathNotFoundError: a path matches nothing, or only where another does not.
        SpecMismatchError: two paths have different numbers of wildcards.
    """
    matches = [_matches_or_error(model, path) for path in paths]
    check_wildcard_counts(paths)
    by_binding = [{match.bindings: match for match in found} for found in matches]
    bound = [found for found in by_binding if () not in found]
    keys = list(dict.fromkeys(key for found in bound for key in found)) or [()]

    groups, skipped = [], []
    lacking: dict[str, list[str]] = {}
    for key in keys:
        members = [found.get(key) or found.get(()) for found in by_binding]
        missing = [path for path, member in zip(paths, members, strict=True) if member is None]
        if not missing:
            groups.append(
                Group(
                    tuple(member.path for member in members if member),
                    tuple(member.module for member in members if member),
                )
            )
            continue
        present = next(member.path for member in members if member)
        if all("**" in path for path in missing):
            skipped.append(f"{present!r} has no partner for {', '.join(map(repr, missing))}")
            continue
        for path in missing:
            lacking.setdefault(path, []).append(present)
    if lacking:
        raise PathNotFoundError(_partial_match_message(lacking, paths))
    if not groups:
        raise PathNotFoundError(
            "No place in the model has all of these modules: "
            + ", ".join(map(repr, paths))
            + ". "
            + "; ".join(skipped)
            + ". Wildcards at the same position must match the same text in every path."
        )
    return groups, skipped


def find_modules(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Every module any of the paths matches, by its path; a path without a match is an error."""
    return {m.path: m.module for path in paths for m in _matches_or_error(model, path)}


def check_paths(paths: object) -> tuple[str, ...]:
    """Return the paths as a tuple, or say which of them is not a path."""
    if isinstance(paths, str):
        raise PathNotFoundError(f"Paths are given as a list: [{paths!r}], not {paths!r}.")
    if not isinstance(paths, Sequence):
        raise PathNotFoundError(
            f"Paths are given as a list of strings or a mapping role -> path, "
            f"not {type(paths).__name__}."
        )
    if not paths:
        raise PathNotFoundError("The list of paths is empty: name at least one module.")
    for path in paths:
        if not isinstance(path, str):
            raise PathNotFoundError(
                f"A path is a string such as 'layers.*.mlp', not {type(path).__name__}: {path!r}."
            )
        if not path or any(not segment for segment in path.split(".")):
            raise PathNotFoundError(
                f"{path!r} is not a path: it names no module, or has an empty segment. "
                f"The model itself cannot be a member; name modules inside it."
            )
        for segment in path.split("."):
            _check_segment(segment)
    return tuple(paths)


def _check_segment(segment: str) -> None:
    """Say what is wrong with a segment, whether or not a module has children for it."""
    sliced = _SLICE.match(segment)
    if sliced and (not sliced["prefix"] or _is_slice(sliced)):
        _selected(sliced["slice"], [])
        _check_segment(sliced["prefix"])
    elif _MAGIC.search(segment) and segment != "**":
        _compiled(segment)


def _matches_or_error(model: nn.Module, path: str) -> list[Match]:
    segments = path.split(".")
    found = list(dict.fromkeys(_walk(model, segments, (), ())))
    found = [match for match in found if match.path]
    if not found:
        raise PathNotFoundError(_not_found_message(model, path, segments))
    return found


def _walk(
    module: nn.Module, segments: Sequence[str], at: tuple[str, ...], bindings: tuple[str, ...]
) -> Iterator[Match]:
    if not segments:
        yield Match(bindings, ".".join(at), module)
        return
    head, rest = segments[0], segments[1:]
    if head == "**":
        for below, descendant in _descendants(module):
            yield from _walk(descendant, rest, at + below, (*bindings, ".".join(below)))
        return
    for name, child, texts in _children_matching(module, head):
        yield from _walk(child, rest, (*at, name), bindings + texts)


def _descendants(module: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    yield (), module
    for name, child in module._modules.items():
        if child is not None:
            for below, descendant in _descendants(child):
                yield (name, *below), descendant


def _children_matching(
    module: nn.Module, segment: str
) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    if not _MAGIC.search(segment):
        child = module._modules.get(segment)
        if child is not None:
            yield segment, child, ()
        return
    sliced = _SLICE.match(segment)
    if sliced and not sliced["prefix"]:
        for name in _numbered(module, sliced["slice"]):
            yield name, module._modules[name], (name,)  # type: ignore[misc]
        return
    if sliced and (_is_slice(sliced) or module._modules.get(sliced["prefix"]) is not None):
        for outer, parent, texts in _children_matching(module, sliced["prefix"]):
            for name in _numbered(parent, sliced["slice"]):
                yield f"{outer}.{name}", parent._modules[name], (*texts, name)  # type: ignore[misc]
        return
    pattern = _compiled(segment)
    for name, child in module._modules.items():
        matched = pattern.match(name)
        if matched and child is not None:
            yield name, child, matched.groups()


def _is_slice(sliced: re.Match[str]) -> bool:
    """Whether `name[...]` can only be a slice: digits alone may be a set of characters too."""
    return not sliced["slice"].isdigit()


def _numbered(module: nn.Module, text: str) -> list[str]:
    """Names of the numbered children that a slice or an index selects."""
    names = [
        name for name, child in module._modules.items() if name.isdigit() and child is not None
    ]
    names.sort(key=int)
    return _selected(text, names)


def _selected(text: str, names: list[str]) -> list[str]:
    if ":" not in text:
        return names[int(text) :][:1] if -len(names) <= int(text) < len(names) else []
    selection = slice(*(int(part) if part else None for part in text.split(":")))
    if selection.step == 0:
        raise PathNotFoundError(f"'[{text}]' is not a slice: its step is zero.")
    return names[selection]


@lru_cache(maxsize=256)
def _compiled(segment: str) -> re.Pattern[str]:
    """A glob segment as a regular expression with one group per wildcard."""
    pieces = re.split(r"(\*|\?|\[!?\]?[^\]]*\])", segment)
    translated = ""
    for piece in pieces:
        if piece in ("*", "?"):
            translated += "(.*)" if piece == "*" else "(.)"
        elif piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
            inside = piece[1:-1].replace("\\", "\\\\")
            inside = "^" + inside[1:] if inside.startswith("!") else inside
            translated += f"([{inside}])"
        else:
            translated += re.escape(piece)
    try:
        return re.compile(rf"^{translated}$")
    except re.error as error:
        raise PathNotFoundError(f"{segment!r} is not a glob segment: {error}.") from None


def _wildcards(path: str) -> int:
    count = 0
    for segment in path.split("."):
        sliced = _SLICE.match(segment)
        if segment == "**" or (sliced and not sliced["prefix"]):
            count += 1
        elif sliced and _is_slice(sliced):
            count += 1 + _wildcards(sliced["prefix"])
        elif _MAGIC.search(segment):
            count += _compiled(segment).groups
    return count


def check_wildcard_counts(paths: Sequence[str]) -> None:
    """Say which paths of one chain have different numbers of wildcards."""
    counts = {path: _wildcards(path) for path in paths if _wildcards(path)}
    if len(set(counts.values())) > 1:
        raise SpecMismatchError(
            "Wildcards bind from left to right, so the paths of one chain need the same number "
            "of them, or none: "
            + ", ".join(f"{path!r} has {count}" for path, count in counts.items())
            + "."
        )


def _partial_match_message(lacking: Mapping[str, Sequence[str]], paths: Sequence[str]) -> str:
    """Name every place that lacks a member."""
    sentences = []
    for path, places in lacking.items():
        named = ", ".join(map(repr, places[:_PLACES]))
        more = f" and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
        have = "has" if len(places) == 1 else "have"
        sentences.append(f"{named}{more} {have} no partner for {path!r}")
    bound = "Wildcards at the same position must match the same text in every path. "
    return (
        f"The paths match only in part: {'; '.join(sentences)}. "
        + (bound if any("**" in path for path in paths) else "")
        + "Leave it out with a slice, such as 'layers.[1:].mlp', or write '**' to take every "
        "place where all of them are."
    )


def _not_found_message(model: nn.Module, path: str, segments: Sequence[str]) -> str:
    """Name the segment that fails and the real names nearest to it."""
    if not any(child is not None for child in model._modules.values()):
        return f"{path!r} matches nothing: {type(model).__name__} has no submodules."
    depth = 0
    while depth < len(segments) and next(_walk(model, segments[: depth + 1], (), ()), None):
        depth += 1
    prefix = ".".join(segments[:depth])
    parents = list(_walk(model, segments[:depth], (), ()))
    segment = segments[min(depth, len(segments) - 1)]
    head = f"{prefix}." if prefix else ""
    tail = "".join(f".{rest}" for rest in segments[depth + 1 :])
    sliced = _SLICE.match(segment)
    if sliced and any(
        child for p in parents for child in p.module._modules if child == sliced["prefix"]
    ):
        # What is missing is not the child but the numbers in it.
        prefix, segment = head + sliced["prefix"], segment[len(sliced["prefix"]) :]
        head, sliced, parents = f"{prefix}.", None, []
    where = f"under {prefix!r}" if prefix else f"in {type(model).__name__}"
    message = f"{path!r} matches nothing: there is no {segment!r} {where}."
    stem = sliced["prefix"] if sliced and sliced["prefix"] else segment
    names = list(dict.fromkeys(name for p in parents for name, c in p.module._modules.items() if c))
    near = [
        candidate
        for name in difflib.get_close_matches(stem, names, n=_NEAREST, cutoff=0.5)
        if next(
            _walk(
                model, (candidate := head + name + segment[len(stem) :] + tail).split("."), (), ()
            ),
            None,
        )
    ]
    if near:
        return message + " Did you mean " + " or ".join(map(repr, near)) + "?"
    everywhere = [name for name, _ in model.named_modules() if name]
    near = difflib.get_close_matches(path, everywhere, n=_NEAREST, cutoff=0.5) or names[:8]
    return message + " Nearest: " + ", ".join(map(repr, near)) + "." if near else message
