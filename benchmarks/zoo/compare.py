"""What the unfused model gives, and comparing with it to the bit."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from structure import plain_values, structure
from torch import Tensor, nn

from module_fusion import FusionError

from .build import Built, random_state, run, seed
from .flat import flat, gradients_of, is_floating, relative_error, same_bits, same_kind

FAR = 1e-2  # From here on a float64 twin computed something else, with other random numbers say.


class Fault(Exception):
    """Something that must not happen; the message says what."""


class NotComparable(Exception):
    """The unfused model gives nothing to compare with; the message says why."""


class Exact(NamedTuple):
    """What a twin in float64 gives.

    Attributes:
        noise: the largest error of the gradient of each parameter, absolute.
    """

    outputs: list[Any]
    noise: dict[str, float]


class Backward(NamedTuple):
    """What a run with gradients gives, and the random state after it."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    drawn: Any


@dataclasses.dataclass
class Expected:
    """What the unfused model gives.

    Attributes:
        values: the plain attributes that no run of it changes.
        drawn: the random state after a run, None if it is another each time.
        drawn_with_grad: after a run with gradients.
        with_inputs: a run that has gradients of its floating inputs too, None if there is none.
    """

    built: Built
    outputs: list[Any]
    with_grad: list[Any]
    gradients: dict[str, Tensor | None] | None
    why_no_gradients: str | None
    state: dict[str, Tensor]
    structure: Any
    values: dict[tuple[str, str], str]
    drawn: Any = None
    drawn_with_grad: Any = None
    with_inputs: Backward | None = None

    def backward(self, of_inputs: bool) -> Backward | None:
        """What a run with gradients gave, None if there is no such run."""
        if of_inputs:
            return self.with_inputs
        if self.gradients is None:
            return None
        return Backward(self.with_grad, self.gradients, self.drawn_with_grad)

    @cached_property
    def exact(self) -> Exact | None:
        """What a twin in float64 gives, None if it does not run; the model must be unfused."""
        try:
            twin = in_float64(self.built)
            outputs = flat(run(twin.model, twin.inputs))
            is_near = relative_error(self.outputs, outputs) < FAR
        except FusionError:
            raise  # There is nothing fused in it.
        except Exception:
            return None
        if not is_near:
            return None
        backward = self.with_inputs or self.backward(False)
        gradients = {} if backward is None else backward.gradients
        return Exact(outputs, _noise(twin, gradients, self.with_inputs is not None))

    def exact_outputs(self) -> list[Any] | None:
        return None if self.exact is None else self.exact.outputs


def in_float64(built: Built) -> Built:
    """A twin in float64."""
    inputs = {
        name: value.double() if is_floating(value) else value
        for name, value in built.inputs.items()
    }
    return Built(copy.deepcopy(built.model).double(), inputs, built.shrunk)


def _noise(
    twin: Built, gradients: dict[str, Tensor | None], of_inputs: bool = False
) -> dict[str, float]:
    if not gradients:
        return {}
    seed()
    try:
        _, exact = gradients_of(twin.model, twin.inputs, of_inputs)
    except FusionError:
        raise
    except Exception:
        return {}
    found: dict[str, float] = {}
    for name, gradient in gradients.items():
        truth = exact[name]
        if gradient is not None and truth is not None and gradient.numel():
            error = float((gradient - truth).abs().max())
            if math.isfinite(error):
                found[name] = error
    return found


def expectation(built: Built) -> Expected:
    """Run the unfused model.

    Raises:
        NotComparable: it does not run again, or gives other bits each time.
    """
    model, inputs = built.model, built.inputs
    try:
        outputs = flat(run(model, inputs))
        drawn, before = random_state(), plain_values(model)
        again = flat(run(model, inputs))
    except Exception as error:
        raise NotComparable(f"a further run of the unfused model: {told(error)}") from error
    if not same_bits(again, outputs):
        raise NotComparable("two runs of the unfused model differ")
    drawn = drawn if drawn == random_state() else None
    backward, why = _backward(built, of_inputs=False)
    with_inputs = None
    if any(map(is_floating, inputs.values())):
        with_inputs, _ = _backward(built, of_inputs=True)
    model.zero_grad(set_to_none=True)
    state = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    gradients = backward or Backward(outputs, {}, None)
    return Expected(
        built, outputs, gradients.outputs, backward and backward.gradients, why, state,
        structure(model), kept_values(model, before), drawn, gradients.drawn, with_inputs,
    )  # fmt: skip


