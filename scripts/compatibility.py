"""Write the table of versions in `docs/compatibility.md`.

Run: python scripts/compatibility.py

What is needed is read from `pyproject.toml`, what was tested from the logs in
`benchmarks/results/` and from what CI installs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs", "compatibility.md")
START, END = "<!-- Made by scripts/compatibility.py -->", "<!-- Until here -->"

_RESULTS = Path("benchmarks", "results")
_LIBRARIES = ("timm", "torchvision", "diffusers")
_VERSION = r"(\d+(?:\.\d+)+)(?:\+(\w+))?"


class Source(NamedTuple):
    """A file that says with which versions something was run.

    Attributes:
        path: the file.
        lines: what the lines match that have the versions.
        device: where it was run.
    """

    path: Path
    lines: str
    device: str


SOURCES = (
    Source(_RESULTS / "tests-torch-versions.md", r".*transformers \d|\| \d.*", "on a CPU"),
    Source(_RESULTS / "tests-h200.log", r"python \d", "on an H200"),
    Source(_RESULTS / "zoo.md", r"`python benchmarks/zoo", "on a CPU"),
    Source(_RESULTS / "zoo-torch-2.8.md", r"`python benchmarks/zoo", "on a CPU"),
    Source(_RESULTS / "zoo-others.md", r"`python benchmarks/zoo", "on a CPU"),
    Source(_RESULTS / "cpu.md", r"torch \d", "on a CPU"),
    Source(Path(".ci", "run"), r".*pip install .*torch==", "on a CPU"),
)


def table(root: Path = ROOT) -> str:
    """The table, from the files in a checkout."""
    needed, tested = _needed(root), list(_tested(root))

    def versions(package: str, device: str = "") -> str:
        found = {version for name, version, _, on in tested if name == package and device in on}
        return ", ".join(sorted(found, key=_order))

    builds: dict[str, set[str]] = {}
    for name, version, build, device in tested:
        if name == "torch":
            builds.setdefault(_short(version), set()).add(f"{_built(build)}{device}")
    torch = [f"{v} ({'; '.join(sorted(builds[v]))})" for v in sorted(builds, key=_order)]
    python = {_short(version) for name, version, *_ in tested if name == "python"}
    rows = [
        ("Python", _and_newer(needed["python"]), ", ".join(sorted(python, key=_order))),
        ("PyTorch", _and_newer(needed["torch"]), ", ".join(torch)),
        (
            "transformers (optional)",
            _and_newer(needed["transformers"]),
            versions("transformers"),
        ),
        ("kernels", _and_newer(needed["kernels"]), versions("kernels")),
        ("Triton, for the GPU kernels", "comes with PyTorch", versions("triton", "H200")),
        (
            ", ".join(_LIBRARIES),
            "not needed; models of theirs are modules like others",
            ", ".join(f"{name} {versions(name)}" for name in _LIBRARIES),
        ),
    ]
    lines = ["| | supported | tested |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def written(page: str, made: str) -> str:
    """The page with this table in the place of the one it has."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{made}\n\n{END}{after}"


def _needed(root: Path) -> dict[str, str]:
    """The least version of each package, as `pyproject.toml` has it."""
    text = (root / "pyproject.toml").read_text()
    found = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', text))
    python = re.search(r'^requires-python = ">=([\d.]+)"$', text, re.MULTILINE)
    assert python is not None, "pyproject.toml has no requires-python"
    return {**found, "python": python[1]}


def _tested(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """Package, version, build and device, each time one is named."""
    for source in SOURCES:
        lines = (root / source.path).read_text().splitlines()
        lines = [line for line in lines if re.match(source.lines, line)]
        assert lines, f"{source.path} has no line that says the versions"
        for line in lines:
            # In a table of PyTorch versions the first column has no name in it.
            named = re.sub(r"^\| (?=\d)", "| torch ", line)
            for name, version, build in re.findall(rf"(\w+)(?: |==){_VERSION}", named):
                yield name.lower(), version, build, source.device


def _built(build: str) -> str:
    if not build.startswith("cu"):
        return ""
    return f"built for CUDA {build[2:-1]}.{build[-1]}, "


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _order(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _and_newer(version: str) -> str:
    return f"{version} and newer"


if __name__ == "__main__":
    page = ROOT / PAGE
    page.write_text(written(page.read_text(), table()))
