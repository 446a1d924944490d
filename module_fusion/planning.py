"""The plan of a fuse: every group checked and wired, nothing changed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Signature
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .bytecode import function_of
from .chain import Chain
from .code import (
    call_order,
    code_that_asks_for_type,
    module_with_a_way_of_its_own,
)
from .errors import AlreadyFusedError, NotFusableError, SpecMismatchError
from .inventory import Found, modules_in
from .modules import (
    KEY,
    FusedModule,
    expected_class,
    has_expected_class,
    original_class,
    state_of,
)
from .originals import shown_name
from .paths import Group, check_paths
from .seat import check_roles
from .spec import ModuleSpec, Plan, forward_signature, infer_specs, make_plan
from .tracing import Speculation


@dataclass
class Job:
    """One group to fuse: checked, not applied."""

    group: Group
    chain: Chain
    boundary: tuple[str, nn.Module] | None
    holders: list[nn.Module]
    speculation: Speculation
    refusal: str | None
    is_fused: bool

    @property
    def paths(self) -> tuple[str, ...]:
        return self.group.paths

    def found(self) -> Found:
        last = self.group.modules[-1]
        state = state_of(last)
        assert state is not None
        return Found(self.chain, last, state, self.paths)


def roles_and_paths(
    modules: Sequence[str] | Mapping[str, str],
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    if isinstance(modules, Mapping):
        paths = check_paths(list(modules.values()))
        return tuple(str(role) for role in modules), paths
    return None, check_paths(modules)


def make_jobs(
    model: nn.Module,
    groups: Sequence[Group],
    roles: tuple[str, ...] | None,
    specs: Sequence[ModuleSpec] | None,
    kernel: str | None,
) -> list[Job]:
    """Check every group and plan it; nothing is changed."""
    plans: dict[Any, Plan] = {}
    running: set[int] = set()
    speculations: dict[Any, Speculation] = {}
    asking: dict[type, str | None] = {}
    jobs: dict[tuple[int, ...], Job] = {}
    for group in groups:
        _check_members(model, group)
        _check_order(model, group)
    modules = dict(model.named_modules(remove_duplicate=False)) if kernel is not None else {}
    places = _places(modules)
    for group in groups:
        key = tuple(original_class(module) for module in group.modules)
        if key not in plans:
            plans[key] = _plan(group, specs)
        names = roles or tuple(path.rpartition(".")[2] for path in group.paths)
        boundary = None
        refusal = None
        if kernel is not None:
            check_roles(names)
        if kernel is not None and len(group.modules) > 1:
            boundary = _boundary(modules, [p for m in group.modules for p in places[id(m)]])
            refusal = _refusal_to_capture(boundary, group.modules, asking)
        chain = Chain(group.modules[:-1], names, plans[key], kernel, refusal, running)
        existing = _existing(group, chain)
        alike = (key, boundary and original_class(boundary[1]))
        speculation = speculations.setdefault(alike, Speculation())
        holders = _holders(modules, places, boundary, group)
        is_fused = existing is not None
        if not is_fused:
            for path, module in zip(group.paths, group.modules, strict=True):
                _check_class(path, module)
            if boundary is not None:
                _check_class(*boundary)
        job = Job(group, existing or chain, boundary, holders, speculation, refusal, is_fused)
        jobs.setdefault(tuple(map(id, group.modules)), job)
    return list(jobs.values())


def _places(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for path, module in modules.items():
        places.setdefault(id(module), []).append(path)
    return places


def _check_members(model: nn.Module, group: Group) -> None:
    for path, module in zip(group.paths, group.modules, strict=True):
        if module is model:
            raise NotFusableError(f"{path!r} is the model itself, which cannot be a member.")
        if isinstance(module, torch.jit.ScriptModule):
            raise NotFusableError(
                f"{path!r} is a scripted or traced module, which runs compiled code."
            )
        if original_class(module).forward is nn.Module.forward:
            raise NotFusableError(
                f"{path!r} is a {type(module).__name__}, a container that is never called. Name "
                f"the modules in it, such as '{path}.*'."
            )
        if KEY in module.__dict__ and state_of(module) is None:
            raise NotFusableError(f"{path!r} has an attribute {KEY!r} already.")
        if not isinstance(module, FusedModule) and _has_attribute(module, "fused_kernel"):
            raise NotFusableError(f"{path!r} has an attribute 'fused_kernel' already.")
    for index, (path, module) in enumerate(zip(group.paths, group.modules, strict=True)):
        for position, (other, member) in enumerate(zip(group.paths, group.modules, strict=True)):
            if index < position and module is member:
                raise NotFusableError(f"{path!r} and {other!r} are the same module.")
            if module is member or not module._modules:
                continue
            if any(below is member for below in modules_in(module)):
                raise NotFusableError(
                    f"{other!r} is inside {path!r}: a chain is made of modules beside each other."
                )


def _check_class(path: str, module: nn.Module) -> None:
    """Refuse a module whose class is someone else's to change back."""
    state = state_of(module)
    if state is not None and not has_expected_class(module, state):
        raise NotFusableError(
            f"The class of {path!r} is {type(module).__name__}; it was "
            f"{shown_name(expected_class(state))} when it was fused. Undo first what changed it "
            f"since, then fuse."
        )
    if state is None and is_parametrized(module):
        raise NotFusableError(
            f"{path!r} is parametrized itself: it has a class of its own, which "
            f"torch.nn.utils.parametrize takes apart when the parametrization is removed. Remove "
            f"it first, or fuse first and parametrize then."
        )


