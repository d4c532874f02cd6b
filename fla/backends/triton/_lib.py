"""Device helpers that every family shares, and the constants of the hardware's number formats.

All logs are base 2 inside kernels (`exp2` is one instruction); gates come in natural logs.
"""

import triton
import triton.language as tl

from fla.backends import interpreting

INTERPRETED = tl.constexpr(interpreting())  # bf16 dots are wrong in Triton's interpreter
LOG2E = tl.constexpr(1.4426950408889634)
MIN_LOG_DECAY = tl.constexpr(
    -20.0
)  # nats a step: sums of stronger ones lose the digits of weaker ones (kernels in 16 bits)
DEAD_LOG_DECAY = tl.constexpr(-16.0)  # below it a gate's gradient is rounding noise, and is 0


@triton.jit
def columns_mask(m_row, o_d, D):
    """`m_row` for tiles that lie inside D columns, with the columns after D masked too for others and where D is known
    at run time alone."""
    if isinstance(D, tl.tensor):
        return m_row[:, None] & (o_d < D)[None, :]
    elif D // o_d.shape[0] * o_d.shape[0] == D:  # (no % here: the interpreter has none)
        return m_row[:, None]
    else:
        return m_row[:, None] & (o_d < D)[None, :]


@triton.jit
def load_rows(p, o_c, m_c, H, o_d, D):
    """Tokens `o_c` of one head of a `[., H, D]` tensor, columns `o_d`, zeros outside. `p` points at the head's token 0:
    offsets inside a tile fit in 32 bits."""
    return tl.load(p + o_c[:, None] * (H * D) + o_d[None, :], mask=columns_mask(m_c, o_d, D), other=0.0)


# How a kernel loads tiles: by pointers, by a tensor descriptor (TMA), by one and on to registers. The last frees its
# buffer at once, so that the next but one tile can be on its way: for left operands of dots.
POINTERS, TILES, TO_REGISTERS = (tl.constexpr(i) for i in range(3))


if hasattr(tl, "make_tensor_descriptor"):

    @triton.jit
    def _descriptor(x, row, length, H, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WAY: tl.constexpr):
        if WAY == TILES:
            return tl.make_tensor_descriptor(x + row * D, [length, D], [H * D, 1], [C, W])
        else:
            return tl.make_tensor_descriptor(x + row * D, [length, 1, D], [H * D, D, 1], [C, 1, W])

else:  # Triton 3.3, which looks up all names of a kernel: launches go by pointers there (`has_tensor_descriptors`)

    @triton.jit
    def _descriptor(x, row, length, H, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WAY: tl.constexpr):
        tl.static_assert(False, "this Triton has no tensor descriptors")


@triton.jit
def tiles_of(x, row, length, H, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WAY: tl.constexpr):
    """What `load_tile` takes `[C, W]` tiles of a head's `length` tokens from, whose first one is `row` (64 bits) of
    `x` `[., D]`."""
    if WAY == POINTERS:
        return x
    else:
        return _descriptor(x, row, length, H, D, C, W, WAY)


@triton.jit
def load_tile(x, t, first, row, o_c, m_c, H, o_d, D: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WAY: tl.constexpr):
    """Tokens from `t` on, columns from `first` on, zeros outside. By pointers: `load_rows` at token `row`."""
    if WAY == POINTERS:
        return load_rows(x + row * D, o_c, m_c, H, o_d, D)
    elif WAY == TILES:
        return x.load([t, first])
    else:
        return x.load([t, 0, first]).reshape(C, W)


@triton.jit
def store_rows(p, o_c, m_c, H, o_d, D, x):
    """The inverse of `load_rows`, in the tensor's dtype."""
    x = x.to(p.dtype.element_ty)
    tl.store(p + o_c[:, None] * (H * D) + o_d[None, :], x, mask=columns_mask(m_c, o_d, D))


@triton.jit
def load_state(p, i_state, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """The tile of state `i_state` (64 bits) of `[., K, V]` at any two broadcastable index tensors, float32, zeros
    outside."""
    return tl.load(p + i_state * K * V + o_k * V + o_v, mask=(o_k < K) & (o_v < V), other=0.0).to(tl.float32)


@triton.jit
def store_state(p, i_state, o_k, o_v, K: tl.constexpr, V: tl.constexpr, x):
    tl.store(p + i_state * K * V + o_k * V + o_v, x.to(p.dtype.element_ty), mask=(o_k < K) & (o_v < V))


@triton.jit
def log2_decay(x):
    """A loaded natural-log decay as float32 log2, each step clamped so that sums of it keep their digits."""
    return tl.maximum(x.to(tl.float32), MIN_LOG_DECAY) * LOG2E


@triton.jit
def operand(x, dtype: tl.constexpr):
    """`x` as a dot reads it: in `dtype`, and a float32 one rounded to tf32's digits, so that who uses it beside the dot
    uses the same number."""
    if dtype == tl.float32 and not INTERPRETED:
        bits = (x.to(tl.float32).to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot_split(a, b, dtype: tl.constexpr):
    """`a @ b` for a float32 `b` as high and low halves in `dtype`: both halves together carry twice the digits."""
    if dtype == tl.float32 and INTERPRETED:
        out = tl.dot(a, b)
    else:
        high = operand(b, dtype)
        out = tl.dot(a, high)
        out = tl.dot(a, operand(b - high.to(tl.float32), dtype), acc=out)
    return out
