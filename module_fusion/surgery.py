"""`fuse_modules`, `unfuse_modules` and `fused`: plan, check, then touch.

Everything that can be found wrong is found before the first module changes. What still
fails afterwards, such as a kernel that does not load, is undone in reverse order.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from kernels import Mode, kernelize
from torch import nn

from .chain import Chain
from .checkpoints import refuse_to_repeat
from .dry_run import try_to
from .errors import FusionError, NotFusableError, UnfuseError, text_of
from .findings import code_read_once
from .inventory import Found, chains_in, members_of, modules_in, row_of, states_of
from .kernels import builtin_kernels
from .modules import (
    KEY,
    FusedModule,
    ModuleState,
    RegistryCollector,
    expected_class,
    has_expected_class,
    read_forward,
    set_class,
    state_of,
)
from .originals import shown_name
from .paths import check_paths, find_groups, find_modules
from .planning import Job, check_no_overlap, make_jobs, roles_and_paths
from .report import FusionReport, GroupReport
from .spec import ModuleSpec


def fuse_modules(
    model: nn.Module,
    modules: Sequence[str] | Mapping[str, str],
    specs: Sequence[ModuleSpec] | None = None,
    *,
    kernel: str | None = None,
    mode: Mode | None = None,
    device: str | torch.device | None = None,
    use_fallback: bool = True,
    dry_run: bool = False,
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
            `kernels.use_kernel_mapping` or `register_kernel_mapping` says what it stands for;
            where none does, `"RMSNormMLP"` and `"PatchEmbed"` are the built-in ones.
        mode: a `kernels.Mode`; training or inference, as `model.training` says, when omitted.
        device: device type to look the kernel up for; that of the members when omitted.
        use_fallback: False to raise where no kernel is found, instead of running the members.
        dry_run: True to report what would be fused, and why the rest would not, and leave the
            model as it is. It is fused and taken back, with the kernel, because nothing less
            tells what the call itself would say; no other thread may use the model meanwhile.

    Returns:
        What was fused, what was skipped, and why.

    Raises:
        PathNotFoundError: a path matches nothing, or only a part of the blocks.
        SpecMismatchError: the specs do not fit the modules.
        AlreadyFusedError: a module belongs to another chain. The same chain again is reported
            as already fused.
        NotFusableError: a module or the kernel refuses. The model is as it was.

    Examples:
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
    check_arguments(model, kernel, mode)

    def fuse() -> FusionReport:
        return _fuse(model, modules, specs, kernel, mode, device, use_fallback)[0]

    return try_to(fuse, model) if dry_run else fuse()


def _fuse(
    model: nn.Module,
    modules: Sequence[str] | Mapping[str, str],
    specs: Sequence[ModuleSpec] | None = None,
    kernel: str | None = None,
    mode: Mode | None = None,
    device: str | torch.device | None = None,
    use_fallback: bool = True,
) -> tuple[FusionReport, list[Callable[[], None]]]:
    """Fuse; also returns how to give chains that were fused before their kernels back."""
    check_arguments(model, kernel, mode)
    roles, paths = roles_and_paths(modules)
    groups, skipped = find_groups(model, paths)
    jobs = make_jobs(model, groups, roles, specs, kernel)
    kernels_before = apply_jobs(model, jobs, kernel, mode, device, use_fallback)
    rows = [row_of(job.found(), "already fused" if job.is_fused else "fused") for job in jobs]
    report = FusionReport(rows + [GroupReport("skipped", reason=text) for text in skipped])
    return report, kernels_before


def apply_jobs(
    model: nn.Module,
    jobs: Sequence[Job],
    kernel: str | None,
    mode: Mode | None,
    device: str | torch.device | None,
    use_fallback: bool,
) -> list[Callable[[], None]]:
    """Fuse what was planned, all or nothing.

    Returns:
        Steps that give chains which were fused before their kernels back, to be taken in reverse
        order.
    """
    new = [job for job in jobs if not job.is_fused]
    check_no_overlap(new)
    undo: list[Callable[[], None]] = []
    kernels_before: list[Callable[[], None]] = []
    try:
        kernels_before += read_again(jobs)
        undo += kernels_before
        for job in new:
            _apply(job, undo)
        with code_read_once():
            for job in jobs if kernel is not None else ():
                restore = restorer_of_kernel(job.chain)
                undo.append(restore)
                if job.is_fused:
                    kernels_before.append(restore)
                _kernelize(job, model, mode, device, use_fallback)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    finally:
        forget_prepared(jobs)
    return kernels_before


def read_again(jobs: Sequence[Job]) -> list[Callable[[], None]]:
    """Have chains that were fused before go by the code around them as it is now.

    Returns:
        Steps that take that back, to be taken in reverse order.
    """
    again = [job for job in jobs if job.is_fused]
    read = Counter(id(job.chain.boundary) for job in again)
    take_back = []
    for job in again:
        set_holders(job)
        boundary = job.chain.boundary
        is_read = boundary is not None and read[id(boundary)] == boundary.boundary_of
        take_back.append(job.chain.refuse(job.refusal, is_read))
    return take_back


def forget_prepared(jobs: Sequence[Job]) -> None:
    """Have the kernels forget the members, and copies of them, that they looked at."""
    seats = [job.chain.seat for job in jobs]
    for prepare in {getattr(seat.kernel, "prepare", None) for seat in seats if seat is not None}:
        forget = getattr(prepare, "cache_clear", None)
        if forget is not None:
            forget()


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
    chains = chains_in(model)
    everything: list[nn.Module] = []
    if modules is None:
        # A module may also have served a chain that is gone: its last member was replaced.
        everything = [module for module in modules_in(model) if state_of(module) is not None]
    else:
        paths = check_paths([modules] if isinstance(modules, str) else modules)
        wanted = set(map(id, find_modules(model, paths).values()))
        chains = [c for c in chains if any(id(m) in wanted for m in members_of(c))]
    rows = [row_of(found, "unfused") for found in chains]
    undo_chains(model, chains, everything)
    return FusionReport(rows)


@contextmanager
def fused(
    model: nn.Module,
    modules: Sequence[str] | Mapping[str, str],
    specs: Sequence[ModuleSpec] | None = None,
    **options: Any,
) -> Iterator[FusionReport]:
    """Fused inside the `with` block, exactly as before outside, whatever is raised.

    Takes the arguments of `fuse_modules` but `dry_run`. Chains that were fused before stay fused.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        >>> with fused(model, ["0", "1"]) as report:
        ...     model[1]
        FusedModule[Linear](in_features=8, out_features=8, bias=True)
        >>> model[1]
        Linear(in_features=8, out_features=8, bias=True)
    """
    if "dry_run" in options:
        raise FusionError(
            "fused takes its fusion back anyway, so it has no dry_run. To see what would be fused: "
            "fuse_modules(model, ..., dry_run=True)."
        )
    before = chains_in(model) if isinstance(model, nn.Module) else []
    known = {id(found.chain) for found in before}
    result, kernels_before = _fuse(model, modules, specs, **options)
    mine = [found for found in chains_in(model) if id(found.chain) not in known]
    try:
        yield result
    finally:
        undo_chains(model, [found for found in mine if state_of(found.last) is found.state], [])
        for restore in reversed(kernels_before):
            restore()


def report(model: nn.Module) -> FusionReport:
    """What is fused in the model now, and how its calls went.

    Returns:
        A group per chain: where its members are now, the kernel, how often the kernel and
        the members ran (calls inside a compiled graph are not counted), and why the members
        ran the last time they did.
    """
    if not isinstance(model, nn.Module):
        raise FusionError(f"report takes a torch.nn.Module, not {type(model).__name__}.")
    return FusionReport([row_of(found, "fused") for found in chains_in(model)])


def check_arguments(model: object, kernel: object, mode: object) -> None:
    if not isinstance(model, nn.Module):
        raise FusionError(f"fuse_modules takes a torch.nn.Module, not {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise NotFusableError(
            "A scripted or traced module runs compiled code, not its submodules. Fuse the model "
            "first, then trace it."
        )
    if kernel is not None and (not isinstance(kernel, str) or not kernel):
        raise NotFusableError(
            f"kernel is the layer name in a kernel mapping, such as 'RMSNormMLP', not {kernel!r}."
        )
    if mode is not None and not isinstance(mode, Mode):
        raise NotFusableError(f"mode is a kernels.Mode, such as Mode.INFERENCE, not {mode!r}.")


def _apply(job: Job, undo: list[Callable[[], None]]) -> None:
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
            state.role, state.outputs, state.plan = RegistryCollector, plan.outputs, plan
            state.speculation = job.speculation
            state.collects_for += 1
        set_class(member, state)
    if job.boundary is not None:
        path, module = job.boundary
        state = state_of(module) or ModuleState(module, path)
        undo.append(_restorer(module, state))
        if not state.boundary_of:
            state.inside, state.read = {}, read_forward(state.original)
        state.boundary_of += 1
        set_class(module, state)
        job.chain.boundary = state
        for member in members[:-1]:
            collector = state_of(member)
            assert collector is not None
            collector.boundary = state
        set_holders(job)
    job.chain.states = tuple(map(state_of, members[:-1]))
    job.chain.take_seat(members[-1])


def set_holders(job: Job) -> None:
    """Tell the collectors which modules are around the members now."""
    holders = list(map(weakref.ref, job.holders))
    for member in job.group.modules[:-1]:
        state = state_of(member)
        assert state is not None
        known = (state.holders or ()) if state.collects_for > 1 else ()
        state.holders = tuple(dict.fromkeys([*known, *holders]))


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


def restorer_of_kernel(chain: Chain) -> Callable[[], None]:
    """How to give a chain the kernel back that it has now, or its absence."""
    assert chain.seat is not None
    seat, reason, accuracy = chain.seat.restorer(), chain.reason, chain.accuracy

    def restore() -> None:
        seat()
        chain.reason, chain.accuracy = reason, accuracy

    return restore


def _kernelize(
    job: Job,
    model: nn.Module,
    mode: Mode | None,
    device: str | torch.device | None,
    use_fallback: bool,
) -> None:
    """Let the `kernels` library fill this chain's seat, and nothing else."""
    seat = job.chain.seat
    assert seat is not None
    on = device or _device_of(job.group.modules)
    before = seat.__dict__.get("forward")
    try:
        with builtin_kernels(job.chain.kernel, on):
            kernelize(
                seat,
                mode=mode or (Mode.TRAINING if model.training else Mode.INFERENCE),
                device=on,
                use_fallback=use_fallback,
            )
        refused = seat.__dict__["_why_unprepared"]
        if refused and not use_fallback:
            raise ValueError(refused)
    except Exception as error:
        why = text_of(error)
        where = _device_of(job.group.modules)
        if device is not None and str(where).partition(":")[0] != str(device).partition(":")[0]:
            why += f". It was asked for on {device}, the modules are on {where}"
        refused = NotFusableError(
            f"The kernel {job.chain.kernel!r} cannot take over {' -> '.join(job.paths)}: {why}. "
            f"The model is as it was before the call."
        )
        refused.reason = f"the kernel {job.chain.kernel!r} cannot take over: {why}"
        refused.was_loaded = seat.__dict__.get("forward") is not before
        raise refused from error


