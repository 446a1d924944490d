"""What is fused in a model now: chains, their members and their places."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter

from torch import nn

from .chain import Chain
from .modules import KEY, ModuleState, original_class, state_of
from .report import Feed, GroupReport
from .spec import External, Plan, Wire


@dataclass
class Found:
    """One chain found in a model, with the paths its members have now."""

    chain: Chain
    last: nn.Module
    state: ModuleState
    paths: tuple[str, ...]


def states_of(found: Found) -> list[ModuleState]:
    """States of a chain's modules that still belong to it."""
    states = [found.state, *found.chain.states, found.chain.boundary]
    alive = []
    for state in states:
        module = state.module() if state is not None and state.module is not None else None
        if state is not None and module is not None and state_of(module) is state:
            alive.append(state)
    return alive


def members_of(found: Found) -> list[nn.Module]:
    return [*found.chain.collectors, found.last]


def chains_in(model: nn.Module) -> list[Found]:
    """The chains whose last member is in the model, with present paths."""
    names: dict[int, str] = {}
    ends: list[tuple[nn.Module, ModuleState]] = []
    for name, module in _named_modules_in(model):
        names[id(module)] = name or "(the module itself)"
        if KEY in module.__dict__:
            state = state_of(module)
            if state is not None and state.chain is not None:
                ends.append((module, state))
    return [
        Found(
            state.chain,
            module,
            state,
            tuple(
                names.get(id(member), f"outside: {_path_of(member)}")
                for member in (*state.chain.collectors, module)
            ),
        )
        for module, state in ends
    ]


def _path_of(module: nn.Module) -> str:
    state = state_of(module)
    return state.path if state is not None else type(module).__name__


def _named_modules_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules()`, but for the seats of kernels, and without a generator per module."""
    pending, seen = [("", model)], set()
    while pending:
        name, module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module
            prefix = f"{name}." if name else ""
            for key, child in reversed(module._modules.items()):
                if child is not None:
                    pending.append((prefix + key, child))


def modules_in(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, as `modules()` gives them, without making up their names."""
    pending, seen = [model], set()
    while pending:
        module = pending.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            pending += [child for child in module._modules.values() if child is not None]


def strays_in(model: nn.Module, chains: Sequence[Found]) -> list[nn.Module]:
    """Fused modules whose chain is gone: its last member was replaced or is elsewhere."""
    known = {id(state) for found in chains for state in states_of(found)}
    return [
        module
        for module in modules_in(model)
        if KEY in module.__dict__
        and (state := state_of(module)) is not None
        and id(state) not in known
    ]


def row_of(found: Found, action: str) -> GroupReport:
    chain = found.chain
    return GroupReport(
        action=action,
        paths=found.paths,
        roles=chain.roles,
        classes=tuple(original_class(member).__name__ for member in members_of(found)),
        kernel=chain.kernel,
        path="kernel" if chain.armed else "members",
        kernel_calls=chain.kernel_calls,
        member_calls=chain.member_calls,
        reason=chain.reason
        or (chain.why_not_compiled() if chain.armed else chain.why_not_running()),
        family=chain.family,
        accuracy=chain.accuracy,
        wires=tuple(_wires_of(chain.plan)),
    )


def _wires_of(plan: Plan) -> Iterator[Feed]:
    inputs = list(plan.signature.parameters.values())
    for index, member in enumerate(plan.members):
        for name, source in zip(member.parameters, member.sources, strict=True):
            if isinstance(source, Wire):
                yield Feed(source.member, index, name)
            elif isinstance(source, External):
                parameter = inputs[source.position]
                is_optional = parameter.default is not Parameter.empty
                yield Feed(None, index, parameter.name, is_optional)
