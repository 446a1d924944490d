"""Run the notebooks in `examples/` afresh and store their outputs.

Run: python scripts/run_notebooks.py [NAME ...] [--renew]

An output that agrees with the stored one stays as it is stored, so that what changed shows in the
diff; `--renew` stores all. Needs `pip install -e ".[test]"`.
"""

from __future__ import annotations

import argparse
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from html import unescape
from itertools import zip_longest
from pathlib import Path
from unittest.mock import patch

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Cells with this tag show how long something took.
TIMING = "timing"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

_CONDITIONS = re.compile(r"\b\d+ rounds.*? in turn; (medians \[.*?\]); [^\n]*?; torch \S+")
_EXPECTATION = re.compile(r"\s*Nothing got faster[^\n]*")
_VERDICT = re.compile(r"no difference shown|[\d.]+ times as fast|takes [\d.]+ times as long")
_NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]\d+)?(?: (?:s|ms|µs|ns)\b)?")
_FOOTNOTE = re.compile(r"^\[\d+\](?= )|(?<=  )\[\d+\]$", re.MULTILINE)
_REPEATED = re.compile(r"^(\[#\] .*(?:\n|\Z))\1+", re.MULTILINE)
_FLOAT = re.compile(r"(?:<(?=1\.0))?(-?\d+\.\d+(?:e[+-]?\d+)?)")
_SMALLEST = re.compile(r"(differ\s+\S+\s+)\S+\s+\S+")
_ACCURACY = re.compile(r"error [\d.]+ x the modules'")
_PADDING = re.compile(r"-{2,}|(?<=\S) {2,}")
_UNSEEN = re.compile(r"<style>.*?</style>|<[^>]*>", re.DOTALL)
_ROUNDING = 1e-5


def read(path: Path) -> NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def execute(notebook: NotebookNode, twice: bool = False) -> NotebookNode:
    """Run a copy of the notebook from its beginning, in the Python that runs this.

    Args:
        notebook: stays as it is.
        twice: run every code cell twice in a row.

    Raises:
        CellExecutionError: a cell failed.
    """
    fresh = deepcopy(notebook)
    fresh.metadata = nbformat.from_dict(METADATA)
    if twice:
        fresh.cells = [deepcopy(cell) for cell in fresh.cells for _ in range(_times(cell))]
        for number, cell in enumerate(fresh.cells):
            cell.id = f"run-{number}"
    with tempfile.TemporaryDirectory() as home:
        # No kernel that is installed, no setting of this computer's user, and no port.
        manager = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            transport="ipc",
            ip=f"{home}/kernel",
        )
        client = NotebookClient(
            fresh,
            km=manager,
            timeout=300,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(EXAMPLES)}},
        )
        own = {"IPYTHONDIR": home, "JUPYTER_RUNTIME_DIR": home, "HF_HUB_OFFLINE": "1"}
        with patch.dict("os.environ", own):
            client.execute(cleanup_kc=True)
    fresh.metadata = nbformat.from_dict(METADATA)
    for cell in _code(fresh):
        cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
    return fresh


def _times(cell: NotebookNode) -> int:
    return 2 if cell.cell_type == "code" else 1


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _is_noise(output: NotebookNode) -> bool:
    """Whether other packages wrote it to stderr: they depend on what else is installed."""
    if output.output_type != "stream" or output.name != "stderr":
        return False
    return not any(ours in output.text for ours in ("module_fusion", "ipykernel_"))


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """What a fresh run shows that is not stored, a text for each cell where they differ."""
    return [
        f"cell {ours.id}:\n--- stored\n{theirs_text}\n--- fresh\n{ours_text}"
        for theirs, ours in zip(_code(stored), _code(fresh), strict=True)
        if not _cells_agree(theirs, ours)
        for theirs_text, ours_text in [("\n".join(_texts(theirs)), "\n".join(_texts(ours)))]
    ]


