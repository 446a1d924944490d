"""RMSNorm followed by a gated MLP, as one kernel layer for the `kernels` library."""

from . import layers

__all__ = ["layers"]
