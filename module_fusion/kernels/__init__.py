"""The built-in kernels: one self-contained folder each, and the repository that serves them.

The folders import nothing of this package, so each can be published as it stands.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from kernels import use_kernel_mapping
from kernels.layer.globals import _KERNEL_MAPPING
from torch import nn


class InstalledRepository:
    """A kernel repository that serves a layer of an installed Python package.

    What `kernels.LayerRepository` is for the Hub: for a kernel mapping. Nothing is downloaded.

    Args:
        package: the importable package with a module `layers`.
        layer_name: the layer class in it.

    Examples:
        >>> repository = InstalledRepository("module_fusion.kernels.patch_embed", "PatchEmbed")
        >>> repository.load().__name__
        'PatchEmbed'
    """

    def __init__(self, package: str, layer_name: str) -> None:
        self.package = package
        self.layer_name = layer_name

    def load(self) -> type[nn.Module]:
        """The layer class."""
        layers = importlib.import_module(f"{self.package}.layers")
        return getattr(layers, self.layer_name)  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        return type(other) is InstalledRepository and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.package, self.layer_name))

    def __repr__(self) -> str:
        return f"`{self.package}` (layer `{self.layer_name}`)"


def _on_all_devices(folder: str, layer_name: str) -> dict[str, InstalledRepository]:
    repository = InstalledRepository(f"{__name__}.{folder}", layer_name)
    return {"cuda": repository, "cpu": repository}


# For `kernels.use_kernel_mapping`; `fuse_modules` falls back on it by itself.
MAPPING: dict[str, dict[str, InstalledRepository]] = {
    "RMSNormMLP": _on_all_devices("rms_norm_mlp", "RMSNormMLP"),
    "PatchEmbed": _on_all_devices("patch_embed", "PatchEmbed"),
}


def builtin_kernels(name: str | None, device: str | torch.device) -> AbstractContextManager[Any]:
    """A context in which a built-in kernel is mapped, unless the user mapped that name.

    Args:
        name: the layer name.
        device: where its weights are.
    """
    kind = str(device).partition(":")[0]
    repository = MAPPING.get(name or "", {}).get(kind)
    if repository is None or kind in _KERNEL_MAPPING.get().get(name or "", {}):
        return nullcontext()
    mapping: dict[str, Any] = {str(name): {kind: repository}}
    return use_kernel_mapping(mapping)  # type: ignore[no-any-return]
