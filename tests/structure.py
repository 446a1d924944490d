"""What a model is made of, to compare before and after surgery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

CONTAINERS = tuple(
    name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set))
)


class Identity:
    """Equal only to the identity of the very same object, which it keeps alive.

    A bare `id` may be taken over by a new object once the old one is freed.
    """

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):#x}>"


@dataclass(frozen=True)
class ModuleStructure:
    """One module: all that fusing could change and has to leave or give back."""

    module: Identity
    cls: Identity
    attributes: list[str]
    forward: Identity
    training: bool
    containers: dict[str, Identity]
    children: list[tuple[str, Identity]]
    parameters: list[tuple[str, Identity, bool]]
    buffers: list[tuple[str, Identity]]
    hooks: dict[str, list[tuple[Any, Identity]]]


@dataclass(frozen=True)
class Structure:
    """A whole model: every module by path, shared ones at each path, and the state dict's keys."""

    modules: dict[str, ModuleStructure]
    order: list[str]
    state_dict: list[str]


def structure(model: nn.Module) -> Structure:
    """Capture the structure of a model; equal before and after if nothing was changed."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return Structure(
        modules={path: _structure_of(module) for path, module in modules.items()},
        order=list(modules),
        state_dict=list(model.state_dict()),
    )


PLAIN = (type(None), bool, int, float, complex, str, bytes)


def plain_values(model: nn.Module) -> dict[tuple[str, str], str]:
    """The attributes of every module that are plain values, or tuples of them, by path and name."""
    return {
        (path, name): repr(value)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


def _structure_of(module: nn.Module) -> ModuleStructure:
    own = module.__dict__
    containers = [name for name in CONTAINERS if name in own]
    return ModuleStructure(
        module=Identity(module),
        cls=Identity(type(module)),
        attributes=list(own),
        forward=Identity(own.get("forward")),
        training=module.training,
        containers={name: Identity(own[name]) for name in containers},
        children=[(name, Identity(child)) for name, child in module._modules.items()],
        parameters=[
            (name, Identity(parameter), parameter is not None and parameter.requires_grad)
            for name, parameter in module._parameters.items()
        ],
        buffers=[(name, Identity(buffer)) for name, buffer in module._buffers.items()],
        hooks={
            name: [(key, Identity(hook)) for key, hook in own[name].items()]
            for name in containers
            if "hooks" in name and isinstance(own[name], dict)
        },
    )
