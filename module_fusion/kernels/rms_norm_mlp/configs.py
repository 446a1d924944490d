"""Launch configurations of the kernels for few tokens, fixed in advance: no call tunes anything.

`configs.json` beside this file holds measured ones by device name and shape; for everything
else a default is computed from the shape.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference import Weights

MOST_TOKENS = 16


class Stream(NamedTuple):
    """How one kernel streams a weight matrix.

    Args:
        columns: output columns, rows of the weight, that a program does at a time.
        depth: values along the reduction per step.
        warps: per program.
        stages: steps in flight.
        resident: programs in the grid, each taking one tile after the other; 0 for one program
            per tile.
        flatten: one loop over tiles and steps, which does not drain between tiles.
    """

    columns: int
    depth: int
    warps: int
    stages: int
    resident: int = 0
    flatten: bool = False

    def programs(self, size: int) -> int:
        """The grid for this many output columns."""
        tiles = -(-size // self.columns)
        return min(tiles, self.resident) if self.resident else tiles


class Skinny(NamedTuple):
    """Token rows in a tile, 1 or 16, and the two kernels."""

    tokens: int
    gate_up: Stream
    down: Stream


@functools.cache
def table() -> dict[tuple[str, int, int, int], Skinny | None]:
    """Measured configurations by device name, hidden, intermediate and token rows.

    None where cuBLAS was faster.
    """
    entries: list[dict[str, Any]] = json.loads(Path(__file__).with_name("configs.json").read_text())
    found: dict[tuple[str, int, int, int], Skinny | None] = {}
    for entry in entries:
        tokens = entry["tokens"]
        key = (entry["device"], entry["hidden"], entry["intermediate"], tokens)
        found[key] = None
        if "gate_up" in entry:
            found[key] = Skinny(tokens, Stream(**entry["gate_up"]), Stream(**entry["down"]))
    return found


@functools.cache
def _device(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


@functools.cache
def _chosen(index: int | None, hidden: int, intermediate: int, tokens: int) -> Skinny | None:
    name, processors = ("interpreter", 4) if index is None else _device(index)
    key = (name, hidden, intermediate, tokens)
    return table()[key] if key in table() else default(hidden, intermediate, tokens, processors)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_graph(
    index: int, hidden: int, intermediate: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """The two launches for one token, as numbers: torch.compile takes them as they are now.

    Returns:
        For each kernel the grid, columns, depth, warps, stages and flatten of its `Stream`.
    """
    config = _chosen(index, hidden, intermediate, 1)
    if config is None:
        return None
    return _numbers(config.gate_up, intermediate), _numbers(config.down, hidden)


def _numbers(stream: Stream, size: int) -> tuple[Any, ...]:
    columns, depth, warps, stages, _, flatten = stream
    return stream.programs(size), columns, depth, warps, stages, flatten


def default(hidden: int, intermediate: int, tokens: int, processors: int) -> Skinny:
    """About two programs for each multiprocessor in the down projection, which has few columns."""
    if tokens > 1:
        return Skinny(tokens, Stream(16, 256, 4, 4), Stream(16, 256, 4, 5))
    columns = 16
    while columns > 2 and hidden // columns < 2 * processors - 16:
        columns //= 2
    depth = 1024 if hidden >= 2048 else 512 if hidden >= 512 else 256
    down_depth = 512 if columns == 16 else 1024
    # More stages than steps take shared memory, and with it programs, for nothing.
    stages, down_stages = (
        max(2, min(most, size // step))
        for most, size, step in ((5, hidden, depth), (4, intermediate, down_depth))
    )
    return Skinny(1, Stream(4, depth, 4, stages), Stream(columns, down_depth, 4, down_stages))


def skinny(x: Tensor, weights: Weights) -> Skinny | None:
    """The configuration for few tokens, None where cuBLAS does the products."""
    tokens = x.numel() // x.shape[-1]
    if tokens > MOST_TOKENS or x.dtype == torch.float32 or not are_contiguous(weights):
        return None
    hidden, intermediate = weights.down.shape
    return _chosen(
        x.get_device() if x.is_cuda else None,
        hidden,
        intermediate,
        1 if tokens == 1 else MOST_TOKENS,
    )


def are_contiguous(weights: Weights) -> bool:
    """Whether the kernels for few tokens can read them."""
    return all(tensor is None or tensor.is_contiguous() for tensor in weights)
