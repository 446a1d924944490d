"""`fuse_modules`, `unfuse_modules` and `fused`: plan, check, then touch.

Everything that can be found wrong is found before the first module changes. What still
fails afterwards, such as a kernel that does not load, is undone in reverse order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature
from typing import Any

import torch
from kernels import Mode, kernelize
from torch import nn

from .code import code_that_asks_for_type
from .deferred import Speculation
from .errors import (
    AlreadyFusedError,
    FusionError,
    NotFusableError,
    SpecMismatchError,
    UnfuseError,
)
from .modules import (
    KEY,
    FusedModule,
    ModuleState,
    RegistryCollector,
    expected_class,
    original_class,
    set_class,
    state_of,
)
from .paths import Group, check_paths, find_groups, find_modules
from .report import FusionReport, GroupReport
from .seat import Chain, check_roles
from .spec import ModuleSpec, Plan, forward_signature, infer_specs, make_plan


def fuse_modules(
    model: nn.Module,
    modules: Sequence[str] | Mapping[str, str],
    specs: Sequence[ModuleSpec] | None = None,
    *,
    kernel: str | None = None,
    mode: Mode | None = None,
    device: str | torch.device | None = None,
    use_fallback: bool = True,
) -> FusionReport:
    """Fuse adjacent submodules in place, in every repeated block.

    Args:
        model: any module in memory. Parameters, names and the order of children stay.
        modules: glob paths in the order in which the modules run, or a mapping from role to
            path. A role is the name by which a kernel reaches the member; a list takes the
            last segment of each path. One module is a valid chain.
        specs: one `ModuleSpec` per module. Inferred from the `forward` signatures when
            omitted: each module's output is the next one's first input.
        kernel: a layer name for the `kernels` library. A mapping registered with
            `kernels.use_kernel_mapping` or `register_kernel_mapping` says what it stands for.
        mode: a `kernels.Mode`; training or inference, as `model.training` says, when omitted.
        device: device type to look the kernel up for; that of the members when omitted.
        use_fallback: False to raise where no kernel is found, instead of running the members.

    Returns:
        What was fused, what was skipped, and why.

    Raises:
        PathNotFoundError: a path matches nothing, or only a part of the blocks.
        SpecMismatchError: the specs do not fit the modules.
        AlreadyFusedError: a module belongs to another chain. The same chain again is reported
            as already fused.
        NotFusableError: a module or the kernel refuses. The model is as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> block = nn.Sequential()
        >>> block.norm, block.mlp = nn.LayerNorm(8), nn.Linear(8, 8)
        >>> x = torch.randn(2, 3, 8)  # (batch, tokens, hidden)
        >>> before = block(x)
        >>> _ = fuse_modules(block, ["norm", "mlp"])
        >>> torch.equal(block(x), before)
        True
        >>> block.mlp
        FusedModule[Linear](in_features=8, out_features=8, bias=True)
        >>> _ = unfuse_modules(block)
        >>> block.mlp
        Linear(in_features=8, out_features=8, bias=True)
    """
    _check_arguments(model, kernel, mode)
    roles, paths = _roles_and_paths(modules)
    groups, skipped = find_groups(model, paths)
    jobs = _make_jobs(model, groups, roles, specs, kernel)
    new = [job for job in jobs if not job.is_fused]
    _check_no_overlap(new)
    undo: list[Callable[[], None]] = []
    try:
        for job in new:
            _apply(job, undo)
        if kernel is not None:
            for job in jobs:
                _kernelize(job, model, mode, device, use_fallback, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    rows = [_row(job.found(), "already fused" if job.is_fused else "fused") for job in jobs]
    return FusionReport(rows + [GroupReport("skipped", reason=text) for text in skipped])


def unfuse_modules(model: nn.Module, modules: Sequence[str] | str | None = None) -> FusionReport:
    """Take fusion back: class, `__dict__` and order are exactly what they were before.

    Args:
        model: the model, or a part of it.
        modules: glob paths; the chains with a member that one of them matches are unfused.
            All chains when omitted.

    Returns:
        What was unfused; no groups for a model with nothing fused.

    Raises:
        PathNotFoundError: a path matches no module.
        UnfuseError: someone changed the class of a member since. Nothing is unfused then.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(f"unfuse_modules takes a torch.nn.Module, not {type(model).__name__}.")
    chains = _chains_in(model)
    strays = _strays_in(model, chains) if modules is None else []
    if modules is not None:
        paths = check_paths([modules] if isinstance(modules, str) else modules)
        wanted = set(map(id, find_modules(model, paths).values()))
        chains = [c for c in chains if any(id(m) in wanted for m in _members(c))]
    rows = [_row(found, "unfused") for found in chains]
    _undo_chains(model, chains, strays)
    return FusionReport(rows)


