"""Every architecture of transformers, tiny: whatever is fused, nothing may change.

And models of timm, torchvision and diffusers.

Builds each model type from a small config with random weights, fuses every pair of modules that
are called one after the other and every norm-like and MLP-like siblings, without a kernel and
with one that runs the members, and compares outputs and gradients to the bit; then `fuse`.
Results go to a file as they come, so that an interrupted sweep goes on where it was.

    python benchmarks/zoo --jobs 2
    python benchmarks/zoo --only 'qwen*' --results qwen.jsonl
    python benchmarks/zoo --library timm --only '*/vit*'
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

RESULTS = HERE.parent / "results"

from zoo.subset import LIBRARIES, SUBSET  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", help="model types, or models such as timm/vit_tiny_patch16_224"
    )
    parser.add_argument("--only", metavar="PATTERN", help="model types that match, as in a shell")
    parser.add_argument("--subset", choices=["ci"], help="the architectures of the tests")
    parser.add_argument(
        "--library", choices=[*LIBRARIES, "others"], help="another than transformers, or all others"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--limit-seconds", type=float, default=60, help="processor time for each")
    parser.add_argument(
        "--like", type=Path, help="only what these results, of another torch perhaps, checked"
    )
    parser.add_argument(
        "--diffusers", type=Path, help="a checkout of diffusers; its tests have the tiny configs"
    )
    parser.add_argument("--results", type=Path, help="lines of JSON; zoo.jsonl or zoo-others.jsonl")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--retry", action="store_true", help="also those that were not checked")
    parser.add_argument("--table", action="store_true", help="write it to results/, as JSON too")
    parser.add_argument("--name", default="zoo", help="of the table: zoo, zoo-torch-2.8")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from zoo import worker

        worker.main()
        return
    from tqdm import tqdm

    from zoo.diffusers_configs import CHECKOUT
    from zoo.sweep import checked_in, read, sweep

    names = options.names or named_by(options.subset, options.library)
    are_others = any("/" in name for name in names)
    options.results = options.results or Path("zoo-others.jsonl" if are_others else "zoo.jsonl")
    if options.only:
        names = fnmatch.filter(names, options.only)
    if options.diffusers:
        os.environ[CHECKOUT] = str(options.diffusers.resolve())
    done = {
        row["architecture"]
        for row in read(options.results)
        if not options.again and (row["status"] == "checked" or not options.retry)
    }
    names = [name for name in names if name not in done]
    checked = checked_in(read(options.like)) if options.like else None
    if checked is not None:
        names = [name for name in names if name in checked]
    with tqdm(total=len(names), unit="architecture") as bar:

        def progress(result: dict[str, object]) -> None:
            bar.update()
            bar.set_postfix_str(f"{result['architecture']}: {result['status']}")
            for fault in result.get("faults", ()):  # type: ignore[attr-defined]
                bar.write(f"FAULT {result['architecture']}: {fault['what']}: {fault['fault']}")

        sweep(names, options.results, options.jobs, options.limit_seconds, progress)
    if options.table:
        from zoo import others_table, table

        if are_others:
            others_table.write(read(options.results), RESULTS)
        else:
            table.write(read(options.results), RESULTS, options.name, checked)


def named_by(subset: str | None, library: str | None) -> list[str]:
    """The architectures that the options name."""
    from zoo import classes, others

    if library is not None:
        libraries = LIBRARIES if library == "others" else [library]
        return [name for library in libraries for name in others.names(library)]
    return list(SUBSET) if subset else classes.architectures()


if __name__ == "__main__":
    main()
