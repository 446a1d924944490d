"""Tiny models of every architecture in transformers, with inputs they take.

A config is made small by what its numbers are called; where the result is not accepted, less
of it is made small. Inputs are tried until the model runs.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn
from transformers.utils import logging

from .classes import classes_of, named
from .configs import LADDER, small_configs
from .inputs import Inputs, candidates, fuller
from .parts import around, called_inside

logging.set_verbosity_error()

LARGEST = 32_000_000  # Parameters of a model that is still called tiny.
SECONDS = 8  # Of processor time, after which nothing more is tried.
LARGER = 100_000_000  # Of one that is taken where no smaller one runs.
# What is said where an input is missing.
MISSING = re.compile(r"None|missing|specify|required|provide|passed")


class Built(NamedTuple):
    """A model that runs, and how to run it."""

    model: nn.Module
    inputs: Inputs
    shrunk: str
    part_of: str | None = None  # The model type whose model it was taken from.


class Unbuildable(Exception):
    """No tiny model of an architecture runs; the message says why the last one did not."""

    def __init__(self, failures: list[str]) -> None:
        # The first complaint about the smallest model tells most.
        super().__init__(" | ".join(dict.fromkeys(failures[:1] + failures[-2:])) or "no class")
        self.failures = failures


def build(
    model_type: str,
    class_name: str | None = None,
    shrunk: str | None = None,
    seconds: float = SECONDS,
) -> Built:
    """A tiny model of an architecture in eval mode, its norms not ones, its biases not zeros.

    Args:
        model_type: of transformers.
        class_name: one of its classes; the one with most of the model if None.
        shrunk: what is made small, of `configs.LADDER`; if None, the most that runs.
        seconds: of processor time, after which nothing more is tried.

    Raises:
        Unbuildable: nothing that was tried could be built and run.
    """
    failures: list[str] = []
    deadline = time.process_time() + seconds
    names = [class_name] if class_name else classes_of(model_type)[:4]
    rungs = LADDER if shrunk is None else (shrunk,)
    for found in _tried(model_type, names, failures, deadline, rungs):
        return found
    for outer in () if class_name else around(model_type)[:3]:
        for whole in _tried(outer, classes_of(outer)[:2], [], deadline):
            for part, inputs in called_inside(whole.model, model_type, lambda w=whole: run(*w[:2])):
                try:
                    run(part, inputs)
                except Exception as error:
                    failures.append(said("run as a part", error))
                else:
                    return Built(part, inputs, whole.shrunk, outer)
    raise Unbuildable(failures)


def _tried(
    model_type: str,
    names: list[str],
    failures: list[str],
    deadline: float,
    rungs: Sequence[str] = LADDER,
) -> Iterator[Built]:
    """What can be built of these classes, small models first; the failures are added to a list."""
    large: list[tuple[int, Any, str, Any]] = []
    for name in names:
        cls = named(model_type, name)
        if cls is None:
            failures.append(f"transformers has no {name}")
            continue
        for shrunk, config in small_configs(model_type, rungs, failures):
            if time.process_time() > deadline:
                failures.append("not all was tried: time")
                return
            try:
                size = _size(cls, config)
                if size > LARGEST:
                    large.append((size, cls, shrunk, config))
                    raise ValueError(f"{size / 1e6:.0f} million parameters")
                model = _model(cls, config)
            except Exception as error:
                failures.append(said("build", error))
                continue
            yield from _running(model, config, shrunk, failures)
    for size, cls, shrunk, config in sorted(large, key=lambda item: item[0]):
        if size > LARGER or time.process_time() > deadline:
            break
        try:
            model = _model(cls, config)
        except Exception as error:
            failures.append(said("build", error))
            continue
        yield from _running(model, config, shrunk, failures)


def _running(model: nn.Module, config: Any, shrunk: str, failures: list[str]) -> Iterator[Built]:
    errors: list[str] = []
    for ways in (candidates, fuller):
        for inputs in ways(model, config):
            try:
                run(model, inputs)
            except Exception as error:
                errors.append(said("run", error))
            else:
                yield Built(model, inputs, shrunk)
        if not any(map(MISSING.search, errors)):
            break
    failures += errors


def seed() -> None:
    """The same random numbers for every run of a model."""
    torch.manual_seed(3)
    numpy.random.seed(3)
    random.seed(3)


def random_state() -> tuple[Any, ...]:
    """How many random numbers were drawn since `seed`, as the states of the generators."""
    name, keys, *rest = numpy.random.get_state()
    numbers = torch.get_rng_state().numpy().tobytes()
    return numbers, name, keys.tobytes(), *rest, random.getstate()


def run(model: nn.Module, inputs: Inputs) -> Any:
    """What the model returns, without gradients."""
    seed()
    with torch.no_grad():
        return model(**inputs)


def said(what: str, error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{what}: {type(error).__name__}: {' '.join(lines)[:200]}"


def _size(cls: Any, config: Any) -> int:
    """How many parameters a model would have."""
    with torch.device("meta"):
        try:
            return sum(p.numel() for p in cls(config).parameters())
        except Exception as error:
            if "meta" not in str(error):
                raise
            return 0  # Some need numbers while they are built.


def _model(cls: Any, config: Any) -> nn.Module:
    seed()
    model: nn.Module = cls(config)
    if sum(p.numel() for p in model.parameters()) > LARGER:
        raise ValueError("too many parameters")
    return perturbed(model)


def perturbed(model: nn.Module) -> nn.Module:
    """The model in eval mode and float32, with noise on every parameter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_complex():
                scale = 0.3 if parameter.ndim == 1 else 0.05
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))
    return model.float().eval()