@contextmanager
def fused(
    model: nn.Module,
    modules: Sequence[str] | Mapping[str, str],
    specs: Sequence[ModuleSpec] | None = None,
    **options: Any,
) -> Iterator[FusionReport]:
    """Fused inside the `with` block, exactly as before outside, whatever is raised.

    Takes the arguments of `fuse_modules`. Chains that were fused before stay fused.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        >>> with fused(model, ["0", "1"]) as report:
        ...     type(model[1]).__name__
        'FusedModule[Linear]'
        >>> type(model[1]).__name__
        'Linear'
    """
    before = _chains_in(model) if isinstance(model, nn.Module) else []
    known = {id(found.chain) for found in before}
    result = fuse_modules(model, modules, specs, **options)
    mine = [found for found in _chains_in(model) if id(found.chain) not in known]
    try:
        yield result
    finally:
        _undo_chains(model, [found for found in mine if state_of(found.last) is found.state], [])


def report(model: nn.Module) -> FusionReport:
    """What is fused in the model now, and how its calls went.

    Returns:
        A group per chain: where its members are now, the kernel, how often the kernel and
        the members ran (calls inside a compiled graph are not counted), and why the members
        ran the last time they did.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(f"report takes a torch.nn.Module, not {type(model).__name__}.")
    return FusionReport([_row(found, "fused") for found in _chains_in(model)])


@dataclass
class _Job:
    """One group to fuse: checked, not applied."""

    group: Group
    chain: Chain
    boundary: tuple[str, nn.Module] | None
    speculation: Speculation
    is_fused: bool

    @property
    def paths(self) -> tuple[str, ...]:
        return self.group.paths

    def found(self) -> _Found:
        last = self.group.modules[-1]
        state = state_of(last)
        assert state is not None
        return _Found(self.chain, last, state, self.paths)


@dataclass
class _Found:
    """One chain found in a model, with the paths its members have now."""

    chain: Chain
    last: nn.Module
    state: ModuleState
    paths: tuple[str, ...]


def _check_arguments(model: object, kernel: object, mode: object) -> None:
    if not isinstance(model, nn.Module):
        raise FusionError(f"fuse_modules takes a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise NotFusableError(
            "A scripted or traced module runs compiled code, not its submodules. Fuse the model "
            "first, then trace it."
        )
    if kernel is not None and (not isinstance(kernel, str) or not kernel.isidentifier()):
        raise NotFusableError(
            f"kernel is the layer name in a kernel mapping, such as 'RMSNormMLP', not {kernel!r}."
        )
    if mode is not None and not isinstance(mode, Mode):
        raise NotFusableError(f"mode is a kernels.Mode, such as Mode.INFERENCE, not {mode!r}.")


def _roles_and_paths(
    modules: Sequence[str] | Mapping[str, str],
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    if isinstance(modules, Mapping):
        paths = check_paths(list(modules.values()))
        return tuple(str(role) for role in modules), paths
    return None, check_paths(modules)


def _make_jobs(
    model: nn.Module,
    groups: Sequence[Group],
    roles: tuple[str, ...] | None,
    specs: Sequence[ModuleSpec] | None,
    kernel: str | None,
) -> list[_Job]:
    """Check every group and plan it; nothing is changed."""
    plans: dict[Any, Plan] = {}
    running: set[int] = set()
    speculations: dict[Any, Speculation] = {}
    jobs: dict[tuple[int, ...], _Job] = {}
    for group in groups:
        _check_members(model, group)
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
            refusal = _refusal_to_capture(boundary, group.modules)
        chain = Chain(group.modules[:-1], names, plans[key], kernel, refusal, running)
        existing = _existing(group, chain)
        alike = (key, boundary and original_class(boundary[1]))
        speculation = speculations.setdefault(alike, Speculation())
        job = _Job(group, existing or chain, boundary, speculation, is_fused=existing is not None)
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
        if not isinstance(module, FusedModule) and hasattr(module, "fused_kernel"):
            raise NotFusableError(f"{path!r} has an attribute 'fused_kernel' already.")
    for index, (path, module) in enumerate(zip(group.paths, group.modules, strict=True)):
        for position, (other, member) in enumerate(zip(group.paths, group.modules, strict=True)):
            if index < position and module is member:
                raise NotFusableError(f"{path!r} and {other!r} are the same module.")
            if module is not member and any(m is member for m in module.modules()):
                raise NotFusableError(
                    f"{other!r} is inside {path!r}: a chain is made of modules beside each other."
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
        if called and "forward" not in module.__dict__:
            return path, module
        if not common:
            return None
        common = common[:-1]


def _refusal_to_capture(
    boundary: tuple[str, nn.Module] | None, members: Sequence[nn.Module]
) -> str | None:
    if boundary is None:
        return None
    asking = code_that_asks_for_type(boundary[1], set(map(id, members)))
    return f"{asking} asks for type(...), which a captured output cannot answer" if asking else None


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
                f"{path!r} belongs to another chain: it is a {type(module).__name__}. Take that "
                f"one back first: unfuse_modules(model, [{path!r}])."
            )
    return None


def _options(chain: Chain) -> str:
    kernel = "without a kernel" if chain.kernel is None else f"with the kernel {chain.kernel!r}"
    return f"{kernel}, roles {list(chain.roles)} and inputs {chain.plan.signature}"


def _check_no_overlap(jobs: Sequence[_Job]) -> None:
    """A module may collect for several chains of one call, and end only one."""
    ends: dict[int, _Job] = {}
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


def _apply(job: _Job, undo: list[Callable[[], None]]) -> None:
    members = job.group.modules
    for path, role, member, plan in zip(
        job.paths, job.chain.roles, members, job.chain.plan.members, strict=True
    ):
        state = state_of(member) or ModuleState(member, path)
        undo.append(_restorer(member, state))
        state.name = role
        if member is members[-1]:
            state.role, state.chain = FusedModule, job.chain
        else:
            state.role, state.outputs = RegistryCollector, plan.outputs
            state.speculation = job.speculation
            state.collects_for += 1
        set_class(member, state)
    if job.boundary is not None:
        path, module = job.boundary
        state = state_of(module) or ModuleState(module, path)
        undo.append(_restorer(module, state))
        state.boundary_of += 1
        set_class(module, state)
        job.chain.boundary = state
    job.chain.states = tuple(state_of(member) for member in members[:-1])
    job.chain.take_seat(members[-1])


def _restorer(module: nn.Module, state: ModuleState) -> Callable[[], None]:
    saved = dict(state.__dict__)
    cls, had_state = type(module), state_of(module) is not None

    def restore() -> None:
        state.__dict__.clear()
        state.__dict__.update(saved)
        if type(module) is not cls:
            module.__class__ = cls
        if not had_state:
            module.__dict__.pop(KEY, None)

    return restore


def _kernelize(
    job: _Job,
    model: nn.Module,
    mode: Mode | None,
    device: str | torch.device | None,
    use_fallback: bool,
    undo: list[Callable[[], None]],
) -> None:
    """Let the `kernels` library fill this chain's seat, and nothing else."""
    seat = job.chain.seat
    assert seat is not None
    before = seat.__dict__.get("forward")

    def restore() -> None:
        if before is not None:
            seat.forward = before
        elif "forward" in seat.__dict__:
            del seat.forward

    undo.append(restore)
    try:
        kernelize(
            seat,
            mode=mode or (Mode.TRAINING if model.training else Mode.INFERENCE),
            device=device or _device_of(job.group.modules),
            use_fallback=use_fallback,
        )
    except Exception as error:
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise NotFusableError(
            f"The kernel {job.chain.kernel!r} cannot take over {' -> '.join(job.paths)}: {reason}. "
            f"The model is as it was before the call."
        ) from error


