"""`fuse`: find the groups of every family, check them, and fuse those that pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from kernels import Mode
from torch import nn

from ..context import check_not_fake, has_global_hooks
from ..dry_run import try_to
from ..effects import effect_of
from ..errors import AlreadyFusedError, FusionError, NotFusableError, text_of
from ..exact import seeded
from ..findings import code_read_once
from ..inventory import Found, row_of
from ..modules import original_class, state_of
from ..paths import Group, check_paths, find_modules
from ..plain import why_foreign
from ..planning import Job, check_no_overlap, make_jobs
from ..reach import Reach
from ..report import FusionReport, GroupReport
from ..spec import External
from ..surgery import (
    apply_jobs,
    check_arguments,
    forget_prepared,
    read_again,
    restorer_of_kernel,
    undo_chains,
)
from .certificate import Certificate, Certificates, Samples
from .family import FusionFamily, chosen_families
from .layout import Packer


def fuse(
    model: nn.Module,
    families: bool | Mapping[str, Any] = True,
    *,
    mode: Mode | None = None,
    device: str | torch.device | None = None,
    dry_run: bool = False,
) -> FusionReport:
    """Find what can be fused in a model, and fuse it with the family's kernel.

    A group is fused if its members have the structure the kernel knows, and if the kernel,
    run against them on small random inputs, is at most 1.1 times less accurate than they are,
    measured against float64. Weights that the kernel wants side by side are packed, which
    uses no more memory once the call returns. All else is left alone and reported with the
    reason. Take it back with `unfuse_modules(model)`.

    Args:
        model: any module in memory.
        families: True for every registered family; or a mapping from names to True, False or
            options: `include` and `exclude` (glob paths of members) and `mode`. Built in are
            `"rms_norm_mlp"` and `"patch_embeddings"`.
        mode: a `kernels.Mode`; training or inference, as `model.training` says, when omitted.
        device: device type to look the kernels up for; that of the members when omitted.
        dry_run: True to report what would be fused, and why the rest would not, and leave the
            model as it is. It is fused and taken back, with kernels and packed weights, because
            nothing less tells what the call itself would say; no other thread may use the model
            meanwhile.

    Returns:
        What was fused, with the kernel's error in units of the members', and what was left.

    Raises:
        NotFusableError: there is no family of that name. The model is as it was.
        FusionError: the code of a family raised an error, or tensors are fake and have no
            values. The model is as it was.
        PathNotFoundError: a path in `include` or `exclude` matches nothing.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from module_fusion import fuse, report, unfuse_modules
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 16, stride=16), nn.Flatten(2))
        >>> fuse(model, {"patch_embeddings": True}).fused[0].paths
        ('0',)
        >>> _ = model(torch.randn(2, 3, 32, 32))
        >>> report(model).groups[0].kernel_calls
        1
        >>> _ = unfuse_modules(model)
    """
    check_arguments(model, None, mode)
    check_not_fake(model, "fuse")
    packer = Packer(model)
    if not dry_run:
        return _fuse(model, families, mode, device, packer)

    def fuse_and_unpack() -> FusionReport:
        try:
            return _fuse(model, families, mode, device, packer)
        finally:
            packer.give_all_back()

    return try_to(fuse_and_unpack, model)


def _fuse(
    model: nn.Module,
    families: bool | Mapping[str, Any],
    mode: Mode | None,
    device: str | torch.device | None,
    packer: Packer,
) -> FusionReport:
    rows: list[GroupReport] = []
    fused: list[Found] = []
    restore: list[Callable[[], None]] = []
    chosen = chosen_families(families)
    try:
        for family, options in chosen:
            family.forget()
            wanted = _filter(model, options)
            groups = [group for group in _groups(model, family) if wanted(group)]
            family_mode = options.get("mode", mode)
            check_arguments(model, None, family_mode)
            rows += _fuse_family(model, family, groups, family_mode, device, fused, packer, restore)
    except BaseException:
        packer.give_all_back()
        undo_chains(model, fused, [])
        for step in reversed(restore):
            step()
        raise
    finally:
        for family, _ in chosen:
            family.forget()
    return FusionReport(rows)


@contextmanager
def _code_of(family: FusionFamily, method: str) -> Iterator[None]:
    """Errors in a family's own code say whose they are."""
    try:
        yield
    except Exception as error:
        raise FusionError(
            f"The family {family.name!r} failed in {method}: {text_of(error)}. The model is as it "
            f"was before the call."
        ) from error


