"""What became of fused modules since they were fused: replaced, moved, or of another class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..inventory import Found, chains_in, members_of, modules_in, strays_in
from ..modules import ModuleState, expected_class, state_of
from ..originals import original_of, shown_name

_PART = (
    "{!r} is outside the module given to verify, and is fused with {!r}, which is in it. Give the "
    "module that has both: verify(model, ...)"
)
_AGAIN = "Undo what is left and fuse again: unfuse_modules(model), then fuse(model)"


def replaced_in(model: nn.Module, found: Sequence[Found]) -> list[str]:
    """A sentence for every fused module that is not what it was, with what to do."""
    names = {id(module): name or "(the module itself)" for name, module in model.named_modules()}
    return [*_gone(found), *_strays(model, found, names), *_changed(model, names)]


def _gone(found: Sequence[Found]) -> Iterator[str]:
    for item in found:
        for role, path, member in zip(item.chain.roles, item.paths, members_of(item), strict=True):
            if not path.startswith("outside: "):
                continue
            if _is_in(item.chain.boundary, member):
                yield _PART.format(path.removeprefix("outside: "), item.paths[-1])
            else:
                yield (
                    f"{path.removeprefix('outside: ')!r}, fused with {item.paths[-1]!r} as "
                    f"{role!r}, {_what_became(item.chain.boundary)}"
                )


def _strays(model: nn.Module, found: Sequence[Found], names: dict[int, str]) -> Iterator[str]:
    strays = strays_in(model, found)
    states = [(module, state) for module in strays if (state := state_of(module)) is not None]
    around = {id(state.boundary) for _, state in states}
    for module, state in states:
        where = names.get(id(module), state.path)
        if state.role is not None and (last := _last_elsewhere(module, state, model)):
            yield _PART.format(last, where)
        elif state.role is not None:
            yield (
                f"{where!r} was fused, and the last module of its chain "
                f"{_what_became(state.boundary)}"
            )
        elif id(state) not in around:
            yield (
                f"the modules in {where!r} that were fused are no longer in the model: they were "
                f"replaced or moved after fusing. {_AGAIN}"
            )


def _what_became(boundary: ModuleState | None) -> str:
    if boundary is None:
        return (
            f"is not in the module given to verify: either this is a part of the model, and "
            f"verify needs the whole, or it was replaced or moved after fusing. {_AGAIN}"
        )
    return f"is no longer in the model: it was replaced or moved after fusing. {_AGAIN}"


def _is_in(boundary: ModuleState | None, member: nn.Module) -> bool:
    """Whether the module around a chain is still there, and has a member in it."""
    around = None if boundary is None or boundary.module is None else boundary.module()
    return around is not None and any(module is member for module in modules_in(around))


def _last_elsewhere(collector: nn.Module, state: ModuleState, model: nn.Module) -> str | None:
    """The path of the last member of a collector's chain, where only that is outside the model."""
    around = None if state.boundary is None else state.boundary.module
    parent = None if around is None else around()
    if parent is None or not _is_in(state.boundary, collector):
        return None
    inside = {id(module) for module in modules_in(model)}
    for found in chains_in(parent):
        if collector in found.chain.collectors and id(found.last) not in inside:
            return found.state.path
    return None


def _changed(model: nn.Module, names: dict[int, str]) -> Iterator[str]:
    for module in modules_in(model):
        state = state_of(module)
        if state is not None and not isinstance(module, expected_class(state)):
            yield (
                f"the class of {names.get(id(module), state.path)!r} was changed after fusing: it "
                f"is {type(module).__name__}, and was {shown_name(expected_class(state))}. Give it "
                f"its class back, unfuse_modules(model), then change it and fuse again"
            )


def notes_on(found: Sequence[Found]) -> list[str]:
    """A sentence for every module inside a member that is of another class than before."""
    notes: list[str] = []
    for item in found:
        for path, member in zip(item.paths, members_of(item), strict=True):
            state = state_of(member)
            form = None if state is None else state.form
            modules: list[nn.Module | None] = []
            for part in () if form is None else form.parts:
                parent = modules[part.parent] if modules else None
                module = parent._modules.get(part.key) if parent is not None else None
                module = module if modules else member
                modules.append(module)
                now, before = original_of(type(module)), original_of(part.cls)
                if part.name and now is not before:
                    notes.append(
                        f"{path}{part.name} is a {now.__name__}, and was a {before.__name__} when "
                        f"the kernel was chosen, so the modules run; fuse again for a kernel that "
                        f"knows it"
                    )
    return notes
