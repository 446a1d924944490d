"""Inputs that a model may take, by the names of the parameters of its `forward`."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .exceptions import INPUTS

Inputs = dict[str, Any]
BATCH, TOKENS = 2, 6
MOST = 16  # Combinations of values that are tried.
CHOICES = 24  # Combinations of parameters.
# Parameters that no model needs.
OPTIONAL = re.compile(r"labels|^past_|^output_|^return_|^use_|cache|head_mask|inputs_embeds")


def candidates(model: nn.Module, config: Any) -> Iterator[Inputs]:
    """Inputs to try, those that use most of the model first."""
    makers, known = _makers(model, config)
    yield from _made(makers, _choices(model, list(makers), known), config)


def fuller(model: nn.Module, config: Any) -> Iterator[Inputs]:
    """The same with parameters beside them, for a model that says something is missing."""
    makers, known = _makers(model, config)
    choices = _with_more(_choices(model, list(makers), known), list(makers))
    yield from _made(makers, itertools.islice(choices, CHOICES), config)


def _makers(model: nn.Module, config: Any) -> tuple[dict[str, Callable[[Any], list[Any]]], Inputs]:
    """What makes each parameter; and those that are known of the model type, of `INPUTS`."""
    parameters = inspect.signature(type(model).forward).parameters
    makers = {name: maker for name in parameters if (maker := maker_of(name)) is not None}
    known = INPUTS.get(getattr(config, "model_type", ""), {})
    known = {name: value for name, value in known.items() if name in parameters}
    for name, value in known.items():
        makers[name] = lambda config, value=value: [value]
        if value is None:
            del makers[name]
    return makers, known


def _made(
    makers: dict[str, Callable[[Any], list[Any]]], choices: Iterable[tuple[str, ...]], config: Any
) -> Iterator[Inputs]:
    for choice in dict.fromkeys(choices):
        made = [makers[name](config) for name in choice]
        for values in itertools.islice(itertools.product(*made), MOST):
            yield dict(zip(choice, values, strict=True))


def _choices(model: nn.Module, makeable: list[str], known: Inputs) -> list[tuple[str, ...]]:
    """Which of the parameters to give, the most first; always those that are known."""
    parameters = inspect.signature(type(model).forward).parameters
    main = str(getattr(model, "main_input_name", "input_ids"))
    required = [
        name
        for name, p in parameters.items()
        if name != "self"
        and p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    names = {main: None, **dict.fromkeys(required)}
    text = [n for n in ("input_ids", "decoder_input_ids", "bbox") if n in parameters]
    rich = {**names, **dict.fromkeys(text)}
    seen = [n for n in ("pixel_values", "input_features", "input_values") if n in parameters]
    choices = [
        [*rich, *seen, *(n for n in ("grid_thw", "image_grid_thw") if n in parameters)],
        [*rich, *seen],
        [*rich, *seen, "qformer_input_ids"],
        list(rich),
        list(names),
        [n for n in ("input_ids", "decoder_input_ids") if n in parameters],
        required,
    ]
    absent = {name for name, value in known.items() if value is None}
    chosen = [
        tuple(dict.fromkeys(n for n in (*choice, *known) if n in parameters and n not in absent))
        for choice in choices
    ]
    return [choice for choice in chosen if choice and set(choice) <= set(makeable)]


def _with_more(known: list[tuple[str, ...]], makeable: list[str]) -> Iterator[tuple[str, ...]]:
    """The choices with one or two more parameters; some are needed though they have a default."""
    for count in (1, 2):
        for choice in known:
            rest = [name for name in makeable if name not in choice and not OPTIONAL.search(name)]
            yield from (choice + more for more in itertools.combinations(rest, count))


def maker_of(name: str) -> Callable[[Any], list[Any]] | None:
    """What makes values for a parameter, by its name."""
    if name in MADE:
        return MADE[name]
    return next((maker for pattern, maker in ALIKE if re.search(pattern, name)), None)


def found(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these settings that a config or a config in it has."""
    pending = [config]
    while pending:
        here = pending.pop(0)
        for name in names:
            value = getattr(here, name, None)
            if value is not None and not callable(value):
                return value
        pending += [v for v in vars(here).values() if hasattr(v, "model_type")]
    return default


def _number(config: Any, default: int, *names: str) -> int:
    value = found(config, *names, default=default)
    return value if isinstance(value, int) else default


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator())


def _ids(config: Any) -> list[Tensor]:
    top = min(int(found(config, "vocab_size", default=64)), 64)
    ids = torch.randint(3, max(top, 5), (BATCH, TOKENS), generator=_generator())
    codebooks = found(config, "num_codebooks", "n_codebooks")
    more = [] if codebooks is None else [ids[:, :, None].repeat(1, 1, codebooks) % 16]
    if codebooks is not None:
        more.append(ids[:, None].repeat(1, codebooks, 1).flatten(0, 1) % 16)
    return [ids, *more, ids[:, None].repeat(1, 2, 1)]  # The last one is for multiple choice.


