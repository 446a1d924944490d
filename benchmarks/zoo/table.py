"""The results as Markdown, and as JSON beside it."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import transformers
from common import machine

from .check import general
from .classes import architectures
from .discover import share
from .heads import NOT_COMPARABLE, NOT_REACHED
from .rounding import ANOTHER_KERNEL
from .sources import digest

FAMILIES = ("rms_norm_mlp", "patch_embeddings")
COMMAND = "python benchmarks/zoo --table"
# What `rounding.check_accuracy` says; rows of earlier sweeps do not have it.
REFERENCES = {
    "same bits": "the same bits",
    "float64": "compared with float64",
    "unfused": "compared with the unfused ones, there being no float64 twin",
    "not noted": "what they were compared with was not noted",
}
ON_THE_KERNEL = (
    "On the kernel means that the kernel was called. On a CPU in float32 the one of "
    "`patch_embeddings` itself calls the convolution where that is faster, so its count does not "
    "say that the matrix product ran.\n"
)
Row = dict[str, Any]


def write(
    rows: Sequence[Row], folder: Path, name: str = "zoo", followed: Set[str] | None = None
) -> None:
    """Write `NAME.md` and `NAME.json`.

    Args:
        rows: the results.
        folder: where to.
        name: of the files.
        followed: what another sweep checked, where this one left out the rest.
    """
    reached = {row["architecture"] for row in rows}
    rows = [*rows, *(_missing(n, followed) for n in architectures() if n not in reached)]
    rows = sorted(rows, key=lambda row: row["architecture"])
    (folder / f"{name}.md").write_text(_markdown(rows, name))
    lines = ",\n".join(json.dumps(_compact(row)) for row in rows)
    (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n")


def _missing(architecture: str, followed: Set[str] | None) -> Row:
    if followed is not None and architecture not in followed:
        status, error = "left out", "not checked by the sweep that this one follows"
    else:
        status, error = "not reached", "not in this sweep"
    return {"architecture": architecture, "status": status, "error": error}


def missed(row: Row, family: str) -> list[tuple[str, str]]:
    """What there is for a family and did not run on its kernel: where, and why."""
    if family == "rms_norm_mlp":
        there = [tuple(pair) for pair in row.get("norms_before_mlps", ())]
    else:
        there = [(path,) for path in row.get("patch_embeddings", ())]
    found = {tuple(g["paths"]): g for g in row.get("groups", ()) if g["family"] == family}
    reasons = []
    for paths in there:
        group = found.get(paths)
        if group is None:
            reasons.append((" -> ".join(paths), "not found"))
        elif group["outcome"] != "kernel":
            reasons.append((" -> ".join(paths), str(group["reason"] or group["outcome"])))
    return reasons


def _markdown(rows: Sequence[Row], name: str) -> str:
    command = COMMAND if name == "zoo" else f"{COMMAND} --name {name}"
    checked = [row for row in rows if row["status"] == "checked"]
    rest = [row for row in rows if row["status"] != "checked"]
    parts = [
        "# Every architecture of transformers\n",
        f"`{command}`, {datetime.date.today():%Y-%m-%d}, transformers {transformers.__version__}, "
        f"{machine()}.\n",
        "Tiny configs, random weights, float32, eval mode; half precision, training mode and GPUs "
        "are with the tests. Each model is listed under its model type: one model class whole, and "
        "of its other classes `fuse` and the pairs that no class of the type before them had. A "
        "pair is two modules called one after the other by the same module, or a norm-like and an "
        "MLP-like child of one parent in either order; blocks that are alike count once. Each is "
        "fused by path without a kernel and with a kernel that runs the members. Outputs have to "
        "be the unfused model's to the bit; gradients too, or, with a kernel, summed in another "
        "order (counted below), which moves them by some units of rounding. `fuse` has to give "
        "outputs as close to float64 as the unfused model's, where the model runs in float64, and "
        "gradients, also those of floating inputs, within "
        f"{ANOTHER_KERNEL:.0e} of their own largest element (the most that was seen is below). "
        "Every run has to draw as many random numbers as the unfused model's. While fused the "
        "state dict, and after undoing modules, their plain attributes and state dict have to be "
        "what they were.\n",
        ON_THE_KERNEL,
        "An architecture has an RMSNorm before a gated MLP where, in a run, the output of a module "
        "goes into one other alone, and fed with random numbers the one divides by the root mean "
        "square and scales each feature, the other computes `down(act(gate(x)) * up(x))`. Experts, "
        "clamped gates, MLPs with a norm or an adapter inside, and norms whose output has other "
        "uses are none; what `fuse` looked at and left is listed with its reason.\n",
        _of_other_sources(checked),
        _table(("", ""), _totals(rows, checked)),
        *sections(checked, rest),
    ]
    return "\n".join(parts)


def _of_other_sources(checked: Sequence[Row]) -> str:
    """How many rows another state of the package, or of the checks, gave."""
    others = sum(row.get("sources") != digest() for row in checked)
    if not others:
        return ""
    return (
        f"{others} of the architectures were checked by an earlier state of the package or of the "
        f"checks than the one this table was made with.\n"
    )


def sections(checked: Sequence[Row], rest: Sequence[Row]) -> list[str]:
    """All that comes after the totals."""
    parts = [
        "\n## Wrong results and errors that are not typed\n",
        _table(
            ("architecture", "where", "what"),
            [(r["architecture"], f["what"], f["fault"]) for r in checked for f in r["faults"]],
        ),
        "\n## Refused, by reason\n",
        _reasons(checked, ("refused", "refused at the call")),
        "\n## On the kernel in some blocks only, by reason\n",
        _reasons(checked, ("kernel in some blocks",)),
        "\n## On the members' own calls, by reason\n",
        _reasons(checked, ("members",)),
    ]
    for family in FAMILIES:
        misses = Counter(
            (row["architecture"], reason) for row in checked for _, reason in missed(row, family)
        )
        parts += [
            f"\n## There for {family}, and not on its kernel\n",
            _table(
                ("architecture", "groups", "why"), [(a, n, why) for (a, why), n in misses.items()]
            ),
        ]
    parts += [
        "\n## Left by `fuse`, by reason\n",
        _left(checked),
        "\n## Without gradients\n",
        _table(
            ("architecture", "why"),
            [(r["architecture"], r["no_gradients"]) for r in checked if r["no_gradients"]],
        ),
        "\n## Other model classes that were not built, not reached or not comparable\n",
        _table(
            ("architecture", "class", "error"),
            [
                (row["architecture"], other["class"], other["error"])
                for row in checked
                for other in row.get("others", ())
                if "error" in other
            ],
        ),
        "\n## By architecture\n",
        _table(
            ("architecture", "class", "classes", "pairs: kernel, in some blocks, members, refused",
             *FAMILIES, "generate", "compiled", "faults"),
            [_cells(row) for row in checked],
        ),
        "\n## Not built, not run, or not the same twice without fusing\n",
        _table(
            ("architecture", "status", "why", "error"),
            [(r["architecture"], r["status"], r.get("why", ""), r.get("error", "")) for r in rest],
        ),
    ]  # fmt: skip
    return parts


def _totals(rows: Sequence[Row], checked: Sequence[Row]) -> list[tuple[str, Any]]:
    others = [other for row in checked for other in row.get("others", ())]
    reached = [other for other in others if "error" not in other]
    late = sum(other.get("error") == NOT_REACHED for other in others)
    uneven = sum(str(other.get("error")).startswith(NOT_COMPARABLE) for other in others)
    pairs = _pairs_of(checked)
    of_pairs = sum(row["of_pairs"] for row in [*checked, *reached])
    outcomes = Counter(map(_outcome, pairs))
    references = Counter(row.get("reference", "not noted") for row in checked)
    own = sum(_has_pairs(other) for other in reached)
    groups = [group for row in checked for group in row["groups"]]
    ran = Counter((g["family"], g["outcome"]) for g in groups)
    totals = [
        ("architectures", len(rows)),
        *Counter(row["status"] for row in rows).most_common(),
        ("built and run", share(sum(map(_ran, rows)), len(rows))),
        ("model classes checked", len(checked) + own),
        ("of these, other classes for the pairs of their own", own),
        ("other model classes, all of whose pairs had been checked in another", len(reached) - own),
        ("other model classes run with `fuse`", sum("reference" in other for other in reached)),
        ("of these, groups on the kernel", sum(map(_on_kernel, reached))),
        ("model classes that were not built", len(others) - len(reached) - late - uneven),
        ("model classes whose results differ each time", uneven),
        ("model classes not reached: time", late),
        ("pairs fused by path", f"{len(pairs)} of {of_pairs}"),
        ("pairs not reached: time", of_pairs - len(pairs)),
        *((f"pairs: {name}", count) for name, count in outcomes.most_common()),
        ("pairs with gradients summed in another order", sum("gradients" in p for p in pairs)),
        ("architectures without gradients", sum(bool(r["no_gradients"]) for r in checked)),
        *((f"outputs of `fuse`: {what}", references[name]) for name, what in REFERENCES.items()),
        (
            "gradients with `fuse`: largest difference, of its own largest element",
            f"{max((r.get('gradients', 0.0) for r in (*checked, *reached)), default=0.0):.1e}",
        ),
        ("architectures none of whose pairs was tried: time", sum(map(_untried, checked))),
        ("architectures in which a check ran out of memory", sum(map(_ran_out, checked))),
        ("wrong results and untyped errors", sum(len(row["faults"]) for row in checked)),
        ("generate: the same tokens", sum(r.get("generate") == "same" for r in checked)),
        ("compiled into one graph: the same", sum(map(_is_compiled, checked))),
        (
            "of these, with gradients too",
            sum(r.get("compiled") == "same, gradients too" for r in checked),
        ),
    ]
    for family in FAMILIES:
        key = "norms_before_mlps" if family == "rms_norm_mlp" else "patch_embeddings"
        there = [row for row in checked if row.get(key)]
        whole = sum(not missed(row, family) for row in there)
        kernel = ran[family, "kernel"]
        noted = Counter(
            group["with_gradients"]
            for group in groups
            if group["family"] == family
            and group["outcome"] == "kernel"
            and "with_gradients" in group
        )
        fused = kernel + ran[family, "members"]
        totals += [
            (f"{family}: groups found by `fuse` and called", fused + ran[family, "skipped"]),
            (f"{family}: groups fused, on the kernel", share(kernel, fused)),
            (
                f"{family}: of these, on it with gradients too, of those run with gradients",
                share(noted["kernel"], noted.total()),
            ),
            (f"{family}: architectures that have one", len(there)),
            (f"{family}: of these, all on the kernel", share(whole, len(there))),
        ]
    return totals


def _pairs_of(rows: Sequence[Row]) -> list[Row]:
    """The pairs of all model classes."""
    return [
        p for row in rows for part in (row, *row.get("others", ())) for p in part.get("pairs", ())
    ]


def _outcome(pair: Row) -> str:
    """What became of a pair; earlier sweeps told by the reason that some blocks ran the members."""
    outcome: str = pair["outcome"]
    return "kernel in some blocks" if outcome == "kernel" and pair.get("reason") else outcome


def _has_pairs(row: Row) -> bool:
    return bool(row.get("of_pairs") or row.get("faults"))


def _is_compiled(row: Row) -> bool:
    return str(row.get("compiled")).startswith("same")


def _on_kernel(row: Row) -> int:
    return sum(group["outcome"] == "kernel" for group in row.get("groups", ()))


def _untried(row: Row) -> bool:
    return bool(row["of_pairs"] and not row["pairs"])


def _left(rows: Sequence[Row]) -> str:
    """The groups that families found and did not fuse: how many, in which architectures."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for group in row["groups"]:
            if group["outcome"] == "skipped":
                key = group["family"], general(str(group["reason"]))
                found.setdefault(key, []).append(row["architecture"])
    lines = [
        (family, len(names), reason, ", ".join(dict.fromkeys(names)))
        for (family, reason), names in found.items()
    ]
    lines.sort(key=lambda line: -line[1])
    return _table(("family", "groups", "reason", "architectures"), lines)


