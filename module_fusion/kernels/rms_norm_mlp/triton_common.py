"""Arithmetic that the Triton kernels share.

Values are computed in float32 and rounded to the dtype of the tensors where the Hugging Face
modules round, see `reference.py`. Each function has one `return`: Triton compiles whatever
follows an `if` that returns, also where the condition is known.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled(normalised, weight, NORM: tl.constexpr, dtype: tl.constexpr):
    """The output of the norm, in `dtype`, from the normalised value and the weight in float32."""
    if NORM == "early":
        normalised = normalised.to(dtype).to(tl.float32)
    elif NORM == "one_plus":
        weight += 1.0
    return (normalised * weight).to(dtype)


@triton.jit
def reciprocal_root(sum_of_squares, n, eps):
    """`1 / sqrt(mean + eps)` in float32, without the approximate instructions.

    It is one value a row and a factor of the whole row, so its error does not average out:
    tensors in float32 come with a sum in float64. Inductor passes Python floats as float64.
    """
    if sum_of_squares.dtype == tl.float64:
        mean = sum_of_squares / tl.cast(n, tl.float64)
        root = (1.0 / tl.sqrt(mean + tl.cast(eps, tl.float64))).to(tl.float32)
    else:
        mean = tl.div_rn(sum_of_squares, tl.cast(n, tl.float32))
        root = tl.div_rn(1.0, tl.sqrt_rn(mean + tl.cast(eps, tl.float32)))
    return root


@triton.jit
def _exp(x):
    """As exact as torch's: `tl.exp` loses digits in `x * log2(e)` for large `x`.

    The integer part of the power of two is split off first (Cody and Waite 1980). Beyond 150
    it is 0 or inf, and there the rest is no small number any more.
    """
    x = tl.minimum(tl.maximum(x, -150.0), 150.0)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -1.428606765330187e-06, tl.fma(n, -0.693145751953125, x))
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def _times_sigmoid(x, t, EXACT: tl.constexpr):
    """`x * sigmoid(t)`; float32 tensors need the exact form, half precision rounds more anyway."""
    if EXACT:
        y = tl.div_rn(x, 1.0 + _exp(-t))
    else:
        y = x / (1.0 + tl.exp(-t))
    return y


@triton.jit
def activation(g, ACT: tl.constexpr, EXACT: tl.constexpr):
    """SiLU, or GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), in float32.

    `0.5 * (1 + tanh(u))` is `sigmoid(2 * u)`, which does not cancel for negative `u`.
    """
    if ACT == "silu":
        y = _times_sigmoid(g, g, EXACT)
    elif ACT == "gelu_tanh":
        y = _times_sigmoid(g, 1.5957691216057308 * (g + 0.044715 * g * g * g), EXACT)
    else:
        y = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    return y


@triton.jit
def _sigmoid_and_rest(t, EXACT: tl.constexpr):
    """`sigmoid(t)` and `1 - sigmoid(t)`.

    The difference is taken where it hardly cancels: its error then has the sign opposite to
    that of the sigmoid's, and the two make up for each other in the derivatives below.
    """
    if EXACT:
        small = _exp(-tl.abs(t))
        s = tl.div_rn(tl.where(t < 0, small, 1.0), 1.0 + small)
    else:
        small = tl.exp(-tl.abs(t))
        s = tl.where(t < 0, small, 1.0) / (1.0 + small)
    return s, tl.where(t < 2, 1.0 - s, small * s)


@triton.jit
def activation_derivative(g, ACT: tl.constexpr, EXACT: tl.constexpr):
    """The derivative of `activation` at `g`, in float32."""
    if ACT == "silu":
        s, rest = _sigmoid_and_rest(g, EXACT)
        slope = tl.fma(g * s, rest, s)
    elif ACT == "gelu_tanh":
        t = 1.5957691216057308 * (g + 0.044715 * g * g * g)
        s, rest = _sigmoid_and_rest(t, EXACT)
        slope = tl.fma(g * s * rest, 1.5957691216057308 * (1.0 + 0.134145 * g * g), s)
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
        slope = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * density
    return slope
