"""The public surface is frozen: names, signatures, documentation, and what importing costs."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import module_fusion

NAMES = [
    "AlreadyFusedError",
    "BenchmarkReport",
    "DeferredUseError",
    "FusedModule",
    "FusionError",
    "FusionFamily",
    "FusionReport",
    "MissingPackageError",
    "ModuleSpec",
    "NotFusableError",
    "PathNotFoundError",
    "RegistryCollector",
    "SpecMismatchError",
    "UnfuseError",
    "VerificationReport",
    "benchmark",
    "from_pretrained",
    "fuse",
    "fuse_modules",
    "fused",
    "register_family",
    "report",
    "unfuse_modules",
    "verify",
]
SIGNATURES = {
    "benchmark": (
        "(model: 'nn.Module', /, *args: 'Any', method: 'str' = 'forward', "
        "backward: 'bool' = False, compare: 'str | Sequence[str]' = (), "
        "compile_options: 'Mapping[str, Any] | None' = None, seconds: 'float' = 5.0, "
        "precision: 'float' = 0.02, confidence: 'float' = 0.95, "
        "progress: 'bool | None' = None, **kwargs: 'Any') -> 'BenchmarkReport'"
    ),
    "from_pretrained": (
        "(cls: 'Any', name: 'str | os.PathLike[str] | None', *, "
        "fusion_config: 'bool | Mapping[str, Any] | None' = None, **kwargs: 'Any') -> 'Any'"
    ),
    "fuse": (
        "(model: 'nn.Module', families: 'bool | Mapping[str, Any]' = True, *, "
        "mode: 'Mode | None' = None, device: 'str | torch.device | None' = None, "
        "dry_run: 'bool' = False) -> 'FusionReport'"
    ),
    "register_family": "(family: 'Family') -> 'Family'",
    "fuse_modules": (
        "(model: 'nn.Module', modules: 'Sequence[str] | Mapping[str, str]', "
        "specs: 'Sequence[ModuleSpec] | None' = None, *, kernel: 'str | None' = None, "
        "mode: 'Mode | None' = None, device: 'str | torch.device | None' = None, "
        "use_fallback: 'bool' = True, dry_run: 'bool' = False) -> 'FusionReport'"
    ),
    "fused": (
        "(model: 'nn.Module', modules: 'Sequence[str] | Mapping[str, str]', "
        "specs: 'Sequence[ModuleSpec] | None' = None, **options: 'Any') -> "
        "'Iterator[FusionReport]'"
    ),
    "report": "(model: 'nn.Module') -> 'FusionReport'",
    "unfuse_modules": (
        "(model: 'nn.Module', modules: 'Sequence[str] | str | None' = None) -> 'FusionReport'"
    ),
    "ModuleSpec": "(inputs: 'Sequence[str]', outputs: 'Sequence[str]' = ('_',)) -> 'None'",
    "FusionReport": "(groups: 'Sequence[GroupReport]' = <factory>) -> None",
    "verify": (
        "(model: 'nn.Module', /, *args: 'Any', method: 'str' = 'forward', "
        "gradients: 'bool' = False, dtypes: 'Sequence[torch.dtype] | None' = None, "
        "**kwargs: 'Any') -> 'VerificationReport'"
    ),
}


PUBLIC_CLASSES = [
    "BenchmarkReport",
    "FusedModule",
    "FusionReport",
    "ModuleSpec",
    "RegistryCollector",
]


def in_a_fresh_process(code: str) -> Any:
    """What the code prints as JSON, in an interpreter that has imported nothing yet."""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def seconds_to_import(statement: str) -> float:
    return float(
        in_a_fresh_process(
            f"import time; start = time.perf_counter(); {statement}; "
            "print(time.perf_counter() - start)"
        )
    )


def modules_imported(statement: str) -> set[str]:
    return set(
        in_a_fresh_process(f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))")
    )


def test_the_public_names_are_these() -> None:
    assert module_fusion.__all__ == NAMES
    assert all(hasattr(module_fusion, name) for name in NAMES)


def test_a_star_import_brings_the_public_names_and_no_others() -> None:
    namespace: dict[str, Any] = {}
    exec("from module_fusion import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring_of_its_own(name: str) -> None:
    value = getattr(module_fusion, name)
    assert value.__doc__
    for base in getattr(value, "__mro__", ())[1:]:
        assert value.__doc__ != base.__doc__
    first = value.__doc__.split("\n\n")[0]
    assert first.strip().endswith(".")


@pytest.mark.parametrize("name", PUBLIC_CLASSES)
def test_every_public_attribute_of_a_class_has_a_docstring(name: str) -> None:
    cls = getattr(module_fusion, name)
    # Methods of nn.Module that a class overrides are documented there.
    inherited = {"extra_repr", "named_modules", "train"}
    own = [
        value
        for key, value in vars(cls).items()
        if not key.startswith("_") and key not in inherited
        and (callable(value) or isinstance(value, property))
    ]  # fmt: skip
    assert all(value.__doc__ for value in own)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_the_signature_is_frozen(name: str) -> None:
    assert str(inspect.signature(getattr(module_fusion, name))) == SIGNATURES[name]


def test_every_public_function_has_its_signature_frozen() -> None:
    functions = {name for name in NAMES if inspect.isfunction(getattr(module_fusion, name))}
    assert functions == {
        "benchmark",
        "from_pretrained",
        "fuse",
        "fuse_modules",
        "fused",
        "register_family",
        "report",
        "unfuse_modules",
        "verify",
    }
    assert functions < set(SIGNATURES)


def test_the_package_says_its_version_and_that_it_is_typed() -> None:
    from importlib.resources import files

    assert all(part.isdigit() for part in module_fusion.__version__.split("."))
    assert files("module_fusion").joinpath("py.typed").is_file()


def test_importing_costs_little_more_than_importing_torch_and_kernels() -> None:
    """The best of several, because only the slowness of a machine varies, not its speed."""
    ours, theirs = [], []
    for _ in range(3):
        theirs.append(seconds_to_import("import torch, kernels"))
        ours.append(seconds_to_import("import module_fusion"))
    assert min(ours) <= 1.5 * min(theirs)


def test_importing_brings_in_nothing_heavy_that_torch_and_kernels_do_not() -> None:
    extra = modules_imported("import module_fusion") - modules_imported("import torch, kernels")
    heavy = (
        "transformers",
        "torch._dynamo",
        "torch._inductor",
        "triton",
        "numpy",
        "IPython",
        "matplotlib",
        "tqdm",
        "liger_kernel",
    )
    assert {name for name in extra if name.startswith(heavy)} == set()
    # Apart from itself it needs the standard library alone.
    packages = {name.partition(".")[0] for name in extra}
    assert packages - {"module_fusion"} <= set(sys.stdlib_module_names)
