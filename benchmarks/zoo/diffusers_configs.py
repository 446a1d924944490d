"""Writes `diffusers.json`: tiny configs and inputs of models, from the tests of diffusers.

PYTHONPATH=CHECKOUT python benchmarks/zoo/diffusers_configs.py CHECKOUT
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FEW = 64  # Numbers of a tensor that are written out.
PLAIN = (bool, int, float, str, type(None))


def testers(checkout: Path) -> Iterator[Any]:
    """Every object of the tests that makes a config and inputs of a model class."""
    for path in sorted(checkout.glob("tests/models/*/test_*.py")):
        try:
            module = importlib.import_module(f"tests.models.{path.parent.name}.{path.stem}")
        except ImportError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            continue
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                yield object.__new__(cls)


def config_and_inputs(tester: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tester makes a model of, and what it gives it."""
    if hasattr(tester, "get_init_dict"):
        return tester.get_init_dict(), tester.get_dummy_inputs()
    config, inputs = tester.prepare_init_args_and_inputs_for_common()
    return config, inputs


def written(value: Any) -> Any:
    """A value as JSON; large tensors as their shape."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return {name: written(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [written(item) for item in value]}
    if isinstance(value, list):
        return [written(item) for item in value]
    if not isinstance(value, Tensor):
        raise TypeError(f"a {type(value).__name__} cannot be written")
    text = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value.numel() and bool((value == value.flatten()[0]).all()):
        return {**text, "fill": value.flatten()[0].item()}
    if value.numel() <= FEW or not value.is_floating_point():
        numbers = value.flatten().tolist()
        return {**text, "values": [round(n, 4) if type(n) is float else n for n in numbers]}
    return text


def read(value: Any) -> Any:
    """The value that was written; tensors of which the shape is known only are random."""
    if isinstance(value, list):
        return [read(item) for item in value]
    if not isinstance(value, dict):
        return value
    if list(value) == ["tuple"]:
        return tuple(read(item) for item in value["tuple"])
    if "shape" not in value or "dtype" not in value:
        return {name: read(item) for name, item in value.items()}
    dtype = getattr(torch, value["dtype"])
    if "fill" in value:
        return torch.full(value["shape"], value["fill"], dtype=dtype)
    if "values" in value:
        return torch.tensor(value["values"], dtype=dtype).view(value["shape"])
    return torch.randn(value["shape"], dtype=dtype)


def main() -> None:
    found = {}
    for tester in testers(Path(sys.argv[1])):
        name = getattr(getattr(tester, "model_class", None), "__name__", None)
        if name is None or name in found:
            continue
        torch.manual_seed(0)
        try:
            config, inputs = config_and_inputs(tester)
            inputs.pop("generator", None)
            found[name] = {"config": written(config), "inputs": written(inputs)}
        except (AttributeError, TypeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (Path(__file__).parent / "diffusers.json").write_text(text)


if __name__ == "__main__":
    main()
