"""The built-in kernels as repositories of the `kernels` library, and which one a model gets.

`scripts/build_kernels.py` makes the repositories; here they are built, loaded and run.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

import kernels
import pytest
import torch
import transformers as hf
from huggingface_hub import HfApi
from kernels import LocalLayerRepository, Mode
from kernels._rust import KernelName, Metadata
from support import computed_in, functions_in_seats, mapped, members_kernel, runs
from torch import Tensor, nn

from module_fusion import from_pretrained, fuse, fuse_modules, report
from module_fusion.inventory import chains_in
from module_fusion.kernels.rms_norm_mlp.layers import RMSNormMLP

SCRIPT = Path(__file__).parent.parent / "scripts" / "build_kernels.py"
VARIANTS = ("torch-cpu", "torch-cuda")
MODES = {
    "inference": Mode.INFERENCE,
    "training": Mode.TRAINING,
    "inference-compiled": Mode.INFERENCE | Mode.TORCH_COMPILE,
    "training-compiled": Mode.TRAINING | Mode.TORCH_COMPILE,
}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("build_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All repositories. Built once: `kernels` keeps what it loaded by its path."""
    out = tmp_path_factory.mktemp("hub")
    script.build(out)
    return out


@pytest.fixture(autouse=True)
def downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Attempts to reach a network or to download. They fail, and so does their test."""
    attempts: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            attempts.append(name)
            raise OSError(f"{name} in a test that must not download")

        return attempt

    for name in ("snapshot_download", "hf_hub_download", "list_repo_refs", "list_repo_tree"):
        monkeypatch.setattr(HfApi, name, refuse(name))
    monkeypatch.setattr(socket.socket, "connect", refuse("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("getaddrinfo"))
    yield attempts
    assert not attempts


def test_the_guard_sees_a_download(downloads: list[str]) -> None:
    repository = kernels.LayerRepository("kernels-community/none", layer_name="None", version=1)
    with pytest.raises(Exception, match="must not download"):
        repository.load()
    assert downloads
    downloads.clear()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, without the bytecode that importing leaves."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if "__pycache__" not in path.parts
    }


# What is built.


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_the_script_builds_every_kernel_or_those_named(script: Any, tmp_path: Path) -> None:
    done = run_script(tmp_path / "one", "--kernel", "rms-norm-mlp")
    assert done.stdout == f"{tmp_path / 'one' / 'rms-norm-mlp'}: written\n", done.stderr
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["rms-norm-mlp"]
    assert run_script(tmp_path / "all").returncode == 0
    folders = {path.name for path in script.KERNELS.iterdir() if (path / "layers").is_dir()}
    assert {path.name.replace("-", "_") for path in (tmp_path / "all").iterdir()} == folders
    assert folders >= {"rms_norm_mlp", "patch_embed"}


def test_both_variants_hold_the_files_of_the_package(script: Any, built: Path) -> None:
    for name, folder in script.kernel_folders().items():
        source = contents(folder)
        for variant in VARIANTS:
            copied = contents(built / name / "build" / variant)
            del copied["metadata.json"]
            assert copied == source
        top = {path.name for path in (built / name).iterdir()}
        assert top == {"LICENSE", "README.md", "build"}
    assert "configs.json" in contents(built / "rms-norm-mlp" / "build" / "torch-cuda")


def test_building_twice_gives_the_same_bytes(
    script: Any, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From another checkout, where the files come in another order and bytecode lies about.
    copy = tmp_path / "kernels"
    for folder in sorted(script.KERNELS.iterdir(), reverse=True):
        if folder.is_dir() and folder.name != "__pycache__":
            shutil.copytree(folder, copy / folder.name)
            (copy / folder.name / "__pycache__").mkdir(exist_ok=True)
            (copy / folder.name / "__pycache__" / "other.cpython-399.pyc").write_bytes(b"other")
    monkeypatch.setattr(script, "KERNELS", copy)
    script.build(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built)


def test_the_metadata_is_what_the_kernels_library_requires(script: Any, built: Path) -> None:
    ids = set()
    for name in script.kernel_folders():
        for variant in VARIANTS:
            path = built / name / "build" / variant / "metadata.json"
            metadata = Metadata.read_from_file(path)
            assert metadata.name == KernelName(name)
            assert metadata.version == 1
            assert metadata.license == "Apache-2.0"
            assert metadata.python_depends == []
            assert str(metadata.backend.backend_type).lower() == variant.removeprefix("torch-")
            assert metadata.id.isidentifier()
            ids.add(metadata.id)
            assert set(json.loads(path.read_text())) == {
                *("name", "id", "version", "license", "python-depends", "backend")
            }
    assert len(ids) == len(VARIANTS) * len(script.kernel_folders())


def test_other_content_has_another_id(
    script: Any, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(script.KERNELS / "rms_norm_mlp", copy / "rms_norm_mlp")
    monkeypatch.setattr(script, "KERNELS", copy)

    def id_in(out: Path) -> str:
        path = out / "rms-norm-mlp" / "build" / "torch-cpu" / "metadata.json"
        return str(json.loads(path.read_text())["id"])

    ids = [id_in(built)]
    for change in ("configs.json", "layers/__init__.py"):
        with (copy / "rms_norm_mlp" / change).open("a") as file:
            file.write("\n")
        script.build(tmp_path / "out", force=True)
        ids.append(id_in(tmp_path / "out"))
    assert len(set(ids)) == 3


def test_the_readme_says_what_it_is_and_how_it_is_used(built: Path) -> None:
    text = (built / "rms-norm-mlp" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert "\n# rms-norm-mlp\n\nRMSNorm followed by a gated MLP" in text
    assert 'LocalLayerRepository(Path("rms-norm-mlp"), layer_name="RMSNormMLP")' in text
    assert "\n## RMSNormMLP\n" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    ast.parse(code)


# What is there already.


def test_the_same_content_is_left_alone(script: Any, tmp_path: Path) -> None:
    assert all(script.build(tmp_path).values())
    bytecode = tmp_path / "patch-embed" / "build" / "torch-cpu" / "__pycache__"
    bytecode.mkdir()
    assert not any(script.build(tmp_path).values())
    assert bytecode.exists()


@pytest.mark.parametrize(
    ("path", "difference"),
    [
        ("build/torch-cpu/_ops.py", "build/torch-cpu/_ops.py differs"),
        ("build/torch-cuda/old.py", "build/torch-cuda/old.py is not of this build"),
        ("notes.txt", "notes.txt is not of this build"),
    ],
)
def test_other_content_is_refused_and_forced(
    script: Any, tmp_path: Path, path: str, difference: str
) -> None:
    script.build(tmp_path, ["rms-norm-mlp"])
    fresh = contents(tmp_path)
    mine = tmp_path / "rms-norm-mlp" / path
    mine.write_text("mine")
    before = contents(tmp_path)
    # The other repository would be written first: all or nothing.
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"build_kernels.py: {tmp_path / 'rms-norm-mlp'} holds other content: {difference}. "
        f"Nothing was written. --force replaces build, README.md and LICENSE there.\n"
    )
    assert contents(tmp_path) == before
    assert run_script(tmp_path, "--kernel", "rms-norm-mlp", "--force").returncode == 0
    kept = {"rms-norm-mlp/notes.txt": b"mine"} if path == "notes.txt" else {}
    assert contents(tmp_path) == fresh | kept


def test_a_missing_file_is_other_content(script: Any, tmp_path: Path) -> None:
    script.build(tmp_path)
    (tmp_path / "patch-embed" / "LICENSE").unlink()
    with pytest.raises(script.BuildError, match="LICENSE is missing"):
        script.build(tmp_path)


def test_a_fresh_clone_is_built_into_and_keeps_its_history(script: Any, tmp_path: Path) -> None:
    history = tmp_path / "patch-embed" / ".git" / "HEAD"
    history.parent.mkdir(parents=True)
    history.write_text("ref: refs/heads/main\n")
    (tmp_path / "patch-embed" / ".gitattributes").write_text("")
    assert script.build(tmp_path, ["patch-embed"]) == {"patch-embed": True}
    assert script.build(tmp_path, ["patch-embed"], force=True) == {"patch-embed": False}
    assert history.exists()


def test_what_cannot_be_built_is_an_error(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_script(tmp_path, "--kernel", "rms_norm_mlp")
    assert done.returncode == 1
    assert done.stderr == (
        "build_kernels.py: No kernel rms_norm_mlp; there are patch-embed, rms-norm-mlp.\n"
    )
    (tmp_path / "rms-norm-mlp").write_text("a file")
    with pytest.raises(script.BuildError, match=r"rms-norm-mlp is not a directory\.$"):
        script.build(tmp_path, ["rms-norm-mlp"])
    copy = tmp_path / "kernels"
    shutil.copytree(script.KERNELS / "patch_embed", copy / "patch_embed")
    monkeypatch.setattr(script, "KERNELS", copy)
    (copy / "patch_embed" / "kernel.cu").write_text("")
    with pytest.raises(script.BuildError, match=r"neither \.py nor \.json: kernel\.cu\.$"):
        script.build(tmp_path / "out")
    shutil.move(copy / "patch_embed", copy / "_embed")
    with pytest.raises(script.BuildError, match="'-embed' is not a kernel name"):
        script.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is built stands alone.


def test_the_code_imports_only_itself_torch_and_triton(built: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    checked = 0
    for variant in built.glob("*/build/*"):
        for path in variant.rglob("*.py"):
            depth = len(path.relative_to(variant).parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level <= depth, f"{path}:{node.lineno} leaves the folder"
                elif isinstance(node, ast.ImportFrom):
                    assert str(node.module).split(".")[0] in allowed, f"{path}:{node.lineno}"
                elif isinstance(node, ast.Import):
                    roots = {alias.name.split(".")[0] for alias in node.names}
                    assert roots <= allowed, f"{path}:{node.lineno}"
                else:
                    continue
                checked += 1
    assert checked > 50


ALONE = """
import importlib.util, json, sys
from pathlib import Path
import torch
from torch import nn

