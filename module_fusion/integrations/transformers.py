"""Load, fuse and save models of `transformers`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FusionError
from ..families import fuse
from ..families.family import chosen_families
from ..families.state_dicts import pack_state_dict, packed_layouts, unpack_state_dict
from .stored_config import LOG, check_mode, decoded, encoded, fuse_stored, without_groups

# Not `fusion_config`: that key is transformers' own, and it raises for names it does not know.
KEY = "module_fusion"
# Files `model.packed.safetensors`: plain transformers says that they are not what it looks for.
VARIANT = "packed"
_ORIGINAL = ("model.safetensors", "pytorch_model.bin")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def from_pretrained(
    cls: Any,
    name: str | os.PathLike[str],
    *,
    fusion_config: bool | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a model with transformers, then fuse it.

    The config that was used is kept as `model.config.module_fusion`, which
    `model.save_pretrained` writes into `config.json`. Plain transformers loads that checkpoint
    and passes the entry over; this function applies it again. What could not be fused is one
    warning, with the reasons; `report(model)` shows what is, and the logger `"module_fusion"`
    has the whole report at level INFO.

    Args:
        cls: a model class of transformers, such as `AutoModelForCausalLM`.
        name: a folder or a name on the Hub. The weights may be in the original format or, if
            `save_pretrained` of this module wrote them, in the packed one.
        fusion_config: as `families` of `fuse`: True, or a mapping from names to True, False or
            options, where `mode` may also be the name of a `kernels.Mode`. None for the config
            stored in the checkpoint, if there is one; False for nothing.
        kwargs: for `cls.from_pretrained`.

    Returns:
        What `cls.from_pretrained` returns, with the model fused.

    Raises:
        ImportError: transformers is not installed.
        FusionError: `fusion_config` is none; `NotFusableError` and `PathNotFoundError` as for
            `fuse`. A stored config raises nothing: what no longer fits is in the warning.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from module_fusion import from_pretrained, report
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
        >>> folder = tempfile.TemporaryDirectory()
        >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
        >>> LlamaForCausalLM(config).save_pretrained(folder.name)
        >>> families = {"rms_norm_mlp": True}
        >>> model = from_pretrained(LlamaForCausalLM, folder.name, fusion_config=families)
        >>> len(report(model).fused)
        2
        >>> model.config.module_fusion
        {'families': [['rms_norm_mlp', True]]}
        >>> model.save_pretrained(folder.name)
        >>> len(report(from_pretrained(LlamaForCausalLM, folder.name)).fused)
        2
        >>> folder.cleanup()
    """
    _check_installed()
    config = None if fusion_config is None else decoded(fusion_config)
    for _, options in chosen_families({} if config is None else config):
        check_mode(options.get("mode"))
    loaded = _load(cls, name, kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    stored = getattr(model.config, KEY, None)
    problems: list[str] = []
    if config is not None and config is not False:
        done = fuse(model, config)
        setattr(model.config, KEY, {"families": encoded(config)})
        problems = without_groups(config, done)
        LOG.info("%s", done)
    elif config is None and stored is not None:
        problems = fuse_stored(model, stored)
    if problems:
        warnings.warn(f"Not fused in {name}: {'; '.join(problems)}.", stacklevel=2)
    return loaded


def save_pretrained(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    save_original_format: bool = True,
    **kwargs: Any,
) -> None:
    """Save a model, in the format of transformers or with the weights as they are packed.

    Args:
        model: a model of transformers, fused or not.
        folder: where to save it.
        save_original_format: True for what `model.save_pretrained(folder)` writes, which plain
            transformers loads. False for the packed tensors of the families' layouts, in files
            `model.packed.safetensors` that `module_fusion.from_pretrained` loads and plain
            transformers does not find. The weights have the same bits in both.
        kwargs: for `model.save_pretrained`.

    Raises:
        ImportError: transformers is not installed.
        FusionError: the folder has weights in the original format, which plain transformers
            would go on loading; or `variant` is given with the packed format.
    """
    _check_installed()
    layouts = {} if save_original_format else packed_layouts(model)
    if not layouts:
        model.save_pretrained(folder, save_original_format=save_original_format, **kwargs)
        return
    if kwargs.get("variant") is not None:
        raise FusionError(
            f"The packed format is the variant {VARIANT!r}; variant={kwargs['variant']!r} cannot "
            f"be another one. Leave it out, or save with save_original_format=True."
        )
    beside = [f for f in _ORIGINAL for f in (f, f"{f}.index.json") if (Path(folder) / f).exists()]
    if beside:
        raise FusionError(
            f"{os.fspath(folder)} has weights in the original format, {beside[0]}, which plain "
            f"transformers would load instead of these. Save to another folder, or remove it."
        )
    state_dict = kwargs.pop("state_dict", None)
    state_dict = pack_state_dict(model.state_dict() if state_dict is None else state_dict, layouts)
    with _stored(model.config, layouts):
        model.save_pretrained(
            folder, state_dict=state_dict, save_original_format=False, variant=VARIANT, **kwargs
        )


def _check_installed() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "This needs transformers: pip install 'module-fusion[transformers]'."
        ) from error


