"""`benchmark`: its numbers are right, its doubts are stated, and nothing is left behind."""

from __future__ import annotations

import array
import dataclasses
import io
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from structure import structure
from support import PATHS, Block, Mlp, Model, Norm, WeightKernel, mapped
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from module_fusion import (
    BenchmarkReport,
    FusionError,
    MissingPackageError,
    NotFusableError,
    benchmark,
    fuse_modules,
    report,
    verify,
)
from module_fusion.benchmarking import timing
from module_fusion.benchmarking.candidates import candidates_of, twin
from module_fusion.benchmarking.report import BenchmarkRow
from module_fusion.benchmarking.runs import Run
from module_fusion.benchmarking.timing import median_interval, rounds_needed
from module_fusion.benchmarking.workload import are_alike, sizes_of

QUICK = {"seconds": 0.0, "progress": False}


@pytest.fixture
def fused_model(model: Model) -> Model:
    with mapped(K=WeightKernel):
        fuse_modules(model, PATHS, kernel="K")
    return model


# Known ratios


class _Clock:
    """A clock that only the modules move, so that what they cost is known exactly."""

    def __init__(self) -> None:
        self.now = 0.0
        self.noise = random.Random(0)

    def spend(self, seconds: float) -> None:
        # Gets slower and slower: what both of a round's calls have in common.
        self.now += seconds * (1 + self.now) * self.noise.lognormvariate(0, 0.2)


def _on_a_clock_of_its_own(
    monkeypatch: pytest.MonkeyPatch, members_s: float, kernel_s: float, **options: Any
) -> BenchmarkReport:
    clock = _Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    model = _costing(monkeypatch, lambda: clock.spend(members_s), lambda: clock.spend(kernel_s))
    return benchmark(model, torch.randn(2, 3, 8), **{**QUICK, **options})


class _SpendingMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.spend())


def _costing(
    monkeypatch: pytest.MonkeyPatch, members: Callable[[], None], kernel: Callable[[], None]
) -> Model:
    """A fused model in which the members of a call cost one thing and the kernel another."""

    def spend(x: Tensor) -> Tensor:
        members()
        return x

    class CostlyKernel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kernel()
            return WeightKernel.forward(self, x)

    # A method of tensors, because the members of other code that has an effect would run.
    monkeypatch.setattr(Tensor, "spend", spend, raising=False)
    model = Model(1)
    model.layers[0].mlp = _SpendingMlp()
    with mapped(K=CostlyKernel):
        fuse_modules(model, PATHS, kernel="K")
    return model


def test_the_interval_holds_a_ratio_that_is_known_although_the_machine_gets_slower(
    monkeypatch: pytest.MonkeyPatch,
):
    found = _on_a_clock_of_its_own(
        monkeypatch, 4e-3, 2e-3, confidence=0.99, seconds=30, precision=0.1
    )
    low, high = found["fused"].ratio_interval
    assert low < 0.5 < high
    assert high - low < 0.1 * 0.5 * 1.05
    assert found["fused"].kernel_calls == found.rounds
    assert "times as fast" in found["fused"].verdict
    # The times themselves drifted by more than the ratio's interval is wide.
    assert found["unfused"].median_s > 1.5 * 4e-3


@pytest.mark.parametrize("slowdown", [1.0, 1.5])
def test_what_is_not_faster_is_not_called_faster(monkeypatch: pytest.MonkeyPatch, slowdown: float):
    found = _on_a_clock_of_its_own(monkeypatch, 2e-3, 2e-3 * slowdown, confidence=0.999)
    verdict = found["fused"].verdict
    assert verdict == "no difference shown" if slowdown == 1 else "as long" in verdict
    assert verdict in str(found)
    assert "as fast" not in str(found)


def test_it_agrees_with_an_independent_timing_of_the_same_calls(monkeypatch: pytest.MonkeyPatch):
    jitter, ran = random.Random(0), []

    def spend(name: str, low_s: float, high_s: float) -> None:
        ran.append(name)
        time.sleep(jitter.uniform(low_s, high_s))

    model = _costing(
        monkeypatch,
        lambda: spend("unfused", 3.4e-3, 4.6e-3),
        lambda: spend("fused", 1.7e-3, 2.3e-3),
    )
    started: list[float] = []
    lasted: dict[str, list[float]] = {"fused": [], "unfused": []}

    def start(*_: object) -> None:
        started.append(time.perf_counter())

    def stop(*_: object) -> None:
        lasted[ran[-1]].append(time.perf_counter() - started[-1])

    # The very same calls, whatever else the machine does meanwhile, by a watch of our own.
    model.register_forward_pre_hook(start)
    model.register_forward_hook(stop)
    found = benchmark(
        model, torch.randn(2, 3, 8), seconds=0.8, precision=0.0, confidence=0.999, progress=False
    )
    row = found["fused"]
    assert row.kernel_calls == found.rounds
    ours, theirs = (lasted[name][-found.rounds :] for name in ("fused", "unfused"))
    independent = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    assert row.ratio_interval[0] < independent < row.ratio_interval[1]
    for name, times in (("fused", ours), ("unfused", theirs)):
        low, high = found[name].interval_s
        assert low < statistics.median(times) < high
        assert found[name].median_s == pytest.approx(statistics.median(times), rel=0.05)


def _wait(seconds: float) -> None:
    """Until a moment on the clock: who mostly sleeps is not made longer by what else runs."""
    end = time.perf_counter() + seconds
    time.sleep(seconds - 3e-4)
    while time.perf_counter() < end:
        pass


