"""Device functions that the kernels share: from lengths to blocks, and divisions that cost little."""

from __future__ import annotations

import triton
import triton.language as tl

from .problem import SHORT_LIMIT

MOST = tl.constexpr(SHORT_LIMIT)


@triton.jit
def load_lengths(lengths, stride, i, mask):
    """Elements `i` of a lengths tensor as int32."""
    return tl.load(lengths + i.to(tl.int64) * stride, mask=mask, other=0).to(tl.int32)


@triton.jit
def cdiv_tile(tokens, tile, multiplier):
    """cdiv(tokens, tile) without a division: tiles are 16 e, and multiplier is ceil(2^32 / e)."""
    sixteens = (tokens + tile - 1).to(tl.uint32) >> 4  # at most 2^27 + 14, for which the product is exact
    return tl.umulhi(sixteens, multiplier.to(tl.uint32, bitcast=True)).to(tl.int32)


@triton.jit
def floor_div_tile(tokens, multiplier):
    """tokens // tile for tokens >= 0, likewise."""
    return tl.umulhi((tokens >> 4).to(tl.uint32), multiplier.to(tl.uint32, bitcast=True)).to(tl.int32)


@triton.jit
def num_blocks(lengths, strides, i, mask, most, n, LAYOUT: tl.constexpr):
    """Query rows, query blocks and key blocks of sequences `i`; zero where `mask` is off.

    `most`: max_seqlen_q and max_seqlen_k_new. `n`, LAYOUT: kernel.Numbers and Layout. `short` holds only if no length
    is beyond MOST. One that is, such as a row of padding that nobody has set, counts as MOST, so that the places of the
    order stay within the tensor. With `window` only the key blocks that the last query block reads, as in `BlockMN`
    (hopper/block.h).
    """
    max_seqlen_q, max_seqlen_k_new = most
    cache_seqlens, cu_seqlens_q, seqused_q, cu_seqlens_k_new, leftpad_k = lengths
    if seqused_q is not None:
        seqlen_q = load_lengths(seqused_q, strides[2], i, mask)
    elif cu_seqlens_q is not None:
        seqlen_q = load_lengths(cu_seqlens_q, strides[1], i + 1, mask) - load_lengths(cu_seqlens_q, strides[1], i, mask)
    else:
        seqlen_q = max_seqlen_q  # one number for all, as long as it can stay one

    seqlen_k = load_lengths(cache_seqlens, strides[0], i, mask)
    if leftpad_k is not None:
        seqlen_k -= load_lengths(leftpad_k, strides[4], i, mask)
    if cu_seqlens_k_new is not None:
        new = strides[3]
        seqlen_k += load_lengths(cu_seqlens_k_new, new, i + 1, mask) - load_lengths(cu_seqlens_k_new, new, i, mask)
    else:
        seqlen_k += max_seqlen_k_new

    seqlen_q = tl.maximum(seqlen_q, 0)
    seqlen_k = tl.maximum(seqlen_k, 0)
    rows = tl.maximum(seqlen_q * n.q_heads_per_row, 0)
    if LAYOUT.short:
        seqlen_k = tl.minimum(seqlen_k, MOST)
        rows = tl.minimum(rows, MOST)
    num_m_blocks = cdiv_tile(rows, n.block_m, n.multiplier_m)
    num_n_blocks = cdiv_tile(seqlen_k, n.block_n, n.multiplier_n)
    if LAYOUT.window:
        at = tl.maximum(num_m_blocks - 1, 0) * n.block_m // n.q_heads_per_row + seqlen_k - seqlen_q
        first_key = at - n.window_left
        if n.attention_chunk > 0:
            into_chunk = at % n.attention_chunk
            into_chunk = tl.where(into_chunk < 0, into_chunk + n.attention_chunk, into_chunk)
            first_key = tl.maximum(first_key, at - into_chunk)
        num_n_blocks = tl.maximum(num_n_blocks - floor_div_tile(tl.maximum(first_key, 0), n.multiplier_n), 0)
    return tl.where(mask, rows, 0), tl.where(mask, num_m_blocks, 0), tl.where(mask, num_n_blocks, 0)


@triton.jit
def cdiv(a, b, SHORT: tl.constexpr):
    """cdiv(a, b) for a >= 0, b > 0, exact in int32: cheaper than an integer division on a GPU.

    SHORT, for a < 2^19: the quotient plus a margin that rounding errors stay within (a + b < 2^20, and a larger b gives
    at most one), rounded down in the mantissa of a number over 2^23: a conversion to int is slow.
    """
    if SHORT:
        divisor = b.to(tl.float32)
        rounded = (a.to(tl.float32) + (divisor - 0.5)) * (1.0 / divisor) + 8388607.5
        return rounded.to(tl.int32, bitcast=True) - 0x4B000000
    a += b - 1
    inverse = 1.0 / b.to(tl.float32)
    quotient = (a.to(tl.float32) * inverse).to(tl.int32)  # off by a few in 2^22
    quotient += ((a - quotient * b).to(tl.float32) * inverse).to(tl.int32)  # off by one at most
    remainder = a - quotient * b
    return quotient + (remainder >= b).to(tl.int32) - (remainder < 0).to(tl.int32)
