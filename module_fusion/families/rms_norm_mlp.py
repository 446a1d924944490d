"""RMSNorm followed by a gated MLP, as in Llama, Qwen, Gemma, Mistral and Phi-3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..modules import original_class
from ..spec import forward_signature
from .dataflow import feeding_pairs, forget_sources
from .family import FusionFamily, register_family

_SCALES = (1.0, 30.0, 1e-3, 3e3)
_TOKENS = 16
_LARGEST_EPS = 1e-2  # What keeps a norm from a division by zero is no larger.
_LEADING: list[tuple[int, ...]]
_LEADING = [(), (8, 9), (2, 3, 4), (1,), (1, 1), (1, 5), (2, 1)]


@register_family
class RMSNormMLPFamily(FusionFamily):
    """Whatever is normalised and then multiplied by several matrices.

    What the two modules are called does not matter. What they compute is proved by the
    kernel, which runs small copies of them.
    """

    name = "rms_norm_mlp"
    kernel = "RMSNormMLP"
    roles = ("norm", "mlp")
    inputs = 1

    def groups(self, model: nn.Module) -> Iterable[tuple[str, ...]]:
        for path, parent in model.named_modules():
            for first, second in feeding_pairs(parent):
                norm, mlp = parent.get_submodule(first), parent.get_submodule(second)
                if _is_norm(norm) and _is_mlp(mlp):
                    yield tuple(f"{path}.{name}" if path else name for name in (first, second))

    def is_fusable(self, members: Sequence[nn.Module]) -> str | None:
        from ..kernels.rms_norm_mlp.recipe import prepare

        try:
            prepare(*members)
        except ValueError as error:
            return str(error)
        return None

    def forget(self) -> None:
        from ..kernels.rms_norm_mlp.recipe import prepare

        prepare.cache_clear()  # type: ignore[attr-defined]
        forget_sources()

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        """Hidden states `(..., hidden)` of several sizes; small ones show the epsilon, large ones a
        clamp, more dimensions a mean over tokens, those of one what is left out by `squeeze`, rows
        of one value or with zeros what is taken for padding."""
        from ..kernels.rms_norm_mlp.recipe import prepare

        hidden = prepare(*members).hidden
        leading = [(_TOKENS,)] * len(_SCALES) + _LEADING
        scales = (*_SCALES, *[1.0] * len(_LEADING))
        samples = [
            torch.randn((*shape, hidden), generator=generator, device="cpu") * scale
            for shape, scale in zip(leading, scales, strict=True)
        ]
        samples[0][0], samples[0][1, ::3] = 1, 0
        odd = torch.randn(5, hidden, generator=generator, device="cpu")
        odd[0], odd[1, 0], odd[2, -1], odd[3, 0] = 0, torch.nan, torch.inf, -torch.inf
        return [(sample,) for sample in (*samples, odd)]


def _is_norm(module: nn.Module) -> bool:
    """Something with one vector of weights, or two, or with an epsilon, and nothing in it."""
    if module._modules:
        return False
    if next(module.parameters(), None) is None:
        return any(type(v) is float and 0 < v < _LARGEST_EPS for v in vars(module).values())
    dimensions = _dimensions(module)
    return 0 < len(dimensions) <= 2 and set(dimensions) == {1}


def _is_mlp(module: nn.Module) -> bool:
    """Something with several matrices, or a stack of them, that takes hidden states alone.

    Attention has several matrices too, but takes positions, masks and caches.
    """
    try:
        taken = forward_signature(original_class(module)).parameters.values()
    except (TypeError, ValueError):
        return False
    named = [p for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return sum(dims > 1 for dims in _dimensions(module)) > 1 and len(named) <= 2


def _dimensions(module: nn.Module) -> list[int]:
    """Of every parameter, none if one has no shape yet: the layer is lazy and has not run."""
    parameters = list(module.parameters())
    lazy = any(is_lazy(parameter) for parameter in parameters)
    return [] if lazy else [parameter.dim() for parameter in parameters]
