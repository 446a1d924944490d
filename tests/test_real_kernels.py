"""Models of transformers on the built-in kernels: they run, the members do not, on every device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from test_real_models import compiled, seats_in
from torch import Tensor, nn

from module_fusion import FusionReport, fuse, report, unfuse_modules

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

# After the path: the sweep's own tiny models.
from zoo import others
from zoo.build import Built, build
from zoo.flat import flat

# How many groups of each family, norm and MLP before patch embedding, are on a kernel.
LANGUAGE = {
    "llama": (2, 0), "mistral": (2, 0), "qwen2": (2, 0), "qwen3": (2, 0), "gemma": (2, 0),
    "gemma2": (2, 0), "gemma3_text": (2, 0), "phi3": (2, 0), "deepseek_v3": (1, 0),
}  # fmt: skip
VISION = {
    "vit": (0, 1), "siglip": (0, 1), "clip": (0, 1), "dinov2": (0, 1),
    "qwen2_vl_vision": (0, 1), "qwen2_5_vl_vision": (2, 1), "qwen3_vl_vision": (0, 1),
    "timm/vit_tiny_patch16_224": (0, 1),
}  # fmt: skip
COMPILED = ("llama", "gemma2", "phi3", "siglip", "dinov2")
NEW_TOKENS = 64

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]


def on(device: str, name: str) -> Built:
    """A tiny model with random weights, its norms not ones, and its inputs."""
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed")
    built = others.build(name) if "/" in name else build(name)
    inputs = {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in built.inputs.items()
    }
    return built._replace(model=built.model.to(device), inputs=inputs)


def by_family(found: FusionReport) -> tuple[int, int]:
    families = [group.family for group in found.fused]
    return families.count("rms_norm_mlp"), families.count("patch_embeddings")


def calls(model: nn.Module) -> set[tuple[int, int]]:
    """Of kernel and members, group by group."""
    return {(group.kernel_calls, group.member_calls) for group in report(model).groups}


@contextmanager
def forwards_of_members(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the members whose own `forward` is entered inside, by whomever."""
    paths = {id(model.get_submodule(path)): path for g in report(model).groups for path in g.paths}
    entered: list[str] = []

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == "forward":
            path = paths.get(id(frame.f_locals.get("self")))
            if path is not None:
                entered.append(path)

    sys.setprofile(look)
    try:
        yield entered
    finally:
        sys.setprofile(None)


def tensors(built: Built) -> list[Tensor]:
    """Every number that the model returns, with the same random numbers each time."""
    torch.manual_seed(0)
    values = flat(built.model(**built.inputs))
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


@pytest.mark.parametrize("name", [*LANGUAGE, *VISION])
def test_the_kernels_run_in_every_block_and_the_members_do_not(name: str, device: str) -> None:
    built = on(device, name)
    with torch.no_grad():
        expected = tensors(built)
        assert by_family(fuse(built.model)) == {**LANGUAGE, **VISION}[name]
        with forwards_of_members(built.model) as entered:
            found = tensors(built)
    assert calls(built.model) == {(1, 0)}
    assert entered == []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    unfuse_modules(built.model)
    with torch.no_grad():
        assert all(map(torch.equal, tensors(built), expected))


@pytest.mark.parametrize("name", [*LANGUAGE, *VISION])
def test_in_training_the_kernels_run_and_the_gradients_are_those_of_the_members(
    name: str, device: str
) -> None:
    built = on(device, name)
    built.model.train()
    expected = gradients(built)
    fuse(built.model)
    with forwards_of_members(built.model) as entered:
        found = gradients(built)
    assert calls(built.model) == {(1, 0)}
    assert entered == []
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-4 * largest, key


def gradients(built: Built) -> dict[str, Tensor]:
    built.model.zero_grad()
    torch.stack([(value * value).mean() for value in tensors(built)]).sum().backward()
    return {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", COMPILED)
def test_in_one_compiled_graph_every_block_has_its_kernel(name: str, device: str) -> None:
    built = on(device, name)
    with torch.no_grad():
        try:
            expected = tensors(built._replace(model=compiled(built.model)[0]))
        except torch._dynamo.exc.TorchDynamoException as error:
            pytest.skip(f"torch does not compile the unfused model: {str(error).splitlines()[0]}")
        fuse(built.model)
        model, graphs = compiled(built.model)
        found = tensors(built._replace(model=model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    assert seats_in(graph) == sum({**LANGUAGE, **VISION}[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_in_a_short_dtype_gives_the_same_tokens(
    name: str, dtype: torch.dtype, device: str
) -> None:
    model: Any = on(device, name).model.to(dtype)
    ids = torch.arange(3, 11, device=device).view(2, 4)
    options = {
        "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False,
        "pad_token_id": 0, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    expected = model.generate(ids, **options)
    fuse(model)
    tokens = model.generate(ids, **options)
    assert calls(model) == {(NEW_TOKENS, 0)}
    unfuse_modules(model)
    for got, wanted in zip(tokens, expected, strict=True):
        differing = (got != wanted).nonzero()
        if differing.numel():
            # Another order of summation may decide between two tokens that rounding made equal.
            first = int(differing[0])
            best = model(wanted[None, :first]).logits[0, -1].float().topk(2).values
            assert best[0] - best[1] <= 4 * torch.finfo(dtype).eps * best[0].abs()