def _timed_in_turn(models: list[nn.Module], x: Tensor, calls: int) -> list[list[float]]:
    """How long each call took, in a loop of its own."""
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(calls):
            for model, lasted in zip(models, times, strict=True):
                model(x)  # What it needs is in the caches after that.
                start = time.perf_counter()
                model(x)
                lasted.append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize("kernel_s", [5e-3, 20e-3])
def test_it_agrees_with_a_run_of_its_own_of_work_whose_ratio_is_known(
    monkeypatch: pytest.MonkeyPatch, kernel_s: float
):
    jitter, members_s, width = random.Random(0), 10e-3, 0.1

    def spend(seconds: float) -> None:
        _wait(seconds * jitter.uniform(1 - width, 1 + width))

    model = _costing(monkeypatch, lambda: spend(members_s), lambda: spend(kernel_s))
    x = torch.randn(2, 3, 8)
    options = {"seconds": 1.2, "precision": 0.0, "confidence": 0.9999, "progress": False}
    row = benchmark(model, x, **options)["fused"]
    assert row.kernel_calls > 0
    # The middle of what a call may take, so that few calls tell.
    width = 0.0
    never_fused = Model(1)
    never_fused.layers[0].mlp = _SpendingMlp()
    ours, theirs = _timed_in_turn([model, never_fused], x, 25)
    independent = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = row.ratio_interval
    assert low < independent < high
    # The rest of the model, a few per cent, takes the same time in both.
    assert low < kernel_s / members_s * 1.05
    assert high > kernel_s / members_s * 0.95
    assert (row.ratio < 1) == (kernel_s < members_s)


def test_what_rounds_have_in_common_with_the_next_leaves_the_ratios_interval_right():
    draw, confidence, held, held_apart, widths = random.Random(2), 0.95, 0, 0, []
    for _ in range(400):
        ours, theirs, speed = [], [], 0.0
        for _ in range(40):
            # The machine's speed wanders: what a round has, the next has nearly too.
            speed = 0.98 * speed + draw.gauss(0, 0.1)
            for samples, cost in ((ours, 2.0), (theirs, 4.0)):
                samples.append(timing.Sample(cost * math.exp(speed + draw.gauss(0, 0.05))))
        fused, unfused = SimpleNamespace(samples=ours), SimpleNamespace(samples=theirs)
        low, high = median_interval(Run.ratios(fused, unfused), confidence)
        held += low < 0.5 < high
        widths.append(high - low)
        low, high = median_interval([sample.wall_s for sample in ours], confidence)
        held_apart += low < 2.0 < high
    assert held / 400 > confidence - 0.03
    assert statistics.mean(widths) < 0.05
    # The times themselves are not independent, and the documentation says so.
    assert held_apart / 400 < 0.8


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(1)
    for count, confidence in [(6, 0.95), (25, 0.9), (40, 0.99)]:
        held = 0
        for _ in range(2000):
            low, high = median_interval([draw.expovariate(1) for _ in range(count)], confidence)
            held += low < math.log(2) < high
        assert held / 2000 > confidence - 0.015


@pytest.mark.parametrize("count", [6, 7, 20, 101])
def test_the_interval_is_the_narrowest_with_that_confidence(count: int):
    low, high = median_interval(list(range(count)), 0.95)
    assert high == count - 1 - low

    def outside(cut: int) -> float:
        return 2 * sum(math.comb(count, j) for j in range(cut + 1)) / 2**count

    assert outside(low) <= 0.05 < outside(low + 1)


def test_too_few_rounds_for_the_confidence_are_not_enough_whatever_the_budget(
    model: Model, x: Tensor
):
    assert rounds_needed(0.95) == 6
    with pytest.raises(ValueError, match="too few"):
        median_interval([1.0] * 5, 0.95)
    fuse_modules(model, PATHS)
    assert benchmark(model, x, **QUICK).rounds == 6
    assert benchmark(model, x, confidence=0.999, **QUICK).rounds == rounds_needed(0.999) == 11


def test_it_stops_when_the_interval_is_narrow_or_the_time_is_up(fused_model: Model, x: Tensor):
    start = time.perf_counter()
    found = benchmark(fused_model, x, seconds=60, precision=100.0, progress=False)
    assert found.rounds == 20
    assert time.perf_counter() - start < 30
    assert benchmark(fused_model, x, seconds=0.3, precision=0.0, progress=False).rounds > 20


