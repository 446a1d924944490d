"""Which state of the package, and of what checks it, a row was made by."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("module_fusion", "benchmarks/zoo")
# What no check runs: what shows, times and verifies, and what writes the table.
OTHERS = (
    "module_fusion/__main__.py",
    "module_fusion/benchmark.py",
    "module_fusion/benchmarking",
    "module_fusion/dry_run.py",
    "module_fusion/rendering",
    "module_fusion/verify.py",
    "module_fusion/verifying",
    "benchmarks/zoo/sources.py",
    "benchmarks/zoo/table.py",
)


@lru_cache(maxsize=1)
def digest() -> str:
    """Of every Python file that a check may run, short."""
    others = [ROOT / other for other in OTHERS]
    found = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(path.is_relative_to(other) for other in others):
                found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]
