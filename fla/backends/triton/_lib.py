"""Device helpers that every family shares: loading and storing tiles, and numbers as dots read them.

Kernels take logarithms to base 2, because `exp2` is one instruction. Gates arrive as natural logarithms.

In the shapes of the comments, `[C, D]` is a tile of C tokens and D channels of one head.
"""

import triton
import triton.language as tl

from fla.backends import interpreting

INTERPRETED = tl.constexpr(interpreting())  # Triton's interpreter computes bf16 dots wrong
LOG2E = tl.constexpr(1.4426950408889634)
# 16-bit kernels clamp each step to this many nats: in a running sum, a stronger one would take the digits of weaker
# ones. In a simulation the clamp leaves an error of 1.5e-6 in the outputs; unclamped steps of -1e4 nats leave 1e-3.
MIN_LOG_DECAY = tl.constexpr(-20.0)
# The gradient of a gate below this is at most e^-16 of its scale, which is rounding noise, and is set to 0. Otherwise
# the sum of dg times g is off by 13 % where 5 % of the gates are at -20 nats (simulated).
DEAD_LOG_DECAY = tl.constexpr(-16.0)


@triton.jit
def columns_mask(m_row, o_d, D):
    """The mask of a tile: rows by `m_row`, and columns from D on, unless the tile is known to lie within D columns.

    D may be known at run time alone.
    """
    if isinstance(D, tl.tensor):
        return m_row[:, None] & (o_d < D)[None, :]
    elif D // o_d.shape[0] * o_d.shape[0] == D:  # (no % here: the interpreter has none)
        return m_row[:, None]
    else:
        return m_row[:, None] & (o_d < D)[None, :]


@triton.jit
def load_rows(p, o_c, m_c, H, o_d, D):
    """Tokens `o_c` and columns `o_d` of one head of a tensor `[tokens, H, D]`, zeros outside.

    `p` points at token 0 of the head. Offsets inside a tile fit in 32 bits.
    """
    return tl.load(p + o_c[:, None] * (H * D) + o_d[None, :], mask=columns_mask(m_c, o_d, D), other=0.0)


# LOAD, how a kernel loads tiles: by pointers; by a tensor descriptor (TMA) into shared memory; by a descriptor and from
# there to registers. The last frees the buffer in shared memory at once, so that one more tile can be under way. It is
# for left operands of dots, which may come from registers.
POINTERS, DESCRIPTORS, TO_REGISTERS = (tl.constexpr(i) for i in range(3))


if hasattr(tl, "make_tensor_descriptor"):

    @triton.jit
    def _make_descriptor(x, row, length, H, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, LOAD: tl.constexpr):
        if LOAD == DESCRIPTORS:
            return tl.make_tensor_descriptor(x + row * D, [length, D], [H * D, 1], [C, W])
        else:
            return tl.make_tensor_descriptor(x + row * D, [length, 1, D], [H * D, D, 1], [C, 1, W])

else:  # Triton 3.3 has none, and looks up every name of a kernel. `has_tensor_descriptors` keeps kernels to pointers.

    @triton.jit
    def _make_descriptor(x, row, length, H, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, LOAD: tl.constexpr):
        tl.static_assert(False, "this Triton has no tensor descriptors")


@triton.jit
def tile_source(x, row, length, H, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, LOAD: tl.constexpr):
    """What `load_tile` loads from, for tiles `[C, W]` of a head's `length` tokens.

    The first of these tokens is row `row` (64 bits) of `x` `[rows, D]`; the next one lies H rows further.
    """
    if LOAD == POINTERS:
        return x
    else:
        return _make_descriptor(x, row, length, H, D, C, W, LOAD)


@triton.jit
def load_tile(
    x, t, first, row, o_c, m_c, H, o_d, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, LOAD: tl.constexpr
):
    """A tile `[C, W]`: tokens from `t` on, columns from `first` on, zeros outside.

    By pointers: `load_rows` of the tokens `o_c`, masked by `m_c`, and the columns `o_d`, where `row` is token `t`.
    """
    if LOAD == POINTERS:
        return load_rows(x + row * D, o_c, m_c, H, o_d, D)
    elif LOAD == DESCRIPTORS:
        return x.load([t, first])
    else:
        return x.load([t, 0, first]).reshape(C, W)


@triton.jit
def store_rows(p, o_c, m_c, H, o_d, D, x):
    """Stores `x` where `load_rows` would load it, in the tensor's dtype."""
    x = x.to(p.dtype.element_ty)
    tl.store(p + o_c[:, None] * (H * D) + o_d[None, :], x, mask=columns_mask(m_c, o_d, D))


@triton.jit
def load_state(p, i_state, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """A tile of state `i_state` (64 bits) of `p` `[states, K, V]` in float32, zeros outside.

    `o_k` and `o_v` broadcast to the tile: with `[K, 1]` and `[1, V]` it is `[K, V]`, the other way round `[V, K]`.
    """
    return tl.load(p + i_state * K * V + o_k * V + o_v, mask=(o_k < K) & (o_v < V), other=0.0).to(tl.float32)


@triton.jit
def store_state(p, i_state, o_k, o_v, K: tl.constexpr, V: tl.constexpr, x):
    """Stores `x` where `load_state` would load it, in the tensor's dtype."""
    tl.store(p + i_state * K * V + o_k * V + o_v, x.to(p.dtype.element_ty), mask=(o_k < K) & (o_v < V))


@triton.jit
def log2_decay(x):
    """A natural-log decay as a float32 log2, clamped so that sums of many keep their digits."""
    return tl.maximum(x.to(tl.float32), MIN_LOG_DECAY) * LOG2E


@triton.jit
def operand(x, dtype: tl.constexpr):
    """`x` as a dot reads it: in `dtype`, and float32 rounded to the digits of tf32.

    What uses the result beside the dot then uses the very number that the dot used.
    """
    if dtype == tl.float32 and not INTERPRETED:
        bits = (x.to(tl.float32).to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot_split(a, b, dtype: tl.constexpr):
    """`a @ b` for a float32 `b`, which enters as a high and a low half in `dtype`, and so with twice the digits."""
    if dtype == tl.float32 and INTERPRETED:
        out = tl.dot(a, b)
    else:
        high = operand(b, dtype)
        out = tl.dot(a, high)
        out = tl.dot(a, operand(b - high.to(tl.float32), dtype), acc=out)
    return out