def _groups(model: nn.Module, family: FusionFamily) -> list[Group]:
    groups: dict[tuple[int, ...], Group] = {}
    with _code_of(family, "groups"):
        for paths in family.groups(model):
            if len(paths) != len(family.roles):
                raise FusionError(
                    f"it has {len(family.roles)} roles and found a group of {len(paths)}, {paths}"
                )
            modules = tuple(model.get_submodule(path) for path in paths)
            groups.setdefault(tuple(map(id, modules)), Group(tuple(paths), modules))
    return list(groups.values())


def _filter(model: nn.Module, options: Mapping[str, Any]) -> Callable[[Group], bool]:
    """Whether a group is wanted: `include` and `exclude` name members, or modules around or in
    them."""
    chosen: dict[str, dict[str, nn.Module] | None] = {}
    for name in ("include", "exclude"):
        paths = options.get(name)
        paths = [paths] if isinstance(paths, str) else paths
        paths = list(paths) if isinstance(paths, (set, frozenset)) else paths
        chosen[name] = None if paths is None else find_modules(model, check_paths(paths))
    include, exclude = chosen["include"], chosen["exclude"] or {}

    def wanted(group: Group) -> bool:
        included = include is None or any(_meets(*place, group) for place in include.items())
        return included and not any(_meets(*place, group) for place in exclude.items())

    return wanted


def _meets(path: str, module: nn.Module, group: Group) -> bool:
    """Whether a module is a member of a group, around one, or in one."""
    return any(
        module is member or f"{known}.".startswith(f"{path}.") or path.startswith(f"{known}.")
        for known, member in zip(group.paths, group.modules, strict=True)
    )


def _fuse_family(
    model: nn.Module,
    family: FusionFamily,
    groups: Sequence[Group],
    mode: Mode | None,
    device: str | torch.device | None,
    fused: list[Found],
    packer: Packer,
    restore: list[Callable[[], None]],
) -> list[GroupReport]:
    """Fuse the groups of one family; adds what was fused to `fused`."""
    rows: list[GroupReport] = []
    fusable: dict[int, Group] = {}
    with code_read_once():
        for group in groups:
            end = id(group.modules[-1])
            reason = _why_untried(group, family.roles)
            if reason is None:
                with _code_of(family, "is_fusable"):
                    reason = family.is_fusable(group.modules)
            if reason is None and end in fusable:
                reason = f"{' -> '.join(fusable[end].paths)} ends in the same module"
            if reason is None:
                fusable[end] = group
            else:
                there = _row_of_fused(group, family, reason)
                rows.append(there or _skipped(family, group, reason))
    jobs = []
    for job in _plan(model, family, list(fusable.values()), rows):
        reason = None if job.is_fused else _why_other_inputs(job, family)
        if reason is None:
            jobs.append(job)
        else:
            rows.append(_skipped(family, job.group, reason))
    unpacked = _pack(family, jobs, packer)
    for job in jobs:
        if not job.is_fused and id(job) in unpacked:
            rows.append(_skipped(family, job.group, unpacked[id(job)]))
    jobs = [job for job in jobs if job.is_fused or id(job) not in unpacked]
    new = [job for job in jobs if not job.is_fused]
    # A kernel that is there already stays, such as one of the user's own, and looks at the
    # members as they are now.
    empty = [job for job in jobs if not (job.is_fused and job.chain.armed)]
    kept = [job for job in jobs if job not in empty]
    # All at once: what is around several chains is read where each of them is fused again.
    restore += read_again(jobs)
    with code_read_once():
        for job in kept:
            job.chain.seat._arm()  # type: ignore[union-attr]
    restored, failed = _apply(model, empty, family.kernel, mode, device)
    restore += restored
    fused += [job.found() for job in new if id(job) not in failed]
    done = []
    # Where weights could not be packed again, the members run.
    running = [job for job in jobs if id(job) not in failed and id(job) not in unpacked]
    reasons, refused = _compare(running, family)
    for job in jobs:
        reason = failed.get(id(job)) or reasons.get(id(job))
        if id(job) in failed and job in new:
            packer.give_back(job.chain)
            rows.append(_skipped(family, job.group, reason or ""))
        elif reason is not None and job in new:
            found = job.found()
            packer.give_back(job.chain)
            undo_chains(model, [found], [])
            fused.remove(found)
            rows.append(_skipped(family, job.group, reason))
        elif reason is not None and id(job) in refused:
            restore.append(restorer_of_kernel(job.chain))
            job.chain.take_kernel_out(reason)
            done.append(row_of(job.found(), "already fused"))
        else:
            row = row_of(job.found(), "fused" if job in new else "already fused")
            done.append(row._replace(reason=unpacked.get(id(job), reason or row.reason)))
    return done + rows


