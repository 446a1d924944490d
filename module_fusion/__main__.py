"""The command line: `python -m module_fusion plan|verify|bench MODEL_OR_CONFIG`.

Nothing is downloaded: the model is a local checkpoint of transformers, or a config, which gets
random weights.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import FusionError, __version__, benchmark, fuse, unfuse_modules, verify
from .errors import needed, text_of

_SAVE = "Save the model's keyword arguments with torch.save and give the file: --inputs inputs.pt."
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line when omitted.

    Returns:
        0; 1 where fusing changed a result; 2 where there is nothing to compare, or the model
        cannot be built or fused. Arguments that are none raise `SystemExit(2)`.
    """
    options = _parser().parse_args(arguments)
    try:
        model = _load(Path(options.model), options.dtype).to(options.device)
        return int(options.run(model, options))
    except Exception as error:
        # Whatever a model, its config or its inputs raise: 1 is for a changed result alone.
        text = text_of(error)
        if not isinstance(error, FusionError):
            text = " ".join(text.split())
        print(f"module_fusion: {text}", file=sys.stderr)
        return 2


def _plan(model: nn.Module, options: argparse.Namespace) -> int:
    result = fuse(model, _families(options), dry_run=True)
    _show(result, options)
    return 0


def _verify(model: nn.Module, options: argparse.Namespace) -> int:
    inputs = _checked(_inputs(model, options), verify, options)
    _fuse(model, options)
    # A kernel without a backward runs where no gradients are recorded alone.
    with torch.set_grad_enabled(options.gradients), _inputs_blamed(model, inputs, options):
        result = verify(model, gradients=options.gradients, **_call(options), **inputs)
    _show(result, options)
    return 0 if result.passed else 1