def _device_of(modules: Sequence[nn.Module]) -> str | torch.device:
    for module in modules:
        for parameter in module.parameters():
            if parameter.device.type == "cuda" and torch.version.hip is not None:
                return "rocm"
            return parameter.device
    return torch.device("cpu")


def _undo_chains(model: nn.Module, chains: Sequence[_Found], strays: Sequence[nn.Module]) -> None:
    states = [state for found in chains for state in _states(found)]
    states += [state for stray in strays if (state := state_of(stray)) is not None]
    for state in states:
        module = state.module() if state.module is not None else None
        if module is not None and type(module) is not expected_class(state):
            names = {id(m): name for name, m in model.named_modules()}
            raise UnfuseError(
                f"The class of {(names.get(id(module)) or state.path)!r} is "
                f"{type(module).__name__}; it was {expected_class(state).__name__} when it was "
                f"fused. Undo first what changed it since, then unfuse."
            )
    for found in chains:
        if found.chain.seat is not None:
            found.chain.seat.__dict__.pop("forward", None)
            found.chain.seat._arm()
        found.state.role, found.state.chain = None, None
        for state in found.chain.states:
            if state is not None:
                state.collects_for -= 1
                state.role = RegistryCollector if state.collects_for else None
        if found.chain.boundary is not None:
            found.chain.boundary.boundary_of -= 1
    for stray in strays:
        state = state_of(stray)
        assert state is not None
        state.role, state.collects_for, state.boundary_of = None, 0, 0
    for state in states:
        module = state.module() if state.module is not None else None
        if module is not None and state_of(module) is state:
            set_class(module, state)