def _row_of_fused(group: Group, family: FusionFamily, reason: str) -> GroupReport | None:
    """The row of a group that is refused and was fused before; None where it was not.

    A kernel that refuses the members itself, as they are now, does not run from here on. Another
    kernel of that name stays.
    """
    last = group.modules[-1]
    state = state_of(last)
    if state is None or state.chain is None or state.chain.kernel != family.kernel:
        return None
    if list(map(id, state.chain.collectors)) != list(map(id, group.modules[:-1])):
        return None
    if state.chain.armed:
        state.chain.seat._arm()
    return row_of(Found(state.chain, last, state, group.paths), "already fused")._replace(
        reason=reason
    )


def _apply(
    model: nn.Module,
    jobs: Sequence[Job],
    kernel: str,
    mode: Mode | None,
    device: str | torch.device | None,
) -> tuple[list[Callable[[], None]], dict[int, str]]:
    """Fuse what can be fused: all at once, or else one by one.

    Returns:
        How to give the kernels back that were there before, and why the others failed, by id.
    """
    try:
        return apply_jobs(model, jobs, kernel, mode, device, use_fallback=True), {}
    except (NotFusableError, AlreadyFusedError):
        pass
    restore: list[Callable[[], None]] = []
    failed: dict[int, str] = {}
    applied: list[Job] = []
    # A kernel that does not load may take long to say so, and says the same for equal groups.
    missing: dict[Any, str] = {}
    for job in jobs:
        wanted = (str(job.chain.plan.signature), *_devices_of(job.group))
        if wanted in missing:
            failed[id(job)] = missing[wanted]
            continue
        try:
            check_no_overlap([*(other for other in applied if not other.is_fused), job])
            restore += apply_jobs(model, [job], kernel, mode, device, use_fallback=True)
            applied.append(job)
        except NotFusableError as error:
            failed[id(job)] = error.reason or str(error)
            if not error.was_loaded:
                missing[wanted] = failed[id(job)]
        except AlreadyFusedError as error:
            failed[id(job)] = str(error)
    return restore, failed


def _devices_of(group: Group) -> list[str]:
    return sorted({str(p.device) for member in group.modules for p in member.parameters()})


def _pack(family: FusionFamily, jobs: Sequence[Job], packer: Packer) -> dict[int, str]:
    """Pack the weights as the kernel wants them; reasons for those that cannot be."""
    reasons = {}
    for job in jobs:
        reason = packer.pack(job.chain, job.group.modules, family.layouts)
        if reason is not None:
            reasons[id(job)] = reason
    return reasons


