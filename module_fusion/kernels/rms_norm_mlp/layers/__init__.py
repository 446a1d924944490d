"""The layer class that `kernels.kernelize` takes `forward` from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._ops import rms_norm_mlp
from ..recipe import Recipe, prepare


class RMSNormMLP(nn.Module):
    """`mlp(norm(hidden_states))` for an RMSNorm and a gated MLP of the shape of Llama's.

    Only `forward` is used, bound to a module that has the members as `self.norm` and
    `self.mlp` and what `forward.prepare(norm, mlp)` returned as `self.prepared`.
    """

    can_torch_compile = True
    has_backward = True

    norm: nn.Module
    mlp: nn.Module
    prepared: Recipe

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise and apply the MLP.

        Args:
            hidden_states: `(..., hidden)`, in the dtype and on the device of the weights.

        Returns:
            `(..., hidden)`, contiguous on a GPU.
        """
        recipe = self.prepared
        norm, mlp = self.norm, self.mlp
        if (
            hidden_states.shape[-1:] != (recipe.hidden,)
            or hidden_states.dtype != recipe.dtype
            or _is_empty(hidden_states)
        ):
            # Whatever the members do with such an input, an error included, is right.
            output: Tensor = mlp(norm(hidden_states))
            return output
        weights = recipe.weights(norm, mlp)
        return rms_norm_mlp(hidden_states, weights, recipe.options(norm), recipe.triton)


def _is_empty(x: Tensor) -> bool:
    """Whether it has no elements, in a compiled graph for any size whether it never has."""
    if not torch.compiler.is_compiling():
        return x.numel() == 0
    # Imports sympy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x.numel() == 0)


setattr(RMSNormMLP.forward, "prepare", prepare)
