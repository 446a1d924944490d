"""A checkpoint runs a part of a forward again: what is captured is the same both times."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from support import Mlp, Norm, WeightKernel, mapped, members_kernel, runs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from written import PATHS, path_of

from module_fusion import (
    DeferredUseError,
    ModuleSpec,
    fuse_modules,
    fused,
    report,
    unfuse_modules,
)
from module_fusion.checkpoints import _ADDING, _RECORDS
from module_fusion.modules import state_of

Part = Callable[[Tensor], Tensor]


class Scale(nn.Module):
    """What it saves for the backward looks like what a product beside it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Pair(Scale):
    def forward(self, x: Tensor) -> Any:
        return x * self.weight, torch.tanh(x)


class Parallel(nn.Module):
    """Computes something else between the first member and the last."""

    def __init__(self, first: type[nn.Module] = Scale) -> None:
        super().__init__()
        self.norm, self.mlp, self.gate = first(), Mlp(), nn.Sequential(Mlp())
        self.other = nn.Parameter(torch.rand(8) + 3)
        self.checkpoints = self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoints:
            return checkpoint(self.part, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.part(x)

    def part(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = x * self.other
        if self.fails:
            raise Stop(h)
        return y + self.mlp(h)


class Stop(Exception):
    """Carries a value out of a forward."""


class Beside(Parallel):
    """Another module gets the value too."""

    def part(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = x * self.other
        return y + self.gate(h) + self.mlp(h)


class Unpacking(Parallel):
    def part(self, x: Tensor) -> Tensor:
        h, _ = self.norm(x)
        y = x * self.other
        return y + self.mlp(h)


def gradients(run: Part, model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    run(x).sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def assert_close(got: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def fuse(block: nn.Module, kernel: type[nn.Module], specs: Any = None) -> nn.ModuleList:
    model = nn.ModuleList([block])
    with mapped(Kernel=kernel):
        fuse_modules(model, PATHS, specs, kernel="Kernel")
    return model


PLACES: dict[str, Callable[[Any], Part]] = {
    "around the block": lambda block: lambda x: checkpoint(block, x, use_reentrant=False),
    "in its forward": lambda block: block,
    "around a part of it, elsewhere": lambda block: (
        lambda x: checkpoint(block.part, x, use_reentrant=False)
    ),
}


@pytest.mark.parametrize("first", [Scale, Pair])
@pytest.mark.parametrize("where", PLACES)
def test_wherever_a_checkpoint_is_the_gradients_are_right(
    x: Tensor, where: str, first: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    block = (Unpacking if first is Pair else Parallel)(first).to(x.device)
    block.checkpoints = where == "in its forward"
    run = PLACES[where](block)
    expected = gradients(run, block, x)
    kernel = members_kernel(1)
    specs = [ModuleSpec(["x"], ["h", "_"]), ModuleSpec(["h"])] if first is Pair else None
    model = fuse(block, kernel, specs)
    for _ in range(2):
        assert_close(gradients(run, block, x), expected)
    assert (runs(kernel) > 0) == (where == "around the block")
    run(x)
    reasons = {
        "in its forward": "norm is in a checkpoint, or under other hooks for saved tensors, alone",
        "around a part of it, elsewhere": "norm is called outside the forward of the module around",
    }
    assert where not in reasons or reasons[where] in str(path_of(model)[2])


def test_a_hook_of_the_backward_that_calls_a_member_gets_its_value(x: Tensor) -> None:
    block = Parallel(Norm).to(x.device)

    def run(x: Tensor) -> Tensor:
        y = x * 1
        y.register_hook(lambda gradient: block.norm(gradient))
        return block(y)  # type: ignore[no-any-return]

    expected = gradients(run, block, x)
    fuse(block, members_kernel(1))
    assert_close(gradients(run, block, x), expected)


def test_a_backward_in_the_forward_may_call_a_member_too(x: Tensor) -> None:
    class Inner(Parallel):
        def part(self, x: Tensor) -> Tensor:
            y = x.detach().requires_grad_()
            product = y * 2
            product.register_hook(lambda gradient: self.norm(gradient))
            (slope,) = torch.autograd.grad(product.sum(), y)
            return super().part(x + slope)

    block = Inner().to(x.device)
    expected = gradients(block, block, x)
    fuse(block, members_kernel(1))
    assert_close(gradients(block, block, x), expected)


@pytest.mark.parametrize("after", [False, True], ids=["compiled before", "compiled after"])
def test_beside_compiled_code_in_a_checkpoint_gradients_are_right(x: Tensor, after: bool) -> None:
    block = Beside().to(x.device)
    run = PLACES["around the block"](block)
    expected = gradients(run, block, x)
    torch.compiler.reset()
    if not after:
        block.gate.compile(backend="eager")
    model = fuse(block, members_kernel(1))
    if after:
        block.gate[0].compile(backend="eager")
        assert_close(gradients(run, block, x), expected)
    for _ in range(2):
        assert_close(gradients(run, block, x), expected)
    text = "goes into compiled code" if after else "a compiled Sequential may get a captured output"
    assert text in str(path_of(model)[2])


@pytest.mark.parametrize("after", [False, True], ids=["compiled before", "compiled after"])
def test_many_blocks_beside_compiled_code_are_compiled_no_more_often(
    x: Tensor, after: bool
) -> None:
    model = nn.Sequential(*[Beside() for _ in range(12)]).to(x.device)
    for block in model:
        block.gate[0].__class__ = Uncounted
        block.other.data.fill_(0.1)
    expected = model(x)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")

    def compile_siblings() -> None:
        for block in model:
            block.gate[0].compile(backend=counter, fullgraph=True)

    if not after:
        compile_siblings()
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, PATHS, kernel="Kernel")
    if after:
        compile_siblings()
    for _ in range(3):
        assert torch.equal(model(x), expected)
    assert counter.frame_count <= 1 + after


class Alike(nn.Module):
    """What is learned of the value in one block, all blocks of the same classes know."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.mlp, self.then = Norm(), Mlp(), then

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.then(x + self.mlp(h), h)


def keep(y: Tensor, h: Tensor) -> Tensor:
    return y.add([h.float()][0], alpha=0)


@torch.compile(backend="eager")
def half(h: Tensor) -> Tensor:
    return h * 0.5


@pytest.mark.parametrize("then", [keep, lambda y, h: y + half(h)], ids=["given away", "compiled"])
def test_what_is_learned_in_between_does_not_change_what_is_run_again(
    x: Tensor, then: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """The first block is in a checkpoint; the second teaches both to run the members."""
    torch.manual_seed(0)
    model = nn.ModuleList([Alike(lambda y, h: y), Alike(then)]).to(x.device)

    def run(x: Tensor) -> Tensor:
        return model[1](checkpoint(model[0], x, use_reentrant=False))  # type: ignore[no-any-return]

    expected = gradients(run, model, x)
    with mapped(K=WeightKernel):
        fuse_modules(model, {"norm": "*.norm", "mlp": "*.mlp"}, kernel="K")
    if then is keep:
        with pytest.warns(UserWarning, match="is given to others"):
            assert_close(gradients(run, model, x), expected)
    else:
        assert_close(gradients(run, model, x), expected)
    first = report(model).groups[0]
    assert (first.kernel_calls, first.member_calls) == (2, 0)
    assert_close(gradients(run, model, x), expected)
    assert report(model).groups[0].member_calls == 2
    gc.collect()
    assert not _RECORDS


def around(mode: Callable[[], Any]) -> Callable[[Any], Callable[[], None]]:
    """Enter a mode; returns how to leave it."""

    def enter(model: Any) -> Callable[[], None]:
        stack = ExitStack()
        stack.enter_context(mode())
        return stack.close

    return enter


def hook_on(name: str) -> Callable[[Any], Callable[[], None]]:
    return lambda model: (
        getattr(model[0], name).register_forward_hook(lambda *call: None).remove  # type: ignore[no-any-return]
    )


def hook_on_all(model: Any) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(lambda *call: None).remove


def learning(model: Any) -> Callable[[], None]:
    """Nothing that can be left: it is known from now on that the value is given away."""
    state_of(model[0].norm).speculation.needs_gradient = True  # type: ignore[union-attr]
    return lambda: None


class Overriding(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


STATES: dict[str, Callable[[Any], Callable[[], None]]] = {
    "a hook on the first": hook_on("norm"),
    "a hook on the last": hook_on("mlp"),
    "a hook on all": hook_on_all,
    "a dispatch mode": around(lambda: FlopCounterMode(display=False)),
    "a function mode": around(Overriding),
    "learned": learning,
}


REFUSAL = r"A checkpoint runs .* again in the backward"


@pytest.fixture(params=["Scale", "Norm"])
def parallel(request: pytest.FixtureRequest, x: Tensor) -> tuple[Any, list[Any], type[nn.Module]]:
    """A fused model, the gradients that it had before, and the kernel."""
    torch.manual_seed(0)
    block = Parallel({"Scale": Scale, "Norm": Norm}[request.param]).to(x.device)
    expected = gradients(checkpointed(block), block, x)
    kernel = members_kernel(1)
    return fuse(block, kernel), expected, kernel


def checkpointed(block: nn.Module) -> Part:
    return lambda x: checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


def forward_of(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    return x, checkpointed(model[0])(x).sum()


def doubled(slopes: list[Tensor | None]) -> list[Tensor | None]:
    return [None if slope is None else 2 * slope for slope in slopes]


def gradients_in(model: Any, x: Tensor) -> list[Tensor | None]:
    return [x.grad, *(p.grad for p in model[0].parameters())]


@pytest.mark.parametrize("state", STATES)
def test_what_ends_before_the_backward_does_not_change_what_is_run_again(
    x: Tensor, parallel: Any, state: str
) -> None:
    model, expected, kernel = parallel
    leave = STATES[state](model)
    try:
        given, y = forward_of(model, x)
    finally:
        leave()
    y.backward()
    assert_close(gradients_in(model, given), expected)
    assert runs(kernel) == 0
    assert_close(gradients(checkpointed(model[0]), model[0], x), expected)


@pytest.mark.parametrize("state", STATES)
def test_what_begins_before_the_backward_is_an_error_or_changes_nothing(
    x: Tensor, parallel: Any, state: str
) -> None:
    model, expected, kernel = parallel
    given, y = forward_of(model, x)
    leave = STATES[state](model)
    try:
        if state in ("learned", "a function mode"):  # A backward runs outside of such a mode.
            y.backward()
            assert_close(gradients_in(model, given), expected)
            assert runs(kernel) == 2
        else:
            with pytest.raises(DeferredUseError, match=REFUSAL):
                y.backward()
    finally:
        leave()
    assert_close(gradients(checkpointed(model[0]), model[0], x), expected)


def with_another_kernel(model: nn.Module) -> None:
    with mapped(Kernel=members_kernel(1)):
        fuse_modules(model, PATHS, kernel="Kernel")


def with_the_members(model: Any) -> None:
    del model[0].mlp.fused_kernel.forward


@pytest.mark.parametrize("change", [with_another_kernel, with_the_members, unfuse_modules])
def test_what_is_fused_otherwise_before_the_backward_is_an_error(
    x: Tensor, parallel: Any, change: Callable[[Any], Any]
) -> None:
    model, expected, _ = parallel
    _, y = forward_of(model, x)
    change(model)
    with pytest.raises(DeferredUseError, match=REFUSAL):
        y.backward()
    assert_close(gradients(checkpointed(model[0]), model[0], x), expected)


def test_what_is_fused_for_a_while_is_an_error_in_a_later_backward(x: Tensor) -> None:
    block = Parallel(Norm).to(x.device)
    expected = gradients(checkpointed(block), block, x)
    model = nn.ModuleList([block])
    with mapped(K=members_kernel(1)), fused(model, PATHS, kernel="K"):
        _, y = forward_of(model, x)
        again, z = forward_of(model, x)
        z.backward()
        assert_close(gradients_in(model, again), expected)
    with pytest.raises(DeferredUseError, match="has been unfused since"):
        y.backward()
    assert_close(gradients(checkpointed(block), block, x), expected)


def test_what_is_fused_after_the_forward_is_run_again_as_it_was(x: Tensor) -> None:
    block = Parallel(Scale).to(x.device)
    expected = gradients(checkpointed(block), block, x)
    model, kernel = nn.ModuleList([block]), members_kernel(1)
    given, y = forward_of(model, x)
    with mapped(K=kernel):
        fuse_modules(model, PATHS, kernel="K")
    y.backward()
    assert_close(gradients_in(model, given), expected)
    assert runs(kernel) == 0
    assert_close(gradients(checkpointed(block), block, x), expected)
    assert runs(kernel) == 2


def test_each_call_of_a_block_in_a_checkpoint_is_run_again_as_it_was(
    x: Tensor, parallel: Any
) -> None:
    """The first call with a hook, so with the members, the second one with the kernel."""
    model, expected, kernel = parallel

    def twice(x: Tensor) -> Tensor:
        remove = hook_on("norm")(model) if not calls else lambda: None
        calls.append(1)
        y = model[0](x)
        remove()
        return y + model[0](x)  # type: ignore[no-any-return]

    calls: list[int] = []
    model.zero_grad()
    x = x.clone().requires_grad_()
    checkpoint(twice, x, use_reentrant=False).sum().backward()
    assert_close(gradients_in(model, x), doubled(expected))
    assert runs(kernel) == 2


@pytest.mark.parametrize("when", ["in the checkpoint", "before the backward"])
def test_copies_run_again_what_their_original_ran(x: Tensor, parallel: Any, when: str) -> None:
    model, expected, kernel = parallel
    model.zero_grad()
    given = x.clone().requires_grad_()
    if when == "in the checkpoint":
        y = checkpoint(lambda x: copy.deepcopy(model[0])(x), given, use_reentrant=False)
    else:
        y = checkpoint(lambda x: model[0](x), given, use_reentrant=False)
        model[0] = copy.deepcopy(model[0])
    y.sum().backward()
    torch.testing.assert_close(given.grad, expected[0])
    assert runs(kernel) == 2


@pytest.mark.parametrize("step", ["forward", "unfuse"])
def test_a_checkpoint_is_noted_while_no_other_thread_looks(step: str) -> None:
    """What a thread notes while another one goes through all of them would be an error there."""
    block = Parallel(Norm)
    model = fuse(block, members_kernel(1))
    x = torch.randn(2, 8).requires_grad_()
    steps: dict[str, Callable[[], Any]] = {
        "forward": lambda: checkpoint(block, x, use_reentrant=False),
        "unfuse": lambda: unfuse_modules(model),
    }
    thread = threading.Thread(target=steps[step])
    with _ADDING:
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpoint_in_a_checkpoint_and_a_second_backward_run_the_same(
    x: Tensor, parallel: Any, early_stop: bool
) -> None:
    model, expected, _ = parallel
    model.zero_grad()
    x = x.clone().requires_grad_()
    with set_checkpoint_early_stop(early_stop):
        y = checkpoint(checkpointed(model[0]), x, use_reentrant=False).sum()
    y.backward(retain_graph=True)
    learning(model)
    y.backward()
    assert_close(gradients_in(model, x), doubled(expected))


def test_a_compiled_block_in_a_checkpoint_is_right(x: Tensor, parallel: Any) -> None:
    model, expected, _ = parallel
    torch.compiler.reset()
    model[0].compile(backend="aot_eager")
    for _ in range(2):
        assert_close(gradients(checkpointed(model[0]), model[0], x), expected)


class Uncounted(Mlp):
    """Does not change when it runs, so that a trace stays right."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))  # type: ignore[no-any-return]


def test_a_value_that_an_exception_carries_out_is_computed_before(x: Tensor) -> None:
    block = Parallel(Norm).to(x.device)
    block.fails = True
    with pytest.raises(Stop) as stopped:
        block(x)
    expected = stopped.value.args[0]
    model = fuse(block, members_kernel(1))
    with pytest.raises(Stop) as stopped:
        block(x)
    unfuse_modules(model)
    with torch.no_grad():
        block.norm.weight.mul_(2)
    assert torch.equal(stopped.value.args[0] + 0, expected)
