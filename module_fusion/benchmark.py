"""`benchmark`: how much faster the fused model is than the same model unfused."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .benchmarking.candidates import candidates_of, check_not_compiled
from .benchmarking.options import check_options, names_in
from .benchmarking.progress import Progress
from .benchmarking.report import BenchmarkReport
from .benchmarking.runs import Run
from .benchmarking.timing import (
    Stopwatch,
    device_name,
    devices_of,
    median,
    median_interval,
    rounds_needed,
)
from .benchmarking.workload import Workload
from .comparison import check_not_ambiguous, counts_kept, nothing_left_behind
from .context import check_not_fake
from .errors import FusionError
from .inventory import chains_in

# Shorter samples are lost in the clock's own time.
_SAMPLE_S = 200e-6
_MOST_CALLS = 1000
# Before that many, a narrow interval may be luck.
_FEWEST_ROUNDS = 20


def benchmark(
    model: nn.Module,
    /,
    *args: Any,
    method: str = "forward",
    backward: bool = False,
    compare: str | Sequence[str] = (),
    compile_options: Mapping[str, Any] | None = None,
    seconds: float = 5.0,
    precision: float = 0.02,
    confidence: float = 0.95,
    progress: bool | None = None,
    **kwargs: Any,
) -> BenchmarkReport:
    """Time the fused model against the same model unfused, in turns, on the inputs given.

    In every round each candidate runs once, in an order that rotates, so that a slow moment of
    the machine falls on all of them. The ratio is the median of the rounds' own ratios, because
    what two calls a moment apart have in common, such as a clock frequency, cancels in it; a
    ratio of two medians keeps it. Intervals come from order statistics: they assume nothing
    about the distribution, only that rounds are alike and know nothing of each other. Of ratios
    that is so where what lasts for several rounds, such as a clock frequency or the load of the
    machine, slows both down alike. The times by themselves keep it, so while a machine drifts
    their intervals are too narrow; rely on that of the ratio. When to stop depends on the width
    alone, not on where an interval lies.

    Every call has a fresh copy of the inputs, and every sample starts from the same random state
    and buffers; copying, swapping, compiling and warming up are outside the clock. A sample is one
    call, or several where a call is quicker than a clock can tell. `forward` alone runs without
    gradients. Times on a GPU end when the GPU is done; its L2 cache is not flushed.

    So rounds are the same work, also with a cache that a call extends. State that is out of reach,
    as in an object of C code, is not put back; where two calls of the warm-up differ, a note says
    so.

    The model is left as it was: classes, buffers, gradients, random state, and the counts in
    `report(model)`; so is what Python attributes hold, as deep as a cache goes. Parameters that
    the model writes to when it is called are not put back, nor are CUDA's peak memory statistics.
    No other thread may run the model meanwhile.

    Args:
        model: a model with something fused in it.
        *args: the inputs. Those that `forward` changes, such as a cache, stay as they are.
        method: what is called, `"forward"` or such as `"generate"`.
        backward: whether the backward of the output's `loss`, or else of the sum of its
            floating outputs, is part of the time. Gradients are None before each sample.
        compare: more to measure: `"unfused compiled"`, `"fused compiled"`, `"liger"`.
        compile_options: arguments for torch.compile, such as `{"mode": "reduce-overhead"}`.
        seconds: how long to go on at most once all is warm, unless the confidence needs more
            rounds (6 for 0.95).
        precision: stop earlier once every ratio's interval is narrower than this part of it.
        confidence: of the intervals.
        progress: a bar on stderr after a second; None for where tqdm is installed.
        **kwargs: the inputs by name. Where the model has a parameter with the name of an
            option, the option is meant: give the model's by position, or benchmark a module
            around it whose `forward` has another name for it.

    Returns:
        A row per candidate: median, ratio to unfused, both with intervals, tokens per second,
        host and device time, peak memory, and how often the kernels ran.

    Raises:
        FusionError: nothing is fused, the model is compiled already or has no values, or an
            option is none, or could be the model's.
        NotFusableError: Liger does not know the model.
        MissingPackageError: Liger, or tqdm where `progress=True`, is not installed.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from module_fusion import benchmark, fuse_modules
        >>> model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        >>> _ = fuse_modules(model, ["0", "1"])
        >>> found = benchmark(model, torch.randn(2, 8), seconds=0.1)
        >>> [row.name for row in found.rows]
        ['unfused', 'fused']
        >>> found["fused"].note
        'the kernel did not run: no kernel'
    """
    options = {
        "method": method,
        "backward": backward,
        "compare": compare,
        "compile_options": compile_options,
        "seconds": seconds,
        "precision": precision,
        "confidence": confidence,
        "progress": progress,
    }
    if isinstance(model, nn.Module):
        check_not_ambiguous(benchmark, model, method, options)
    check_options(model, options)
    check_not_fake(model, "benchmark")
    check_not_compiled(model)
    found = chains_in(model)
    if not found:
        raise FusionError(
            f"Nothing is fused in {type(model).__name__}, so there is nothing to compare. Call "
            f"fuse(model), or fuse_modules(model, [...]), then benchmark(model, ...)."
        )
    chains = [item.chain for item in found]
    workload = Workload(model, method, backward, args, kwargs)
    stopwatch = Stopwatch(devices_of(model, workload.tensors))
    with ExitStack() as stack:
        put_back = stack.enter_context(nothing_left_behind(model, *workload.modules))
        stack.enter_context(counts_kept(found))
        bar = stack.enter_context(Progress(progress))
        stack.enter_context(torch.set_grad_enabled(backward))
        runs = [
            Run(candidate, workload, stopwatch, chains, put_back)
            for candidate in candidates_of(model, names_in(compare), compile_options or {})
        ]
        for run in runs:
            with bar.during(f"warming up {run.candidate.name}"):
                run.warm_up()
        calls = min(_MOST_CALLS, math.ceil(_SAMPLE_S / min(run.typical.wall_s for run in runs)))
        rounds = _rounds(runs, calls, seconds, precision, confidence, bar)
    return BenchmarkReport(
        rows=tuple(run.row(runs[0], confidence) for run in runs),
        device=device_name(stopwatch.devices),
        torch_version=torch.__version__,
        method=method,
        backward=backward,
        rounds=rounds,
        calls_per_sample=calls,
        confidence=confidence,
    )


def _rounds(
    runs: Sequence[Run],
    calls: int,
    seconds: float,
    precision: float,
    confidence: float,
    bar: Progress,
) -> int:
    """Sample every candidate in turn until it is enough; how many rounds that were."""
    fewest = rounds_needed(confidence)
    next_look = max(fewest, _FEWEST_ROUNDS)
    start = time.perf_counter()
    for done in itertools.count(1):
        turn = done % len(runs)
        for run in (*runs[turn:], *runs[:turn]):
            run.take_sample(calls)
        elapsed = time.perf_counter() - start
        if done >= fewest and elapsed >= seconds:
            break
        if done >= next_look:
            if all(_is_narrow(run.ratios(runs[0]), precision, confidence) for run in runs[1:]):
                break
            next_look = math.ceil(1.25 * done)
        bar.show(f"round {done}", elapsed / seconds if seconds else 1.0)
    return done


def _is_narrow(ratios: Sequence[float], precision: float, confidence: float) -> bool:
    low, high = median_interval(ratios, confidence)
    return high - low < precision * median(ratios)
