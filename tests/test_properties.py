"""Properties over generated parents: the fused model cannot be told from one never fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from generated import Case, Holder, Stack, cases, flat
from hypothesis import given, note, settings
from structure import structure
from support import mapped, members_kernel, runs
from torch import Tensor, nn

from module_fusion import DeferredUseError, fuse_modules, unfuse_modules
from module_fusion.spec import Plan, forward_signature, infer_specs, make_plan

# Their blocks run any program, which no bytecode tells what leaves them.
pytestmark = pytest.mark.filterwarnings("ignore:The output of .* is given to others:UserWarning")


def member(model: Stack, block: int, index: int) -> nn.Module:
    found = model.blocks[block].get_submodule(f"m{index}")
    return found.inner if isinstance(found, Holder) else found


def add_hooks(model: Stack, case: Case) -> list[Any]:
    """Register the drawn hooks; each logs its member, its kind and the bits it was given."""
    log: list[Any] = []

    def logger(key: Any) -> Any:
        def hook(module: nn.Module, *given: Any) -> None:
            log.append((key, [bits(leaf) for leaf in flat(list(given))]))

        return hook

    for index, kind in case.hooks:
        module = member(model, 0, index)
        if kind == "forward":
            module.register_forward_hook(logger((index, kind)))
        elif kind == "kwargs":
            module.register_forward_hook(logger((index, kind)), with_kwargs=True)
        elif kind == "pre":
            module.register_forward_pre_hook(logger((index, kind)), with_kwargs=True)
        else:
            module.register_full_backward_hook(logger((index, kind)))
    return log


def plan_of(case: Case) -> Plan:
    forwards = [forward_signature(kind) for kind in case.kinds]
    return make_plan(forwards, case.specs or infer_specs(forwards), list(case.paths))


def bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes())
    return value


def run(model: Stack, case: Case) -> dict[str, Any]:
    """Outputs, gradients, buffers and random state after one call."""
    torch.manual_seed(case.seed + 1)
    x = torch.randn(3, 4, requires_grad=case.gradients)
    extra = torch.randn(3, 4)
    model.zero_grad()
    with torch.set_grad_enabled(case.gradients):
        leaves = list(flat(model(x, extra)))
        if case.gradients:
            sum(leaf.sum() for leaf in leaves).backward()
    return {
        "types": [type(leaf) for leaf in leaves],
        "outputs": [bits(leaf) for leaf in leaves],
        "gradients": [p.grad for p in model.parameters()] + [x.grad],
        "buffers": [bits(buffer) for buffer in model.buffers()],
        "random state": bits(torch.get_rng_state()),
    }


def same_or_refused(model: Stack, twin: Stack, case: Case) -> bool:
    """Whether both did the same; False for a typed error where an input was modified in place."""
    expected, got = outcome(twin, case), outcome(model, case)
    if got is DeferredUseError:
        assert case.modifies_in_place
        return False
    gradients, wanted = got.pop("gradients", []), expected.pop("gradients", [])
    assert got == expected
    if case.with_kernel and case.sums_gradients:
        # The kernel computes a value that the member computes again for the other use, so its
        # gradient is the same sum in another order.
        for gradient, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, other)
    else:
        assert [bits(g) for g in gradients] == [bits(g) for g in wanted]
    return True


def outcome(model: Stack, case: Case) -> Any:
    """What a run gave: a dict, or the error that was raised."""
    try:
        return run(model, case)
    except DeferredUseError:
        return DeferredUseError
    except RuntimeError as error:
        return {"error": str(error)[:60]}


@given(case=cases())
def test_a_fused_model_does_what_its_twin_does_and_unfusing_leaves_no_trace(case: Case) -> None:
    model = case.build()
    twin = copy.deepcopy(model)
    logs = add_hooks(model, case), add_hooks(twin, case)
    before = structure(model)
    keys = list(model.state_dict())
    kernel = members_kernel(len(plan_of(case).signature.parameters))
    with mapped(Kernel=kernel):
        fuse_modules(model, case.paths, case.specs, kernel="Kernel" if case.with_kernel else None)
    note(str(model))
    equal = same_or_refused(model, twin, case)
    assert list(model.state_dict()) == keys
    unfuse_modules(model)
    for block, twin_block in zip(model.blocks, twin.blocks, strict=True):
        block.__dict__.pop("kept", None), twin_block.__dict__.pop("kept", None)
    assert structure(model) == before
    if equal:
        once = not (case.with_kernel and case.sums_gradients)
        assert logs[0] == logs[1] or (
            not once and [k for k, _ in logs[0]] == [k for k, _ in logs[1]]
        )
        assert same_or_refused(model, twin, case)


def test_the_generated_cases_reach_the_kernel_often_enough_to_mean_something() -> None:
    ran: list[bool] = []

    @settings(max_examples=200, derandomize=True, database=None)
    @given(case=cases())
    def look(case: Case) -> None:
        model = case.build()
        kernel = members_kernel(len(plan_of(case).signature.parameters))
        with mapped(Kernel=kernel):
            fuse_modules(model, case.paths, case.specs, kernel="Kernel")
        outcome(model, case)
        ran.append(runs(kernel) > 0)

    look()
    assert sum(ran) > 0.25 * len(ran)
