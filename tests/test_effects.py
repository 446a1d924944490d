"""A member whose running has an effect runs at its own call; a pure one is captured."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import operator
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from support import Block, Mlp, Norm, WeightKernel, members_kernel, runs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.activations import ACT2CLS, ACT2FN
from written import assert_same, fuse, model_of, path_of

from module_fusion import unfuse_modules
from module_fusion.effects import effect_of
from module_fusion.findings import code_read_once
from module_fusion.reach import Reach


def between(self: Any, x: Tensor) -> Tensor:
    """Random numbers, the input and the first output are used between and after the members."""
    x = x * 1
    h = self.norm(x)
    y = x + torch.rand_like(x)
    return self.mlp(h) + y + x + h


def assert_same_as_twin(model: nn.Module, x: Tensor, kernel: type[nn.Module]) -> str:
    """Compare two calls with those of an unfused twin; why the kernel did not run."""
    twin = copy.deepcopy(model)
    fuse(model, kernel)
    results: list[Any] = []
    with torch.no_grad():
        for run in (model, twin):
            torch.manual_seed(4)
            results.append([run(x), run(x), *run.buffers(), torch.rand(3)])
    assert_same(*results)
    kernel_calls, _, reason = path_of(model)
    assert kernel_calls == 0
    return str(reason)


def model_with(norm: nn.Module, x: Tensor, mlp: nn.Module | None = None) -> nn.Module:
    model = model_of(between, x.device)
    model[0].norm = norm
    model[0].mlp = mlp or model[0].mlp
    return model.to(x.device).eval()


class AddsInPlace(Norm):
    def forward(self, x: Tensor) -> Tensor:
        x += self.weight
        return x


class MlpKernel(nn.Module):
    """The last member alone, as if the first did nothing."""

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        gate = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
        return F.linear(gate, mlp.down_proj.weight)


class WritesByKeyword(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


class WritesByPosition(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, True)


@pytest.mark.parametrize(
    "norm",
    [lambda: nn.ReLU(inplace=True), AddsInPlace, WritesByKeyword, WritesByPosition],
    ids=["ReLU", "+=", "keyword", "position"],
)
def test_a_first_member_that_writes_to_its_input_runs_at_its_own_call(x: Tensor, norm: Any) -> None:
    reason = assert_same_as_twin(model_with(norm(), x), x, MlpKernel)
    assert "norm writes to its input" in reason or "norm may write to a tensor" in reason


def test_a_last_member_that_writes_to_its_input_runs_itself(x: Tensor) -> None:
    class Kernel(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return F.relu(F.linear(input, self.norm.weight, self.norm.bias))

    model = model_with(nn.Linear(8, 8), x, nn.ReLU(inplace=True))
    assert assert_same_as_twin(model, x, Kernel) == "mlp writes to its input"


class Counting(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))


class CountsByAddition(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x)


class CountsInAnItem(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.steps[0] = self.steps[0] + 1
        return super().forward(x)


class CountsByReplacing(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.steps = self.steps + 1
        return super().forward(x)


class CountsByOut(Counting):
    def forward(self, x: Tensor) -> Tensor:
        torch.add(self.steps, 1, out=self.steps)
        return super().forward(x)


class CountsInALoop(Counting):
    def forward(self, x: Tensor) -> Tensor:
        for steps in self.buffers():
            steps += 1
        return super().forward(x)


class CountsByData(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.steps.data = self.steps + 1
        return super().forward(x)


class CountsInAComprehension(Counting):
    def forward(self, x: Tensor) -> Tensor:
        [buffer.add_(1) for buffer in (self.steps,)]
        return super().forward(x)


class CountsByOperator(Counting):
    def forward(self, x: Tensor) -> Tensor:
        operator.iadd(self.steps, 1)
        return super().forward(x)


class CountsByMethod(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.steps.__setitem__(0, self.steps[0] + 1)
        return super().forward(x)


class CountsByRegistering(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("steps", self.steps + 1)
        return super().forward(x)


class CountsInASetter(Counting):
    @property
    def count(self) -> Tensor:
        return self.steps

    @count.setter
    def count(self, value: Tensor) -> None:
        self.steps.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return super().forward(x)


@pytest.mark.parametrize(
    "norm",
    [
        CountsByOperator,
        CountsByMethod,
        CountsByRegistering,
        CountsInASetter,
        CountsByAddition,
        CountsInAnItem,
        CountsByReplacing,
        CountsByOut,
        CountsInALoop,
        CountsByData,
        CountsInAComprehension,
    ],
)
def test_a_member_that_writes_to_its_buffer_runs_at_its_own_call(x: Tensor, norm: Any) -> None:
    reason = assert_same_as_twin(model_with(norm(), x), x, WeightKernel)
    assert reason.startswith(("norm may write to", "norm uses ", "norm sets its "))


class KeepsItsSize(Norm):
    size: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.size = y.abs().mean()
        return y


def test_what_a_member_keeps_on_itself_is_there_after_its_call(x: Tensor) -> None:
    model = model_with(KeepsItsSize(), x)
    twin = copy.deepcopy(model)
    fuse(model, WeightKernel)
    for given in (x, 2 * x):
        results = []
        for run in (model, twin):
            torch.manual_seed(4)
            with torch.no_grad():
                results.append([run(given), run[0].norm.size])
        assert_same(*results)
    assert str(path_of(model)[2]).startswith("norm sets its size")


def test_a_member_that_reads_what_it_counts_runs_at_its_call(x: Tensor) -> None:
    class Warming(Norm):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            scale = min(self.calls / 3, 1.0)
            return scale * self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    fused = model_with(Warming(), x)
    members = copy.deepcopy(fused)
    fuse(fused, WeightKernel)
    for _ in range(4):
        results = []
        for run in (fused, members):
            torch.manual_seed(4)
            results.append(run(x))
        assert_same(*results)
    assert str(path_of(fused)[2]).startswith("norm counts its calls, and reads it")


class CountsInOneReadsInAnother(Norm):
    def count(self) -> None:
        self.calls += 1

    def scale(self) -> float:
        return 1 / (self.calls + 1)

    def forward(self, x: Tensor) -> Tensor:
        self.count()
        return self.scale() * self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


class CountsInAChild(Norm):
    """What it reads under the same name is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Noise()
        self.child.calls = 0  # type: ignore[assignment]
        self.calls = 3

    def forward(self, x: Tensor) -> Tensor:
        self.child.calls += 1
        return self.calls * self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def counting_outside() -> type[Norm]:
    calls = 0

    class CountsOutside(Norm):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls = calls + 1
            return calls * self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))

    return CountsOutside


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: CountsInOneReadsInAnother, "norm counts its calls, and reads it"),
        (lambda: CountsInAChild, "norm may write to a tensor, in"),
        (counting_outside, "norm may write to a tensor, in"),
    ],
)
def test_a_member_that_reads_elsewhere_what_it_counts_runs_at_its_call(
    make: Callable[[], type[Norm]], why: str, x: Tensor
) -> None:
    results = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = model_with(make()(), x)
        if is_fused:
            fuse(model, WeightKernel)
        outputs = []
        for _ in range(3):
            torch.manual_seed(4)
            outputs.append(model(x))
        results.append(outputs)
        if is_fused:
            assert str(path_of(model)[2]).startswith(why)
    assert_same(*results)


