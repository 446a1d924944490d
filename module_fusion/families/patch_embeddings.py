"""Convolutions whose stride is their kernel size, as in vision transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import original_class
from .family import FusionFamily, register_family

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MANY = 4096
_GRID = 3


@register_family
class PatchEmbeddingsFamily(FusionFamily):
    """Every convolution over patches that do not overlap."""

    name = "patch_embeddings"
    kernel = "PatchEmbed"
    roles = ("proj",)
    inputs = 1

    def groups(self, model: nn.Module) -> Iterable[tuple[str, ...]]:
        for path, module in model.named_modules():
            if issubclass(original_class(module), _CONVOLUTIONS):
                convolution: Any = module
                patch = tuple(convolution.kernel_size)
                if tuple(convolution.stride) == patch and math.prod(patch) > 1:
                    yield (path,)

    def is_fusable(self, members: Sequence[nn.Module]) -> str | None:
        from ..kernels.patch_embed._geometry import prepare

        try:
            prepare(members[0])
        except ValueError as error:
            return str(error)
        return None

    def samples(
        self, members: Sequence[nn.Module], generator: torch.Generator
    ) -> list[tuple[Tensor, ...]]:
        """Inputs `(batch, channels, *size)`: one patch, a grid, a remainder, a batch of one, none.

        On a GPU also many patches: there kernels are chosen by size.
        """
        proj: Any = members[0]
        patch = tuple(proj.kernel_size)
        sizes = [patch, tuple(_GRID * p for p in patch), tuple(_GRID * p + p - 1 for p in patch)]
        shapes = [(2, proj.in_channels, *size) for size in sizes]
        shapes.append((1, proj.in_channels, *sizes[0]))
        shapes.append((proj.in_channels, *sizes[1]))
        if proj.weight.is_cuda:
            shapes.append((_MANY, proj.in_channels, *patch))
        return [(torch.randn(shape, generator=generator, device="cpu"),) for shape in shapes]