def _has_attribute(module: nn.Module, name: str) -> bool:
    """`hasattr`, which for a module that has not takes long to say so."""
    own = module.__dict__
    places = (own, own["_modules"], own["_parameters"], own["_buffers"])
    return any(name in place for place in places) or hasattr(type(module), name)


def _check_order(model: nn.Module, group: Group) -> None:
    """Refuse a chain whose modules are certain to run in another order."""
    for first, second in itertools.pairwise(group.paths):
        parent, one, other = model, first.split("."), second.split(".")
        while one and one[0] == other[0]:
            parent = parent._modules[one.pop(0)]  # type: ignore[assignment]
            other.pop(0)
        forward = function_of(original_class(parent).forward)
        order = call_order(forward.__code__) if forward is not None else {}
        if order.get(one[0], -1) > order.get(other[0], len(order)):
            raise SpecMismatchError(
                f"{second!r} runs before {first!r}: {original_class(parent).__qualname__}.forward "
                f"calls self.{other[0]} first. Give the modules in the order in which they run: "
                f"[..., {second!r}, {first!r}, ...]."
            )


def _plan(group: Group, specs: Sequence[ModuleSpec] | None) -> Plan:
    forwards: list[Signature] = []
    for path, module in zip(group.paths, group.modules, strict=True):
        try:
            forwards.append(forward_signature(original_class(module)))
        except (TypeError, ValueError) as error:
            raise SpecMismatchError(
                f"The forward of {path!r} has no signature: {error}."
            ) from error
    if specs is None:
        return make_plan(forwards, infer_specs(forwards), group.paths)
    if not isinstance(specs, Sequence) or not all(isinstance(spec, ModuleSpec) for spec in specs):
        raise SpecMismatchError(
            "specs is a list of ModuleSpec, one per module: "
            "[ModuleSpec(inputs=['x'], outputs=['y']), ...]."
        )
    if len(specs) != len(group.modules):
        raise SpecMismatchError(
            f"There are {len(specs)} specs for {len(group.modules)} modules, "
            f"{', '.join(map(repr, group.paths))}. Give one ModuleSpec per module, or none."
        )
    return make_plan(forwards, specs, group.paths)


