"""The sample: one graph of torch.compile, and greedy generation."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import torch
from structure import structure

from .build import Built, seed
from .check import all_families, fused_by_path
from .compare import Expected, Fault
from .flat import flat, relative_error, same_bits

NEW_TOKENS = 8
Pair = tuple[str, str]


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
    try:
        before = _generated(built)
    except Exception as error:
        return f"the unfused model does not generate: {type(error).__name__}"
    if not same_bits(_generated(built), before):
        return "two generations of the unfused model differ"
    # They set attributes.
    expected = dataclasses.replace(expected, structure=structure(built.model))
    with all_families(built, expected):
        if not same_bits(_generated(built)[:1], before[:1]):
            raise Fault("generate: other tokens with `fuse`")
    if pair is not None:
        with fused_by_path(built, pair):
            if not same_bits(_generated(built), before):
                raise Fault(f"generate: other tokens or logits with {pair} fused")
    return "same"


def _generated(built: Built) -> list[Any]:
    model: Any = built.model
    seed()
    with torch.no_grad():
        result = model.generate(
            **{k: v for k, v in built.inputs.items() if not k.startswith("decoder_")},
            max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, eos_token_id=None,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    if isinstance(result, torch.Tensor):
        return [result]
    return [result.sequences, *flat(getattr(result, "logits", None))]


def check_compiled(built: Built, expected: Expected, pair: Pair | None) -> str:
    """One graph of the fused model gives what one graph of the unfused model gives.

    Raises:
        Fault: the fused model does not compile, or gives something else.
    """
    try:
        before = _compiled(built)
    except Exception as error:
        return f"the unfused model does not compile: {type(error).__name__}"
    expected = dataclasses.replace(expected, structure=structure(built.model))
    with all_families(built, expected):
        error = relative_error(_compiled(built), before)
        if not error < 1e-4:
            raise Fault(f"compiled: relative error {error:.1e} with `fuse`")
    if pair is not None:
        with fused_by_path(built, pair):
            found = _compiled(built)
            if not same_bits(found, before):
                error = relative_error(found, before)
                raise Fault(f"compiled: outputs differ by {error:.1e} with {pair} fused")
    return "same"


def _compiled(built: Built) -> list[Any]:
    torch.compiler.reset()
    seed()
    model: Any = torch.compile(built.model, fullgraph=True, backend="aot_eager")
    try:
        with torch.no_grad():
            return flat(model(**built.inputs))
    finally:
        torch.compiler.reset()
