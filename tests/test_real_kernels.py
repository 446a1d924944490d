"""Models of transformers on the built-in kernels: they run, the members do not, on every device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support import computed_in
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
DISTINCT_TOKENS = 20  # At least, of the 128 of two rows.

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


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*LANGUAGE, *VISION])
def test_the_kernels_run_in_every_block_and_the_members_do_not(
    name: str, context: Callable[[], AbstractContextManager[None]], device: str
) -> None:
    built = on(device, name)
    with context():
        expected = tensors(built)
    assert by_family(fuse(built.model)) == {**LANGUAGE, **VISION}[name]
    with context(), forwards_of_members(built.model) as entered:
        found = tensors(built)
    assert calls(built.model) == {(1, 0)}
    assert entered == []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    unfuse_modules(built.model)
    with context():
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


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", COMPILED)
def test_in_one_compiled_graph_every_block_has_its_kernel_and_no_member(
    name: str, grad: bool, device: str
) -> None:
    built = on(device, name)
    run = gradients if grad else outputs
    unfused, graphs = compiled(built.model)
    try:
        expected = run(built._replace(model=unfused))
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"torch does not compile the unfused model: {str(error).splitlines()[0]}")
    members = {path for group in fuse(built.model).fused for path in group.paths}
    (graph,) = graphs
    assert computed_in(graph, members) == members  # What is looked for is in that graph.
    fused, graphs = compiled(built.model)
    found = run(built._replace(model=fused))
    largest = max(float(value.abs().max()) for value in expected.values()) if grad else 1.0
    torch.testing.assert_close(found, expected, rtol=0 if grad else 1e-4, atol=1e-4 * largest)
    (graph,) = graphs
    assert seats_in(graph) == sum({**LANGUAGE, **VISION}[name])
    assert computed_in(graph, members) == set()


def outputs(built: Built) -> dict[str, Tensor]:
    with torch.no_grad():
        return {str(i): value for i, value in enumerate(tensors(built))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_in_a_short_dtype_gives_the_same_tokens(
    name: str, dtype: torch.dtype, device: str
) -> None:
    model = talkative(on(device, name).model).to(dtype)
    ids = torch.arange(3, 11, device=device).view(2, 4)
    options = {
        "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False,
        "pad_token_id": 0, "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    expected = model.generate(ids, **options)
    assert len(expected[:, ids.shape[1] :].unique()) >= DISTINCT_TOKENS
    groups = fuse(model).fused
    tokens = model.generate(ids, **options)
    assert calls(model) == {(NEW_TOKENS, 0)}
    unfuse_modules(model)
    if device == "cpu":
        assert torch.equal(tokens, expected)
    else:
        check_same_up_to_a_near_tie(model, tokens, expected)
    # What the kernels compute decides about the tokens, in both rows.
    for group in groups:
        nn.init.zeros_(model.get_submodule(group.paths[-1]).down_proj.weight)
    assert (model.generate(ids, **options) != expected).any(dim=1).all()


def talkative(model: Any) -> Any:
    """With weights by which many different tokens follow each other.

    With those of a fresh model, above all with a tied head, tokens repeat whatever the blocks do.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter.device), alpha=0.3)
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.roll(1, 0))
    return model


def check_same_up_to_a_near_tie(model: Any, tokens: Tensor, expected: Tensor) -> None:
    """On a GPU the kernels sum in another order than the members' matrix products.

    That may decide between two tokens that rounding made equal, and what follows is another text.
    """
    for got, wanted in zip(tokens, expected, strict=True):
        differing = (got != wanted).nonzero()
        if differing.numel():
            first = int(differing[0])
            best = model(wanted[None, :first]).logits[0, -1].float().topk(2).values
            assert best[0] - best[1] <= 4 * torch.finfo(model.dtype).eps * best[0].abs()