for name in BLOCKED:
    sys.modules[name] = None  # importing it is an ImportError

variant = Path(VARIANT)
spec = importlib.util.spec_from_file_location(
    json.loads((variant / "metadata.json").read_text())["id"], variant / "__init__.py"
)
kernel = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(16, 24, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Seat(nn.Module):
    forward = kernel.layers.RMSNormMLP.forward


seat, x = Seat(), torch.randn(2, 3, 16)
seat.norm, seat.mlp = nn.RMSNorm(16, eps=1e-5), Mlp()
seat.prepared = Seat.forward.prepare(seat.norm, seat.mlp)
expected = seat.mlp(seat.norm(x))
Mlp.forward = None  # from here on, only the kernel can compute it
torch.testing.assert_close(seat(x), expected)
torch.testing.assert_close(torch.compile(seat, fullgraph=True, backend="eager")(x), expected)
assert sys.modules["module_fusion"] is None
print("ran", kernel._ops.HAS_TRITON)
"""


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("without", [[], ["triton"]], ids=["triton", "no-triton"])
def test_it_runs_where_module_fusion_cannot_be_imported(
    built: Path, tmp_path: Path, variant: str, without: list[str]
) -> None:
    has_triton = not without and importlib.util.find_spec("triton") is not None
    path = built / "rms-norm-mlp" / "build" / variant
    values = f"BLOCKED, VARIANT = {['module_fusion', *without]!r}, {str(path)!r}\n"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", values + ALONE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"ran {has_triton}\n"


# What is built runs in a model.


@dataclass(frozen=True)
class Case:
    """A tiny model, and what of it a kernel takes over."""

    model: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    kernel: str
    repository: str
    modules: dict[str, str]


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BEFORE_MLP = {"norm": "model.layers.*.post_attention_layernorm", "mlp": "model.layers.*.mlp"}
RMS = {"kernel": "RMSNormMLP", "repository": "rms-norm-mlp", "modules": BEFORE_MLP}


def tokens() -> Tensor:
    return torch.arange(3, 15).view(2, 6)


CASES = {
    "llama": Case(
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
        tokens,
        **RMS,
    ),
    "qwen3": Case(
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, head_dim=8)),
        tokens,
        **RMS,
    ),
    "vit": Case(
        lambda: hf.ViTModel(hf.ViTConfig(**IMAGE), add_pooling_layer=False),
        lambda: torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
        kernel="PatchEmbed",
        repository="patch-embed",
        modules={"proj": "embeddings.patch_embeddings.projection"},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def members_of(model: nn.Module, case: Case) -> dict[str, nn.Module]:
    """The members by path, fused or not."""
    patterns = case.modules.values()
    return {
        path: module
        for path, module in model.named_modules()
        if any(fnmatch(path, pattern) for pattern in patterns)
    }


@contextmanager
def member_runs(model: nn.Module, case: Case) -> Iterator[set[str]]:
    """The members whose own `forward` ran in Python, seen without touching them."""
    paths = {id(module): path for path, module in members_of(model, case).items()}
    ran: set[str] = set()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name == "forward":
            path = paths.get(id(frame.f_locals.get("self")))
            ran.update([path] if path else [])

    sys.setprofile(look)
    try:
        yield ran
    finally:
        sys.setprofile(None)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a GPU to load torch-cuda for"
        ),
    ),
]


def mapping_of(case: Case, built: Path, device: str, variant: str = "") -> dict[str, Any]:
    path = built / case.repository / (f"build/{variant}" if variant else "")
    repository = LocalLayerRepository(repo_path=path, layer_name=case.kernel)
    return {case.kernel: {device: repository}}


def files_of_kernels(model: nn.Module) -> set[str]:
    """Where the functions in the seats come from."""
    seats = [found.chain.seat for found in chains_in(model)]
    assert all(seat is not None and seat.kernel is not None for seat in seats)
    return {seat.kernel.__code__.co_filename for seat in seats}  # type: ignore[union-attr]


class Traced:
    """A backend for torch.compile that keeps what was traced."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def origins(self) -> str:
        """Lines of code, by file, that something in the graphs comes from."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return "".join(node.meta.get("stack_trace") or "" for node in nodes)


def result_of(model: nn.Module, call: Callable[..., Any], x: Tensor) -> list[Tensor]:
    """The output, and in training the gradients of all parameters."""
    with torch.set_grad_enabled(model.training):
        output: Tensor = call(x)[0]
    if not model.training:
        return [output]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), parameters, allow_unused=True)
    return [output, *(gradient for gradient in gradients if gradient is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """The same values; on a GPU the kernels sum in another order than the members' products."""
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        if wanted.is_cuda:
            assert (value - wanted).abs().max() <= 1e-4 * max(t.abs().max() for t in expected)
        else:
            torch.testing.assert_close(value, wanted)


def check_the_kernel_ran(
    case: Case, model: nn.Module, mode: Mode, expected: list[Tensor], root: Path, device: str
) -> None:
    """Same results, from the kernel in `root` alone, in eager mode and compiled."""
    x = case.inputs().to(device)
    assert {Path(file).is_relative_to(root) for file in files_of_kernels(model)} == {True}
    before = [group.kernel_calls for group in report(model).fused]
    with member_runs(model, case) as ran:
        assert_close(result_of(model, model, x), expected)
    assert ran == set()
    groups = report(model).fused
    assert [group.kernel_calls for group in groups] == [calls + 1 for calls in before]
    assert {group.member_calls for group in groups} == {0}
    if Mode.TORCH_COMPILE in mode:
        traced = Traced()
        compiled = torch.compile(model, fullgraph=True, backend=traced)
        assert_close(result_of(model, compiled, x), expected)
        origins = traced.origins()
        assert f'File "{root}' in origins
        (graph,) = traced.graphs
        assert computed_in(graph, members_of(model, case).keys()) == set()
        # Nor by a kernel that has no call of a member: the class of the last one has no other
        # modules in these models.
        codes = {type(found.last).forward.__code__ for found in chains_in(model)}
        for code in codes:
            first, last = code.co_firstlineno, max(line for *_, line in code.co_lines() if line)
            for line in range(first, last + 1):
                assert f'File "{code.co_filename}", line {line}, ' not in origins


def test_members_are_seen_in_the_graph_of_an_unfused_model(case: Case) -> None:
    """What `check_the_kernel_ran` looks for."""
    model, traced = case.model().eval(), Traced()
    result_of(model, torch.compile(model, fullgraph=True, backend=traced), case.inputs())
    (graph,) = traced.graphs
    assert computed_in(graph, members_of(model, case).keys()) == set(members_of(model, case))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("way", ["fuse", "fuse_modules", "kernelize"])
def test_a_built_kernel_runs_in_every_mode(
    case: Case, built: Path, mode: Mode, way: str, device: str
) -> None:
    torch.manual_seed(0)
    model = case.model().train(Mode.TRAINING in mode).to(device)
    with member_runs(model, case) as ran:
        expected = result_of(model, model, case.inputs().to(device))
    assert ran == set(members_of(model, case))
    root = built / case.repository / "build"
    if device == "cuda":
        root /= "torch-cuda"
    if way == "kernelize":
        fuse_modules(model, case.modules, kernel=case.kernel)
        assert not any(Path(file).is_relative_to(root) for file in files_of_kernels(model))
    with kernels.use_kernel_mapping(mapping_of(case, built, device)):
        if way == "kernelize":
            kernels.kernelize(model, mode=mode, device=device, use_fallback=False)
        elif way == "fuse_modules":
            fuse_modules(model, case.modules, kernel=case.kernel, mode=mode, use_fallback=False)
        else:
            fuse(model, mode=mode)
    check_the_kernel_ran(case, model, mode, expected, root, device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_tensors_of_the_cpu(case: Case, built: Path, variant: str) -> None:
    """With a CUDA build of torch, `kernels` loads torch-cuda for the CPU too."""
    torch.manual_seed(0)
    model, mode = case.model().eval(), Mode.INFERENCE | Mode.TORCH_COMPILE
    expected = result_of(model, model, case.inputs())
    with kernels.use_kernel_mapping(mapping_of(case, built, "cpu", variant)):
        fuse_modules(model, case.modules, kernel=case.kernel, mode=mode, use_fallback=False)
    root = built / case.repository / "build" / variant
    check_the_kernel_ran(case, model, mode, expected, root, "cpu")


# Which kernel a model gets.


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return CASES["llama"].model().eval()


def test_without_a_mapping_the_built_in_kernel_is_used() -> None:
    model = tiny_llama()
    expected = model(tokens())[0]
    fuse_modules(model, BEFORE_MLP, kernel="RMSNormMLP", use_fallback=False)
    assert functions_in_seats(model) == {RMSNormMLP.forward}
    torch.testing.assert_close(model(tokens())[0], expected)
    assert [group.kernel_calls for group in report(model).fused] == [1, 1]


def test_a_mapping_of_the_user_comes_first() -> None:
    model, layer = tiny_llama(), members_kernel(1)
    with mapped(RMSNormMLP=layer):
        fuse_modules(model, BEFORE_MLP, kernel="RMSNormMLP", use_fallback=False)
    assert functions_in_seats(model) == {layer.forward}
    model(tokens())
    assert runs(layer) == 2


def test_a_repository_of_the_hub_in_the_mapping_of_the_user_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, layer = tiny_llama(), members_kernel(1)
    loaded: list[kernels.LayerRepository] = []

    def load(self: kernels.LayerRepository) -> type[nn.Module]:
        loaded.append(self)
        return layer

    monkeypatch.setattr(kernels.LayerRepository, "load", load)
    mine = kernels.LayerRepository("me/my-kernel", layer_name="Mine", revision="main")
    with kernels.use_kernel_mapping({"RMSNormMLP": {"cpu": mine}}):
        assert len(fuse(model).fused) == 2
    assert set(loaded) == {mine}
    assert functions_in_seats(model) == {layer.forward}
    # Without it, the next model has the built-in one again.
    other = tiny_llama()
    fuse(other)
    assert functions_in_seats(other) == {RMSNormMLP.forward}


def test_fuse_downloads_nothing(case: Case, downloads: list[str]) -> None:
    model = case.model().eval()
    result = fuse(model)
    assert {group.kernel for group in result.fused} == {case.kernel}
    model(case.inputs())
    assert downloads == []


def test_loading_a_checkpoint_of_this_machine_downloads_nothing(
    tmp_path: Path, downloads: list[str]
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = from_pretrained(hf.LlamaForCausalLM, tmp_path, fusion_config=True)
    assert functions_in_seats(model) == {RMSNormMLP.forward}
    # What is fused is in the config from then on.
    model.save_pretrained(tmp_path / "fused")
    again = from_pretrained(hf.LlamaForCausalLM, tmp_path / "fused")
    assert functions_in_seats(again) == {RMSNormMLP.forward}
    assert downloads == []


def test_a_mapping_for_other_names_or_devices_leaves_the_built_in_kernel() -> None:
    model, layer = tiny_llama(), members_kernel(1)
    with mapped(Other=layer), kernels.use_kernel_mapping({"RMSNormMLP": {"xpu": object()}}):
        fuse_modules(model, BEFORE_MLP, kernel="RMSNormMLP", use_fallback=False)
    assert functions_in_seats(model) == {RMSNormMLP.forward}


def test_the_built_in_mapping_does_not_outlast_the_call() -> None:
    model = tiny_llama()
    fuse_modules(model, BEFORE_MLP, kernel="RMSNormMLP", use_fallback=False)
    with pytest.raises(ValueError, match="No layer mapping for `RMSNormMLP`"):
        kernels.kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
