"""`fuse`: find the groups of every family, check them, and fuse those that pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from kernels import Mode
from torch import nn

from ..context import has_global_hooks
from ..effects import code_read_once, effect_of
from ..errors import FusionError
from ..inventory import Found, row_of
from ..modules import original_class, state_of
from ..paths import Group, check_paths, find_modules
from ..planning import Job, make_jobs
from ..report import FusionReport, GroupReport
from ..surgery import apply_jobs, check_arguments, set_holders, undo_chains
from .certificate import Certificates, seeded
from .family import FusionFamily, chosen_families
from .layout import Packer


def fuse(
    model: nn.Module,
    families: bool | Mapping[str, Any] = True,
    *,
    mode: Mode | None = None,
    device: str | torch.device | None = None,
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

    Returns:
        What was fused, with the kernel's error in units of the members', and what was left.

    Raises:
        NotFusableError: there is no family of that name. The model is as it was.
        PathNotFoundError: a path in `include` or `exclude` matches nothing.

    Example:
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
    rows: list[GroupReport] = []
    fused: list[Found] = []
    packer = Packer(model)
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
        for step in restore:
            step()
        raise
    finally:
        for family, _ in chosen:
            family.forget()
    return FusionReport(rows)


def _groups(model: nn.Module, family: FusionFamily) -> Iterator[Group]:
    seen = set()
    for paths in family.groups(model):
        if len(paths) != len(family.roles):
            raise FusionError(
                f"The family {family.name!r} has {len(family.roles)} roles and found a group of "
                f"{len(paths)}, {paths}."
            )
        modules = tuple(model.get_submodule(path) for path in paths)
        if tuple(map(id, modules)) not in seen:
            seen.add(tuple(map(id, modules)))
            yield Group(tuple(paths), modules)


def _filter(model: nn.Module, options: Mapping[str, Any]) -> Callable[[Group], bool]:
    """Whether a group is wanted: `include` and `exclude` name members, or modules around or in
    them."""
    chosen: dict[str, dict[str, nn.Module] | None] = {}
    for name in ("include", "exclude"):
        paths = options.get(name)
        paths = [paths] if isinstance(paths, str) else paths
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
    certificates = Certificates()
    fusable: dict[int, Group] = {}
    with code_read_once():
        for group in groups:
            end = id(group.modules[-1])
            # Nothing is probed that draws random numbers, or writes somewhere, when it runs.
            reason = _effect_in(group, family.roles) or family.is_fusable(group.modules)
            if reason is None and end in fusable:
                reason = f"{' -> '.join(fusable[end].paths)} ends in the same module"
            if reason is None:
                fusable[end] = group
            else:
                rows.append(_skipped(family, group, reason))
    jobs = _plan(model, family, list(fusable.values()), rows)
    unpacked = _pack(family, jobs, packer)
    for job in jobs:
        if not job.is_fused and id(job) in unpacked:
            rows.append(_skipped(family, job.group, unpacked[id(job)]))
    jobs = [job for job in jobs if job.is_fused or id(job) not in unpacked]
    new = [job for job in jobs if not job.is_fused]
    # A kernel that is there already stays, such as one of the user's own, and looks at the
    # members as they are now.
    empty = [job for job in jobs if not (job.is_fused and job.chain.armed)]
    for job in jobs:
        if job not in empty:
            job.chain.seat._arm()  # type: ignore[union-attr]
            set_holders(job)
    restore += apply_jobs(model, empty, family.kernel, mode, device, use_fallback=True)
    fused += [job.found() for job in new]
    done = []
    for job in jobs:
        reason = _why_not(job, family, certificates)
        if reason is not None and job in new:
            found = job.found()
            packer.give_back(job.chain)
            undo_chains(model, [found], [])
            fused.remove(found)
            rows.append(_skipped(family, job.group, reason))
        else:
            row = row_of(job.found(), "fused" if job in new else "already fused")
            done.append(row._replace(reason=unpacked.get(id(job), reason or row.reason)))
    return done + rows


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


def _effect_in(group: Group, roles: Sequence[str]) -> str | None:
    """What keeps the members from being run as a trial, None if nothing does."""
    if has_global_hooks():
        return "a global module hook is registered"
    for role, member in zip(roles, group.modules, strict=True):
        for name, part in nn.Module.named_modules(member):  # Not the seat.
            effect = effect_of(part, original_class(part))
            if effect is not None and effect.happens(part):
                return f"{role}{'.' if name else ''}{name} {effect.what}"
    return None


def _why_not(job: Job, family: FusionFamily, certificates: Certificates) -> str | None:
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
    certificate = certificates.of(chain, members, lambda: family.samples(members, seeded()))
    chain.family = family.name
    if certificate is None:
        return None
    chain.accuracy = certificate.ratio
    return certificate.refusal


def _skipped(family: FusionFamily, group: Group, reason: str) -> GroupReport:
    return GroupReport(
        "skipped",
        paths=group.paths,
        roles=family.roles,
        classes=tuple(original_class(module).__name__ for module in group.modules),
        kernel=family.kernel,
        reason=reason,
        family=family.name,
    )
