"""Every code block of the README and of the documentation runs, one page after the other."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = Sybil(parsers=[PythonCodeBlockParser()], path=str(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_blocks_of_a_page_run(page: Path) -> None:
    for example in BLOCKS.parse(page).examples():
        example.evaluate()


def test_the_pages_with_code_are_these() -> None:
    counts = {page.name: len(list(BLOCKS.parse(page).examples())) for page in PAGES}
    assert {name for name, count in counts.items() if count} == {
        "README.md",
        "guide.md",
        "kernels.md",
    }


@pytest.fixture(scope="module")
def compatibility() -> Any:
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / VERSIONS)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERSIONS = Path("scripts", "compatibility.py")


def test_the_table_of_versions_is_the_one_that_its_script_makes(compatibility: Any) -> None:
    page = (ROOT / compatibility.PAGE).read_text()
    assert page == compatibility.written(page, compatibility.table()), f"python {VERSIONS}"
    assert compatibility.written(page, "made") != page


@pytest.mark.parametrize(
    ("path", "before", "after", "row"),
    [
        ("pyproject.toml", r"torch>=[\d.]+", "torch>=3.1", "| PyTorch | 3.1 and newer |"),
        ("pyproject.toml", r"(?<=^requires-python = .>=)[\d.]+", "3.99", "| 3.99 and newer |"),
        (".ci/run", r"torch==[\d.]+", "torch==7.1.0", "7.1 (on a CPU) |"),
        ("benchmarks/results/tests-h200.log", r"triton [\d.]+", "triton 9.9.0", "| 9.9.0 |"),
        ("benchmarks/results/tests-torch-versions.md", r"^\| \d\S+", "| 6.5.0+cu209",
         "6.5 (built for CUDA 20.9, on a CPU)"),
        ("benchmarks/results/zoo-others.md", r"timm [\d.]+\d", "timm 4.5.6", "timm 4.5.6,"),
        ("benchmarks/results/zoo.md", r"transformers [\d.]+\d", "transformers 8.7.0", ", 8.7.0 |"),
    ],
)  # fmt: skip
def test_the_versions_are_those_of_the_files_that_have_them(
    compatibility: Any, tmp_path: Path, path: str, before: str, after: str, row: str
) -> None:
    for part in (Path("pyproject.toml"), *(source.path for source in compatibility.SOURCES)):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    assert compatibility.table(tmp_path) == compatibility.table()
    assert row not in compatibility.table()
    text, count = re.subn(before, after, (tmp_path / path).read_text(), flags=re.MULTILINE)
    assert count
    (tmp_path / path).write_text(text)
    assert row in compatibility.table(tmp_path)