def test_every_round_has_every_candidate_once_in_an_order_that_rotates(
    fused_model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    take_sample = Run.take_sample

    def noted(run: Run, calls: int) -> None:
        order.append(run.candidate.name)
        take_sample(run, calls)

    monkeypatch.setattr(Run, "take_sample", noted)
    benchmark(fused_model, x, **QUICK)
    rounds = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert rounds == 3 * [("fused", "unfused"), ("unfused", "fused")]


def test_calls_too_quick_for_the_clock_are_timed_several_at_once(fused_model: Model, x: Tensor):
    found = benchmark(fused_model, x, **QUICK)
    assert found.calls_per_sample >= 1
    quick = nn.Sequential(nn.Identity(), nn.Identity()).to(x.device)
    fuse_modules(quick, ["0", "1"])
    found = benchmark(quick, x, **QUICK)
    assert found.calls_per_sample > 1
    assert found["fused"].median_s < 1e-3
    assert found["fused"].member_calls == found.rounds * found.calls_per_sample
    assert f"of {found.calls_per_sample} calls" in str(found)


# Which path ran


def test_it_counts_the_calls_in_which_the_kernels_ran(fused_model: Model, x: Tensor):
    found = benchmark(fused_model, x, **QUICK)
    timed = found.rounds * found.calls_per_sample
    assert (found["fused"].kernel_calls, found["fused"].member_calls) == (2 * timed, 0)
    assert (found["unfused"].kernel_calls, found["unfused"].member_calls) == (0, 0)
    assert found["fused"].note == ""
    assert f"kernel {2 * timed}" in str(found)


def test_a_kernel_that_never_ran_is_named_with_the_reason(model: Model, x: Tensor):
    fuse_modules(model, PATHS)
    found = benchmark(model, x, **QUICK)
    assert found["fused"].kernel_calls == 0
    assert "the kernel did not run: no kernel" in str(found)


def test_groups_whose_members_ran_are_counted_with_the_reason(fused_model: Model, x: Tensor):
    fused_model.layers[0].norm.register_forward_hook(lambda *_: None)
    found = benchmark(fused_model, x, **QUICK)
    assert found["fused"].note.startswith("the members ran in 1 of 2 groups: norm has a hook")


def test_modules_that_are_not_called_are_said_not_to_be(fused_model: Model, x: Tensor):
    fused_model.forward = lambda x: x + 1
    note = benchmark(fused_model, x, **QUICK)["fused"].note
    assert note == "the kernel did not run: the modules were not called"


class SignKernel(WeightKernel):
    """Tells itself from the members in a graph: nothing else takes a sign."""

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x) + 0 * torch.sign(x)


class UncompilableKernel(WeightKernel):
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        return WeightKernel.forward(self, x) + 0 * x


COMPILED = ["unfused compiled", "fused compiled"]


