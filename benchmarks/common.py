"""What the benchmarks share: a kernel repository in memory, the machine, a table, and a file."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import kernels
import torch
from torch import nn

RESULTS = Path(__file__).parent / "results"


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


@contextlib.contextmanager
def saved(name: str | None, title: str) -> Iterator[None]:
    """Write what is printed inside to a file of `results/` too, unless `name` is None.

    A file has a section per command; a command that is run again replaces its own. On top of
    each are the date, the versions and the processor.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(_Both(sys.stdout, printed)):
        yield
    if name is None:
        return
    path, command = RESULTS / name, shlex.join(["python", f"benchmarks/{_script()}", *sys.argv[1:]])
    text = path.read_text() if path.exists() else f"# {title}\n"
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    heading = f"## `{command}`\n"
    when = f"{datetime.date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}."
    mine = f"{heading}\n{when}\n\n{printed.getvalue().strip()}\n"
    others = [section for section in sections if not section.startswith(heading)]
    parts = [head, *others, mine]
    path.write_text("\n".join(part.strip() + "\n" for part in parts))
    print(f"\nwritten to {path.relative_to(RESULTS.parents[1])}")


class _Both(io.TextIOBase):
    """What is written goes to two places."""

    def __init__(self, *targets: io.TextIOBase) -> None:
        self.targets = targets

    def write(self, text: str) -> int:
        for target in self.targets:
            target.write(text)
        return len(text)

    def flush(self) -> None:
        for target in self.targets:
            target.flush()


def _script() -> str:
    return Path(sys.argv[0]).name


def in_turn(functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of what each function returns, called one after the other in every round."""
    values: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            values[name].append(functions[name]())
    return {name: statistics.median(found) for name, found in values.items()}


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
