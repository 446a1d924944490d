"""Greedy generation; and of a sample one graph of torch.compile, without and with gradients."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from structure import plain_values, structure
from torch._guards import TracingContext

from module_fusion import report
from module_fusion.chain import Chain
from module_fusion.modules import state_of

from .build import Built, run, seed
from .check import all_families, fused_by_path
from .compare import (
    FAR,
    Expected,
    Fault,
    check_alike,
    check_outputs,
    in_float64,
    kept_values,
)
from .flat import flat, gradients_of, relative_error, same_bits
from .rounding import ANOTHER_KERNEL, ANOTHER_ORDER, check_accuracy, check_gradients

NEW_TOKENS = 8
# Options of `generate`, of which the first that the unfused model takes are used.
OPTIONS: tuple[dict[str, Any], ...]
OPTIONS = ({"eos_token_id": None}, {"eos_token_id": None, "decoder_start_token_id": 0}, {})
Pair = tuple[str, str]
Results = tuple[list[Any], dict[str, torch.Tensor | None]]


def in_sample(architecture: str, every: int) -> bool:
    """Whether an architecture is in a sample of one in `every`, the same each time."""
    return zlib.crc32(architecture.encode()) % every == 0


def check_generate(built: Built, expected: Expected, pair: Pair | None) -> str | None:
    """Greedy tokens and logits, unfused and fused; None where the model does not generate.

    Raises:
        Fault: they differ.
    """
    can: Any = getattr(built.model, "can_generate", None)
    if "input_ids" not in built.inputs or can is None or not can():
        return None
    for options in OPTIONS:
        generated = partial(_generated, options=options)
        try:
            before = generated(built)
            break
        except Exception as error:
            why = f"the unfused model does not generate: {type(error).__name__}"
    else:
        return why
    values = plain_values(built.model)
    if not same_bits(generated(built), before):
        return "two generations of the unfused model differ"
    with all_families(built, _renewed(built, expected, values)):
        found = generated(built)
    if not same_bits(found[:1], before[:1]):
        raise Fault("generate: other tokens with `fuse`")
    _check_close(found, before, built, generated, "generate, with `fuse`")
    if pair is not None:
        with fused_by_path(built, pair):
            if not same_bits(generated(built), before):
                raise Fault(f"generate: other tokens or logits with {pair} fused")
    return "same"


def _generated(built: Built, options: dict[str, Any]) -> list[Any]:
    model: Any = built.model
    seed()
    with torch.no_grad():
        result = model.generate(
            **{k: v for k, v in built.inputs.items() if not k.startswith("decoder_")},
            max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    if isinstance(result, torch.Tensor):
        return [result]
    return [result.sequences, *flat(getattr(result, "logits", None))]


def check_compiled(
    built: Built, expected: Expected, pair: Pair | None, with_gradients: bool = False
) -> str:
    """One graph of the fused model gives what one graph of the unfused model gives.

    Args:
        pair: one that is fused by path too.
        with_gradients: whether one with gradients is compared too, which takes much longer.

    Raises:
        Fault: the fused model does not compile, or gives something else.
    """
    found = _check_graph(built, expected, pair, False)
    if found is not None or not with_gradients or expected.gradients is None:
        return found or "same"
    found = _check_graph(built, expected, pair, True)
    return "same, gradients too" if found is None else f"same; with gradients {found}"


def _check_graph(
    built: Built, expected: Expected, pair: Pair | None, with_gradients: bool
) -> str | None:
    """Why there is no graph of the unfused model to compare with, None where there is."""
    how = "compiled, with gradients" if with_gradients else "compiled"
    values = plain_values(built.model)
    try:
        before, gradients = _compiled(built, with_gradients)
    except Exception as error:
        return f"the unfused model does not compile: {type(error).__name__}"
    renewed = _renewed(built, expected, values)
    unfused = dataclasses.replace(renewed, gradients=gradients)
    if with_gradients:
        unfused.__dict__["exact"] = expected.exact
    with all_families(built, renewed):
        found, now = _compiled_on_kernel(built, with_gradients, f"{how}, with `fuse`")
    _check_close(found, before, built, _run, f"{how}, with `fuse`")
    check_gradients(now, unfused, ANOTHER_KERNEL, f"{how}, with `fuse`")
    if pair is not None:
        with fused_by_path(built, pair):
            found, now = _compiled_on_kernel(built, with_gradients, f"{how}, with {pair} fused")
        check_outputs(found, before, f"{how}, with {pair} fused")
        check_gradients(now, unfused, ANOTHER_ORDER, f"{how}, with {pair} fused")
    return None


def _renewed(built: Built, expected: Expected, values: dict[tuple[str, str], str]) -> Expected:
    """What the model is now: generation and compiling set attributes."""
    now = kept_values(built.model, values)
    return dataclasses.replace(expected, structure=structure(built.model), values=now)


def _run(built: Built) -> list[Any]:
    return flat(run(built.model, built.inputs))


def _check_close(
    found: list[Any],
    before: list[Any],
    built: Built,
    run: Callable[[Built], list[Any]],
    how: str,
) -> None:
    """As close to float64 as the unfused model, run in the same way; the model is unfused.

    Raises:
        Fault: further from it.
    """
    try:
        check_alike(found, before, "from those of the unfused model")
        check_accuracy(found, before, partial(_exact, before, built, run))
    except Fault as fault:
        raise Fault(f"{how}: {fault}") from fault


def _exact(before: list[Any], built: Built, run: Callable[[Built], list[Any]]) -> list[Any] | None:
    """What a twin in float64 gives where it does the same."""
    try:
        outputs = run(in_float64(built))
        return outputs if relative_error(before, outputs) < FAR else None
    except Exception:
        return None


def _compiled_on_kernel(built: Built, with_gradients: bool, how: str) -> Results:
    """What one graph gives, which has the kernel wherever it runs without a graph.

    Raises:
        Fault: the members are in the graph instead.
    """
    # It tells whether the members' outputs are used elsewhere.
    _results(built.model, built, with_gradients)
    before = report(built.model).groups
    _results(built.model, built, with_gradients)
    calls = {
        now.paths: now.kernel_calls - earlier.kernel_calls
        for earlier, now in zip(before, report(built.model).groups, strict=True)
    }
    with _counting() as in_graphs:
        found = _compiled(built, with_gradients)
    wanted = sum(count for paths, count in calls.items() if not _why_not_in_graph(built, paths))
    if in_graphs() != wanted:
        raise Fault(f"{how}: {in_graphs()} of {wanted} calls of kernels are in the graph")
    return found


def _why_not_in_graph(built: Built, paths: tuple[str, ...]) -> str | None:
    state = state_of(built.model.get_submodule(paths[-1]))
    return None if state is None or state.chain is None else state.chain.why_not_compiled()


_TRACED: list[Any] = []
_MADE: list[Any] = []


@torch.compiler.assume_constant_result  # Runs while the graph is made.
def _note_traced() -> None:
    _TRACED.append(TracingContext.get())


def _backend(graph: Any, inputs: Any) -> Any:
    """`aot_eager`, which notes the traces that were not given up to start again."""
    _MADE.append(TracingContext.get())
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@contextmanager
def _counting() -> Iterator[Callable[[], int]]:
    """Inside, kernels that become part of a graph are counted."""

    def run_kernel(self: Chain, inputs: list[Any]) -> Any:
        if torch.compiler.is_dynamo_compiling():
            _note_traced()
        return real(self, inputs)

    def in_graphs() -> int:
        return sum(any(trace is made for made in _MADE) for trace in _TRACED)

    _TRACED.clear()
    _MADE.clear()
    real = Chain.run_kernel
    Chain.run_kernel = run_kernel  # type: ignore[method-assign]
    try:
        yield in_graphs
    finally:
        Chain.run_kernel = real  # type: ignore[method-assign]


def _compiled(built: Built, with_gradients: bool) -> Results:
    """What one graph gives, and nothing is compiled before or after."""
    torch.compiler.reset()
    try:
        model = torch.compile(built.model, fullgraph=True, backend=_backend)
        outputs, gradients = _results(model, built, with_gradients)
    finally:
        torch.compiler.reset()
    return outputs, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}


def _results(model: Any, built: Built, with_gradients: bool) -> Results:
    """The outputs; and the gradients, where they are asked for."""
    seed()
    if with_gradients:
        return gradients_of(model, built.inputs)
    with torch.no_grad():
        return flat(model(**built.inputs)), {}
