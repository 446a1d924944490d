"""Fuzzing: random steps on random models, fused and never fused, for a time.

python benchmarks/fuzz.py --minutes 60 --seed 0

Runs the state machine of tests/test_machine.py with one seed after the other. A fault is printed
as the shortest sequence of steps that shows it. `python benchmarks/fuzz.py --seed N --minutes 0`
runs the one seed N again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HYPOTHESIS_PROFILE", "quick")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from common import machine
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from test_machine import Machine

import module_fusion

RESULTS = Path(__file__).parent / "results" / "fuzz.md"
HEADER = """# Fuzzing

Random steps on random models: fusing and unfusing, forward and backward, optimizers, hooks,
adapters, parametrizations, dtypes, copies, pickles, state dicts, threads, exceptions. After every
step the fused model and its never-fused twin are equal to the bit, and after the last unfuse
nothing tells them apart (`tests/test_machine.py`). "On a kernel" counts forwards in which a kernel
ran at least once. Where gradients may be summed in another order, because a value is used or a
member called more than once, an example has a kernel or gradients, not both. Made by
`python benchmarks/fuzz.py`.

"""
COLUMNS = (
    "date", "module_fusion", "versions", "minutes", "seeds", "examples each", "examples", "steps",
    "forwards", "on a kernel", "faults",
)  # fmt: skip


class Fault(NamedTuple):
    seed: int
    text: str


def run(number: int, examples: int, steps: int) -> Fault | None:
    """Run the machine with one seed; the fault it found, if it did."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(number)(Machine), settings=chosen)
    except Exception as error:
        return Fault(number, "".join(traceback.format_exception(error)))
    return None


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def row(
    minutes: float, seeds: Sequence[int], examples: int, faults: Sequence[Fault]
) -> tuple[str, ...]:
    return (
        datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        module_fusion.__version__,
        machine(),
        f"{minutes:.0f}",
        f"{seeds[0]} to {seeds[-1]}",
        str(examples),
        f"{Machine.examples:,}",
        f"{Machine.steps:,}",
        f"{Machine.forwards:,}",
        f"{Machine.on_a_kernel:,}",
        ", ".join(f"seed {fault.seed}" for fault in faults) or "0",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first; the next is one more")
    parser.add_argument("--examples", type=int, default=200, help="for each seed")
    parser.add_argument("--steps", type=int, default=30, help="for each example")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Stopped, it still writes its row.
    warnings.simplefilter("ignore")
    start, number, faults = time.monotonic(), arguments.seed, []
    try:
        while number == arguments.seed or time.monotonic() - start < 60 * arguments.minutes:
            fault = run(number, arguments.examples, arguments.steps)
            if fault is not None:
                faults.append(fault)
                print(f"\nseed {fault.seed}:\n{fault.text}", flush=True)
            print(
                f"{(time.monotonic() - start) / 60:6.1f} min, seed {number}: "
                f"{Machine.examples:,} examples, {Machine.steps:,} steps, {Machine.forwards:,} "
                f"forwards, {Machine.on_a_kernel:,} on a kernel, {len(faults)} faults",
                flush=True,
            )
            number += 1
    finally:
        minutes = (time.monotonic() - start) / 60
        seeds = (arguments.seed, max(arguments.seed, number - 1))
        if not arguments.results.exists():
            rule = line(["---"] * len(COLUMNS))
            arguments.results.write_text(HEADER + line(COLUMNS) + rule)
        with arguments.results.open("a") as results:
            results.write(line(row(minutes, seeds, arguments.examples, faults)))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
