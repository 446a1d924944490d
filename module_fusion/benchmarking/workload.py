"""The call that `benchmark` times: what is called, on what, and how many tokens it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import FusionError
from ..verifying.structures import (
    computable,
    fresh,
    has_numbers,
    is_plain,
    modules_given,
    tensors_in,
)

# Two calls may sum in another order on a GPU; what a call computes with a longer cache is further.
_ROUNDING = 1e-3


class Inputs(NamedTuple):
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Workload:
    """One call of a model's method, with its backward or without.

    Raises:
        FusionError: the model has no such method, or cannot run its backward here.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        backward: bool,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        if not callable(getattr(model, method, None)):
            raise FusionError(
                f"{type(model).__name__} has no method {method!r}: method is 'forward' or the "
                f"name of another, such as 'generate'."
            )
        if backward:
            _check_backward(model)
        self.method = method
        self.backward = backward
        self.inputs = Inputs(args, dict(kwargs))
        self.tensors = tensors_in(self.inputs)
        self.modules = modules_given(self.inputs)
        self._encoder_decoder = bool(
            getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        )

    def fresh(self) -> Inputs:
        """A copy of the inputs that a call may change; modules in them stay the same."""
        return fresh(self.inputs)  # type: ignore[no-any-return]

    def bound_to(self, module: nn.Module) -> Callable[[Inputs], Any]:
        """The call, on a module in the classes it has now."""
        target = module if self.method == "forward" else getattr(module, self.method)
        if not self.backward:
            return lambda inputs: target(*inputs.args, **inputs.kwargs)

        def forward_and_backward(inputs: Inputs) -> Any:
            output = target(*inputs.args, **inputs.kwargs)
            _loss(output).backward()  # type: ignore[no-untyped-call]
            return output

        return forward_and_backward

    def tokens(self, output: Any) -> int | None:
        """Tokens that one call reads, or that `generate` writes, padding counted too."""
        prompt = self._token_ids()
        if self.method != "generate":
            return None if prompt is None else prompt.numel()
        written = getattr(output, "sequences", output)
        if not _is_token_ids(written):
            return None
        starts: list[Tensor]
        if self._encoder_decoder:
            given = self.inputs.kwargs.get("decoder_input_ids")
            # The token that decoders start with stands before what is given, if it does not yet.
            starts = [given, _behind_one(given)] if _is_token_ids(given) else [written[:, :1]]
        elif "inputs_embeds" in self.inputs.kwargs:
            starts = []
        elif prompt is None:
            return None
        else:
            starts = [prompt]
        return int(len(written) * (written.shape[1] - _width_of_start(written, starts)))

    def _token_ids(self) -> Tensor | None:
        args, kwargs = self.inputs
        named = kwargs.get("input_ids", kwargs.get("inputs"))
        found = named if named is not None else args[0] if args else None
        return found if _is_token_ids(found) else None


def sizes_of(output: Any) -> list[tuple[Any, float]]:
    """The shape of every tensor and the sum of its absolute values: what is left of an output.

    The sum is 0.0 where a tensor has none.
    """
    return [(_shape_of(tensor), _sum_of(tensor)) for tensor in tensors_in(output)]


def are_alike(ours: Sequence[tuple[Any, float]], theirs: Sequence[tuple[Any, float]]) -> bool:
    """Whether two outputs have the same shapes and, but for rounding, the same sums."""
    return [shape for shape, _ in ours] == [shape for shape, _ in theirs] and all(
        math.isclose(a, b, rel_tol=_ROUNDING) or (math.isnan(a) and math.isnan(b))
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )


def _shape_of(tensor: Tensor) -> Any:
    return (tensor.layout, None if tensor.is_nested else tuple(tensor.shape))


def _sum_of(tensor: Tensor) -> float:
    if not is_plain(tensor) or tensor.is_meta or not has_numbers(tensor.dtype):
        return 0.0
    values = tensor.detach()
    has_norm = values.is_floating_point() or values.is_complex()
    values = computable(values) if has_norm else values.double()
    dtype = torch.complex128 if values.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(values, 1, dtype=dtype))


def _is_token_ids(value: Any) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.dim() == 2
        and value.dtype in (torch.int32, torch.int64)
        and math.prod(value.shape) > 0
    )


def _behind_one(ids: Tensor) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], -1), ids], 1)


def _width_of_start(written: Tensor, starts: Sequence[Tensor]) -> int:
    """How much of every row was given: the widest start that all rows have; -1 is any token."""
    fitting = [0]
    for start in starts:
        width = start.shape[1]
        if len(written) % len(start) == 0 and width <= written.shape[1]:
            rows = start.to(written.device).repeat_interleave(len(written) // len(start), 0)
            if bool(((written[:, :width] == rows) | (rows == -1)).all()):
                fitting.append(width)
    return max(fitting)


def _loss(output: Any) -> Tensor:
    """The output's loss, or the sum of its floating tensors."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        return loss.sum()
    found = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not found:
        raise FusionError(
            "backward=True, but no output needs a gradient: no parameter and no input does, or "
            "the method runs without gradients, as generate does."
        )
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
    return sum(tensor.sum() for tensor in real)  # type: ignore[return-value]


def _check_backward(model: nn.Module) -> None:
    if torch.is_inference_mode_enabled():
        raise FusionError("backward=True cannot run in torch.inference_mode: leave it first.")
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise FusionError(
                f"{name!r} has a hook that runs once its gradient is there, and may step an "
                f"optimizer, so backward=True could train the model: remove the hook, or leave "
                f"backward out."
            )
