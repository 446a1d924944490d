"""Small copies of a module, to be run in its place, and a key for what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_OWN = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, also where the fusing library has swapped it for a subclass."""
    cls: type[nn.Module] = type(module).__dict__.get("_fusion_original_class", type(module))
    return cls


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beside parameters, buffers, children and hooks."""
    if "forward" in module.__dict__:
        raise Refused(f"a {original_class(module).__name__} has a forward of its own")
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _OWN and not name.startswith("_fusion")
    }


class Refused(ValueError):
    """The members are not what the kernel computes; the text says why."""


class WrongResult(Refused):
    """The module ran and computed something else."""


class _Same:
    """An object as a key: equal to itself alone, and kept alive, so that no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _frozen(value: Any) -> Any:
    if type(value) is tuple:
        return tuple(_frozen(item) for item in value)
    # 1, 1.0 and True are equal but not the same to a forward.
    return (type(value), value) if isinstance(value, _PLAIN) else _Same(value)


def _form(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device)


def _structure(module: nn.Module | None) -> Any:
    return None if module is None else structure(module)


def structure(module: nn.Module) -> Any:
    """A hashable value, equal for modules whose stand-ins are the same."""
    cls = original_class(module)
    return (
        cls,
        cls.forward,
        tuple((name, _frozen(value)) for name, value in sorted(attributes(module).items())),
        tuple((name, _form(tensor)) for name, tensor in module._parameters.items()),
        tuple((name, _form(tensor)) for name, tensor in module._buffers.items()),
        tuple((name, _structure(child)) for name, child in module._modules.items()),
    )


def stand_in(
    module: nn.Module,
    parameter: Callable[[tuple[str, ...], Tensor], Tensor],
    attribute: Callable[[Any], Any] = lambda value: value,
    path: tuple[str, ...] = (),
) -> nn.Module:
    """A module of the original class with the attributes of `module` and other parameters.

    Args:
        parameter: gives the new value for the parameter at a path.
        attribute: gives the new value for an attribute, to adapt sizes.
    """
    cls = original_class(module)
    copy: nn.Module = object.__new__(cls)
    nn.Module.__init__(copy)
    copy.__dict__.update({k: attribute(v) for k, v in attributes(module).items()})
    for name, tensor in module._parameters.items():
        value = None if tensor is None else parameter((*path, name), tensor)
        copy._parameters[name] = None if value is None else nn.Parameter(value, False)
    for name, child in module._modules.items():
        if child is not None:
            copy._modules[name] = stand_in(child, parameter, attribute, (*path, name))
    return copy.train(module.training)


@contextmanager
def probing(what: nn.Module) -> Iterator[None]:
    """Run probes: no gradients, any error is a refusal."""
    name = original_class(what).__name__
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    except Refused:
        raise
    except Exception as error:
        text = f"a copy of {name} cannot be run: {type(error).__name__}: {error}"
        raise Refused(text) from error


def output_of(module: nn.Module, x: Tensor) -> Any:
    """What a stand-in gives for `x`, unless it would draw random numbers.

    Random numbers belong to whoever draws them next, in any thread, so they can be neither used
    up nor put back. The first run ends before the operation that draws. The second is the one
    that counts: some operations of torch round differently where they are watched.
    """
    with _Watching(module):
        module(x)
    return module(x)


class DrawsRandomNumbers(Refused):
    """A member draws random numbers when it runs."""


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = original_class(self.module).__name__
            when = " in training mode" if self.module.training else ""
            raise DrawsRandomNumbers(f"{name} draws random numbers{when}, in {func}")
        return func(*args, **(kwargs or {}))


def relative_error(value: Tensor, truth: Tensor) -> Tensor:
    """Relative L2 distance of each row; inf where it is no number."""
    if value.shape != truth.shape:
        return torch.full((1,), torch.inf)
    wide = truth.double()
    error: Tensor = (value.double() - wide).norm(dim=-1) / wide.norm(dim=-1)
    return error.nan_to_num(torch.inf, torch.inf)
