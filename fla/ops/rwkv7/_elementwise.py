"""What an RWKV-7 layer computes around its recurrence, element by element: differentiable, on any device."""

import torch
from torch import Tensor

from fla.backends import fused


def fused_addcmul_rwkv7(
    hidden_states: Tensor,
    delta: Tensor,
    xr: Tensor,
    xw: Tensor,
    xk: Tensor,
    xv: Tensor,
    xa: Tensor,
    xg: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The six inputs of an RWKV-7 layer's projections: `hidden_states + delta * x_i` for each `x_i`, in their order.

    `hidden_states` and `delta`, the token shift, are `[B, T, D]`, each `x_i` has D elements in its last axis and
    broadcasts (`[D]`, `[1, 1, D]`). Results have the dtype of `hidden_states`; the last is None without `xg`.
    """

    def mixed(x: Tensor) -> Tensor:
        return torch.addcmul(hidden_states, delta, x.to(hidden_states.dtype))

    return mixed(xr), mixed(xw), mixed(xk), mixed(xv), mixed(xa), None if xg is None else mixed(xg)


def fused_k_rwkv7(
    k: Tensor, a: Tensor, ka: Tensor, cu_seqlens: Tensor | None = None, cu_seqlens_cpu: Tensor | None = None
) -> Tensor:
    """The key that an RWKV-7 layer writes with: `k + k (a - 1) ka`.

    `k`, `a`: `[B, T, D]`; `ka`: D elements in its last axis. `cu_seqlens` and `cu_seqlens_cpu` have no effect, because
    every token is computed by itself.
    """
    return torch.addcmul(k, k * (a - 1), ka.to(k.dtype))


def gate_output_correction(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The bonus of the current token, and the output gate: `(o + (sum_d r k r_k) v) g`.

    `o` and `g` are `[B, T, H * V]`, `r` and `k` `[B, T, H, K]`, `v` `[B, T, H, V]`, `r_k` `[H, K]`; the sum runs over
    K. It is computed in float32 (float64 for float64), and has the shape and dtype of `o`.
    """
    wide = torch.promote_types(o.dtype, torch.float32)
    bonus = (r.to(wide) * k * r_k).sum(-1, keepdim=True) * v
    return ((o + bonus.flatten(-2)) * g).to(o.dtype)


def channel_mixing_rwkv7(
    x: Tensor,
    x_prev: Tensor | None,
    x_k: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    inplace: bool = True,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's channel mix, `relu(z key_weight)^2 value_weight` with `z_t = x_t + (x_{t-1} - x_t) x_k`, and the last x.

    Args:
        x: `[B, T, D]`.
        x_prev: `[B, D]`, what stands before the first token; None means zeros.
        x_k: D elements in its last axis.
        key_weight, value_weight: `[D, I]` and `[I, D]`, which multiply from the right.
        inplace: no effect on results; inputs are never written to.

    Returns:
        The mix `[B, T, D]`, and `[B, D]` the `x_prev` of the next call.

    Raises:
        ValueError: weights whose shapes do not fit.
    """
    _check_weights(x, key_weight, value_weight)
    delta, last = fused.token_shift(x, None, x_prev)
    z = torch.addcmul(x, delta, x_k.to(x.dtype))
    return torch.relu(z @ key_weight).square() @ value_weight, last


def channel_mixing_rwkv7_torch(
    x: Tensor, x_prev: Tensor | None, x_k: Tensor, key_weight: Tensor, value_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """`channel_mixing_rwkv7` by its formula, without a kernel of the library."""
    _check_weights(x, key_weight, value_weight)
    before = torch.zeros_like(x[:, :1]) if x_prev is None else x_prev[:, None].to(x.dtype)
    z = x + (torch.cat((before, x[:, :-1]), 1) - x) * x_k
    return torch.relu(z @ key_weight).square() @ value_weight, x[:, -1]


def _check_weights(x: Tensor, key_weight: Tensor, value_weight: Tensor) -> None:
    expected = (x.shape[-1], key_weight.shape[-1])
    if tuple(key_weight.shape) != expected or tuple(value_weight.shape) != expected[::-1]:
        raise ValueError(
            f"key_weight and value_weight must have shapes [D, I] and [I, D] with D = {x.shape[-1]}, got "
            f"{list(key_weight.shape)} and {list(value_weight.shape)}; the weight of an nn.Linear is transposed"
        )
