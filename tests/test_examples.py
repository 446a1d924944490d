"""Every script in `examples/` runs as it is and comes to its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

# A line of the output that is printed only after the asserts of the script held.
KEY_LINES = {
    "custom_kernel.py": "The kernel ran, gave the same tokens, and was taken back.",
    "quickstart.py": "The same tokens fused and unfused, and the model is as it was.",
}


def test_every_script_has_a_key_line() -> None:
    assert {script.name for script in SCRIPTS} == set(KEY_LINES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_it_runs(script: Path) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert KEY_LINES[script.name] in done.stdout.splitlines()
