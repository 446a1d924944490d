"""Architectures of different block topologies, for the tests."""

from __future__ import annotations

SUBSET = (
    "llama",
    "bert",
)