class _PlainNorm(Norm):
    """Counts nothing, because a graph is made for one value of a count."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _PlainMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def plain(model: Model) -> Model:
    for block in model.layers:
        block.norm.__class__, block.mlp.__class__ = _PlainNorm, _PlainMlp
    return model


def test_compiled_candidates_hold_what_they_say_and_nothing_is_compiled_in_a_round(
    plain: Model, x: Tensor
):
    model = plain
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    with mapped(K=SignKernel):
        fuse_modules(model, PATHS, kernel="K")
    before = structure(model)
    found = benchmark(model, x, compare=COMPILED, compile_options={"backend": backend}, **QUICK)
    assert [row.name for row in found.rows] == ["unfused", "fused", *COMPILED]
    # One graph each, so nothing was compiled again, in a round or before.
    assert ["sign" in graph for graph in graphs] == [False, True]
    assert [row.note for row in found.rows] == [""] * 4
    assert found["fused compiled"].kernel_calls is None
    assert structure(model) == before
    model(x)
    assert report(model).groups[0].kernel_calls == 1


def test_compiling_within_a_round_is_noted(
    fused_model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch
):
    frames = iter(range(1000))
    monkeypatch.setattr("module_fusion.benchmarking.runs.frames_compiled", lambda: next(frames))
    found = benchmark(fused_model, x, **QUICK)
    assert found["fused"].note == "torch.compile ran in 6 of the 6 samples"


def test_a_kernel_that_is_not_in_the_graph_is_said_not_to_be(plain: Model, x: Tensor):
    model = plain
    with mapped(K=UncompilableKernel):
        fuse_modules(model, PATHS, kernel="K")
    options = {"compile_options": {"backend": "eager"}, **QUICK}
    note = benchmark(model, x, compare="fused compiled", **options)["fused compiled"].note
    assert note == "the kernel is not in the graph: the kernel does not support torch.compile"


# Backward, tokens, devices


def test_with_backward_the_gradients_are_computed_and_put_back(fused_model: Model, x: Tensor):
    weight = fused_model.layers[0].mlp.up_proj.weight
    weight.grad = mine = torch.full_like(weight, 7.0)
    seen: list[bool] = []
    weight.register_hook(lambda gradient: seen.append(weight.grad is None))
    found = benchmark(fused_model, x, backward=True, **QUICK)
    assert found.backward
    assert seen[:2] == [True, True]
    assert weight.grad is mine
    assert mine.eq(7).all()
    assert fused_model.layers[0].norm.weight.grad is None
    assert str(found).startswith("forward + backward: ")
    seen.clear()
    benchmark(fused_model, x, **QUICK)
    assert seen == []


@dataclasses.dataclass
class _Output:
    value: Tensor


@pytest.mark.parametrize("form", [_Output, lambda y: torch.complex(y, y), lambda y: {"y": [y]}])
def test_with_backward_tensors_are_found_in_outputs_of_any_form(
    fused_model: Model, x: Tensor, form: Callable[[Tensor], Any]
):
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fused_model

        def forward(self, x: Tensor) -> Any:
            return form(self.model(x))

    seen: list[Tensor] = []
    fused_model.layers[0].mlp.up_proj.weight.register_hook(seen.append)
    assert benchmark(Returns(), x, backward=True, **QUICK).backward
    assert all(float(gradient.abs().sum()) > 0 for gradient in seen)
    assert len(seen) > 2


def _causal() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    fuse_modules(model, ["model.layers.*.post_attention_layernorm", "model.layers.*.mlp"])
    return model


def test_tokens_per_second_of_a_causal_model(device: str):
    model, ids = _causal().to(device), torch.ones(2, 5, dtype=torch.long, device=device)
    for given in ({"input_ids": ids}, {"input_ids": ids, "labels": ids}):
        found = benchmark(model, **given, **QUICK)
        assert all(row.tokens_per_second == 10 / row.median_s for row in found.rows)
    written = benchmark(model, ids, method="generate", max_new_tokens=3, do_sample=True, **QUICK)
    assert all(row.tokens_per_second == 2 * 3 / row.median_s for row in written.rows)
    assert "tokens/s" in str(written)
    embeds = model.get_input_embeddings()(ids).detach()
    assert benchmark(model, inputs_embeds=embeds, **QUICK)["fused"].tokens_per_second is None
    assert written.method == "generate"


def test_tokens_per_second_of_an_encoder_decoder_model_are_those_it_writes():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=32, decoder_start_token_id=0, eos_token_id=None)
    model = T5ForConditionalGeneration(config).eval()
    fuse_modules(model, ["encoder.block.*.layer.1.layer_norm"])
    ids = torch.ones(2, 5, dtype=torch.long)
    found = benchmark(model, ids, method="generate", max_new_tokens=4, **QUICK)
    assert found["fused"].tokens_per_second == 2 * 4 / found["fused"].median_s


@pytest.mark.parametrize("has_start", [True, False])
def test_decoder_tokens_that_are_given_are_not_counted_as_written(has_start: bool):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, vocab_size=32, decoder_start_token_id=0, eos_token_id=None)
    model = T5ForConditionalGeneration(config).eval()
    fuse_modules(model, ["encoder.block.*.layer.1.layer_norm"])
    given = torch.randint(1, 32, (1, 20))
    given[0, 0] = 0 if has_start else 1
    options = {"min_new_tokens": 2, "max_new_tokens": 2, "num_beams": 2, "num_return_sequences": 2}
    options |= {"decoder_input_ids": given, "do_sample": False}
    found = benchmark(
        model, torch.ones(1, 5, dtype=torch.long), method="generate", **options, **QUICK
    )
    assert found["fused"].tokens_per_second == 2 * 2 / found["fused"].median_s


def test_a_generate_that_returns_new_tokens_alone_writes_all_of_them(fused_model: Model):
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.embed = fused_model, nn.Embedding(50, 8)

        def generate(self, input_ids: Tensor) -> Tensor:
            return 50 + self.model(self.embed(input_ids)).argmax(-1)[:, :3]

    device = fused_model.layers[0].norm.weight.device
    ids = torch.randint(0, 50, (2, 9), device=device)
    found = benchmark(Writer().to(device), ids, method="generate", **QUICK)
    assert found["fused"].tokens_per_second == 2 * 3 / found["fused"].median_s


def test_no_tokens_are_made_up_for_other_inputs(fused_model: Model, x: Tensor):
    found = benchmark(fused_model, x, **QUICK)
    assert found["fused"].tokens_per_second is None
    assert "tokens/s" not in str(found)


def test_host_device_and_memory_are_measured_where_they_can_be(fused_model: Model, x: Tensor):
    row = benchmark(fused_model, x, **QUICK)["fused"]
    measured = (row.host_s, row.device_s, row.peak_memory_bytes)
    if x.device.type == "cuda":
        assert 0 < row.host_s <= row.median_s
        assert 0 < row.device_s <= row.median_s
        assert row.peak_memory_bytes > 0
    else:
        assert measured == (None, None, None)


def test_a_compiled_candidate_also_compiles_what_generate_calls():
    model, ids = _causal(), torch.ones(1, 4, dtype=torch.long)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    options = {"method": "generate", "max_new_tokens": 2, "compare": "unfused compiled"}
    benchmark(model, ids, compile_options={"backend": backend}, **options, **QUICK)
    assert graphs
    assert "_compiled_call_impl" not in model.__dict__


# Nothing left behind


class _Stateful(Block):
    """Draws random numbers, writes a buffer and a cache, and can be made to raise."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        # No list: what containers in attributes hold is put back.
        self.drawn: array.array[float] = array.array("d")
        self.raises: list[BaseException] = []
        self.after = 10**9

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        self.seen += 1
        self.drawn.append(float(torch.rand(())))
        time.sleep(3e-4)
        if cache is not None:
            assert not cache
            cache.append(x)
            x.add_(1)
        if self.raises and len(self.drawn) > self.after:
            raise self.raises[0]
        return super().forward(x)


def _stateful() -> _Stateful:
    model = _Stateful()
    with mapped(K=WeightKernel):
        fuse_modules(nn.ModuleDict({"block": model}), ["block.norm", "block.mlp"], kernel="K")
    return model


