"""Everything for one architecture, as plain data; and the process that is asked for it."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import warnings
from typing import Any

import torch

from . import build, discover, extras, others
from .check import check
from .classes import classes_of
from .compare import NotComparable, expectation, is_out_of_memory, noted
from .heads import check_others
from .reasons import why
from .sources import digest

MEMORY = 11 << 30  # A model that is larger than it should be must not take the machine down.
COMPILED = 8  # One architecture in so many is compiled too,
DIFFERENTIATED = 32  # and one in so many with its gradients.


def examine(architecture: str, seconds: float) -> dict[str, Any]:
    """Build and check one architecture; what could not be done is in the result."""
    start = time.process_time()
    result: dict[str, Any] = {"architecture": architecture, "sources": digest()}
    try:
        if "/" in architecture:
            built = others.build(architecture)
        elif classes_of(architecture):
            built = build.build(architecture)
        else:
            return {**result, "status": "unbuildable", "error": "no class", "why": why([])}
        result["class"] = type(built.model).__name__
        result["shrunk"] = built.shrunk
        if built.part_of is not None:
            result["part_of"] = built.part_of
        result["parameters"] = sum(p.numel() for p in built.model.parameters())
        result["inputs"] = list(built.inputs)
    except build.Unbuildable as error:
        return {**result, "status": "unbuildable", "error": str(error), "why": why(error.failures)}
    except Exception as error:
        return {**result, "status": "unbuildable", "error": f"{type(error).__name__}: {error}"}
    try:
        expected = expectation(built)
    except NotComparable as error:
        return {**result, "status": "not comparable", "error": str(error)}
    seen: set[Any] = set()
    result.update(check(built, expected, start + seconds, seen))
    result["norms_before_mlps"] = discover.norms_before_mlps(built)
    result["patch_embeddings"] = discover.patch_embeddings(built)
    pair = _pair_on_kernel(result)
    with noted("generate", result):
        result["generate"] = extras.check_generate(built, expected, pair)
    if extras.in_sample(architecture, COMPILED):
        with_gradients = extras.in_sample(architecture, DIFFERENTIATED)
        with noted("compiled", result):
            result["compiled"] = extras.check_compiled(built, expected, pair, with_gradients)
    if built.part_of is None and "/" not in architecture:
        result["others"] = check_others(architecture, built, seen, start + seconds)
        result["faults"] += [fault for row in result["others"] for fault in row.pop("faults", ())]
    result["status"] = "checked"
    result["seconds"] = round(time.process_time() - start, 1)
    return result


def _pair_on_kernel(result: dict[str, Any]) -> tuple[str, str] | None:
    """A pair whose kernel ran, the most norm-like."""
    pairs = [tuple(row["pair"]) for row in result["pairs"] if row["outcome"].startswith("kernel")]
    pairs.sort(key=lambda pair: "norm" not in pair[0].lower())
    return pairs[0] if pairs else None


def main() -> None:
    """Answer each line `[architecture, seconds]` with a line of JSON."""
    warnings.filterwarnings("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    # What models print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        architecture, seconds = json.loads(line)
        try:
            result = examine(architecture, seconds)
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:300]}"
            result = {"architecture": architecture, "status": "crashed", "error": said}
            if is_out_of_memory(error):
                result["why"] = f"needs more than the {MEMORY >> 30} GiB of memory that it may take"
        result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        answers.write(json.dumps(result) + "\n")
        answers.flush()
