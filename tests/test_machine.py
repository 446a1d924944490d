"""A fused model and its never-fused twin go through any steps and cannot be told apart."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from changes import Hook, inputs_of, kernel_runs, kernels_and_family
from generated import Case, cases
from hypothesis import Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from steps import PICK, SEED, Steps, is_called
from structure import structure
from twins import CONTEXTS, Side, Twins, in_threads

from module_fusion import (
    FusionError,
    UnfuseError,
    fuse,
    fuse_modules,
    fused,
    report,
    unfuse_modules,
)
from module_fusion.comparison import unfused

# Their blocks run any program, which no bytecode tells what leaves them.
pytestmark = pytest.mark.filterwarnings("ignore:The output of .* is given to others:UserWarning")

CHAIN = st.tuples(st.booleans(), PICK, st.integers(0, 3), st.integers(1, 3), st.booleans())
# Mostly those that a kernel may run in.
PROBES = [how for one in CONTEXTS for how in ("plain", "no_grad", "plain", "no_grad", one)]
KERNEL = st.sampled_from(["Weights", "Weights", "Members", "NoBackward", None])


class Machine(Steps):
    """Steps that both models take, and fusing, which only one knows of.

    Where a step says `at`, it is the number of a module among those that the step is for.
    """

    examples = steps = forwards = on_a_kernel = 0

    @initialize(case=cases())
    def start(self, case: Case) -> None:
        type(self).examples += 1
        # With a kernel such gradients may be summed in another order: without one or the other.
        self.without_gradients = case.sums_gradients and case.with_kernel
        self.case, self.twins = case, Twins(case, not self.without_gradients)
        self.never_fused = structure(self.ours)
        self.probes = case.seed
        self.new_optimizer(False)
        if case.with_kernel:
            self.fuse_everything("Weights")

    # Fusing

    def ours_alone(self, step: Any) -> None:
        """A step of the fused model that changes no object, name, tensor or random number."""
        before = torch.get_rng_state()
        objects = list(map(id, (*self.ours.parameters(), *self.ours.buffers())))
        step()
        assert objects == list(map(id, (*self.ours.parameters(), *self.ours.buffers())))
        assert torch.equal(before, torch.get_rng_state())

    def all_or_nothing(self, step: Any) -> FusionError | None:
        before = structure(self.ours)
        try:
            with kernels_and_family():
                self.ours_alone(step)
        except FusionError as error:
            note(f"refused: {error}")
            assert structure(self.ours) == before
            return error
        return None

    def chain(self, whole: bool, at: int, first: int, length: int, everywhere: bool) -> Any:
        """Arguments of `fuse_modules`: the chain of the case, or children of some module."""
        if whole:
            paths = {role: f"stack.{path}" for role, path in self.case.paths.items()}
            return paths, self.case.specs
        parents = ["layers.0", *self.twins.paths(lambda m: len(m._modules) > 0)]
        parent = parents[at % len(parents)]
        names = list(self.ours.get_submodule(parent)._modules)
        names = names[first % len(names) :][:length]
        if everywhere:
            parent = parent.replace("layers.0", "layers.*").replace("blocks.0", "blocks.*")
        return {f"r{name}": f"{parent}.{name}" for name in names}, None

    @rule(chain=CHAIN, kind=KERNEL)
    def fuse_by_path(self, chain: Any, kind: str | None) -> None:
        paths, specs = self.chain(*chain)
        kernel = self.kernel(kind, paths, specs)
        self.all_or_nothing(lambda: fuse_modules(self.ours, paths, specs, kernel=kernel))

    @rule(options=st.sampled_from([True, {"exclude": "layers.1"}, {"include": "layers.1.mlp"}]))
    def fuse_by_family(self, options: Any) -> None:
        self.all_or_nothing(lambda: fuse(self.ours, {"exact": options}))

    @rule(kind=KERNEL)
    def fuse_everything(self, kind: str | None) -> None:
        self.fuse_by_path((True, 0, 0, 1, True), kind)
        self.fuse_by_family(True)

    def kernel(self, kind: str | None, paths: dict[str, str], specs: Any) -> str | None:
        if self.case.sums_gradients and not self.without_gradients:
            return None
        count = inputs_of(self.ours, paths, specs)
        return kind and f"{kind}{count}"

    @rule(at=PICK, below=st.booleans())
    def unfuse_some(self, at: int, below: bool) -> None:
        paths = self.twins.paths(lambda m: True)
        path = paths[at % len(paths)] + (".**" if below else "")
        refusal = self.all_or_nothing(lambda: unfuse_modules(self.ours, path))
        assert type(refusal) is not UnfuseError or self.is_any_parametrized()

    @precondition(lambda self: not self.is_any_parametrized())
    @rule()
    def unfuse_all(self) -> None:
        self.ours_alone(lambda: unfuse_modules(self.ours))
        assert report(self.ours).groups == ()
        self.twins.check_unfused()
        if self.never_fused is None:
            self.never_fused = structure(self.ours)
        assert structure(self.ours) == self.never_fused

    @rule()
    def look(self) -> None:
        self.ours_alone(lambda: (repr(self.ours), str(report(self.ours)), dir(self.ours)))

    @rule(inside=st.booleans(), chain=CHAIN, kind=KERNEL, seed=SEED)
    def forward_in_a_context_of_ours(
        self, inside: bool, chain: Any, kind: str | None, seed: int
    ) -> None:
        """Unfused for one forward, or fused for one."""
        before = structure(self.ours)
        paths, specs = self.chain(*chain)
        context: Any = unfused(self.ours)
        if inside:
            context = fused(self.ours, paths, specs, kernel=self.kernel(kind, paths, specs))
        with kernels_and_family(), ExitStack() as stack:
            try:
                stack.enter_context(context)
            except FusionError as error:
                note(f"refused: {error}")
            self.forward(how="plain", seed=seed, odd=None, gradient=True)
        assert structure(self.ours) == before

    # Running

    @rule(
        how=st.sampled_from(["plain", "plain", *CONTEXTS]),
        seed=SEED,
        odd=st.sampled_from([None] * 12 + ["shape", "dtype"]),
        gradient=st.booleans(),
    )
    def forward(self, how: str, seed: int, odd: str | None, gradient: bool) -> None:
        ran = kernel_runs()
        self.twins.both(lambda s: s.forward(*self.inputs(seed, odd, gradient), how, seed))
        self.count_forward(kernel_runs() > ran)

    def count_forward(self, on_a_kernel: bool) -> None:
        type(self).forwards += 1
        type(self).on_a_kernel += on_a_kernel

    @rule()
    def backward(self) -> None:
        self.twins.both(lambda side: side.backward())

    @rule(at=PICK, seed=SEED)
    def an_error_in_the_middle_of_a_forward(self, at: int, seed: int) -> None:
        path = self.picked(at, is_called) or ""

        def step(side: Side) -> Any:
            module = side.model.get_submodule(path)
            handle = Hook(path, "raise").register(module)
            try:
                return side.forward(*self.inputs(seed), seed=seed)
            finally:
                handle.remove()

        self.twins.both(step)

    @precondition(lambda self: not self.case.has("draw", "store"))
    @rule(seed=SEED)
    def forward_in_two_threads(self, seed: int) -> None:
        """In evaluation mode, so that the threads do not share random numbers or statistics."""
        self.change("", lambda model: model.eval())
        given = [self.inputs(seed), self.inputs(seed + 1)]
        self.twins.both(lambda side: in_threads(side.model, given))

    # What is true after every step

    @invariant()
    def nothing_tells_them_apart(self) -> None:
        if not hasattr(self, "twins"):
            return
        type(self).steps += 1
        self.probes += 1
        ran, how = kernel_runs(), PROBES[self.probes % len(PROBES)]
        odd = "shape" if self.probes % 7 == 0 else None
        self.twins.both(lambda side: Side(side.model).forward(*self.inputs(0, odd), how))
        self.count_forward(kernel_runs() > ran)
        self.twins.check()

    def teardown(self) -> None:
        if sys.exc_info()[0] is None and hasattr(self, "twins"):
            self.put_right()
            self.unfuse_all()
            self.nothing_tells_them_apart()


SETTINGS = settings(
    max_examples=max(20, settings.default.max_examples // 25), stateful_step_count=25
)
TestMachine = Machine.TestCase
TestMachine.settings = SETTINGS


def test_the_machine_reaches_the_kernel_often_enough_to_mean_something() -> None:
    class Counted(Machine):
        pass

    few = settings(SETTINGS, max_examples=15, derandomize=True, database=None)
    run_state_machine_as_test(Counted, settings=settings(few, phases=[Phase.generate]))
    assert Counted.on_a_kernel > 0.15 * Counted.forwards
