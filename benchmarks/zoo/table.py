"""The results as Markdown, and as JSON beside it."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from common import machine

from .build import architectures
from .discover import share

FAMILIES = ("rms_norm_mlp", "patch_embeddings")
COMMAND = "python benchmarks/zoo --table"
Row = dict[str, Any]


def write(rows: Sequence[Row], folder: Path) -> None:
    """Write `zoo.md` and `zoo.json`."""
    reached = {row["architecture"] for row in rows}
    missing: Row = {"status": "not reached", "error": "the sweep was ended before"}
    rows = [*rows, *({"architecture": n, **missing} for n in architectures() if n not in reached)]
    rows = sorted(rows, key=lambda row: row["architecture"])
    (folder / "zoo.md").write_text(_markdown(rows))
    lines = ",\n".join(json.dumps(_compact(row)) for row in rows)
    (folder / "zoo.json").write_text(f"[\n{lines}\n]\n")


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


def _markdown(rows: Sequence[Row]) -> str:
    checked = [row for row in rows if row["status"] == "checked"]
    rest = [row for row in rows if row["status"] != "checked"]
    parts = [
        "# Every architecture of transformers\n",
        f"`{COMMAND}`, {datetime.date.today():%Y-%m-%d}, transformers {transformers.__version__}, "
        f"{machine()}.\n",
        "Tiny configs, random weights, float32, eval mode. Each model is listed under its model "
        "type, with one model class. A pair is two modules called one after the other by the same "
        "module, or a norm-like and an MLP-like child of one parent in either order; blocks that "
        "are alike count once. Each is fused by path without a kernel and with a kernel that runs "
        "the members, and outputs and gradients are compared with the unfused model's to the bit; "
        "after undoing, modules and state dict have to be what they were.\n",
        _table(("", ""), _totals(rows, checked)),
        *sections(checked, rest),
    ]
    return "\n".join(parts)


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
        "\n## By architecture\n",
        _table(
            ("architecture", "class", "pairs: kernel, members, refused", *FAMILIES, "generate",
             "compiled", "faults"),
            [_cells(row) for row in checked],
        ),
        "\n## Not built, not run, or not the same twice without fusing\n",
        _table(
            ("architecture", "status", "error"),
            [(r["architecture"], r["status"], r.get("error", "")) for r in rest],
        ),
    ]  # fmt: skip
    return parts


def _totals(rows: Sequence[Row], checked: Sequence[Row]) -> list[tuple[str, Any]]:
    pairs = [pair for row in checked for pair in row["pairs"]]
    outcomes = Counter(pair["outcome"] for pair in pairs)
    groups = [group for row in checked for group in row["groups"]]
    ran = Counter((g["family"], g["outcome"]) for g in groups)
    totals = [
        ("architectures", len(rows)),
        *Counter(row["status"] for row in rows).most_common(),
        ("model classes checked", len({row["class"] for row in checked})),
        ("pairs fused by path", f"{len(pairs)} of {sum(row['of_pairs'] for row in checked)}"),
        *((f"pairs: {name}", count) for name, count in outcomes.most_common()),
        ("pairs with gradients summed in another order", sum("gradients" in p for p in pairs)),
        ("architectures without gradients", sum(bool(r["no_gradients"]) for r in checked)),
        ("wrong results and untyped errors", sum(len(row["faults"]) for row in checked)),
        ("generate: the same tokens", sum(r.get("generate") == "same" for r in checked)),
        ("compiled into one graph: the same", sum(r.get("compiled") == "same" for r in checked)),
    ]
    for family in FAMILIES:
        key = "norms_before_mlps" if family == "rms_norm_mlp" else "patch_embeddings"
        there = [row for row in checked if row.get(key)]
        whole = sum(not missed(row, family) for row in there)
        kernel = ran[family, "kernel"]
        fused = kernel + ran[family, "members"]
        totals += [
            (f"{family}: groups found by `fuse` and called", fused + ran[family, "skipped"]),
            (f"{family}: groups fused, on the kernel", share(kernel, fused)),
            (f"{family}: architectures that have one", len(there)),
            (f"{family}: of these, all on the kernel", share(whole, len(there))),
        ]
    return totals


def _reasons(rows: Sequence[Row], outcomes: Sequence[str]) -> str:
    counts = Counter(
        str(pair.get("reason"))
        for row in rows
        for pair in row["pairs"]
        if pair["outcome"] in outcomes
    )
    return _table(("pairs", "reason"), [(n, why) for why, n in counts.most_common()])


def _cells(row: Row) -> tuple[str, ...]:
    outcomes = Counter(pair["outcome"] for pair in row["pairs"])
    refused = outcomes["refused"] + outcomes["refused at the call"]
    left = row["of_pairs"] - len(row["pairs"])
    pairs = f"{outcomes['kernel']}, {outcomes['members']}, {refused}"
    return (
        row["architecture"],
        row["class"],
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
        counts = Counter((p["outcome"], p.get("reason")) for p in row["pairs"])
        kept["pairs"] = [[n, outcome, reason] for (outcome, reason), n in counts.items()]
    return kept


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    if len(lines) == 2:
        return "None."
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")[:300]