def _sides(value: Any) -> tuple[int, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return (value,)


def _images(config: Any) -> list[Tensor]:
    size = found(config, "image_size", "input_size", default=64)
    if isinstance(size, dict):
        size = (size.get("height", 64), size.get("width", 64))
    if not isinstance(size, (int, list, tuple)):
        size = 64
    height, width = (*_sides(size), *_sides(size))[-2:] if isinstance(size, int) else size[-2:]
    channels = found(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    image = _randn(BATCH, channels, height, width)
    frames = int(found(config, "num_frames", default=2))
    images = [image, image[:, None].repeat(1, frames, 1, 1, 1), *_patches(config)]
    if (height, width) != (64, 64):
        images.append(_randn(BATCH, channels, 64, 64))
    return images


def _patches(config: Any) -> list[Tensor]:
    patch = found(config, "patch_size", default=4)
    patch = patch if isinstance(patch, int) else patch[-1]
    time = found(config, "temporal_patch_size", "patch_temporal", default=1)
    time = time if isinstance(time, int) else time[0]
    channels = found(config, "in_channels", "num_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    return [_randn(BATCH * 16, channels * time * patch**2)]


def _grid(config: Any) -> list[Tensor]:
    return [torch.tensor([[1, 4, 4]] * BATCH)]


def _states(config: Any) -> list[Tensor]:
    hidden = _number(config, 32, "hidden_size", "d_model", "embed_dim")
    tower = _patches(config) if found(config, "patch_size") is not None else []
    return [*tower, _randn(BATCH, TOKENS, hidden), _randn(BATCH, hidden, 4, 4)]


def _features(config: Any) -> list[Tensor]:
    bins = int(found(config, "num_mel_bins", "feature_size", "input_dim", "n_mels", "num_mels",
                     "input_feat_size", "feat_in", "mel_dim",
                     "feature_projection_input_dim", default=80))  # fmt: skip
    positions = int(found(config, "max_source_positions", default=32))
    frames = 2 * min(positions, 1500)
    return [
        _randn(BATCH, bins, frames), _randn(BATCH, frames, bins), _randn(BATCH, 64, bins),
        _randn(BATCH, bins, 64), _randn(BATCH, 1, 1024, 64), _randn(BATCH, 96, 80),
    ]  # fmt: skip


def _waves(config: Any) -> list[Tensor]:
    bins = int(found(config, "num_mel_bins", "feature_size", default=80))
    length = int(found(config, "max_length", default=64))
    return [
        _randn(BATCH, 4000), _randn(BATCH, 1, 4000), _randn(BATCH, length, bins),
        _randn(BATCH, 1, 1024, 128), _randn(BATCH, TOKENS, bins),
    ]  # fmt: skip


def _series(config: Any) -> list[Tensor]:
    length = found(config, "context_length", default=64)
    lags = max(found(config, "lags_sequence", default=[0]))
    length = length if isinstance(length, int) else 64
    channels = int(found(config, "num_input_channels", default=1))
    return [_randn(BATCH, length, channels), _randn(BATCH, length + lags), _randn(BATCH, length)]


def _ones(*shape: int) -> Callable[[Any], list[Tensor]]:
    return lambda config: [torch.ones(shape, dtype=torch.long)]


MADE: dict[str, Callable[[Any], list[Any]]] = {
    "input_ids": _ids,
    "decoder_input_ids": lambda config: _ids(config)[:1],
    "decoder_inputs_embeds": lambda config: _states(config)[-2:-1],
    "attention_mask": _ones(BATCH, TOKENS),
    "bbox": lambda config: [torch.zeros(BATCH, TOKENS, 4, dtype=torch.long)],
    "pixel_values": _images,
    "pixel_values_videos": lambda config: _images(config)[1:2],
    "grid_thw": _grid,
    "image_grid_thw": _grid,
    "hidden_states": _states,
    "inputs_embeds": _states,
    "encoder_hidden_states": _states,
    "input_features": _features,
    "input_values": _waves,
    "past_values": _series,
    "past_time_features": lambda config: [torch.zeros(*_series(config)[1].shape, 0)],
    "past_observed_mask": lambda config: [torch.ones(_series(config)[1].shape)],
    "spectrogram": _features,
    "qformer_input_ids": lambda config: _ids(config)[:1],
    "flattened_patches": lambda config: [
        torch.cat([torch.ones(BATCH, 4, 2), _randn(BATCH, 4, 768)], dim=-1)
    ],
    "image_sizes": lambda config: [torch.tensor([[64, 64]] * BATCH)],
}
# For parameters with other names; the first that fits counts.
ALIKE: tuple[tuple[str, Callable[[Any], list[Any]]], ...] = (
    (r"position_ids$", lambda config: [torch.arange(TOKENS).expand(BATCH, TOKENS)]),
    (r"token_type_ids$", lambda config: [torch.zeros(BATCH, TOKENS, dtype=torch.long)]),
    (r"(input|text|code|token)\w*_ids$|^tokens$|_tokens$", lambda config: _ids(config)[:1]),
    (r"grid_(t?h)?w$|grid_sizes$|spatial_shapes$", _grid),
    (r"pixel_(attention_)?mask$", lambda config: [
        torch.ones(BATCH, *_images(config)[0].shape[-2:], dtype=torch.long)]),
    (r"pixel|image$|^images$", _images),
    (r"(feature|audio)\w*_mask$", lambda config: [
        torch.ones(BATCH, max(f.shape[1:]), dtype=torch.long) for f in _features(config)[:2]]),
    (r"_mask$", _ones(BATCH, TOKENS)),
    (r"len(gth)?s$", lambda config: [
        torch.tensor([f.shape[-1]] * BATCH) for f in _features(config)[:1]]),
    (r"audio|wave", _waves),
    (r"features$|spectrogram|mel$", _features),
    (r"state$|states$|embeds?$|embeddings?$|^x$|query", _states),
    (r"_id$|_ids$|_index$|timestep", lambda config: [torch.zeros(BATCH, dtype=torch.long)]),
)  # fmt: skip
