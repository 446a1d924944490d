"""What the benchmarks share: a kernel repository in memory, the machine, and a table."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import kernels
import torch
from torch import nn


class Repository:
    """Serves a layer class to the `kernels` library from memory."""

    def __init__(self, layer: type[nn.Module]) -> None:
        self.layer = layer

    def load(self) -> type[nn.Module]:
        return self.layer


def machine() -> str:
    """Versions and processor, for the line above a table."""
    return (
        f"torch {torch.__version__}, kernels {kernels.__version__}, "
        f"Python {sys.version.split()[0]}, {_cpu()}"
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "<") -> None:
    """Print a Markdown table; `align` is `<` or `>`, as in a format specification."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [f"{cell:{align}{width}}" for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