@pytest.mark.parametrize(
    ("after", "error"),
    [*((n, KeyError("mine")) for n in (0, 1, 9, 10**9)), (4, KeyboardInterrupt())],
    ids=repr,
)
def test_the_model_is_left_as_it_was_also_after_an_exception(after: int, error: BaseException):
    model = _stateful().train()
    model(torch.randn(2, 8))
    gradient = model.norm.weight.grad = torch.ones(8)
    model.raises, model.after = [error], after + len(model.drawn)
    before, counts, grad = structure(model), report(model).groups, torch.is_grad_enabled()
    buffer, random_state = model.seen.clone(), torch.get_rng_state()
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    if after < 10**9:
        with pytest.raises(type(error)):
            benchmark(model, x, **QUICK)
    else:
        benchmark(model, x, backward=True, **QUICK)
    assert structure(model) == before
    assert report(model).groups == counts
    assert torch.equal(model.seen, buffer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.norm.weight.grad is gradient
    assert gradient.eq(1).all()
    assert torch.is_grad_enabled() is grad
    assert model.training


def test_every_timed_call_starts_from_the_same_state_on_inputs_of_its_own():
    model, x, cache = _stateful(), torch.zeros(2, 8), []
    benchmark(model, x, cache=cache, **QUICK)
    assert len(set(model.drawn)) == 1
    assert len(model.drawn) > 12
    assert cache == []
    assert x.eq(0).all()


class _Attending(nn.Module):
    """A language model that notes how much is in the cache it is given, and then extends it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.lengths = array.array("q")

    def forward(self, ids: Tensor, cache: Any) -> Any:
        self.lengths.append(int(cache.get_seq_length()))
        return self.model(ids, past_key_values=cache)


@pytest.mark.parametrize("filled", [0, 5])
def test_a_cache_that_is_given_is_as_long_at_every_call(filled: int):
    model, cache = _causal(), DynamicCache()
    if filled:
        model(torch.ones(1, filled, dtype=torch.long), past_key_values=cache)
    attending = _Attending(model)
    found = benchmark(attending, torch.ones(1, 3, dtype=torch.long), cache=cache, **QUICK)
    assert len(attending.lengths) > 2 * found.rounds
    assert set(attending.lengths) == {filled}
    assert cache.get_seq_length() == filled
    assert "other work" not in str(found)


class _Collecting(nn.Module):
    """Keeps what it was given, in a place of its own, and returns all of it."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.kept = [] if kept is None else kept
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.kept.append(x)
        return torch.cat(list(self.kept))


class _Before(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, before: nn.Module) -> Tensor:
        return self.model(before(x))


def test_a_module_among_the_inputs_is_put_back_too(fused_model: Model, device: str):
    given, x = _Collecting(), torch.ones(2, 8, device=device)
    found = benchmark(_Before(fused_model), x, given, **QUICK)
    assert "other work" not in str(found)
    assert verify(_Before(fused_model), x, given).passed
    assert (len(given.kept), int(given.count)) == (0, 0)


class _OutOfReach:
    """Nothing of it is in a `__dict__`."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        self.items.append(x)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.items)


@pytest.mark.parametrize("grows", ["shapes", "values"])
def test_work_that_grows_from_call_to_call_is_said(fused_model: Model, device: str, grows: str):
    collecting = _Collecting(_OutOfReach())
    model = nn.Sequential(collecting, fused_model)
    if grows == "values":
        model.append(_Summed())
    found = benchmark(model, torch.ones(2, 8, device=device), **QUICK)
    assert len(collecting.kept.items) > found.rounds
    assert all("so rounds may be other work" in row.note for row in found.rows)
    for said in (str(found), found.to_markdown(), found._repr_html_(), str(found.to_dict())):
        assert "so rounds may be other work" in said


@pytest.mark.parametrize("dtype", ["float4_e2m1fn_x2", "bits8", "uint4"])
def test_outputs_that_have_no_sum_are_compared_by_shape(
    fused_model: Model, x: Tensor, device: str, dtype: str
):
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    packed = torch.zeros(4, 2, dtype=torch.uint8, device=device).view(getattr(torch, dtype))

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = fused_model

        def forward(self, x: Tensor) -> Any:
            return self.model(x), packed

    found = benchmark(Beside(), x.to(device), **QUICK)
    assert not any("rounds may be other work" in row.note for row in found.rows)
    both = sizes_of(packed), sizes_of(packed[:2])
    assert are_alike(both[0], both[0])
    assert not are_alike(*both)


class _Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


def test_a_module_among_the_inputs_is_not_copied(fused_model: Model, x: Tensor):
    helper, seen = nn.Identity(), set()
    plain = fused_model.forward

    def forward(x: Tensor, helper: nn.Module) -> Tensor:
        seen.add(helper)
        return plain(x)

    fused_model.forward = forward
    benchmark(fused_model, x, helper=helper, **QUICK)
    assert seen == {helper}


def test_inputs_that_belong_to_a_graph_are_copied_too(fused_model: Model, x: Tensor):
    x = x.requires_grad_() * 1
    benchmark(fused_model, x, backward=True, **QUICK)
    assert x.requires_grad


# Liger, and twins


def test_a_twin_shares_every_parameter_and_buffer_and_was_never_fused(fused_model: Model):
    fused_model.register_buffer("table", torch.ones(3))
    copied = twin(fused_model)
    mine, theirs = fused_model.state_dict(keep_vars=True), copied.state_dict(keep_vars=True)
    assert list(mine) == list(theirs)
    assert all(mine[key] is theirs[key] for key in mine)
    assert [type(m) for m in copied.modules()][:4] == [Model, nn.ModuleList, Block, Mlp]
    assert not any("_fusion" in module.__dict__ for module in copied.modules())
    assert not {*map(id, copied.modules())} & {*map(id, fused_model.modules())}
    assert report(copied).groups == ()


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package as Liger is: it patches instances, and functions of a Python module besides."""
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.used = []

    def activation(x: Tensor) -> Tensor:
        package.used.append("activation")
        return torch.nn.functional.silu(x)

    def patch(model: nn.Module) -> None:
        sys.modules["support"].F = SimpleNamespace(
            silu=activation, linear=nn.functional.linear, __module__="liger_kernel.ops"
        )
        nn.Module.added = activation
        for block in model.layers:
            block.norm.forward = lambda x: package.used.append("norm") or x

    activation.__module__ = "liger_kernel.ops"
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"known": patch}
    package._apply_liger_kernel_to_instance = patch
    names = ["liger_kernel", "liger_kernel.transformers", package.__name__]
    for name in names:
        monkeypatch.setitem(sys.modules, name, package)
    return package


