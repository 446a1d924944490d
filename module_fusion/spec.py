"""`ModuleSpec` and the wiring plan made from it.

A chain is a straight program: members run in order, and each input of a member is
either the latest earlier output of that name or a value from outside, captured at that
member's own call. The plan is that program with all names resolved; it knows parameter
names and positions and no modules, so that one plan serves every repeated block.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any, NamedTuple

from torch import nn

from .errors import SpecMismatchError

UNWIRED = "_"
_VALUES = (bool, int, float, complex, str, bytes, tuple)
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, init=False)
class ModuleSpec:
    """Names the inputs and outputs of one member of a chain.

    Args:
        inputs: a name for each positional parameter of the member's `forward`, in order.
            Optional parameters at the end may be left out and keep their defaults. A
            keyword-only parameter is named by its own name.
        outputs: a name for each value `forward` returns: one name for a single value, more
            for a tuple of that length.

    `"_"` stands for one that is not wired: an input that never takes an earlier output, an
    output that no later member uses.

    Examples:
        >>> ModuleSpec(inputs=["hidden_states"], outputs=["normed"])
        ModuleSpec(inputs=('hidden_states',), outputs=('normed',))
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, inputs: Sequence[str], outputs: Sequence[str] = (UNWIRED,)) -> None:
        object.__setattr__(self, "inputs", _names("inputs", inputs))
        object.__setattr__(self, "outputs", _names("outputs", outputs))
        if not self.outputs:
            raise SpecMismatchError(
                "ModuleSpec.outputs is empty: a member returns a value; use ['_']."
            )


class Wire(NamedTuple):
    """An input fed by output `output` of member `member`, which returns `arity` values."""

    member: int
    output: int
    arity: int


class External(NamedTuple):
    """An input taken from outside the chain, by its position in the chain's signature."""

    position: int


