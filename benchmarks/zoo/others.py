"""Models of timm, torchvision and diffusers, with inputs they take.

Of timm and torchvision the smallest model of each module, as far as names tell, made smaller
by what its function takes; of diffusers every model class that its tests have a tiny config for,
where there is a checkout of it.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .build import Built, Unbuildable, perturbed, run, said, seed
from .diffusers_configs import config_and_inputs, tester_of
from .inputs import Inputs
from .subset import LIBRARIES

LARGEST = 100_000_000
SMALL = (
    "zepto", "atto", "femto", "pico", "nano", "micro", "mini", "xxtiny", "xtiny", "tiny",
    "_xxs", "_xs", "_s0", r"_s(_|\d|$)", "small", "_t$", "_b0", "_m$", "18", "050", "0_5", "320",
    "mobilenet", "base", "50",
)  # fmt: skip
SIDES = (64, 128, 224, 256)
FRAMES = 16
NOT_TINY = "no tiny config is known: diffusers has none in its tests, or --diffusers is not given"


def names(library: str) -> list[str]:
    """`library/model` for every model that is looked at."""
    found = {"timm": _of_timm, "torchvision": _of_torchvision, "diffusers": _of_diffusers}
    return [f"{library}/{name}" for name in found[library]()]


def versions() -> str:
    """The libraries and their versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)


def build(architecture: str) -> Built:
    """A small model in eval mode that runs, its norms not ones and its biases not zeros.

    Raises:
        Unbuildable: nothing that was tried could be built and run.
    """
    library, _, name = architecture.partition("/")
    failures: list[str] = []
    making = {"timm": _from_timm, "torchvision": _from_torchvision, "diffusers": _from_diffusers}
    for shrunk, make, candidates in making[library](name):
        try:
            model = _made(make)
        except Exception as error:
            failures.append(said("build", error))
            continue
        for inputs in candidates:
            try:
                run(model, inputs)
            except Exception as error:
                failures.append(said("run", error))
            else:
                return Built(model, inputs, shrunk)
    raise Unbuildable(failures or [NOT_TINY])


Tries = Iterator[tuple[str, Any, list[Inputs]]]


def _made(make: Any) -> nn.Module:
    seed()
    model: nn.Module = make()
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    return perturbed(model)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def smallest(known: list[str]) -> str:
    """The name that tells of the smallest model."""

    def rank(name: str) -> tuple[int, int, str]:
        words = [number for number, word in enumerate(SMALL) if re.search(word, name)]
        return min(words, default=len(SMALL)), len(name), name

    return min(known, key=rank)


def _of_timm() -> list[str]:
    from timm.models import list_models, list_modules

    # Those for tests have few kinds of blocks.
    modules = [list_models(module=name, exclude_filters="test_*") for name in list_modules()]
    return [smallest(known) for known in modules if known]


def _from_timm(name: str) -> Tries:
    import timm

    for side in SIDES:
        sized = [{"img_size": side}, {}]
        depths = [{"depth": 2}, {"depths": (2, 2, 2, 2)}, {}]
        for depth, size in itertools.product(depths, sized):
            options = {"num_classes": 8, **size, **depth}
            yield (
                f"{side} pixels, {depth or 'every layer'}",
                lambda options=options: timm.create_model(name, pretrained=False, **options),
                [{"x": _randn(2, 3, side, side)}],
            )


def _of_torchvision() -> list[str]:
    from torchvision.models import get_model_builder, list_models

    modules: dict[str, list[str]] = {}
    for name in list_models():
        modules.setdefault(get_model_builder(name).__module__, []).append(name)
    return [smallest(known) for known in modules.values()]


def _from_torchvision(name: str) -> Tries:
    from torchvision.models import get_model

    for side in SIDES:
        image, video = _randn(2, 3, side, side), _randn(2, 3, FRAMES, side, side)
        candidates: list[Inputs] = [
            {"x": image}, {"input": image}, {"images": [*image]},
            {"image1": image, "image2": -image}, {"x": video},
        ]  # fmt: skip
        # Detectors take whatever they are given, so theirs come first.
        small: list[dict[str, Any]] = [
            {"min_size": side, "rpn_post_nms_top_n_test": 20}, {"image_size": side},
            {"input_size": (side, side)}, {},
        ]  # fmt: skip
        classes = [{"weights_backbone": None, "num_classes": 8}, {"num_classes": 8}, {}]
        for size, count in itertools.product(small, classes):
            options = {"weights": None, **size, **count}
            yield (
                f"{side} pixels",
                lambda options=options: get_model(name, **options),
                candidates,
            )


def _of_diffusers() -> list[str]:
    import diffusers

    classes = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    base = diffusers.ModelMixin
    return [
        name
        for name, cls in classes.items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base
    ]


def _from_diffusers(name: str) -> Tries:
    import diffusers

    tester = tester_of(name)
    if tester is not None:
        seed()
        config, inputs = config_and_inputs(tester)
        yield "as in its tests", lambda: getattr(diffusers, name)(**config), [inputs]