def _device_of(modules: Sequence[nn.Module]) -> str | torch.device:
    for module in modules:
        for parameter in module.parameters():
            if parameter.device.type == "cuda" and torch.version.hip is not None:
                return "rocm"
            return parameter.device
    return torch.device("cpu")


def undo_chains(model: nn.Module, chains: Sequence[Found], others: Sequence[nn.Module]) -> None:
    """Take chains back; `others` are as they were afterwards, whatever chains they served."""
    states = [state for found in chains for state in states_of(found)]
    states += [state for other in others if (state := state_of(other)) is not None]
    for state in states:
        module = state.module() if state.module is not None else None
        if module is not None and not has_expected_class(module, state):
            names = {id(m): name for name, m in model.named_modules()}
            raise UnfuseError(
                f"The class of {(names.get(id(module)) or state.path)!r} is "
                f"{type(module).__name__}; it was {shown_name(expected_class(state))} when it was "
                f"fused. Undo first what changed it since, then unfuse."
            )
    refuse_to_repeat(member for found in chains for member in members_of(found))
    for found in chains:
        for packing in found.chain.packings:
            packing.separate(members_of(found))
    for found in chains:
        found.chain.set_packings(())
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
    for other in others:
        state = state_of(other)
        assert state is not None
        state.role, state.collects_for, state.boundary_of = None, 0, 0
    for state in states:
        module = state.module() if state.module is not None else None
        if module is not None and state_of(module) is state:
            set_class(module, state)