@contextmanager
def _stored(config: Any, layouts: Mapping[str, Any]) -> Iterator[None]:
    """The layouts in the config, for the time of one save."""
    had, before = hasattr(config, KEY), getattr(config, KEY, None)
    kept = before if isinstance(before, dict) else {}
    setattr(config, KEY, {**kept, "packed": dict(layouts)})
    try:
        yield
    finally:
        if had:
            setattr(config, KEY, before)
        else:
            delattr(config, KEY)


def _load(cls: Any, name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """Load in either format."""
    layouts = _layouts_in(name, kwargs)
    if not layouts:
        return cls.from_pretrained(name, **kwargs)
    others = {k: v for k, v in kwargs.items() if k not in (*_HUB_OPTIONS, "subfolder", "variant")}
    # Transformers loads files alone with all of its options, so it gets files.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _unpack_files(_local_folder(name, kwargs), Path(folder), layouts)
        loaded = cls.from_pretrained(folder, **others)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = os.fspath(name)
    stored = getattr(model.config, KEY, None)
    if isinstance(stored, dict):
        kept = {key: value for key, value in stored.items() if key != "packed"}
        setattr(model.config, KEY, kept) if kept else delattr(model.config, KEY)
    return loaded


def _layouts_in(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Any:
    """The layouts of the weights of a checkpoint in the packed format."""
    from transformers import PretrainedConfig

    options = {k: v for k, v in kwargs.items() if k in (*_HUB_OPTIONS, "subfolder")}
    try:
        config, _ = PretrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError):
        return None  # What is wrong with it, transformers says when it loads it.
    stored = config.get(KEY)
    return stored.get("packed") if isinstance(stored, dict) else None


def _local_folder(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path:
    if not os.path.isdir(name):
        from huggingface_hub import snapshot_download

        options = {k: v for k, v in kwargs.items() if k in _HUB_OPTIONS and v is not None}
        name = snapshot_download(os.fspath(name), **options)
    return Path(name) / (kwargs.get("subfolder") or "")


def _unpack_files(packed: Path, folder: Path, layouts: Mapping[str, Any]) -> None:
    """Write the weights in the original format; every other file is copied."""
    from safetensors.torch import load_file, save_file

    weight_map: dict[str, str] = {}
    for file in sorted(path for path in packed.iterdir() if path.is_file()):
        is_weights = ".safetensors" in file.name or file.name.startswith("pytorch_model")
        if not is_weights:
            shutil.copy(file, folder)
        elif f".{VARIANT}" in file.name and file.suffix == ".safetensors":
            weights = unpack_state_dict(load_file(file), layouts)
            save_file(weights, folder / file.name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(weights, file.name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