def test_liger_runs_on_a_twin_and_what_it_patches_is_in_place_only_meanwhile(
    fused_model: Model, x: Tensor, liger: ModuleType
):
    fused_model.config = SimpleNamespace(model_type="known")
    before, functional = structure(fused_model), sys.modules["support"].F
    found = benchmark(fused_model, x, compare="liger", **QUICK)
    assert [row.name for row in found.rows] == ["unfused", "fused", "liger"]
    # Two blocks, and as many calls of each as of the other.
    assert liger.used.count("norm") == liger.used.count("activation") > 0
    assert liger.used.count("norm") % 2 == 0
    calls = len(liger.used)
    fused_model(x)
    assert len(liger.used) == calls
    assert structure(fused_model) == before
    assert sys.modules["support"].F is functional
    assert not hasattr(nn.Module, "added")


def test_liger_does_not_know_the_model(fused_model: Model, x: Tensor, liger: ModuleType):
    with pytest.raises(NotFusableError, match=r"model_type is None, and Liger knows known\."):
        benchmark(fused_model, x, compare="liger", **QUICK)

    def refuse(model: nn.Module) -> None:
        sys.modules["support"].F = liger._apply_liger_kernel_to_instance
        raise TypeError("no such layer")

    refuse.__module__ = "liger_kernel"
    fused_model.config = SimpleNamespace(model_type="known")
    liger._apply_liger_kernel_to_instance = refuse
    with pytest.raises(NotFusableError, match="Liger refuses Model: TypeError: no such layer"):
        benchmark(fused_model, x, compare="liger", **QUICK)
    assert sys.modules["support"].F is nn.functional