def _cells_agree(stored: NotebookNode, fresh: NotebookNode) -> bool:
    timing = TIMING in stored.metadata.get("tags", [])
    pairs = zip_longest(_texts(stored), _texts(fresh), fillvalue="")
    return all(agree(theirs, ours, timing) for theirs, ours in pairs)


def _texts(cell: NotebookNode) -> Iterator[str]:
    """What the outputs of a cell are, and what they say."""
    for output in cell.outputs:
        if output.output_type == "stream":
            yield f"[{output.name}]\n{output.text}"
            continue
        if output.output_type == "error":
            yield f"[error]\n{output.ename}: {output.evalue}"
            continue
        for kind, data in sorted(output.data.items()):
            if kind == "text/html":
                data = unescape(_UNSEEN.sub(" ", data))
            yield f"[{kind}]\n{data if kind.startswith('text/') else ''}"


def agree(stored: str, fresh: str, timing: bool = False) -> bool:
    """Whether two texts say the same, but for what differs between runs and processors.

    Numbers with a point may be one off in their last place. Those in scientific notation are
    errors: they may be off by a tenth, and all that are as small as rounding agree. What depends
    on rounding alone does not count: errors in ULPs or relative to a single value, which come from
    values near zero, and an accuracy in units of the modules'. Neither do the width of columns and
    the numbers of footnotes.

    Args:
        stored: one text.
        fresh: the other.
        timing: they are about times: no number counts, nor which candidate is faster, nor what
            is said where none is, nor the device, nor the version of torch.
    """
    if timing:
        return _without_times(stored) == _without_times(fresh)
    ours, theirs = (_FLOAT.split(_without_rounding(text)) for text in (stored, fresh))
    return ours[::2] == theirs[::2] and all(map(_close, ours[1::2], theirs[1::2]))


def _without_rounding(text: str) -> str:
    text = _ACCURACY.sub("error # x the modules'", _SMALLEST.sub(r"\1#  #", text))
    return _PADDING.sub("  ", _REPEATED.sub(r"\1", _FOOTNOTE.sub("[#]", text)))


def _without_times(text: str) -> str:
    text = _EXPECTATION.sub("", text)
    text = _CONDITIONS.sub(r"# rounds in turn; \1; a device", text)
    text = _PADDING.sub("  ", _NUMBER.sub("#", _VERDICT.sub("a verdict", text)))
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


def _close(stored: str, fresh: str) -> bool:
    a, b = float(stored), float(fresh)
    if "e" in stored or "e" in fresh:
        return max(abs(a), abs(b)) < _ROUNDING or math.isclose(a, b, rel_tol=0.1)
    last_place = 10.0 ** -min(len(text.partition(".")[2]) for text in (stored, fresh))
    return math.isclose(a, b, rel_tol=_ROUNDING, abs_tol=1.01 * last_place)


def renewed(stored: NotebookNode, fresh: NotebookNode) -> NotebookNode:
    """The fresh notebook with the stored outputs wherever they agree."""
    result = deepcopy(fresh)
    for theirs, ours in zip(_code(stored), _code(result), strict=True):
        if _cells_agree(theirs, ours):
            ours.outputs = theirs.outputs
    return result


def run(path: Path, renew: bool = False) -> bool:
    """Run a notebook and store what it shows; whether the file changed."""
    before = path.read_bytes()
    stored = read(path)
    fresh = execute(stored)
    nbformat.write(fresh if renew else renewed(stored, fresh), path)
    return path.read_bytes() != before


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", type=Path, metavar="NAME", help="paths; all if omitted")
    parser.add_argument("--renew", action="store_true", help="store outputs that agree too")
    options = parser.parse_args(arguments)
    for path in options.names or sorted(EXAMPLES.glob("*.ipynb")):
        print(f"{path.name}: {'stored' if run(path, options.renew) else 'as stored'}")


if __name__ == "__main__":
    main()
