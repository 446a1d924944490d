"""The model types of transformers, and the model classes of each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name

# In what order the classes of an architecture are tried: the first one that runs is taken.
KINDS = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM",
    "CAUSAL_LM", "CTC", "",
)  # fmt: skip


def architectures() -> list[str]:
    """Every model type, one of each kind first; towers and text models have types of their own."""
    known: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for name in CONFIG_MAPPING:
        module = model_type_to_module_name(name)
        ranks[name] = known[module] = known.get(module, 0) + 1
    return sorted(ranks, key=lambda name: min(ranks[name], 2))


def classes_of(model_type: str) -> list[str]:
    """The names of its model classes, the one with most of the model first."""
    found: dict[str, None] = {}
    names = [f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES" for kind in KINDS]
    names += sorted(
        name for name in vars(modeling_auto) if re.match("MODEL_.*_MAPPING_NAMES", name)
    )
    for name in names:
        entry = getattr(modeling_auto, name).get(model_type, ())
        found.update(dict.fromkeys([entry] if isinstance(entry, str) else entry))
    return list(found) or [cls.__name__ for cls in _classes_with(CONFIG_MAPPING[model_type])]


def all_classes_of(model_type: str) -> list[str]:
    """`classes_of`, and the other models beside its config class that have a forward."""
    beside = [
        c for c in _classes_with(CONFIG_MAPPING[model_type]) if issubclass(c, PreTrainedModel)
    ]
    return list(dict.fromkeys([*classes_of(model_type), *(cls.__name__ for cls in beside)]))


def _classes_with(config: Any) -> list[Any]:
    """The model classes beside a config class that are made from it; towers have no other.

    Where there is none, the plain modules that are made from it, the last one defined first.
    """
    classes = [cls for module in _modules_beside(config) for cls in _defined(module)]
    models = [c for c in classes if issubclass(c, PreTrainedModel) and c.config_class is config]
    return models or [cls for cls in reversed(classes) if _takes(cls, config)]


def _modules_beside(config: Any) -> list[Any]:
    """The modeling modules of the package that a config class lies in."""
    name = config.__module__.rpartition(".")[0]
    package = importlib.import_module(name)
    first = config.__module__.rpartition(".")[2].replace("configuration_", "modeling_")
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    wanted = re.compile(r"modeling_|vision$|perceiver$")
    found = []
    for inner in sorted(filter(wanted.match, names), key=lambda inner: inner != first):
        try:
            found.append(importlib.import_module(f"{name}.{inner}"))
        except ImportError:
            continue
    return found


def _defined(module: Any) -> list[Any]:
    return [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, nn.Module)
        and cls.__module__ == module.__name__
        and "forward" in vars(cls)
    ]


def _takes(cls: Any, config: Any) -> bool:
    """Whether a module is made from such a config alone, by its annotation or by their names."""
    parameters = list(inspect.signature(cls).parameters.values())
    required = [p for p in parameters if p.default is p.empty]
    if len(required) != 1:
        return False
    annotation = required[0].annotation
    if annotation is inspect.Parameter.empty:
        return bool(cls.__name__ == config.__name__.removesuffix("Config"))
    return str(getattr(annotation, "__name__", annotation)).strip("'") == config.__name__


def named(model_type: str, class_name: str) -> Any:
    """A model class; some are not public."""
    private = {cls.__name__: cls for cls in _classes_with(CONFIG_MAPPING[model_type])}
    return private.get(class_name) or getattr(transformers, class_name, None)