def test_liger_is_not_installed(fused_model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(MissingPackageError, match="pip install liger-kernel"):
        benchmark(fused_model, x, compare=["liger"], **QUICK)


# Progress


class _Written(io.StringIO):
    """Remembers when it was first written to."""

    first: float | None = None

    def write(self, text: str) -> int:
        self.first = self.first or time.perf_counter()
        return super().write(text)


def _bar_of(monkeypatch: pytest.MonkeyPatch, first_call_s: float, **options: Any) -> _Written:
    slow = iter([first_call_s])
    model = _costing(monkeypatch, lambda: time.sleep(next(slow, 0.0)), lambda: None)
    stderr = _Written()
    monkeypatch.setattr(sys, "stderr", stderr)
    benchmark(model, torch.randn(2, 3, 8), **options)
    return stderr


def test_no_bar_within_a_second(monkeypatch: pytest.MonkeyPatch):
    assert _bar_of(monkeypatch, 0.0, seconds=0.1, progress=True).getvalue() == ""


def test_a_bar_appears_after_a_second_even_within_one_long_call(monkeypatch: pytest.MonkeyPatch):
    start = time.perf_counter()
    written = _bar_of(monkeypatch, 1.6, seconds=0.4, precision=0.0)
    assert written.first is not None
    assert 1.0 <= written.first - start < 1.6
    assert "warming up unfused" in written.getvalue()
    assert "round " in written.getvalue()
    assert _bar_of(monkeypatch, 1.2, seconds=0.0, progress=False).getvalue() == ""


def test_a_bar_without_tqdm(fused_model: Model, x: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    benchmark(fused_model, x, seconds=0.0)
    with pytest.raises(MissingPackageError, match=r"pip install 'module-fusion\[bench\]'"):
        benchmark(fused_model, x, seconds=0.0, progress=True)


# The report


FOUND = BenchmarkReport(
    rows=(
        BenchmarkRow("unfused", 2e-3, (1.9e-3, 2.2e-3), tokens_per_second=5000.0),
        BenchmarkRow(
            name="fused",
            median_s=1e-3,
            interval_s=(0.9e-3, 1.1e-3),
            ratio=0.5,
            ratio_interval=(0.45, 0.55),
            tokens_per_second=10000.0,
            host_s=0.4e-3,
            device_s=0.8e-3,
            peak_memory_bytes=3 * 2**20,
            kernel_calls=40,
            member_calls=2,
            note="a | b",
        ),
    ),
    device="Device",
    torch_version="2.0",
    method="forward",
    backward=False,
    rounds=42,
    calls_per_sample=1,
    confidence=0.95,
)

TEXT = """\
forward: fused against unfused, 2.00 times as fast, 0.500 [0.450, 0.550] of the time

candidate  time per call    of unfused            verdict             tokens/s  host    device  \
peak memory  calls                 note
---------  ---------------  --------------------  ------------------  --------  ------  ------  \
-----------  --------------------  -----
unfused    2 ms [1.9, 2.2]  1                     reference           5,000
fused      1 ms [0.9, 1.1]  0.500 [0.450, 0.550]  2.00 times as fast  10,000    0.4 ms  0.8 ms  \
3.0 MiB      kernel 40, members 2  a | b

42 rounds in turn; medians [95% confidence intervals]; Device; torch 2.0
"of unfused" is the median of the ratios in each round, and so not exactly the ratio of the two \
medians beside it"""


def test_the_text_of_a_report_without_colours():
    assert str(FOUND) == repr(FOUND) == TEXT


def test_a_note_of_several_lines_is_one_cell():
    note = "the kernel refuses: first line\n  second | line\n<third>"
    found = dataclasses.replace(
        FOUND, rows=tuple(dataclasses.replace(row, note=note) for row in FOUND.rows)
    )
    told = "the kernel refuses: first line second | line <third>"
    rows = len(found.rows)
    lines = [line for line in found.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == rows + 2
    assert sum(told.replace("|", "\\|") in line for line in lines) == rows
    assert str(found).count(told) >= 1
    assert "\n<third>" not in str(found)


def test_markdown_has_the_cells_of_the_text():
    header, rows = FOUND.table()
    lines = [line for line in FOUND.to_markdown().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.replace(r"\|", "¦").split("|")[1:-1]] for line in lines]
    assert cells[0] == list(header)
    assert all(set(cell) == {"-"} for cell in cells[1])
    assert cells[2:] == [[cell.replace("|", "¦") for cell in row] for row in rows]
    assert all(cell in TEXT for row in rows for cell in row)
    assert FOUND.summary in FOUND.to_markdown()
    assert FOUND.conditions in FOUND.to_markdown()


def test_a_report_goes_through_json_and_comes_back(fused_model: Model, x: Tensor):
    for found in (FOUND, benchmark(fused_model, x, **QUICK)):
        plain = found.to_dict()
        assert json.loads(json.dumps(plain)) == plain
        rows = [
            BenchmarkRow(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
            for row in plain.pop("rows")
        ]
        assert BenchmarkReport(rows=tuple(rows), **plain) == found


@pytest.mark.parametrize(
    ("interval", "host_s", "kernel_calls", "said"),
    [
        ((0.7, 0.9), None, 3, ""),
        ((0.9, 1.1), None, 3, "Nothing got faster. On a CPU that is to be expected: the kernels"),
        ((1.1, 1.2), None, 3, "Nothing got faster. On a CPU that is to be expected: the kernels"),
        ((1.1, 1.2), 1.0, 3, "Nothing got faster. To be expected where the fused modules are a"),
        ((0.9, 1.1), None, 0, "Nothing got faster: no kernel ran; the table says why."),
    ],
)
def test_where_nothing_got_faster_that_is_said_with_what_to_expect(
    interval: tuple[float, float], host_s: float | None, kernel_calls: int, said: str
):
    row = BenchmarkRow("fused", 1.0, (1.0, 1.0), sum(interval) / 2, interval, None, host_s)
    row = dataclasses.replace(row, kernel_calls=kernel_calls, note="why")
    found = dataclasses.replace(FOUND, rows=(FOUND.rows[0], row))
    assert found.expectation.startswith(said)
    assert bool(found.expectation) is bool(said)
    for text in (str(found), found.to_markdown(), found._repr_html_()):
        assert ("Nothing got faster" in text) is bool(said)
        assert "median of the ratios in each round" in text


def test_a_row_is_found_by_its_name():
    assert FOUND["fused"] is FOUND.rows[1]
    with pytest.raises(KeyError, match="'liger' was not measured"):
        FOUND["liger"]


@pytest.mark.parametrize(("seconds", "cell"), [(2.0, "2 s"), (2e-6, "2 µs"), (3e-9, "3 ns")])
def test_times_are_in_the_unit_of_the_quickest(seconds: float, cell: str):
    row = BenchmarkRow("unfused", seconds, (seconds, seconds))
    found = BenchmarkReport((row,), "", "", "forward", False, 6, 1, 0.95)
    assert found.table()[1][0][1].startswith(f"{cell} [")


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_the_plot_has_bars_intervals_units_and_readable_ink(style: str):
    import matplotlib
    from matplotlib import colors

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.style.context(style), matplotlib.rc_context({"figure.facecolor": "#00000000"}):
        ax = FOUND.plot()
        ax.figure.canvas.draw()
    assert [bar.get_width() for bar in ax.patches] == [2.0, 1.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["unfused", "fused"]
    assert ax.get_xlabel() == "time per call (ms), 95% confidence interval"
    assert ax.texts[1].get_text() == "0.500 [0.450, 0.550] of unfused"
    ends = ax.collections[0].get_segments()[1][:, 0]
    assert ends.tolist() == pytest.approx([0.9, 1.1])
    paper = colors.to_rgba(ax.figure.get_facecolor())
    assert paper[3] == 1
    for ink in (ax.texts[1].get_color(), ax.title.get_color(), ax.xaxis.label.get_color()):
        assert abs(sum(paper[:3]) - sum(colors.to_rgb(ink))) > 1.5
    pyplot.close(ax.figure)


def test_the_plot_draws_on_axes_it_is_given_and_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch,
):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert FOUND.plot(ax) is ax
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'module-fusion\[bench\]'"):
        FOUND.plot()


# Errors


def _uncopyable(x: Tensor) -> dict[str, Any]:
    return {"cache": (value for value in [x])}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": ["compiled"]}, "compare has 'compiled'; besides unfused and fused there are"),
        ({"compare": "fused"}, "compare has 'fused'"),
        ({"method": "generate"}, "Model has no method 'generate'"),
        ({"confidence": 1.0}, r"confidence is a number between 0 and 1, such as 0.95, not 1\.0"),
        ({"confidence": 95}, "confidence is a number between 0 and 1"),
        ({"confidence": "high"}, "confidence is a number between 0 and 1, .* not 'high'"),
        ({"confidence": True}, "confidence is a number between 0 and 1"),
        ({"seconds": -1.0}, r"seconds is a number that is not negative, not -1\.0"),
        ({"seconds": "many"}, "seconds is a number that is not negative, not 'many'"),
        ({"seconds": None}, "seconds is a number that is not negative, not None"),
        ({"precision": math.nan}, "precision is a number that is not negative, not nan"),
        ({"precision": [0.1]}, r"precision is a number that is not negative, not \[0\.1\]"),
        ({"compare": 3}, "compare is a list with some of 'unfused compiled', .*, not 3"),
        ({"compare": [3]}, "compare has 3; besides unfused and fused there are"),
        ({"compare": [["liger"]]}, r"compare has \['liger'\]; besides"),
        ({"compile_options": "reduce-overhead"}, "compile_options is a dict of arguments for"),
        ({"backward": "yes"}, "backward is True or False, not 'yes'"),
        ({"progress": 1}, "progress is True, False or None, not 1"),
        ({"method": 3}, "method is the name of a method, such as 'generate', not 3"),
    ],
)
def test_options_that_are_none_are_refused(
    fused_model: Model, x: Tensor, options: dict[str, Any], message: str
):
    with pytest.raises(FusionError, match=message):
        benchmark(fused_model, x, **{**QUICK, **options})


class Clip(nn.Module):
    """A model whose forward has parameters with the names of options."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Any] = []

    def forward(self, x: Tensor, seconds: Any = 1, dtypes: Any = None) -> Tensor:
        self.seen = [seconds, dtypes]
        return self.model(x)


class Around(nn.Module):
    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor, length: Any) -> Tensor:
        SEEN.append(length)
        return self.clip(x, seconds=length)


SEEN: list[Any] = []


def test_a_keyword_that_the_model_has_too_is_refused_with_two_ways_out(
    fused_model: Model, x: Tensor
):
    clip = Clip(fused_model)
    for seconds in (30, torch.ones(2), "long"):
        with pytest.raises(FusionError, match="forward of Clip has a parameter 'seconds'") as told:
            benchmark(clip, x, seconds=seconds)
        assert "by position; or give benchmark a module around the model" in str(told.value)
    with pytest.raises(FusionError, match="and so has verify: it is not clear which one dtypes="):
        verify(clip, x, dtypes=[torch.float32])
    SEEN.clear()
    benchmark(Around(clip), x, length=30, **QUICK)
    assert set(SEEN) == {30}


def test_a_model_with_nothing_fused_is_refused_with_the_call_to_make(model: Model, x: Tensor):
    with pytest.raises(FusionError, match=r"Nothing is fused in Model.*Call fuse\(model\)"):
        benchmark(model, x)
    with pytest.raises(FusionError, match=r"takes a torch\.nn\.Module, not function"):
        benchmark(test_options_that_are_none_are_refused, x)


def test_a_model_that_is_compiled_already_is_refused(fused_model: Model, x: Tensor):
    for compiled in (torch.compile(fused_model, backend="eager"), fused_model):
        if compiled is fused_model:
            fused_model.layers[0].compile(backend="eager")
        with pytest.raises(FusionError, match="is compiled already"):
            benchmark(compiled, x)


def test_a_backward_that_cannot_be_is_refused(fused_model: Model, x: Tensor):
    with torch.inference_mode(), pytest.raises(FusionError, match=r"cannot run in torch\.infer"):
        benchmark(fused_model, x, backward=True)
    weight = fused_model.layers[1].norm.weight
    handle = weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(FusionError, match=r"'layers\.1\.norm\.weight' has a hook"):
        benchmark(fused_model, x, backward=True)
    handle.remove()
    fused_model.requires_grad_(False)
    with pytest.raises(FusionError, match="no output needs a gradient"):
        benchmark(fused_model, x, backward=True)


def test_an_input_or_a_model_that_cannot_be_copied_is_named(fused_model: Model, x: Tensor):
    with pytest.raises(FusionError, match="these cannot be copied"):
        benchmark(fused_model, x, cache=(value for value in [x]), **QUICK)
    fused_model.stream = (value for value in [x])
    with pytest.raises(FusionError, match="Model cannot be copied"):
        candidates_of(fused_model, ["unfused compiled"], {})


def test_a_candidate_that_does_not_run_is_named(fused_model: Model, x: Tensor):
    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        raise RuntimeError("no backend")

    before = structure(fused_model)
    for name in COMPILED:
        with pytest.raises(FusionError, match=f"'{name}' does not run on these inputs"):
            benchmark(fused_model, x, compare=name, compile_options={"backend": backend}, **QUICK)
    assert structure(fused_model) == before


class _WithLoss(Block):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"loss": y.sum() * 3, "other": y * 1000}


def test_the_backward_starts_at_the_loss_where_there_is_one(x: Tensor):
    holder = nn.ModuleDict({"block": _WithLoss()}).to(x.device)
    model = holder["block"]
    fuse_modules(holder, ["block.norm", "block.mlp"])
    seen: list[Tensor] = []
    model.mlp.down_proj.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    benchmark(model, x, backward=True, **QUICK)
    model(x)["loss"].backward()
    assert torch.equal(seen[0], seen[-1])