def _plan(
    model: nn.Module, family: FusionFamily, groups: list[Group], rows: list[GroupReport]
) -> list[Job]:
    """Plan the groups; those that cannot be fused become rows."""
    if not groups:
        return []
    try:
        return make_jobs(model, groups, family.roles, None, family.kernel)
    except FusionError as error:
        if len(groups) == 1:
            rows.append(_skipped(family, groups[0], str(error)))
            return []
    half = len(groups) // 2
    first = _plan(model, family, groups[:half], rows)
    return first + _plan(model, family, groups[half:], rows)


def _why_untried(group: Group, roles: Sequence[str]) -> str | None:
    """What keeps the members from being run as a trial, None if nothing does.

    Nothing is tried that draws random numbers, or writes somewhere, when it runs.
    """
    if "" in group.paths:
        return "the model itself cannot be a member: fuse a module around it"
    if has_global_hooks():
        return "a global module hook is registered"
    if len(devices := _devices_of(group)) > 1 and "meta" not in devices:
        return f"the weights are on several devices: {', '.join(devices)}"
    for role, member in zip(roles, group.modules, strict=True):
        foreign = why_foreign(member)
        if foreign is not None:
            return role + foreign
        for where, reach in Reach(member, original_class(member)).all(role):
            part, effect = reach.places[()].module, effect_of(reach)
            if effect is not None and effect.happens(part):
                return f"{where} {effect.what}"
            for key, tensor in (*part._parameters.items(), *part._buffers.items()):
                if tensor is not None and tensor.is_meta:
                    return f"{where}.{key} is on the meta device: load the weights, then fuse"
    return None


def _why_other_inputs(job: Job, family: FusionFamily) -> str | None:
    """Why the kernel cannot have the inputs of a chain, None if it can."""
    for role, member in zip(family.roles, job.chain.plan.members, strict=True):
        for name, source in zip(member.parameters, member.sources, strict=True):
            if isinstance(source, External) and source.position >= (family.inputs or math.inf):
                return f"{role} takes another input, {name!r}"
    return None


def _compare(
    jobs: Sequence[Job], family: FusionFamily
) -> tuple[dict[int, str | None], dict[int, Certificate]]:
    """For each job, by id, why its group must not stay fused, None if it may.

    The certificates are of those of which the kernel differs from the members.
    """
    certificates = Certificates()
    refused: dict[int, Certificate] = {}
    try:
        return {id(job): _why_not(job, family, certificates, refused) for job in jobs}, refused
    finally:
        forget_prepared(jobs)


def _why_not(
    job: Job,
    family: FusionFamily,
    certificates: Certificates,
    refused: dict[int, Certificate],
) -> str | None:
    """Why a group that was fused must not stay so, None if it may."""
    chain = job.chain
    if not chain.armed:
        return chain.why_not_running()
    members = job.group.modules
    for role, member in zip(family.roles, members, strict=True):
        state = state_of(member)
        assert state is not None
        assert state.form is not None
        reason = state.form.why_not_plain(member, role, [])
        if reason is not None:
            return reason

    def samples() -> Samples:
        with _code_of(family, "samples"):
            return family.samples(members, seeded())

    certificate = certificates.of(chain, members, samples)
    chain.family = family.name
    if certificate is None:
        return None
    chain.accuracy = certificate.ratio
    if certificate.refusal is not None:
        refused[id(job)] = certificate
    return certificate.refusal


def _skipped(family: FusionFamily, group: Group, reason: str) -> GroupReport:
    return GroupReport(
        "skipped",
        paths=tuple(path or "(the module itself)" for path in group.paths),
        roles=family.roles,
        classes=tuple(original_class(module).__name__ for module in group.modules),
        kernel=family.kernel,
        reason=reason,
        family=family.name,
    )