def _bench(model: nn.Module, options: argparse.Namespace) -> int:
    inputs = _checked(_inputs(model, options), benchmark, options)
    _fuse(model, options)
    with _inputs_blamed(model, inputs, options):
        result = benchmark(
            model, seconds=options.seconds, compare=options.compare, **_call(options), **inputs
        )
    _show(result, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m module_fusion", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("plan", _plan, "what `fuse` would do, and why not the rest"),
        ("verify", _verify, "fused against unfused; exits with 1 where a result changed"),
        ("bench", _bench, "fused and unfused, measured in turns"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("model", help="a checkpoint folder, or a config.json")
        command.add_argument("--families", nargs="+", metavar="NAME", help="all when left out")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--dtype", choices=_DTYPES, help="that of the config when left out")
        if name != "plan":
            command.add_argument("--inputs", help="a torch.save of the model's keyword arguments")
            command.add_argument("--batch", type=int, default=1)
            command.add_argument("--tokens", type=int, default=32, help="in a random text input")
            command.add_argument("--generate", type=int, metavar="N", help="generate N tokens")
            command.add_argument("--seed", type=int, default=0, help="of random inputs")
        if name == "verify":
            command.add_argument("--gradients", action="store_true", help="compare them too")
        if name == "bench":
            command.add_argument("--seconds", type=float, default=5.0, help="at most")
            command.add_argument(
                "--compare", nargs="+", default=(), metavar="NAME",
                help="'unfused compiled', 'fused compiled', 'liger'",
            )  # fmt: skip
    return parser


def _load(path: Path, dtype: str | None) -> nn.Module:
    """The model of a checkpoint, or one with random weights of a config."""
    transformers = needed("transformers", "the command line", "'module-fusion[transformers]'")
    if not path.exists():
        raise FusionError(f"There is no file or folder {str(path)!r}.")
    config = _config(transformers, path)
    cls = _class(transformers, config)
    chosen = config.dtype if dtype is None else _DTYPES[dtype]
    if any(path.glob("*.safetensors*")) or any(path.glob("pytorch_model*.bin*")):
        loader = cls or transformers.AutoModel
        model: nn.Module = loader.from_pretrained(path, local_files_only=True, dtype=chosen)
        return model
    print("module_fusion: no weights there, so they are random", file=sys.stderr)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    if chosen is not None:
        model.to(chosen)
    return model.eval()


def _config(transformers: Any, path: Path) -> Any:
    """The config at a path, where it needs no code but that of transformers."""
    try:
        given, _ = transformers.PreTrainedConfig.get_config_dict(path, local_files_only=True)
    except TypeError:
        given = None  # Some versions of transformers look into what they read at once.
    if not isinstance(given, dict):
        raise FusionError(f"{str(path)!r} has no config: a config is a JSON object.")
    if given.get("auto_map"):
        # Asked for the config, transformers would offer to run that code, or to look for it.
        raise FusionError(
            f"{str(path)!r} names code of its own in 'auto_map', {given['auto_map']!r}, and the "
            f"command line runs none that comes with a checkpoint. Load the model in Python, where "
            f"you decide about trust_remote_code, and call verify(model, ...); or take 'auto_map' "
            f"out, for the class that transformers itself has."
        )
    names = given.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise FusionError(
            f"'architectures' of {str(path)!r} is a list of names of classes, such as "
            f"['LlamaForCausalLM'], not {names!r}."
        )
    return transformers.AutoConfig.from_pretrained(path, local_files_only=True)


def _class(transformers: Any, config: Any) -> Any:
    """The first of the config's architectures that transformers has, None where it has none."""
    names = getattr(config, "architectures", None) or []
    name = next((name for name in names if hasattr(transformers, name)), None)
    cls = None if name is None else getattr(transformers, name)
    if cls is None:
        return None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise FusionError(f"'architectures' has {name!r}, which is no model of transformers.")
    of = getattr(cls, "config_class", None)
    if of is not None and not isinstance(config, of):
        raise FusionError(
            f"'architectures' has {name!r}, whose config is a {of.__name__}; 'model_type' "
            f"{config.model_type!r} makes this one a {type(config).__name__}."
        )
    return cls


def _families(options: argparse.Namespace) -> bool | Mapping[str, bool]:
    return True if options.families is None else dict.fromkeys(options.families, True)


def _call(options: argparse.Namespace) -> dict[str, Any]:
    if options.generate is None:
        return {}
    return {
        "method": "generate",
        "max_new_tokens": options.generate,
        "min_new_tokens": options.generate,
        "do_sample": False,
    }


def _inputs(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Those of a file, or random ones of the model's main input."""
    if options.generate is not None and options.generate < 1:
        raise FusionError(f"--generate is at least 1, not {options.generate}.")
    if options.inputs is not None:
        loaded = torch.load(options.inputs, map_location=options.device, weights_only=True)
        if not isinstance(loaded, dict):
            raise FusionError(
                f"{options.inputs} has a {type(loaded).__name__}; save a dict of the model's "
                f"keyword arguments: torch.save({{'input_ids': ids}}, ...)."
            )
        return loaded
    if options.batch < 1 or options.tokens < 1:
        raise FusionError(
            f"--batch and --tokens are at least 1, not {options.batch} and {options.tokens}."
        )
    name = getattr(model, "main_input_name", None)
    config = model.config.get_text_config() if name == "input_ids" else model.config
    random = torch.Generator().manual_seed(options.seed)
    shape: tuple[int, ...] = (options.batch, options.tokens)
    if name == "input_ids":
        value: Tensor = torch.randint(0, config.vocab_size, shape, generator=random)
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (options.batch, config.num_channels, config.image_size, config.image_size)
        value = torch.randn(shape, generator=random).to(model.dtype)
    else:
        raise FusionError(
            f"It is not known how to make the input {name!r} of {type(model).__name__}. {_SAVE}"
        )
    return {name: value.to(options.device)}


@contextmanager
def _inputs_blamed(
    model: nn.Module, inputs: dict[str, Any], options: argparse.Namespace
) -> Iterator[None]:
    """Says of an error that random inputs are the reason, where the model unfused has one too."""
    try:
        yield
    except Exception as error:
        if options.inputs is not None or _runs(model, inputs, options):
            raise
        raise FusionError(
            f"{type(model).__name__} does not run on a random {' and '.join(inputs)!r} alone: "
            f"{' '.join(text_of(error).split())}. {_SAVE}"
        ) from error


def _runs(model: nn.Module, inputs: dict[str, Any], options: argparse.Namespace) -> bool:
    unfuse_modules(model)
    method = _call(options)
    call = getattr(model, method.pop("method", "forward"))
    try:
        with torch.no_grad():
            call(**method, **inputs)
    except Exception:
        return False
    return True


def _checked(
    inputs: dict[Any, Any], command: Callable[..., Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Inputs that can be given by name, and that are not taken for options of the command."""
    parameters = inspect.signature(command).parameters.values()
    reserved = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    for name in inputs:
        if not isinstance(name, str):
            raise FusionError(
                f"{options.inputs} has the key {name!r} of class {type(name).__name__}; keys are "
                f"the names of the model's arguments, such as 'input_ids'."
            )
        if name in _call(options) and name not in reserved:
            raise FusionError(
                f"{options.inputs} has {name!r}, which --generate sets: leave it out."
            )
        if name in reserved:
            raise FusionError(
                f"{options.inputs} has {name!r}, which is an option of {command.__name__} and "
                f"not an input: leave it out, and see --help for what the command line can set."
            )
    return inputs


def _fuse(model: nn.Module, options: argparse.Namespace) -> None:
    found = fuse(model, _families(options))
    if not found.fused:
        raise FusionError(f"Nothing is fused in this model. {found}")


def _show(result: Any, options: argparse.Namespace) -> None:
    print(json.dumps(result.to_dict(), indent=2, allow_nan=False) if options.json else result)


if __name__ == "__main__":
    sys.exit(main())
