"""Make repositories for the Hugging Face Hub of the built-in kernels.

Run: python scripts/build_kernels.py OUT [--kernel rms-norm-mlp]

Every folder in `module_fusion/kernels` becomes `OUT/<name>`, in the layout that the `kernels`
library loads: the same code in `build/torch-cuda` and `build/torch-cpu`, each with its
`metadata.json`, and a README. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "module_fusion" / "kernels"
BACKENDS = ("cuda", "cpu")
# What `kernels.LayerRepository(..., version=1)` asks for: it changes when a layer's inputs,
# members or results do.
VERSION = 1
# As in the package data of pyproject.toml; anything else is an oversight in one of the two.
SUFFIXES = (".py", ".json")

README = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# {name}

{summary}

For models in memory, with the Python package `module_fusion`, which gives the layer its members:

```python
from pathlib import Path

from kernels import LocalLayerRepository, use_kernel_mapping
from module_fusion import fuse_modules

repository = LocalLayerRepository(Path("{name}"), layer_name="{layer}")
modules = {{...}}  # glob paths of the members by role; the layer below says which roles
with use_kernel_mapping({{"{layer}": {{"cuda": repository, "cpu": repository}}}}):
    fuse_modules(model, modules, kernel="{layer}", use_fallback=False)
```

{layers}

`build/torch-cuda` and `build/torch-cpu` hold the same code, which takes tensors on either device.
Made by `scripts/build_kernels.py` of `module_fusion`; changes belong there.
"""


class BuildError(Exception):
    """A kernel cannot be built; the text says which, and what to do."""


def kernel_folders() -> dict[str, Path]:
    """The folders of the kernels, by the names of their repositories."""
    found = {}
    for layers in sorted(KERNELS.glob("*/layers/__init__.py")):
        folder = layers.parent.parent
        name = folder.name.replace("_", "-")
        if not re.fullmatch("[a-z][a-z0-9-]*[a-z0-9]", name):
            raise BuildError(f"{folder}: {name!r} is not a kernel name, [a-z][a-z0-9-]*[a-z0-9].")
        found[name] = folder
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the folder, without bytecode and hidden files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_dir() and not any(p[0] == "." or p == "__pycache__" for p in parts):
            found["/".join(parts)] = path.read_bytes()
    return found


def repository(name: str, folder: Path) -> dict[str, bytes]:
    """Every file of a kernel's repository, by its path in it."""
    code = files_in(folder)
    strange = [path for path in code if not path.endswith(SUFFIXES)]
    if strange:
        raise BuildError(f"{folder}: neither {' nor '.join(SUFFIXES)}: {', '.join(strange)}.")
    files = {"LICENSE": (ROOT / "LICENSE").read_bytes(), "README.md": readme(name, code)}
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        files |= {f"{variant}/{path}": content for path, content in code.items()}
        files[f"{variant}/metadata.json"] = metadata(name, backend, code)
    return files


def metadata(name: str, backend: str, code: dict[str, bytes]) -> bytes:
    """What `kernels` reads before it imports a variant.

    The id is the name of the imported module, and the operators of torch are named after it:
    two contents, or two variants, can be loaded into one process. There are no `archs`: where
    a GPU cannot run the Triton code, the layers compute with torch's operations. `triton` may
    not be among the `python-depends`; the code does without it where it is not installed.
    """
    digest = hashlib.sha256()
    for path, content in code.items():
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    python_name = name.replace("-", "_")
    fields = {
        "name": name,
        "id": f"_{python_name}_{backend}_v{VERSION}_{digest.hexdigest()[:16]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def readme(name: str, code: dict[str, bytes]) -> bytes:
    """What the docstrings say, and how to use it."""
    summary = ast.get_docstring(ast.parse(code["__init__.py"])) or ""
    layers = {
        node.name: ast.get_docstring(node) or ""
        for node in ast.parse(code["layers/__init__.py"]).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    sections = [f"## {layer}\n\n{text}" for layer, text in layers.items()]
    text = README.format(
        name=name, summary=summary, layer=next(iter(layers)), layers="\n\n".join(sections)
    )
    return text.encode()


def differences(directory: Path, files: dict[str, bytes]) -> list[str]:
    """How what is in a directory differs from a repository; nothing where it does not exist."""
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise BuildError(f"{directory} is not a directory.")
    there = files_in(directory)
    return (
        [f"{path} differs" for path in files if there.get(path, files[path]) != files[path]]
        + [f"{path} is missing" for path in files if there and path not in there]
        + [f"{path} is not of this build" for path in there if path not in files]
    )


def build(out: Path, names: list[str] | None = None, force: bool = False) -> dict[str, bool]:
    """Build repositories, or none where one of them cannot be built.

    Args:
        out: the directory to make them in.
        names: names of kernels; all when omitted.
        force: replace `build`, `README.md` and `LICENSE` in directories with other content.
            Other files there, such as a clone's `.git`, are left alone in any case.

    Returns:
        Whether each repository was written, False where it was there already.

    Raises:
        BuildError: there is no such kernel, or a directory holds other content.
    """
    folders = kernel_folders()
    if unknown := set(names or ()) - set(folders):
        raise BuildError(f"No kernel {', '.join(sorted(unknown))}; there are {', '.join(folders)}.")
    repositories = {name: repository(name, folders[name]) for name in names or folders}
    differing = {name: differences(out / name, files) for name, files in repositories.items()}
    for name, found in differing.items():
        if found and not force:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise BuildError(
                f"{out / name} holds other content: {', '.join(found[:3])}{more}. Nothing was "
                f"written. --force replaces build, README.md and LICENSE there."
            )
    written = {}
    for name, files in repositories.items():
        directory = out / name
        written[name] = files_in(directory) != files
        if not written[name]:
            continue
        if (directory / "build").exists():
            shutil.rmtree(directory / "build")
        for path, content in files.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(content)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="where to make the repositories")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this; repeatable")
    parser.add_argument("--force", action="store_true", help="replace other content")
    arguments = parser.parse_args()
    try:
        written = build(arguments.out, arguments.kernel, arguments.force)
    except BuildError as error:
        sys.exit(f"build_kernels.py: {error}")
    for name, new in written.items():
        print(f"{arguments.out / name}: {'written' if new else 'there already, the same'}")


if __name__ == "__main__":
    main()