def _backward(built: Built, of_inputs: bool) -> tuple[Backward | None, str | None]:
    """A run with gradients of the unfused model; or None and why there is none."""
    runs = []
    try:
        for _ in range(2):
            seed()
            found = gradients_of(built.model, built.inputs, of_inputs)
            runs.append(Backward(*found, random_state()))
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[:150]}"
    first, again = runs
    if not same_bits([*again.gradients.values()], [*first.gradients.values()]):
        return None, "two backward passes of the unfused model differ"
    return first._replace(drawn=first.drawn if first.drawn == again.drawn else None), None


def kept_values(model: nn.Module, before: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """The plain attributes that runs of the unfused model have not changed since."""
    now = plain_values(model)
    return {where: value for where, value in before.items() if now.get(where) == value}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def told(error: Exception) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {str(error)[:300]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether only the machine was too small."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


@contextmanager
def noted(what: str, result: dict[str, Any]) -> Iterator[None]:
    """Whatever is raised inside is a fault in the result, unless the memory did not suffice."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            result.setdefault("out_of_memory", []).append(what)
        else:
            result["faults"].append({"what": what, "fault": told(error)})


def check_untouched(expected: Expected, what: str) -> None:
    """Modules and state dict are what they were.

    Raises:
        Fault: they are not.
    """
    model = expected.built.model
    if structure(model) != expected.structure:
        raise Fault(f"after {what} the model is not as it was")
    now = plain_values(model)
    for where, value in expected.values.items():
        if now.get(where) != value:
            path = ".".join(filter(None, where))
            raise Fault(f"after {what} {path} is {now.get(where)}, it was {value}")
    check_state(expected, f"after {what} the state dict is not as it was")


def check_state(expected: Expected, fault: str) -> None:
    """The state dict is what it was; if not, a `Fault` with this text."""
    state = tensors_of(expected.built.model)
    names_differ = list(state) != list(expected.state)
    if names_differ or not same_bits([*state.values()], [*expected.state.values()]):
        raise Fault(fault)


def check_drawn(expected: Any, how: str) -> None:
    """As many random numbers were drawn since `seed` as by the unfused model.

    Args:
        expected: the random state after a run of it, None if it is another each time.
        how: the model was fused, for the fault.

    Raises:
        Fault: more, or fewer.
    """
    if expected is not None and random_state() != expected:
        raise Fault(f"other random numbers were drawn {how}")


def check_outputs(found: list[Any], expected: list[Any], how: str) -> None:
    """Two lists of `flat` are the same to the bit.

    Raises:
        Fault: they are not.
    """
    if not same_bits(found, expected):
        raise Fault(f"outputs differ {how}: {_distance(found, expected)}")


def _distance(found: list[Any], expected: list[Any]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} values for {len(expected)}"
    for ours, theirs in zip(found, expected, strict=True):
        if not same_bits([ours], [theirs]):
            if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
                return f"{str(ours)[:50]} for {str(theirs)[:50]}"
            if not same_kind(ours, theirs):
                return f"{kind_of(ours)} for {kind_of(theirs)}"
            if ours.stride() != theirs.stride():
                return f"strides {ours.stride()} for {theirs.stride()}"
            return f"relative error {relative_error([ours], [theirs]):.1e}"
    return "not at all"


def kind_of(tensor: Tensor) -> str:
    requires = ", requires grad" if tensor.requires_grad else ""
    return f"{type(tensor).__name__} {tuple(tensor.shape)} of {tensor.dtype}{requires}"


def check_alike(found: list[Any], expected: list[Any], how: str) -> None:
    """Two lists of `flat` differ in nothing but the values of real numbers.

    Raises:
        Fault: they do.
    """
    if len(found) != len(expected):
        raise Fault(f"outputs differ {how}: {_distance(found, expected)}")
    for ours, theirs in zip(found, expected, strict=True):
        if _is_real(ours) and _is_real(theirs):
            alike = same_kind(ours, theirs)
        elif isinstance(ours, float) and isinstance(theirs, float):
            alike = math.isclose(ours, theirs, rel_tol=1e-3) or same_bits([ours], [theirs])
        else:
            alike = same_bits([ours], [theirs])
        if not alike:
            raise Fault(f"outputs differ {how}: {_distance([ours], [theirs])}")


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