@dataclass(frozen=True)
class MemberPlan:
    """How one member's `forward` parameters are fed.

    `sources` has an entry for each name in `parameters`, `None` where the parameter is left
    out of the chain. `positional` counts the parameters a caller may pass by position, and
    `positional_only` those that he cannot pass by name. `only` is the source of a member whose
    first parameter is its only input: nearly all of them.
    """

    parameters: tuple[str, ...]
    positional: int
    positional_only: int
    sources: tuple[Wire | External | None, ...]
    defaults: tuple[Any, ...]
    outputs: int
    only: Wire | External | None = None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | str:
        """Values by parameter, `Parameter.empty` where not passed, or the name not in the plan."""
        if len(args) > self.positional:
            return f"positional argument {self.positional}"
        values: list[Any] = list(args) + [Parameter.empty] * (len(self.parameters) - len(args))
        for name, value in kwargs.items():
            if name not in self.parameters:
                return name
            position = self.parameters.index(name)
            if position < max(len(args), self.positional_only):
                return name
            values[position] = value
        return values

    def takes(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the call names parameters only, and leaves out none that it needs."""
        values = self.bind(args, kwargs)
        if isinstance(values, str):
            return False
        for value, default in zip(values, self.defaults, strict=True):
            if value is Parameter.empty and default is Parameter.empty:
                return False
        return True


@dataclass(frozen=True)
class Plan:
    """The wiring of one chain, and the signature its kernel has.

    `is_straight` where every member has one input and one output, which feeds the next one.
    """

    members: tuple[MemberPlan, ...]
    signature: Signature
    inputs: int
    is_straight: bool


def infer_specs(forwards: Sequence[Signature]) -> list[ModuleSpec]:
    """Specs for members that feed each other straight on.

    Each member has one output, which is the next member's first input; every other named
    parameter comes from outside under its own name. Where an earlier member has a parameter
    of that name with another default, the member's position is added to the name.
    """
    specs: list[ModuleSpec] = []
    defaults: dict[str, Any] = {}
    produced: set[str] = set()
    for index, signature in enumerate(forwards):
        inputs: list[str] = []
        for name, parameter in _named(signature).items():
            if index > 0 and not inputs:
                inputs.append(name)
                continue
            default = parameter.default
            known = defaults.get(name, Parameter.empty)
            if Parameter.empty not in (default, known) and not _same_default(default, known):
                name = f"{name}_{index}"
            defaults.setdefault(name, default)
            inputs.append(UNWIRED if name in produced else name)
        following = forwards[index + 1] if index + 1 < len(forwards) else None
        output = next(iter(_named(following)), "input") if following else UNWIRED
        produced.add(output)
        variadic = any(p.kind is Parameter.VAR_POSITIONAL for p in signature.parameters.values())
        specs.append(ModuleSpec(inputs or (["input"] if variadic or index else []), [output]))
    return specs


def make_plan(
    forwards: Sequence[Signature], specs: Sequence[ModuleSpec], paths: Sequence[str]
) -> Plan:
    """Resolve the names of the specs into a plan.

    Raises:
        SpecMismatchError: the specs do not fit the signatures or each other.
    """
    latest: dict[str, Wire] = {}
    externals: dict[str, Parameter] = {}
    resolved = []
    for index, (signature, spec, path) in enumerate(zip(forwards, specs, paths, strict=True)):
        parameters = _assign(signature, spec, path)
        if index > 0:
            _check_not_produced_later(spec, specs, index, {*latest, *externals}, paths)
        sources: dict[str, Wire | str] = {}
        for name, parameter in parameters:
            if name != UNWIRED and name in latest:
                sources[parameter.name] = latest[name]
                continue
            if name == UNWIRED and parameter.name in spec.inputs and parameter.name not in latest:
                raise SpecMismatchError(
                    f"The parameter {parameter.name!r} of {path!r} is not wired, so it comes from "
                    f"outside under its own name, but the spec gives that name to another input. "
                    f"Give one of them another name."
                )
            name = parameter.name if name == UNWIRED else name
            _add_external(externals, name, parameter, path)
            sources[parameter.name] = name
        resolved.append((signature, spec, sources))
        for position, name in enumerate(spec.outputs):
            if name != UNWIRED:
                latest[name] = Wire(index, position, len(spec.outputs))

    ordered = sorted(externals.values(), key=lambda p: p.default is not Parameter.empty)
    index_of = {parameter.name: External(i) for i, parameter in enumerate(ordered)}
    members = tuple(
        _member_plan(signature, spec, sources, index_of) for signature, spec, sources in resolved
    )
    _check_all_used(members, specs, paths)
    straight = (External(0), *(Wire(index, 0, 1) for index in range(len(members) - 1)))
    is_straight = tuple(member.only for member in members) == straight
    return Plan(members, Signature(ordered), len(ordered), is_straight)


def forward_signature(cls: type[nn.Module]) -> Signature:
    """Signature of the class's `forward`, without `self`."""
    parameters = list(inspect.signature(cls.forward).parameters.values())
    return Signature(parameters[1:])


def check_name(name: object, what: str) -> str:
    """A name that can stand in a signature, or an error."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise SpecMismatchError(f"{what} must be a Python identifier, not {name!r}.")
    return name


def _names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise SpecMismatchError(f"ModuleSpec.{what} is a list of names, not {names!r}.")
    if what == "inputs" and "self" in names:
        raise SpecMismatchError(
            "ModuleSpec.inputs has 'self', which the forward of a kernel has already. Give the "
            "input another name."
        )
    named = [check_name(name, f"A name in ModuleSpec.{what}") for name in names if name != UNWIRED]
    twice = {name for name in named if named.count(name) > 1}
    if twice:
        raise SpecMismatchError(
            f"ModuleSpec.{what} has {', '.join(map(repr, sorted(twice)))} twice: names must be "
            f"unambiguous."
        )
    return tuple(names)


def _named(signature: Signature) -> dict[str, Parameter]:
    variadic = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {name: p for name, p in signature.parameters.items() if p.kind not in variadic}


def _assign(signature: Signature, spec: ModuleSpec, path: str) -> list[tuple[str, Parameter]]:
    """Pair the names of a spec with the parameters they stand for."""
    named = _named(signature)
    positional = [p for p in named.values() if p.kind in _POSITIONAL]
    keyword_only = {name: p for name, p in named.items() if p.kind is Parameter.KEYWORD_ONLY}
    variadic = any(p.kind is Parameter.VAR_POSITIONAL for p in signature.parameters.values())
    assigned = []
    for name in spec.inputs:
        if name in keyword_only:
            assigned.append((name, keyword_only.pop(name)))
        elif positional:
            assigned.append((name, positional.pop(0)))
        elif variadic:
            free = name
            while free == UNWIRED or free in named or free in {p.name for _, p in assigned}:
                free += "_"
            assigned.append((name, Parameter(free, Parameter.POSITIONAL_ONLY)))
        else:
            raise SpecMismatchError(
                f"The spec of {path!r} names {len(spec.inputs)} inputs, {list(spec.inputs)}, but "
                f"its forward takes {signature}. Name at most its parameters, in order."
            )
    required = [
        p.name for p in (*positional, *keyword_only.values()) if p.default is Parameter.empty
    ]
    if required:
        raise SpecMismatchError(
            f"The spec of {path!r} leaves out {', '.join(map(repr, required))}, which its forward "
            f"{signature} requires. Only parameters with a default can be left out."
        )
    return assigned


def _check_not_produced_later(
    spec: ModuleSpec,
    specs: Sequence[ModuleSpec],
    index: int,
    known: Container[str],
    paths: Sequence[str],
) -> None:
    for name in spec.inputs:
        if name == UNWIRED or name in known:
            continue
        for later in range(index + 1, len(specs)):
            if name in specs[later].outputs:
                raise SpecMismatchError(
                    f"Input {name!r} of {paths[index]!r} is produced only later, by "
                    f"{paths[later]!r}. List the paths in the order in which the modules run, or "
                    f"name the input otherwise if it comes from outside."
                )


def _add_external(
    externals: dict[str, Parameter], name: str, parameter: Parameter, path: str
) -> None:
    known = externals.get(name)
    if known is None:
        externals[name] = Parameter(
            name, Parameter.POSITIONAL_OR_KEYWORD, default=parameter.default
        )
    elif parameter.default is Parameter.empty or known.default is Parameter.empty:
        externals[name] = known.replace(default=Parameter.empty)
    elif not _same_default(known.default, parameter.default):
        raise SpecMismatchError(
            f"Input {name!r} comes from outside with default {known.default!r} for an earlier "
            f"member and {parameter.default!r} for {path!r}. Give one of them another name: "
            f"specs=[ModuleSpec(inputs=[..], outputs=[..]), ..]."
        )


def _same_default(first: Any, second: Any) -> bool:
    """Whether two defaults are the same value; an array compares by identity."""
    if first is second:
        return True
    return type(first) is type(second) and type(first) in _VALUES and bool(first == second)


def _member_plan(
    signature: Signature,
    spec: ModuleSpec,
    sources: Mapping[str, Wire | str],
    index_of: Mapping[str, External],
) -> MemberPlan:
    named = _named(signature)
    extra = [name for name in sources if name not in named]
    positional = [name for name, p in named.items() if p.kind in _POSITIONAL] + extra
    parameters = positional + [name for name in named if name not in positional]
    resolved = [sources.get(name) for name in parameters]
    final = tuple(index_of[s] if isinstance(s, str) else s for s in resolved)
    straight = bool(positional) and final.count(None) == len(final) - 1
    return MemberPlan(
        parameters=tuple(parameters),
        positional=len(positional),
        positional_only=sum(
            name not in named or named[name].kind is Parameter.POSITIONAL_ONLY
            for name in positional
        ),
        sources=final,
        defaults=tuple(
            named[name].default if name in named else Parameter.empty for name in parameters
        ),
        outputs=len(spec.outputs),
        only=final[0] if straight else None,
    )


def _check_all_used(
    members: Sequence[MemberPlan], specs: Sequence[ModuleSpec], paths: Sequence[str]
) -> None:
    used = {source.member for m in members for source in m.sources if isinstance(source, Wire)}
    for index in range(len(members) - 1):
        if index not in used:
            _check_not_produced_later(specs[index], specs, index, (), paths)
            raise SpecMismatchError(
                f"No later member takes an output of {paths[index]!r}. Give the output and the "
                f"input it feeds the same name: specs=[ModuleSpec(inputs=[..], outputs=[..]), ..]."
            )
