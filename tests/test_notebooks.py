"""The notebooks in `examples/` show what a fresh run shows, and their cells can be run twice."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "run_notebooks.py"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]
MACHINE_PATH = re.compile(r"site-packages|(?<![\w.~])/(?:home|root|tmp|usr|opt|Users)/|\b[A-Z]:\\")

TIMES = """forward: fused against unfused, {verdict}, {ratio} [0.900, 1.100] of the time

candidate  time per call           verdict  calls
---------  ----------------------  -------  ---------
fused      {time} [1.2, 3.4]  {verdict}  {calls}

{rounds} rounds of 3 calls in turn; medians [95% confidence intervals]; {device}; torch {torch}"""
SLOW = {
    "verdict": "takes 1.05 times as long",
    "ratio": "1.05",
    "time": "13.8 ms",
    "calls": "kernel 60",
    "rounds": "15",
    "device": "AMD EPYC",
    "torch": "2.13.0+cpu",
}
FAST = {
    "verdict": "no difference shown",
    "ratio": "0.98",
    "time": "813 µs",
    "calls": "kernel 1,200",
    "rounds": "300",
    "device": "NVIDIA H200",
    "torch": "2.14.1",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(*sources: str) -> NotebookNode:
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    return nbformat.v4.new_notebook(cells=cells)


def outputs(node: NotebookNode) -> Iterator[NotebookNode]:
    for cell in node.cells:
        if cell.cell_type == "code":
            yield from cell.outputs


# The notebooks.


def test_there_are_five() -> None:
    assert [name[:2] for name in NAMES] == ["1_", "2_", "3_", "4_", "5_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_a_fresh_run_shows_what_is_stored(script: ModuleType, path: Path) -> None:
    stored = script.read(path)
    found = script.differences(stored, script.execute(stored))
    assert not found, "\n\n".join([*found, f"python scripts/run_notebooks.py examples/{path.name}"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_cell_can_be_run_twice_in_a_row(script: ModuleType, path: Path) -> None:
    stored = script.read(path)
    fresh = script.execute(stored, twice=True)
    # The asserts in the cells held both times.
    counts = [cell.execution_count for cell in fresh.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert len(counts) == 2 * sum(cell.cell_type == "code" for cell in stored.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_is_stored_as_run_from_its_beginning_and_of_no_one_machine(
    script: ModuleType, path: Path
) -> None:
    stored = script.read(path)
    nbformat.validate(stored)
    assert stored.metadata == script.METADATA
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(re.fullmatch("[a-z-]+", cell.id) for cell in stored.cells)
    assert all(set(cell.metadata) <= {"tags"} for cell in stored.cells)
    assert any("text/html" in output.get("data", {}) for output in outputs(stored))
    for output in outputs(stored):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert not MACHINE_PATH.search(json.dumps({**output, "png": None}))
    assert script.TIMING not in str(stored.metadata)


def test_machine_paths_are_known_when_seen() -> None:
    for path in ("/home/me/x.py", "in /tmp/ipykernel_1/2.py:3", "C:\\x", "lib/site-packages/torch"):
        assert MACHINE_PATH.search(path)
    for text in ("1.72e-04 / 2.58e-07", "</p>", "and/or", "layers/tmp/x"):
        assert not MACHINE_PATH.search(text)


# What counts as the same.


def test_a_wrong_output_is_found_and_named(script: ModuleType) -> None:
    node = notebook(
        "print('right', 1.5)", "2 + 2", "from IPython.display import HTML\nHTML('<b>hm</b>')"
    )
    stored = script.execute(node)
    assert not script.differences(stored, script.execute(stored))
    wrong = [
        (0, "text", "wrong 1.5\n"),
        (0, "text", "right 1.7\n"),
        (1, "data", nbformat.from_dict({"text/plain": "5"})),
        (1, "data", nbformat.from_dict({"image/png": ""})),
        (
            2,
            "data",
            nbformat.from_dict({**stored.cells[2].outputs[0].data, "text/html": "<b>ah</b>"}),
        ),
    ]
    for number, field, value in wrong:
        changed = nbformat.from_dict(json.loads(json.dumps(stored)))
        changed.cells[number].outputs[0][field] = value
        (found,) = script.differences(changed, stored)
        assert found.startswith(f"cell cell-{number}:")
    gone = nbformat.from_dict(json.loads(json.dumps(stored)))
    gone.cells[1].outputs = []
    assert len(script.differences(gone, stored)) == len(script.differences(stored, gone)) == 1


def test_a_failing_cell_fails_the_run(script: ModuleType) -> None:
    with pytest.raises(CellExecutionError, match="first 1, then 2"):
        script.execute(notebook("n = 0", "n += 1\nassert n == 1, 'first 1, then 2'"), twice=True)


def test_times_and_devices_do_not_count_in_cells_that_show_times(script: ModuleType) -> None:
    slow, fast = TIMES.format(**SLOW), TIMES.format(**FAST)
    assert script.agree(slow, fast, timing=True)
    assert script.agree(f"{slow}\nNothing got faster. On a CPU", fast, timing=True)
    assert not script.agree(slow, fast)
    for wrong in (
        fast.replace("fused  ", "liger  "),
        fast.replace("kernel", "members"),
        fast.replace("medians", "means"),
        fast.replace("fused against", "unfused against"),
    ):
        assert not script.agree(slow, wrong, timing=True)


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("similarity 0.73", "similarity 0.74", True),
        ("similarity 0.73", "similarity 0.75", False),
        ("-0.00", "0.00", True),
        ("1.00000000", "<1.00000000", True),
        ("0.99999997", "0.99999497", True),
        ("0.99999997", "0.99990000", False),
        ("1.72e-04 / 2.58e-07", "1.79e-04 / 1.2e-06", True),
        ("1.72e-04", "2.72e-04", False),
        ("1.72e-04", "1.72e-07", False),
        ("differ  1.77e-03  1.54e+01  19322  0.5", "differ  1.77e-03  9e-01  4.2e+06  0.5", True),
        ("differ  1.77e-03  1.54e+01  19322  0.5", "differ  1.77e-02  1e+01  19322  0.5", False),
        ("error 0.91 x the modules'", "error 1.05 x the modules'", True),
        (
            "a  [1]\nb  [2]\n[1] error 0.91 x the modules'\n[2] error 1.00 x the modules'\n[3] hm",
            "a  [1]\nb  [1]\n[1] error 1.00 x the modules'\n[2] hm",
            True,
        ),
        ("a  [1]\n[1] a hook", "a  [1]\n[1] an adapter", False),
        ("[3]", "[4]", False),
        ("kernel 4", "kernel 5", False),
        ("a  ----", "a  --", True),
        ("equal", "differ", False),
    ],
)  # fmt: skip
def test_numbers_agree_up_to_rounding(
    script: ModuleType, stored: str, fresh: str, same: bool
) -> None:
    assert script.agree(stored, fresh) is same


# How they are run.


def test_the_kernel_is_this_python_whatever_is_installed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "kernels" / "python3"
    installed.mkdir(parents=True)
    spec = {"argv": ["false"], "display_name": "Another", "language": "python"}
    (installed / "kernel.json").write_text(json.dumps(spec))
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "mine.py").write_text("mine = 1")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    node = notebook("import sys\nprint(sys.executable, 'mine' in globals())")
    (output,) = outputs(script.execute(node))
    assert output.text == f"{sys.executable} False\n"


def test_what_others_say_on_stderr_is_not_stored_but_warnings_of_ours_are(
    script: ModuleType,
) -> None:
    node = notebook(
        "import sys, tqdm\nprint('from another package', file=sys.stderr)",
        "for _ in tqdm.tqdm(range(3), leave=False):\n    pass",
        "import warnings\nwarnings.warn('from this cell')",
        "print('module_fusion/fuse.py:1: UserWarning: ours', file=sys.stderr)",
    )
    said = [output.text for output in outputs(script.execute(node))]
    assert ["from this cell" in text for text in said] == [True, False]
    assert "ours" in said[1]


def test_the_script_stores_what_changed_and_keeps_what_agrees(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.ipynb"
    node = notebook("import time\nprint(f'{time.time_ns() % 10**6} ms')", "n = 1\nn")
    node.cells[0].metadata.tags = [script.TIMING]
    nbformat.write(node, path)
    script.main([str(path)])
    first = path.read_bytes()
    script.main([str(path)])
    assert path.read_bytes() == first
    script.main([str(path), "--renew"])
    renewed = path.read_bytes()
    assert renewed != first
    path.write_text(path.read_text().replace("n = 1", "n = 2"))
    script.main([str(path)])
    fresh, kept = script.read(path), nbformat.reads(renewed.decode(), as_version=4)
    assert fresh.cells[0].outputs == kept.cells[0].outputs
    assert fresh.cells[1].outputs[0].data["text/plain"] == "2"
    assert capsys.readouterr().out.split("small.ipynb: ")[1:] == [
        "stored\n",
        "as stored\n",
        "stored\n",
        "stored\n",
    ]
