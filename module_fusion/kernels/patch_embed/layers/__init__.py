"""The layer that the `kernels` library binds into the seat."""

from typing import Any

from torch import Tensor, nn

from .._geometry import prepare
from .._ops import patch_embed


class PatchEmbed(nn.Module):
    """`nn.Conv1d/2d/3d` whose stride is its kernel size, as one matrix product over patches.

    Runs on a module on which the convolution is `self.proj` and what `prepare(proj)`
    returned is `self.prepared`. The result has the values, the shape and the memory format
    of the convolution's, so every later `view` works as it did, and
    `flatten(2).transpose(1, 2)` copies nothing. With `prepare(proj, token_major=True)`
    the matrix product leaves memory as it falls, `(batch, *grid, embed_dim)`: tokens come
    out contiguous, but a caller that merges the channels with another dimension by `view`
    gets a RuntimeError where the convolution's output would allow it.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        """Embed patches.

        Args:
            input: `(batch, channels, *size)` or `(channels, *size)`, any strides.

        Returns:
            `(batch, embed_dim, *grid)` or `(embed_dim, *grid)`, where `grid = size // patch`.
        """
        seat: Any = self
        return patch_embed(input, seat.proj.weight, seat.proj.bias, seat.prepared)


PatchEmbed.forward.prepare = prepare  # type: ignore[attr-defined]
