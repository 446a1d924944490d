"""Tiny configs and inputs of diffusers' models: those of the tests in a checkout of it."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

CHECKOUT = "ZOO_DIFFUSERS"  # The environment variable that says where the checkout is.


def tester_of(class_name: str) -> Any:
    """The object of the tests that makes a config and inputs of a model class, None without."""
    return _testers().get(class_name)


@functools.cache
def _testers() -> dict[str, Any]:
    if CHECKOUT not in os.environ:
        return {}
    checkout = Path(os.environ[CHECKOUT])
    sys.path.insert(0, str(checkout))
    found: dict[str, Any] = {}
    for path in sorted(checkout.glob("tests/models/*/test_*.py")):
        try:
            module = importlib.import_module(f"tests.models.{path.parent.name}.{path.stem}")
        except ImportError:
            continue  # Some need packages that are not here.
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__:
                tester = object.__new__(cls)
                name = getattr(getattr(tester, "model_class", None), "__name__", None)
                if name is not None:
                    found.setdefault(name, tester)
    return found


def config_and_inputs(tester: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a tester makes a model of, and what it gives it."""
    if hasattr(tester, "get_init_dict"):
        config, inputs = tester.get_init_dict(), tester.get_dummy_inputs()
    else:
        config, inputs = tester.prepare_init_args_and_inputs_for_common()
    inputs.pop("generator", None)
    return config, inputs