def _boundary(
    modules: Mapping[str, nn.Module], paths: Sequence[str]
) -> tuple[str, nn.Module] | None:
    """The nearest module around all members whose own `forward` is what runs."""
    segments = [path.split(".")[:-1] for path in paths]
    common = segments[0]
    for other in segments[1:]:
        length = 0
        while length < min(len(common), len(other)) and common[length] == other[length]:
            length += 1
        common = common[:length]
    while True:
        path = ".".join(common)
        module = modules[path]
        called = original_class(module).forward is not nn.Module.forward
        if called and "forward" not in module.__dict__ and not is_parametrized(module):
            return path, module
        if not common:
            return None
        common = common[:-1]


def _holders(
    modules: Mapping[str, nn.Module],
    places: Mapping[int, list[str]],
    boundary: tuple[str, nn.Module] | None,
    group: Group,
) -> list[nn.Module]:
    """The modules between the boundary and a member, wherever it is.

    A hook on one of them would see what a collector captured.
    """
    if boundary is None:
        return []
    depth = len(boundary[0].split(".")) if boundary[0] else 0
    segments = [path.split(".") for member in group.modules for path in places[id(member)]]
    paths = {".".join(s[:end]): None for s in segments for end in range(depth + 1, len(s))}
    return [modules[path] for path in paths]


def _refusal_to_capture(
    boundary: tuple[str, nn.Module] | None,
    members: Sequence[nn.Module],
    known: dict[type, str | None],
) -> str | None:
    if boundary is None:
        return "no module around the members has a forward of its own class, to capture calls in"
    asking = code_that_asks_for_type(boundary[1], set(map(id, members)), known)
    if asking:
        return f"{asking}, which a captured output cannot answer"
    other = module_with_a_way_of_its_own(boundary[1], members)
    return f"{other} may get a captured output, and computes in another way then" if other else None


def _existing(group: Group, chain: Chain) -> Chain | None:
    """The same chain, if it is fused already; an error if a member is in another one."""
    state = state_of(group.modules[-1])
    if state is not None and state.chain is not None:
        known: Chain = state.chain
        if list(map(id, known.collectors)) == list(map(id, chain.collectors)):
            if (known.kernel, known.plan) == (chain.kernel, chain.plan) and (
                known.roles == chain.roles or known.kernel is None
            ):
                return known
            raise AlreadyFusedError(
                f"{' -> '.join(group.paths)} is fused already, {_options(known)}; this call asks "
                f"for it {_options(chain)}. Take the first one back: "
                f"unfuse_modules(model, [{group.paths[-1]!r}])."
            )
    for path, module in zip(group.paths, group.modules, strict=True):
        state = state_of(module)
        if state is not None and state.role is not None:
            raise AlreadyFusedError(
                f"{path!r} belongs to another chain: it is a {shown_name(type(module))}. Take "
                f"that one back first: unfuse_modules(model, [{path!r}])."
            )
    return None


def _options(chain: Chain) -> str:
    kernel = "without a kernel" if chain.kernel is None else f"with the kernel {chain.kernel!r}"
    return f"{kernel}, roles {list(chain.roles)} and inputs {chain.plan.signature}"


def check_no_overlap(jobs: Sequence[Job]) -> None:
    """A module may collect for several chains of one call, and end only one."""
    ends: dict[int, Job] = {}
    for job in jobs:
        other = ends.setdefault(id(job.group.modules[-1]), job)
        if other is not job:
            raise AlreadyFusedError(
                f"Two groups end in the same module: {' -> '.join(other.paths)}; "
                f"{' -> '.join(job.paths)}. A module can be the last of one chain only."
            )
    for job in jobs:
        for path, module in zip(job.paths, job.group.modules[:-1], strict=False):
            if id(module) in ends:
                raise AlreadyFusedError(
                    f"{path!r} would be the last module of one chain and an earlier one of another."
                )