def test_how_often_a_member_was_called_is_right_when_it_is_not(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    fuse(model, WeightKernel)
    before = model[0].norm.calls
    with torch.no_grad():
        model(x)
    assert path_of(model)[0] == 1
    assert model[0].norm.calls == before


class DropsInEval(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


class NoisyBatchNorm(nn.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


class HoldsDropout(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.drop = DropsInEval(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class DropsBesideAskingForTraining(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            y = y * 2
        return F.dropout(y, 0.5)


class DrawsInAModule(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return support.noise(super().forward(x))


class DrawsInALocalImport(Norm):
    def forward(self, x: Tensor) -> Tensor:
        from support import noise

        return noise(super().forward(x))


class DrawsInAProperty(Norm):
    @property
    def noise(self) -> Tensor:
        return torch.rand(8, device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.noise


class Noise(nn.Module):
    def noise(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    def forward(self, x: Tensor) -> Tensor:
        return x


class DrawsInAChild(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.child = Noise()

    def forward(self, x: Tensor) -> Tensor:
        return self.child.noise(super().forward(x))


class DrawsInAFunctionOfItsOwn(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.noise = support.noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(super().forward(x))


class Jitters(Norm):
    def jitter(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class DrawsInABase(Jitters):
    def jitter(self, x: Tensor) -> Tensor:
        return super().jitter(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.jitter(Norm.forward(self, x))


class DrawsInAttention(Norm):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.scaled_dot_product_attention(y, y, y, None, 0.5)


class DropsInALayerOfTheMoment(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Dropout(0.5)(super().forward(x))


class DrawsByMethod(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.new_empty(8).normal_()


class DrawsByName(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + getattr(torch, "rand")(8).to(x)  # noqa: B009


class DrawsInAList(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.noises = [support.noise]

    def forward(self, x: Tensor) -> Tensor:
        return self.noises[0](super().forward(x))


@pytest.mark.parametrize(
    "norm",
    [
        HoldsDropout,
        NoisyBatchNorm,
        DropsBesideAskingForTraining,
        DrawsInAModule,
        DrawsInALocalImport,
        DrawsInAProperty,
        DrawsInAChild,
        DrawsInAFunctionOfItsOwn,
        DrawsInABase,
        DrawsInAttention,
        DropsInALayerOfTheMoment,
        DrawsByMethod,
        DrawsByName,
        DrawsInAList,
    ],
)
def test_a_member_that_draws_random_numbers_runs_at_its_own_call(x: Tensor, norm: Any) -> None:
    kernel = MlpKernel if norm is NoisyBatchNorm else WeightKernel
    reason = assert_same_as_twin(model_with(norm(), x), x, kernel)
    assert reason.startswith("norm")


def test_a_last_member_that_draws_random_numbers_runs_itself(x: Tensor) -> None:
    class Drops(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.drop = DropsInEval(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(super().forward(x))

    reason = assert_same_as_twin(model_with(Norm(), x, Drops()), x, WeightKernel)
    assert reason.startswith("mlp.drop may draw random numbers")


def pair(model_type: str, norm: str, mlp: str, **options: Any) -> Any:
    """A norm and an MLP of transformers, tiny."""

    def make() -> tuple[nn.Module, nn.Module]:
        config = AutoConfig.for_model(model_type, **(options or SIZES))
        modeling = importlib.import_module(
            f"transformers.models.{model_type}.modeling_{model_type}"
        )
        cls = getattr(modeling, norm, None) or getattr(nn, norm)
        return cls(8), getattr(modeling, mlp)(*([16] if mlp == "GPT2MLP" else []), config)

    return pytest.param(make, id=mlp)


SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "make",
    [
        pair("llama", "LlamaRMSNorm", "LlamaMLP"),
        pair("gemma", "GemmaRMSNorm", "GemmaMLP"),
        pair("phi3", "Phi3RMSNorm", "Phi3MLP"),
        pair("qwen3", "Qwen3RMSNorm", "Qwen3MLP"),
        pair("olmo2", "Olmo2RMSNorm", "Olmo2MLP"),
        pair("gpt2", "LayerNorm", "GPT2MLP", n_embd=8, n_head=2),
        pair("bloom", "LayerNorm", "BloomMLP", hidden_size=8, n_head=2),
        pair("mpt", "LayerNorm", "MptMLP", d_model=8, n_heads=2),
    ],
)
def test_a_norm_and_an_mlp_of_transformers_are_captured_in_eval(x: Tensor, make: Any) -> None:
    norm, mlp = make()
    more = len(inspect.signature(mlp.forward).parameters) - 1

    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x), *[x] * more)

    model = model_of(forward, x.device)
    model[0].norm, model[0].mlp = norm, mlp
    model.to(x.device).eval()
    expected = model(x)
    kernel = members_kernel(1 + more)
    fuse(model, kernel)
    assert torch.equal(model(x), expected)
    assert runs(kernel) == 1, path_of(model)[2]


# One calls a module that is not its own, the other is a layer with weights of another library.
REFUSED = {"gelu_10": "gelu", "xielu": "a kernel for the member may not know"}


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_an_mlp_with_any_activation_of_transformers_is_captured_where_it_may_be(
    x: Tensor, name: str
) -> None:
    class Activated(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.activation = ACT2FN[name]

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.activation(self.gate_proj(x)))

    model = model_of(Block.forward, x.device)
    model[0].mlp = Activated().to(x.device)
    twin = copy.deepcopy(model)
    kernel = members_kernel(1)
    fuse(model, kernel)
    for training in (True, False):
        torch.manual_seed(1)
        got = model.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(got, twin.train(training)(x))
    reason = str(path_of(model)[2])
    assert runs(kernel) == (0 if name in REFUSED else 2), reason
    assert REFUSED.get(name, "") in reason


def test_what_a_function_does_is_read_again_when_it_was_replaced(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with(DrawsInAModule(), x)
    with monkeypatch.context() as patch:
        patch.setattr(support, "noise", torch.relu)
        kernel = members_kernel(1)
        fuse(model, kernel)
        with torch.no_grad():
            model(x)
        assert runs(kernel) == 1
        unfuse_modules(model)
    assert_same_as_twin(model, x, WeightKernel)


class MayReturnNone(Norm):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x) if x.mean() > 100 else None


class ReturnsNothing(Norm):
    def forward(self, x: Tensor) -> None:  # type: ignore[override]
        super().forward(x)


@pytest.mark.parametrize("norm", [MayReturnNone, ReturnsNothing])
def test_a_member_that_may_return_none_runs_at_its_own_call(x: Tensor, norm: type[Norm]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x if h is None else self.mlp(h)

    model = model_of(forward, x.device)
    model[0].norm = norm().to(x.device)
    expected = model(x)
    fuse(model)
    assert torch.equal(model(x), expected)
    assert effect_of(Reach(norm(), norm)).what == "may return None"  # type: ignore[union-attr]


class Collective(Norm):
    def forward(self, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x)
        return super().forward(x)


class SetsTheMode(Norm):
    def forward(self, x: Tensor) -> Tensor:
        self.train()
        return super().forward(x)


@pytest.mark.parametrize("norm", [Collective, SetsTheMode])
def test_a_member_that_acts_on_more_than_tensors_has_an_effect(norm: type[Norm]) -> None:
    effect = effect_of(Reach(norm(), norm))
    assert effect is not None
    assert effect.happens(norm())


def functions(depth: int, calls: int) -> Any:
    """A function that calls one which calls one, as deep as said, each several times."""
    namespace: dict[str, Any] = {"f0": torch.sin}
    for index in range(1, depth + 1):
        body = " + ".join([f"f{index - 1}(x)"] * calls)
        exec(f"def f{index}(x): return {body}", namespace)
    return namespace[f"f{depth}"]


@pytest.mark.parametrize(("depth", "calls", "readable"), [(40, 3, True), (3000, 1, False)])
def test_functions_that_call_many_others_are_read_once_each(
    depth: int, calls: int, readable: bool
) -> None:
    norm = Norm()
    norm.function = functions(depth, calls)
    cls = type("Calls", (Norm,), {"forward": lambda self, x: self.function(x)})
    assert (effect_of(Reach(norm, cls)) is None) == readable


class OnTopOfALayer(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        smallest = torch.finfo(x.dtype).eps
        return super().forward(x.mT.mT).clamp_min(-1 / smallest)


def test_a_member_on_top_of_a_layer_of_torch_that_only_computes_is_captured(x: Tensor) -> None:
    model = model_of(Block.forward, x.device)
    model[0].norm = OnTopOfALayer(8).to(x.device)
    expected = model(x)
    kernel = members_kernel(1)
    fuse(model, kernel)
    assert torch.equal(model(x), expected)
    assert runs(kernel) == 1, path_of(model)[2]


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "nothing"])
def test_a_member_with_dropout_is_captured_where_it_drops_nothing(x: Tensor, share: float) -> None:
    class Drops(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(share)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(super().forward(x))

    model = model_of(Block.forward, x.device)
    model[0].mlp = Drops().to(x.device)
    kernel = members_kernel(1)
    fuse(model, kernel)
    model(x)
    model.eval()(x)
    assert runs(kernel) == (1 if share else 2)


class Layer(nn.Module):
    """The classes below it have what few ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Iterates(Layer):
    def __iter__(self) -> Any:
        yield self.fc


class Delegates(Layer):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.fc, name)


class KnowsItsDevice(Layer):
    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Holds(Norm):
    """A norm with a layer below it."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.layers = nn.ModuleList([child])


class CallsIt(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return self.child(super().forward(x)).to(x.device)


class CallsAStaticMethod(CallsIt):
    @staticmethod
    def joined(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([x, y])

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, super().forward(x))[1].to(x.device)


class AsksForItsDevice(Holds):
    def forward(self, x: Tensor) -> Tensor:
        if self.child is None or not callable(self.child):
            return x
        return self.child(super().forward(x)).to(self.child.device)


class CallsItInALoop(Holds):
    def forward(self, x: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            found.append(layer(super().forward(x)))
        return found[0]


class CallsAnItem(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers[-1](super().forward(x))


@pytest.mark.parametrize(
    ("norm", "child"),
    [
        (CallsIt, Iterates),
        (CallsIt, Delegates),
        (CallsIt, KnowsItsDevice),
        (CallsAStaticMethod, Delegates),
        (AsksForItsDevice, KnowsItsDevice),
        (CallsItInALoop, KnowsItsDevice),
        (CallsAnItem, KnowsItsDevice),
    ],
)
def test_what_a_layer_could_do_and_nobody_asks_it_for_is_no_effect(
    norm: Any, child: Any, x: Tensor
) -> None:
    model = model_of(Block.forward, x.device)
    model[0].norm = norm(child()).to(x.device)
    expected = model(x)
    kernel = members_kernel(1)
    fuse(model, kernel)
    assert torch.equal(model(x), expected)
    assert runs(kernel) == 1, path_of(model)[2]


class Experts(nn.Module):
    """All of its layers may be a value, and much is taken of values."""

    def __init__(self, children: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = x + layer(x) * x.softmax(-1)[..., index].to(x.dtype).reshape(x.shape[:1])
        return x


def test_what_a_module_reaches_is_read_in_time_proportional_to_its_size() -> None:
    def calls_of(count: int) -> float:
        calls = 0

        def called(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event.endswith("call")

        experts = nn.Sequential(*[Experts([Layer() for _ in range(count)]) for _ in range(4)])
        before = sys.getprofile()
        sys.setprofile(called)
        try:
            with code_read_once():
                Reach(experts, nn.Sequential)
        finally:
            sys.setprofile(before)
        return calls / len(list(experts.modules()))

    assert calls_of(40) < 1.5 * calls_of(5) < 1000


class ChangesAndComputes(Holds):
    change: Any

    def forward(self, x: Tensor) -> Tensor:
        return self.change(super().forward(x))  # type: ignore[no-any-return]


def casts_a_variable(self: Any, x: Tensor) -> Tensor:
    child = self.child
    child.to(torch.float32)
    return x


def casts_one_of_two(self: Any, x: Tensor) -> Tensor:
    child = self.layers
    if x.dim() == 2:
        child = self.child
    child.float()
    return x


def casts_in_a_loop(self: Any, x: Tensor) -> Tensor:
    for layer in self.children():
        layer.float()
    return x


def casts_an_item(self: Any, x: Tensor) -> Tensor:
    self.layers[0].type(x.dtype)
    return x


def casts_itself(self: Any, x: Tensor) -> Tensor:
    me = self
    me.float()
    return x


def cast(module: Any) -> None:
    module.to(torch.float32)


def cast_it(module: Any, kind: Any) -> bool:
    module.float()
    return type(module) is kind


def casts_in_a_function(self: Any, x: Tensor) -> Tensor:
    cast(self.child)
    return x


def casts_a_layer_of_a_layer(self: Any, x: Tensor) -> Tensor:
    [layer.float() for layer in self.child.modules()]
    return x


def empties_its_layers(self: Any, x: Tensor) -> Tensor:
    layers = self.layers
    layers.pop(-1)
    return x


@pytest.mark.parametrize(
    "change",
    [
        casts_a_variable, casts_one_of_two, casts_in_a_loop, casts_an_item, casts_itself,
        casts_in_a_function,
        casts_a_layer_of_a_layer, empties_its_layers,
    ],
)  # fmt: skip
def test_a_member_that_changes_a_module_it_has_as_a_value_runs_at_its_own_call(
    change: Any, x: Tensor
) -> None:
    cls = type("Changes", (ChangesAndComputes,), {"change": change})
    states = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = model_with(cls(Layer()), x).double()
        if is_fused:
            fuse(model, WeightKernel)
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # Of two dtypes.
            model(x.double())
        states.append({name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)})
    assert states[0] == states[1]
    effect = effect_of(Reach(cls(Layer()), cls))
    assert effect is not None
    assert re.match("uses (its|'(to|float|type|pop)' of a module)", effect.what)


class Counts(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class HasText(Counts):
    def __str__(self) -> str:
        return "x" * self.calls


class HasRepr(Counts):
    def __repr__(self) -> str:
        return "x" * self.calls


class HasMore(Counts):
    def extra_repr(self) -> str:
        return "x" * self.calls


class HasFormat(Counts):
    def __format__(self, spec: str) -> str:
        return "x" * self.calls


class HasHash(Counts):
    def __hash__(self) -> int:
        return self.calls

    def __eq__(self, other: object) -> bool:
        return self is other


class HasTruth(Counts):
    def __bool__(self) -> bool:
        return self.calls % 2 == 0


class HasLength(Counts):
    def __len__(self) -> int:
        return self.calls


class HasItems(Counts):
    def __getitem__(self, index: int) -> int:
        return self.calls

    __add__ = __getitem__

    def __iter__(self) -> Any:
        return iter((self.calls, int))


class HasReal(Counts):
    @property
    def real(self) -> int:
        return self.calls


class HasAll(Counts):
    def __getattribute__(self, name: str) -> Any:
        if name == "scale":
            return object.__getattribute__(self, "calls")
        return super().__getattribute__(name)

    scale = 1


class HasAnswers(Counts):
    def __getattr__(self, name: str) -> Any:
        return self.calls if name == "ndim" else super().__getattr__(name)


class CallsAndReads(Holds):
    read: Any

    def forward(self, x: Tensor) -> Tensor:
        self.child(x)
        return super().forward(x) * self.read()


def asks_for_anything(module: Any) -> Any:
    return module.ndim


def takes_of_its_class(self: Any) -> int:
    kind = type(self.child)
    return 1 + (kind.real is None)


def asks_one_or_the_other(self: Any) -> int:
    return (len if self.layers else callable)(self.child)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("child", "read"),
    [
        (HasText, lambda self: len(str(self.child))),
        (HasText, lambda self: len(f"{self.child}")),
        (HasText, lambda self: len("%s" % self.child)),  # noqa: UP031
        (HasText, lambda self: len("{}".format(self.child))),  # noqa: UP032
        (HasText, lambda self: len("".join(map(str, self.children())))),
        (HasRepr, lambda self: len(repr(self.child))),
        (HasMore, lambda self: len(repr(self.child))),
        (HasFormat, lambda self: len(f"{self.child:x}")),
        (HasHash, lambda self: 1 + len({self.child, self})),
        (HasHash, lambda self: 1 + len({self.child: 1})),
        (HasTruth, lambda self: 2 if self.child else 1),
        (HasTruth, lambda self: 2 if (not self.child) else 1),
        (HasLength, lambda self: len(self.child)),
        (HasLength, asks_one_or_the_other),
        (HasItems, lambda self: 1 + isinstance(self.child[len("")], int)),
        (HasItems, lambda self: 1 + callable(self.child[len("")])),
        (HasItems, lambda self: 1 + callable(self.child + len(""))),
        (HasItems, lambda self: 1 + isinstance(*self.child)),
        (HasReal, lambda self: 1 + (type(self.child).real is None)),
        (HasReal, takes_of_its_class),
        (HasReal, lambda self: 1 + int((self.child if self.layers else self).real)),
        (HasAll, lambda self: self.child.scale),
        (HasAnswers, lambda self: asks_for_anything(self.child)),
    ],
)
def test_a_member_that_reads_a_count_by_a_special_method_runs_at_its_call(
    child: Any, read: Any, x: Tensor
) -> None:
    cls = type("Reads", (CallsAndReads,), {"read": read})
    reason = assert_same_as_twin(model_with(cls(child()), x), x, WeightKernel)
    counted = f"norm reads what {child.__name__} counts, its calls"
    assert reason.startswith((counted, "norm uses object.__getattribute__", "norm uses '__getattr"))


def keeps_in_a_default(x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
    seen.append(1)
    return x * len(seen)


def reads_a_default(x: Tensor, *, factors: dict[str, float] = {"a": 2.0}) -> Tensor:  # noqa: B006
    return x * factors["a"]


def casts_a_default(x: Tensor, layer: nn.Module = nn.Linear(8, 8)) -> Tensor:  # noqa: B008
    layer.float()
    return x


def draws_by_a_default(x: Tensor, noise: Any = torch.rand_like) -> Tensor:
    return x + noise(x)


@pytest.mark.parametrize(
    "function", [keeps_in_a_default, reads_a_default, casts_a_default, draws_by_a_default]
)
def test_a_member_with_a_default_that_may_change_or_act_runs_at_its_call(
    function: Any, x: Tensor
) -> None:
    class Calls(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return function(super().forward(x))  # type: ignore[no-any-return]

    effect = effect_of(Reach(Calls(), Calls))
    assert effect is not None
    assert "a default of" in effect.what or "rand_like" in effect.what


def add_to(kept: Any) -> Any:
    if type(kept) is list:
        kept.append(1.0)
    elif type(kept) is dict:
        kept.update(b=1.0)
    else:
        kept.add(2.0)
    return kept


@pytest.mark.parametrize("held", [[1.0], {"a": 1.0}, {1.0}], ids=["list", "dict", "set"])
def test_a_member_that_adds_to_a_container_it_holds_runs_at_its_call(held: Any, x: Tensor) -> None:
    class Adds(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * len(add_to(self.held))

    norm = Adds()
    norm.held = held
    reason = assert_same_as_twin(model_with(norm, x), x, WeightKernel)
    assert reason.startswith("norm may write to its held")


class AsksItsOwnWay(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return x if isinstance(self.child, int) else 2 * x

    forward = types.FunctionType(forward.__code__, {**globals(), "isinstance": cast_it})


class TakesAnything(Holds):
    def forward(*given: Any) -> Any:  # type: ignore[override]
        given[0].float()
        return given[1]


class Returns(Holds):
    def forward(self, x: Tensor) -> Any:
        return self.layers[0]


class CastsWhatACallReturns(Holds):
    def __init__(self, child: nn.Module) -> None:
        super().__init__(Returns(child))

    def forward(self, x: Tensor) -> Tensor:
        self.child(x).float()
        return super().forward(x)


@pytest.mark.parametrize("cls", [AsksItsOwnWay, TakesAnything, CastsWhatACallReturns])
def test_a_cast_that_code_hides_is_found(cls: type[Holds]) -> None:
    effect = effect_of(Reach(cls(Layer()), cls))
    assert effect is not None
    assert "it is not known what that does" in effect.what