def _ran_out(row: Row) -> bool:
    parts = (row, *row.get("others", ()))
    return any(part.get("out_of_memory") for part in parts) or any(
        pair["outcome"] == "out of memory" for pair in _pairs_of([row])
    )


def _ran(row: Row) -> bool:
    return row["status"] in ("checked", "not comparable")


def _reasons(rows: Sequence[Row], outcomes: Sequence[str]) -> str:
    counts = Counter(
        str(pair.get("reason")) for pair in _pairs_of(rows) if _outcome(pair) in outcomes
    )
    return _table(("pairs", "reason"), [(n, why) for why, n in counts.most_common()])


def _cells(row: Row) -> tuple[str, ...]:
    parts = [row, *(o for o in row.get("others", ()) if "error" not in o)]
    outcomes = Counter(map(_outcome, _pairs_of([row])))
    refused = outcomes["refused"] + outcomes["refused at the call"]
    left = sum(part["of_pairs"] - len(part["pairs"]) for part in parts)
    pairs = f"{outcomes['kernel']}, {outcomes['kernel in some blocks']}"
    pairs += f", {outcomes['members']}, {refused}"
    return (
        row["architecture"],
        row["class"],
        f"{len(parts)} of {1 + len(row.get('others', ()))}",
        pairs + (f" ({left} not tried: time)" if left else ""),
        *(_family(row, family) for family in FAMILIES),
        row.get("generate") or "",
        row.get("compiled") or "",
        str(len(row["faults"]) or ""),
    )


def _family(row: Row, family: str) -> str:
    """How many groups ran on the kernel, and why the others did not."""
    counts = Counter(
        (g["outcome"], None if g["outcome"] == "kernel" else g["reason"])
        for g in row["groups"]
        if g["family"] == family
    )
    return "; ".join(
        f"{n} {outcome}: {reason}" if reason else f"{n} {outcome}"
        for (outcome, reason), n in counts.items()
    )


def _compact(row: Row) -> Row:
    kept = {name: value for name, value in row.items() if name not in ("pairs", "memory")}
    if "pairs" in row:
        kept["pairs"] = _counts(row["pairs"])
    if "others" in row:
        kept["others"] = {o["class"]: o.get("error") or _counts(o["pairs"]) for o in row["others"]}
    return kept


def _counts(pairs: Sequence[Row]) -> list[Any]:
    counts = Counter((_outcome(p), p.get("reason")) for p in pairs)
    return [[n, outcome, reason] for (outcome, reason), n in counts.items()]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    if len(lines) == 2:
        return "None."
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")[:300]
