"""Checkpoints in the packed format: the weights, and with them in the files how they are packed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FusionError
from ..families.state_dicts import unpack_state_dict

# Files `model.packed.safetensors`: plain transformers says that they are not what it looks for.
VARIANT = "packed"
_SINGLE = f"model.{VARIANT}.safetensors"
_INDEX = f"model.safetensors.index.{VARIANT}.json"
_WEIGHTS = re.compile(rf"model\.{VARIANT}(-\d{{5}}-of-\d{{5}})?\.safetensors")
_ORIGINAL = tuple(
    file + end for file in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
# The bytes of the layouts as JSON are a tensor among the others: transformers writes the metadata
# of a file by itself, and a config travels without the weights.
_LAYOUTS = "module_fusion.layouts"


def original_files_in(folder: str | os.PathLike[str]) -> dict[str, int]:
    """The files of weights in the original format that a folder has, and when each was written."""
    files = {name: Path(folder) / name for name in _ORIGINAL}
    return {name: file.stat().st_mtime_ns for name, file in files.items() if file.exists()}


def remove_packed_files(folder: str | os.PathLike[str]) -> None:
    """Remove the weights in the packed format, and the index, that an earlier save wrote."""
    for file in Path(folder).iterdir():
        if file.name == _INDEX or _WEIGHTS.fullmatch(file.name):
            file.unlink(missing_ok=True)  # Another process may be as far.


def with_layouts(
    state_dict: Mapping[str, Tensor], layouts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """A packed state dict together with its layouts, as the files have it."""
    text = json.dumps(layouts).encode()
    return {**state_dict, _LAYOUTS: torch.tensor(list(text), dtype=torch.uint8, device="cpu")}


def is_packed(name: str | os.PathLike[str], subfolder: str, options: Mapping[str, Any]) -> bool:
    """Whether the weights of a checkpoint are in the packed format.

    Args:
        name: a folder or a name on the Hub, of which nothing is downloaded.
        subfolder: where in it the files are, `""` for at its top.
        options: `cache_dir`, `local_files_only`, `token` and `revision`, for the Hub.

    Raises:
        FusionError: they are there in both formats.
    """
    from transformers.utils.hub import has_file

    def first_of(files: tuple[str, ...]) -> str | None:
        within = f"{subfolder.rstrip('/')}/" if subfolder else ""
        return next((file for file in files if has_file(name, within + file, **options)), None)

    try:
        packed = first_of((_SINGLE, _INDEX))
        original = first_of(_ORIGINAL) if packed else None
    except (OSError, ValueError):
        return False  # What is wrong with the name, transformers says when it loads it.
    if original:
        raise FusionError(
            f"{os.fspath(name)} has the weights twice, in the packed format, {packed}, and in the "
            f"original one, {original}, and nothing says which are newer. To keep the original "
            f"ones, remove model.{VARIANT}*.safetensors and {_INDEX}; to keep the packed ones, "
            f"remove the other files of weights, such as {original}."
        )
    return packed is not None


def unpack_files(packed: Path, folder: Path) -> None:
    """Write the weights in the original format; every other file is copied.

    Raises:
        FusionError: a file is missing, or does not say how the weights are packed; or a layout is
            of a family that is not registered.
    """
    from safetensors.torch import load_file, save_file

    files = _files_in(packed)
    layouts = _layouts_in(files)
    for file in packed.iterdir():
        is_weights = ".safetensors" in file.name or file.name.startswith("pytorch_model")
        if file.is_file() and not is_weights:
            shutil.copy(file, folder)
    weight_map: dict[str, str] = {}
    for file in files:
        state_dict = load_file(file)
        state_dict.pop(_LAYOUTS, None)
        weights = unpack_state_dict(state_dict, layouts)
        save_file(weights, folder / file.name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(weights, file.name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _files_in(packed: Path) -> list[Path]:
    """The packed files of the last save.

    An earlier one may have left its single file, or its index without the shards, which
    transformers removes.
    """
    index, single = packed / _INDEX, packed / _SINGLE
    if not index.exists():
        return [single]
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [shard for shard in shards if not (packed / shard).exists()]
    if missing and not single.exists():
        raise FusionError(
            f"{index} names {missing[0]}, which is not there. Copy or save the checkpoint again."
        )
    return [single] if missing else [packed / shard for shard in shards]


def _layouts_in(files: list[Path]) -> dict[str, Any]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as opened:
            if _LAYOUTS in opened.keys():  # noqa: SIM118
                found: dict[str, Any] = json.loads(bytes(opened.get_tensor(_LAYOUTS).tolist()))
                return found
    raise FusionError(
        f"The weights in {files[0]} do not say how they are packed. Save them again: "
        f"module_fusion.integrations.transformers.save_pretrained(..., save_original_format=False)."
    )
