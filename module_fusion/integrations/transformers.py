"""Load, fuse and save models of `transformers`."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FusionError
from ..families import fuse
from ..families.family import chosen_families
from ..families.state_dicts import pack_state_dict, packed_layouts
from .packed_files import (
    VARIANT,
    is_packed,
    original_files_in,
    remove_packed_files,
    unpack_files,
    with_layouts,
)
from .stored_config import LOG, check_mode, decoded, encoded, fuse_stored, without_groups

# Not `fusion_config`: that key is transformers' own, and it raises for names it does not know.
KEY = "module_fusion"
_LOOK_OPTIONS = ("cache_dir", "local_files_only", "token", "revision")
_HUB_OPTIONS = (*_LOOK_OPTIONS, "force_download")


def from_pretrained(
    cls: Any,
    name: str | os.PathLike[str] | None,
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
            `save_pretrained` of this module wrote them, in the packed one. None where `config`
            and `state_dict` are the checkpoint.
        fusion_config: as `families` of `fuse`: True, or a mapping from names to True, False or
            options, where `mode` may also be the name of a `kernels.Mode`. None for the config
            stored in the checkpoint, if there is one, whatever `config` says; False for nothing.
        kwargs: for `cls.from_pretrained`.

    Returns:
        What `cls.from_pretrained` returns, with the model fused.

    Raises:
        ImportError: transformers is not installed.
        FusionError: `fusion_config` is none; `NotFusableError` and `PathNotFoundError` as for
            `fuse`. A stored config raises nothing: what no longer fits is in the warning. Or the
            checkpoint has the weights in both formats, or packed files that cannot be read.

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
    problems: list[str] = []
    if config is not None and config is not False:
        done = fuse(model, config)
        setattr(model.config, KEY, {"families": encoded(config)})
        problems = without_groups(config, done)
        LOG.info("%s", done)
    elif config is None:
        _have_the_stored_config(model.config, name, kwargs)
        if (stored := getattr(model.config, KEY, None)) is not None:
            problems = fuse_stored(model, stored)
    if problems:
        where = type(model).__name__ if name is None else name
        warnings.warn(f"Not fused in {where}: {'; '.join(problems)}.", stacklevel=2)
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
            transformers does not find. The weights have the same bits in both. A save in the
            original format removes the packed files of an earlier one from the folder;
            `model.save_pretrained` leaves them, so that `from_pretrained` has weights in both
            formats, and its error says which files to remove.
        kwargs: for `model.save_pretrained`.

    Raises:
        ImportError: transformers is not installed.
        FusionError: the folder has weights in the original format, which plain transformers
            would go on loading; or `variant` is given with the packed format.
    """
    _check_installed()
    layouts = {} if save_original_format else packed_layouts(model)
    if not layouts:
        before = original_files_in(folder)
        model.save_pretrained(folder, save_original_format=save_original_format, **kwargs)
        # Another variant, or adapters alone, may lie beside packed weights.
        if kwargs.get("is_main_process", True) and original_files_in(folder) != before:
            remove_packed_files(folder)
        return
    if kwargs.get("variant") is not None:
        raise FusionError(
            f"The packed format is the variant {VARIANT!r}; variant={kwargs['variant']!r} cannot "
            f"be another one. Leave it out, or save with save_original_format=True."
        )
    if beside := original_files_in(folder):
        raise FusionError(
            f"{os.fspath(folder)} has weights in the original format, {next(iter(beside))}, which "
            f"plain transformers would load instead of these. Save to another folder, or remove it."
        )
    state_dict = kwargs.pop("state_dict", None)
    state_dict = pack_state_dict(model.state_dict() if state_dict is None else state_dict, layouts)
    model.save_pretrained(
        folder,
        state_dict=with_layouts(state_dict, layouts),
        save_original_format=False,
        variant=VARIANT,
        **kwargs,
    )


def _check_installed() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "This needs transformers: pip install 'module-fusion[transformers]'."
        ) from error


def _load(cls: Any, name: str | os.PathLike[str] | None, kwargs: dict[str, Any]) -> Any:
    """Load in either format."""
    if name is None or kwargs.get("variant") not in (None, VARIANT):
        return cls.from_pretrained(name, **kwargs)
    if not is_packed(name, kwargs.get("subfolder") or "", _given(_LOOK_OPTIONS, kwargs)):
        return cls.from_pretrained(name, **kwargs)
    others = {k: v for k, v in kwargs.items() if k not in (*_HUB_OPTIONS, "subfolder", "variant")}
    # Transformers loads files alone with all of its options, so it gets files.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        unpack_files(_local_folder(name, kwargs), Path(folder))
        loaded = cls.from_pretrained(folder, **others)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = os.fspath(name)
    return loaded


def _have_the_stored_config(
    config: Any, name: str | os.PathLike[str] | None, kwargs: Mapping[str, Any]
) -> None:
    """Give a model's config the entry of the checkpoint, where another config was loaded."""
    if name is None or kwargs.get("config") is None:
        return
    from transformers import PretrainedConfig

    options = _given((*_HUB_OPTIONS, "subfolder"), kwargs)
    try:
        of_the_checkpoint, _ = PretrainedConfig.get_config_dict(name, **options)
    except (OSError, ValueError):
        return  # There may be weights alone.
    if of_the_checkpoint.get(KEY) is not None:
        setattr(config, KEY, of_the_checkpoint[KEY])


def _local_folder(name: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Path:
    if not os.path.isdir(name):
        from huggingface_hub import snapshot_download

        name = snapshot_download(os.fspath(name), **_given(_HUB_OPTIONS, kwargs))
    return Path(name) / (kwargs.get("subfolder") or "")


def _given(names: tuple[str, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in names if kwargs.get(name) is not None}