def _states(found: _Found) -> list[ModuleState]:
    """States of a chain's modules that still belong to it."""
    states = [found.state, *found.chain.states, found.chain.boundary]
    alive = []
    for state in states:
        module = state.module() if state is not None and state.module is not None else None
        if state is not None and module is not None and state_of(module) is state:
            alive.append(state)
    return alive


def _members(found: _Found) -> list[nn.Module]:
    return [*found.chain.collectors, found.last]


def _chains_in(model: nn.Module) -> list[_Found]:
    """The chains whose last member is in the model, with present paths."""
    names: dict[int, str] = {}
    ends: list[tuple[nn.Module, ModuleState]] = []
    for name, module in model.named_modules():
        names[id(module)] = name or "(the module itself)"
        state = state_of(module)
        if state is not None and state.chain is not None:
            ends.append((module, state))
    return [
        _Found(
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


def _strays_in(model: nn.Module, chains: Sequence[_Found]) -> list[nn.Module]:
    """Fused modules whose chain is gone: its last member was replaced or is elsewhere."""
    known = {id(state) for found in chains for state in _states(found)}
    return [
        module
        for module in model.modules()
        if (state := state_of(module)) is not None and id(state) not in known
    ]


def _row(found: _Found, action: str) -> GroupReport:
    chain = found.chain
    return GroupReport(
        action=action,
        paths=found.paths,
        roles=chain.roles,
        classes=tuple(original_class(member).__name__ for member in _members(found)),
        kernel=chain.kernel,
        path="kernel" if chain.armed else "members",
        kernel_calls=chain.kernel_calls,
        member_calls=chain.member_calls,
        reason=chain.reason
        or chain.why_not_compiled()
        or (None if chain.armed else chain.why_not_running()),
    )
