"""A strided convolution over patches, as one matrix product."""

from . import layers

__all__ = ["layers"]
