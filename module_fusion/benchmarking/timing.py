"""How long a call takes, and a median with an interval that assumes no distribution."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

# Holding a stream back is counted in cycles of a clock that no GPU exceeds by much.
_CYCLES_PER_SECOND = 2e9
_LONGEST_HOLD_S = 0.1


class Sample(NamedTuple):
    """One sample, in seconds per call.

    Attributes:
        wall_s: until the result is there.
        host_s: until the call returned to Python, None where the two are the same.
        device_s: of the device alone, None where it is not known.
    """

    wall_s: float
    host_s: float | None = None
    device_s: float | None = None


class Stopwatch:
    """Times calls on the devices of a model; synchronises before and after.

    Args:
        devices: where the model and its inputs are. The device's own time is measured on one
            CUDA device, host time on any device that runs behind the host.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self.cuda = [device for device in self.devices if device.type == "cuda"]

    def synchronize(self) -> None:
        for device in self.devices:
            getattr(torch, device.type).synchronize(device)

    def time(self, call: Callable[[Any], Any], inputs: Sequence[Any]) -> Sample:
        """The mean of one call per input, one after the other."""
        self.synchronize()
        start = time.perf_counter()
        for given in inputs:
            call(given)
        returned = time.perf_counter()
        self.synchronize()
        end = time.perf_counter()
        host = (returned - start) / len(inputs) if self.devices else None
        return Sample((end - start) / len(inputs), host)

    def device_time(
        self, call: Callable[[Any], Any], given: Any, host_s: float | None
    ) -> float | None:
        """Seconds the device works on one call, with all of it enqueued before it starts.

        The stream is held back for longer than the host takes. None where that was not enough,
        as for a call that waits for the device itself, and on other devices than one of CUDA.
        """
        if len(self.cuda) != 1 or len(self.devices) != 1 or host_s is None:
            call(given)
            return None
        cuda: Any = torch.cuda
        with cuda.device(self.cuda[0]):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            self.synchronize()
            hold = min(2 * host_s, _LONGEST_HOLD_S)
            cuda._sleep(int(hold * _CYCLES_PER_SECOND))
            start.record()
            call(given)
            end.record()
            was_ahead = not start.query()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 if was_ahead else None

    def peak_memory(self, call: Callable[[Any], Any], given: Any) -> int | None:
        """Bytes one call allocates at most, on top of what is allocated; None without CUDA."""
        if not self.cuda:
            return None
        self.synchronize()
        before = [torch.cuda.memory_allocated(device) for device in self.cuda]
        for device in self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        call(given)
        self.synchronize()
        peaks = [torch.cuda.max_memory_allocated(device) for device in self.cuda]
        return sum(peaks) - sum(before)


def devices_of(model: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.device]:
    """The devices of parameters, buffers and inputs, each once."""
    found = (*model.parameters(), *model.buffers(), *tensors)
    return list(dict.fromkeys(tensor.device for tensor in found))


def frames_compiled() -> int:
    """How many frames torch.compile has compiled in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["frames"]["total"])


def rounds_needed(confidence: float) -> int:
    """The fewest values of which the smallest and the largest are such an interval."""
    count = 1
    while _left_out(count, confidence) < 0:
        count += 1
    return count


def median_interval(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Two of the values that have the median between them, at least with this confidence.

    Counts alone decide which: each value lies below the median with probability one half,
    whatever the distribution, so the number that do is binomial (the sign test turned round).
    That assumes that the values are independent: of those that drift it is too narrow.
    """
    ordered = sorted(values)
    cut = _left_out(len(ordered), confidence)
    if cut < 0:
        raise ValueError(f"{len(ordered)} values are too few for a confidence of {confidence}")
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@lru_cache(maxsize=4096)
def _left_out(count: int, confidence: float) -> int:
    """How many values to leave out at each end; -1 where even all of them are too few."""
    limit = Fraction(1 - confidence) * 2**count / 2
    term = total = 1
    below = 0
    while total <= limit:
        term = term * (count - below) // (below + 1)
        total += term
        below += 1
    return below - 1


def device_name(devices: Sequence[torch.device]) -> str:
    """What a person calls the device: the GPU's name, or the processor's."""
    for device in devices:
        if device.type == "cuda":
            return str(torch.cuda.get_device_name(device))
    names = {device.type for device in devices} - {"cpu"}
    return names.pop() if names else _processor()


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
