"""Triton kernels: matrix products whose patches are read from and written to the image itself.

B batch, C input channels, G grid positions of one image, M = B * G patches, N output
channels, P values of a patch in one channel, K = C * P. An image has three dimensions here,
the leading ones of size 1 where there are fewer. Row m of the matrix of patches starts at
`_rows_M(m)` in the image, and its value k lies `_columns_K(k)` further on, so that the matrix
itself is never written ("implicit im2col"; Chetlur et al., cuDNN, arXiv 1410.0759).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_M(m, G, G1, G2, sb, s0, s1, s2, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Offset of the first value of each patch."""
    position = m % G
    return (
        m // G * sb
        + position // (G1 * G2) * P0 * s0
        + position // G2 % G1 * P1 * s1
        + position % G2 * P2 * s2
    )


@triton.jit
def _columns_K(k, sc, s0, s1, s2, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    """Offset of each value of a patch from its first."""
    return k // (P0 * P1 * P2) * sc + k // (P1 * P2) % P0 * s0 + k // P2 % P1 * s1 + k % P2 * s2


@triton.jit
def _operand(x, OPERAND: tl.constexpr):
    """A factor of a product, as the product is to see it."""
    if OPERAND == "fp32":
        # Triton's interpreter does not multiply bf16.
        x = x.to(tl.float32)
    return x


@triton.jit
def _result(acc, dtype: tl.constexpr, OPERAND: tl.constexpr):
    """A sum in the dtype of the result, rounded to nearest even."""
    if OPERAND == "fp32" and dtype == tl.bfloat16:
        # Triton's interpreter would cut the low bits off.
        bits = acc.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        acc = bits.to(tl.float32, bitcast=True)
    return acc.to(dtype)


@triton.jit
def output_kernel(
    x, w, bias, y, M, N, G, G1, G2, sb, sc, s0, s1, s2, GY, yb, yn, yg,
    K: tl.constexpr, KX: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    HAS_BIAS: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[b, n, g] = bias[n] + sum over k of patch[m, k] * w[n, k], where m = (b, g).

    `KX >= K` values of a patch can be read; those past K are zeros. y has GY positions an
    image, where x may be rows with one, and strides `(yb, yn, yg)`: yn or yg is 1.
    """
    blocks_N = tl.cdiv(N, BN)
    m = tl.program_id(0) // blocks_N * BM + tl.arange(0, BM)
    n = tl.program_id(0) % blocks_N * BN + tl.arange(0, BN)
    wide_m = m.to(tl.int64) if WIDE else m
    wide_n = n.to(tl.int64) if WIDE else n
    # Rows past the end read the first one: only their store needs a mask.
    x_M = x + _rows_M(tl.where(m < M, wide_m, 0), G, G1, G2, sb, s0, s1, s2, P0, P1, P2)
    w_N = w + tl.where(n < N, wide_n, 0) * K
    acc_MN = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        wide_k = k.to(tl.int64) if WIDE else k
        at_K = _columns_K(wide_k, sc, s0, s1, s2, P0, P1, P2)
        if K % BK:
            x_MK = tl.load(x_M[:, None] + at_K[None, :], mask=(k < KX)[None, :], other=0.0)
            w_KN = tl.load(w_N[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
        else:
            x_MK = tl.load(x_M[:, None] + at_K[None, :])
            w_KN = tl.load(w_N[None, :] + k[:, None])
        acc_MN = tl.dot(
            _operand(x_MK, OPERAND), _operand(w_KN, OPERAND), acc_MN, input_precision=PRECISION
        )
    if HAS_BIAS:
        acc_MN += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_MN = _result(acc_MN, y.dtype.element_ty, OPERAND)
    if yn == 1:
        y_M = wide_m // GY * yb + wide_m % GY * yg
        at_MN = y_M[:, None] + wide_n[None, :]
        tl.store(y + at_MN, y_MN, mask=(m < M)[:, None] & (n < N)[None, :])
    else:
        # V neighbours in m, V dividing GY, are neighbours in memory: tell the compiler.
        first_m = wide_m // V * V
        y_M = tl.multiple_of(first_m // GY * yb + first_m % GY, V) + wide_m % V
        at_MN = y_M[:, None] + tl.multiple_of(wide_n * yn, V)[None, :]
        tl.store(y + at_MN, y_MN, mask=(first_m < M)[:, None] & (n < N)[None, :])


@triton.jit
def input_grad_kernel(
    dy, w, dx, M, G, G1, G2, sb, sc, s0, s1, s2,
    N: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dpatch[m, k] = sum over n of dy[m, n] * w[n, k], stored where the patch lies in dx."""
    blocks_K: tl.constexpr = (K + BK - 1) // BK
    m = tl.program_id(0) // blocks_K * BM + tl.arange(0, BM)
    k = tl.program_id(0) % blocks_K * BK + tl.arange(0, BK)
    wide_m = m.to(tl.int64) if WIDE else m
    wide_k = k.to(tl.int64) if WIDE else k
    row_M = tl.where(m < M, wide_m, 0)
    acc_MK = tl.zeros((BM, BK), tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        wide_n = n.to(tl.int64) if WIDE else n
        dy_MN = tl.load(dy + row_M[:, None] * N + wide_n[None, :], mask=(n < N)[None, :], other=0.0)
        inside_NK = (n < N)[:, None] & (k < K)[None, :]
        w_NK = tl.load(w + wide_n[:, None] * K + wide_k[None, :], mask=inside_NK, other=0.0)
        acc_MK = tl.dot(
            _operand(dy_MN, OPERAND), _operand(w_NK, OPERAND), acc_MK, input_precision=PRECISION
        )
    dx_M = _rows_M(wide_m, G, G1, G2, sb, s0, s1, s2, P0, P1, P2)
    at_MK = dx_M[:, None] + _columns_K(wide_k, sc, s0, s1, s2, P0, P1, P2)[None, :]
    mask = (m < M)[:, None] & (k < K)[None, :]
    tl.store(dx + at_MK, _result(acc_MK, dx.dtype.element_ty, OPERAND), mask=mask)


@triton.jit
def weight_grad_kernel(
    dy, x, dw, M, N, G, G1, G2, sb, sc, s0, s1, s2,
    ROWS: tl.constexpr, K: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw[part, n, k] = sum over the `ROWS` patches m of a part of dy[m, n] * patch[m, k]."""
    blocks_K: tl.constexpr = (K + BK - 1) // BK
    n = tl.program_id(0) // blocks_K * BN + tl.arange(0, BN)
    k = tl.program_id(0) % blocks_K * BK + tl.arange(0, BK)
    part = tl.program_id(1)
    wide_k = k.to(tl.int64) if WIDE else k
    at_K = _columns_K(wide_k, sc, s0, s1, s2, P0, P1, P2)
    acc_NK = tl.zeros((BN, BK), tl.float32)
    for start in range(0, ROWS, BM):
        m = part * ROWS + start + tl.arange(0, BM)
        wide_m = m.to(tl.int64) if WIDE else m
        # Both need the mask in m: a zero times what lies elsewhere could be a NaN.
        inside_NM = (n < N)[:, None] & (m < M)[None, :]
        dy_NM = tl.load(dy + wide_m[None, :] * N + n[:, None], mask=inside_NM, other=0.0)
        x_M = _rows_M(wide_m, G, G1, G2, sb, s0, s1, s2, P0, P1, P2)
        inside_MK = (m < M)[:, None] & (k < K)[None, :]
        x_MK = tl.load(x + (x_M[:, None] + at_K[None, :]), mask=inside_MK, other=0.0)
        acc_NK = tl.dot(
            _operand(dy_NM, OPERAND), _operand(x_MK, OPERAND), acc_NK, input_precision=PRECISION
        )
    dw += part.to(tl.int64) * N * K
    mask = (n < N)[:, None] & (k < K)[None, :]
    tl.store(dw + n[:, None] * K + k[None, :], acc_NK, mask=mask)


@triton.jit
def rows_kernel(
    x, rows, M, G, G1, G2, sb, sc, s0, s1, s2,
    K: tl.constexpr, KX: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """rows[m, k] = patch[m, k], and zeros from K to KX."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    wide_m = m.to(tl.int64) if WIDE else m
    wide_k = k.to(tl.int64) if WIDE else k
    x_M = x + _rows_M(wide_m, G, G1, G2, sb, s0, s1, s2, P0, P1, P2)
    at_MK = x_M[:, None] + _columns_K(wide_k, sc, s0, s1, s2, P0, P1, P2)[None, :]
    inside = (m < M)[:, None] & (k < KX)[None, :]
    x_MK = tl.load(at_MK, mask=inside & (k < K)[None, :], other=0.0)
    tl.store(rows + wide_m[:, None] * KX + wide_k[None, :], x_MK, mask=inside)
