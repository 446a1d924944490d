"""Every code block of the README and of the documentation runs, one page after the other."""

from __future__ import annotations

from pathlib import Path

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
