"""One candidate of `benchmark`: its calls, its samples, and what became of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..chain import Chain
from ..context import check_has_values
from ..errors import FusionError
from ..verifying.structures import tensors_in
from .candidates import ON_REQUEST, Candidate
from .report import BenchmarkRow
from .timing import Sample, Stopwatch, frames_compiled, median, median_interval
from .workload import Inputs, Workload, are_alike, sizes_of

# A call that takes longer than this finds no warmer caches the second time.
_QUICK_S = 0.05
# The graph trees of "reduce-overhead" run, record and then replay.
_WARM_UP, _WARM_UP_COMPILED, _LONGEST_WARM_UP = 2, 4, 12
_NOT_REPEATED = (
    "two calls on the same inputs gave other results: something that grows or changes is not put "
    "back, such as a cache that the model reaches in no attribute, so rounds may be other work"
)


@dataclass
class _Count:
    """How the calls of one chain went, in timed calls."""

    kernel: int = 0
    members: int = 0
    reason: str | None = None


@dataclass
class Run:
    """One candidate and what was measured of it."""

    candidate: Candidate
    workload: Workload
    stopwatch: Stopwatch
    chains: Sequence[Chain]
    put_back: Callable[[], None]
    samples: list[Sample] = field(default_factory=list)
    typical: Sample = field(default_factory=lambda: Sample(0.0))
    tokens: int | None = None
    peak_memory_bytes: int | None = None
    compiled_again: int = 0
    is_repeated: bool = True

    def __post_init__(self) -> None:
        self.counts = [_Count() for _ in self.chains]

    def warm_up(self) -> None:
        """Run until nothing is compiled any more, then look at tokens and memory.

        Raises:
            FusionError: a candidate that was asked for does not run at all.
        """
        try:
            self._warm_up()
        except Exception as error:
            if self.candidate.name not in ON_REQUEST:
                raise
            raise FusionError(
                f"{self.candidate.name!r} does not run on these inputs; leave it out of "
                f"compare. {type(error).__name__}: {error}"
            ) from error

    def _warm_up(self) -> None:
        fewest = _WARM_UP_COMPILED if self.candidate.compiled else _WARM_UP
        with self.candidate.active():
            call = self.workload.bound_to(self.candidate.module)
            outputs: list[Any] = []
            for count in range(1, _LONGEST_WARM_UP + 1):
                before = frames_compiled()
                outputs.clear()
                self.typical = self.stopwatch.time(
                    lambda given: outputs.append(call(given)), [self._from_the_start()]
                )
                if count >= fewest and frames_compiled() == before:
                    break
            last = sizes_of(outputs.pop())
            output = call(self._from_the_start())
            check_has_values(self.candidate.module, tensors_in(output), "benchmark")
            self.is_repeated = are_alike(last, sizes_of(output))
            self.tokens = self.workload.tokens(output)
            del output
            self.peak_memory_bytes = self.stopwatch.peak_memory(call, self._from_the_start())

    def take_sample(self, calls: int) -> None:
        """One sample; a call before it warms caches and finds out the device's own time."""
        device_s = None
        with self.candidate.active():
            call = self.workload.bound_to(self.candidate.module)
            if self.stopwatch.cuda or self.typical.wall_s < _QUICK_S:
                given = self._from_the_start()
                device_s = self.stopwatch.device_time(call, given, self.typical.host_s)
            inputs = [self._from_the_start() for _ in range(calls)]
            frames, before = frames_compiled(), self._calls_so_far()
            sample = self.stopwatch.time(call, inputs)
            self.compiled_again += frames_compiled() > frames
            self._count_since(before)
        self.samples.append(sample._replace(device_s=device_s))

    def ratios(self, unfused: Run) -> list[float]:
        """Time in units of the unfused model's, round by round."""
        pairs = zip(self.samples, unfused.samples, strict=True)
        return [mine.wall_s / theirs.wall_s for mine, theirs in pairs]

    def row(self, unfused: Run, confidence: float) -> BenchmarkRow:
        """What the samples come to."""
        walls = [sample.wall_s for sample in self.samples]
        hosts = [sample.host_s for sample in self.samples if sample.host_s is not None]
        devices = [sample.device_s for sample in self.samples if sample.device_s is not None]
        ratios = self.ratios(unfused)
        wall, compiled = median(walls), self.candidate.compiled
        return BenchmarkRow(
            name=self.candidate.name,
            median_s=wall,
            interval_s=median_interval(walls, confidence),
            ratio=median(ratios),
            ratio_interval=None if self is unfused else median_interval(ratios, confidence),
            tokens_per_second=None if self.tokens is None else self.tokens / wall,
            host_s=median(hosts) if hosts else None,
            # A few lucky samples would be no picture of all.
            device_s=median(devices) if 2 * len(devices) > len(self.samples) else None,
            peak_memory_bytes=self.peak_memory_bytes,
            kernel_calls=None if compiled else sum(count.kernel for count in self.counts),
            member_calls=None if compiled else sum(count.members for count in self.counts),
            note="; ".join([*self._notes(), *self._about_tokens(unfused)]),
        )

    def _from_the_start(self) -> Inputs:
        self.put_back()
        if self.workload.backward:
            for parameter in self.candidate.module.parameters():
                parameter.grad = None
        return self.workload.fresh()

    def _calls_so_far(self) -> list[tuple[int, int]]:
        return [(chain.kernel_calls, chain.member_calls) for chain in self.chains]

    def _count_since(self, before: Sequence[tuple[int, int]]) -> None:
        for count, chain, (kernel, members) in zip(self.counts, self.chains, before, strict=True):
            count.kernel += chain.kernel_calls - kernel
            count.members += chain.member_calls - members
            if chain.member_calls > members:
                count.reason = chain.reason

    def _notes(self) -> Iterator[str]:
        if self.candidate.fused:
            compiled = self.candidate.compiled
            yield from self._about_graphs() if compiled else self._about_kernels()
        if not self.is_repeated:
            yield _NOT_REPEATED
        if self.compiled_again:
            yield f"torch.compile ran in {self.compiled_again} of the {len(self.samples)} samples"

    def _about_tokens(self, unfused: Run) -> Iterator[str]:
        if self.tokens != unfused.tokens:
            yield f"{self.tokens} tokens, unfused {unfused.tokens}: another amount of work"

    def _about_kernels(self) -> Iterator[str]:
        without = [count for count in self.counts if count.members or not count.kernel]
        reasons = _joined(count.reason or "the modules were not called" for count in without)
        if not any(count.kernel for count in self.counts):
            yield f"the kernel did not run: {reasons}"
        elif without:
            yield f"the members ran in {len(without)} of {len(self.counts)} groups: {reasons}"

    def _about_graphs(self) -> Iterator[str]:
        known = [self._why_not_in_graph(chain) for chain in self.chains]
        reasons = [reason for reason in known if reason]
        if reasons:
            among = f"in {len(reasons)} of {len(known)} groups "
            where = among if len(reasons) < len(known) else ""
            yield f"the kernel is {where}not in the graph: {_joined(reasons)}"

    def _why_not_in_graph(self, chain: Chain) -> str | None:
        if not chain.armed or chain.seat is None:
            return chain.why_not_running()
        can = chain.seat.__dict__["_capabilities"]
        if not can["can_torch_compile"]:
            return "the kernel does not support torch.compile"
        if self.workload.backward and not can["has_backward"]:
            return "the kernel has no backward"
        return chain.why_not_compiled()


def _joined(reasons: Iterator[str] | Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))
