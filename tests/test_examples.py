"""Every script in `examples/` runs as it is and comes to its end."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from module_fusion import NotFusableError, report

SCRIPTS = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

# A line of the output that is printed only after the asserts of the script held.
KEY_LINES = {
    "custom_kernel.py": "The kernel ran, passed, and was taken back.",
    "quickstart.py": "The same tokens fused and unfused, and the model is as it was.",
}


def test_every_script_has_a_key_line() -> None:
    assert {script.name for script in SCRIPTS} == set(KEY_LINES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_it_runs(script: Path) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert KEY_LINES[script.name] in done.stdout.splitlines()


# From its imports to here an example is what a user has to write.
END = "# That is all of it. Below is a tiny model to try it on.\n"


def test_a_kernel_of_ones_own_is_under_40_lines() -> None:
    script = next(script for script in SCRIPTS if script.name == "custom_kernel.py")
    written, end, rest = script.read_text().partition(END)
    assert end
    _, _, code = written.split('"""', maxsplit=2)
    assert len([line for line in code.splitlines() if line.strip()]) < 40  # With its comments.
    for step in ("class ", "prepare = ", "use_kernel_mapping(", "fuse_modules(", "verify("):
        assert step in code, step
    assert "unfuse_modules(model)" in code
    # Nothing that it needs is further down.
    names: dict[str, object] = {"__name__": "written"}
    exec(compile(code, str(script), "exec"), names)
    assert names["try_it"](tiny_gpt2(), torch.arange(1, 9)[None]).passed  # type: ignore[operator]
    assert "module_fusion" not in rest


def test_a_kernel_of_ones_own_refuses_what_it_does_not_compute() -> None:
    script = next(script for script in SCRIPTS if script.name == "custom_kernel.py")
    try_it, model = runpy.run_path(str(script))["try_it"], tiny_gpt2(activation_function="relu")
    with pytest.raises(NotFusableError, match="its activation is ReLU"):
        try_it(model, torch.arange(1, 9)[None])
    assert not report(model).groups


def tiny_gpt2(**options: str) -> hf.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    config = hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, **options)
    return hf.GPT2LMHeadModel(config).eval()
