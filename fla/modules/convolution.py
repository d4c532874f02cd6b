"""Short convolution: a causal convolution of every channel with its last `W` inputs.

    y[t] = activation(sum_{j < W} weight[:, j] x[t - (W - 1) + j] + bias) + residual

`x` [B, T, D], `weight` [D, W] (in the module [D, 1, W]). The state [N, D, W] holds the last `W` inputs of every
sequence, oldest first; it starts as zeros. Packed sequences do not see each other. They are given by `cu_seqlens`
(batch size 1), or by `seq_idx` [B, T], a number per token that changes where a new sequence begins. Family: `fused`.
Paper: https://arxiv.org/abs/2312.00752
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fla.backends import fused


def causal_conv1d(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    *,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise causal convolution of `x` [B, T, D] with `weight` [D, W]; returns `(y, final_state or None)`.

    Args:
        initial_state: `[N, D, W]`, the inputs before every sequence; it is not written to.
        activation: None, "silu" or "swish".
        backend: None, "triton" or "torch"; "cuda" means None.
        cu_seqlens: `[N + 1]`, bounds of the sequences packed into one row.
        cu_seqlens_cpu: the same on the CPU; it may be given alone.
        seq_idx: `[B, T]` integers, for packed sequences in any number of rows. A sequence begins where a row begins or
            the number changes. States are possible with a single row only. Reading it waits for the GPU, which
            `cu_seqlens` does not.
        chunk_indices: accepted for compatibility; not used.
        cp_context: None (else NotImplementedError).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value; the message names it.
    """
    if cp_context is not None:
        raise NotImplementedError(
            f"cp_context must be None, got {type(cp_context).__name__}: sequences cut over several processes are not "
            "computed yet"
        )
    cu_seqlens, shape = _packing(x, cu_seqlens, cu_seqlens_cpu, seq_idx), None
    if seq_idx is not None and cu_seqlens is not None and x.shape[0] > 1:
        if initial_state is not None or output_final_state:
            raise ValueError(
                f"states need a seq_idx of one row, got {x.shape[0]} rows: pack all sequences into one row"
            )
        shape = x.shape
        x, residual = x.reshape(1, -1, shape[2]), None if residual is None else residual.reshape(1, -1, shape[2])
    y, state = fused.conv(
        x,
        weight,  # type: ignore[arg-type]
        bias,
        residual,
        initial_state,
        output_final_state,
        activation,
        cu_seqlens,
        backend=backend,
    )
    return y if shape is None else y.view(shape), state


def _packing(
    x: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """`cu_seqlens` of the call, from whichever of the three arguments is given.

    With `seq_idx` it describes the row that all rows of `x`, one after another, make up.
    """
    fused.check_float("x", x)
    for name, given in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu), ("seq_idx", seq_idx)):
        fused.check_tensor(name, given)
    if cu_seqlens is None and cu_seqlens_cpu is not None:
        cu_seqlens = cu_seqlens_cpu.to(x.device)
    if seq_idx is None:
        return cu_seqlens
    if cu_seqlens is not None:
        raise ValueError("seq_idx and cu_seqlens cannot both be given: each says where sequences begin")
    if seq_idx.is_floating_point() or seq_idx.shape != x.shape[:2] or seq_idx.device != x.device:
        raise ValueError(
            f"seq_idx must be an integer tensor of shape {list(x.shape[:2])} on {x.device} like x, "
            f"got {seq_idx.dtype} {list(seq_idx.shape)} on {seq_idx.device}"
        )
    if x.dim() != 3 or x.shape[1] < 2:
        return None  # one token per row: every row is one sequence
    begins = nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=True)
    return nn.functional.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel())


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv1d`; returns `(y, cache)`. It updates `cache` [N, D, W] IN PLACE.

    `x` is [N, D], [N, 1, D] or [1, N, D], and D may be split into heads; `y` and `residual` have the shape of `x`.
    `weight` [D, W].
    """
    if weight is None:
        raise TypeError("weight must be a tensor of shape [D, W], got None")
    fused.check_float("x", x)
    fused.check_float("cache", cache)
    fused.check_tensor("residual", residual)
    if cache.dim() != 3 or x.numel() != cache.shape[0] * cache.shape[1]:
        raise ValueError(
            f"x must hold one token of {list(cache.shape[1:-1])} channels for each row of cache {list(cache.shape)}, "
            f"got {list(x.shape)}"
        )
    rows = [None if z is None else z.reshape(cache.shape[:2]) for z in (x, residual)]
    y = fused.conv_step(rows[0], cache, weight, bias, rows[1], activation, backend=backend)  # type: ignore[arg-type]
    return y.view(x.shape), cache


def proj_then_conv1d(
    x: Tensor,
    proj_weight: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None = None,
    cache: Tensor | None = None,
) -> Tensor:
    """`silu(conv(x @ proj_weight.T))`, `x` [B, T, C], `proj_weight` [D, C]. It updates `cache` [B, D, W] in place."""
    y, state = causal_conv1d(
        nn.functional.linear(x, proj_weight), conv1d_weight, conv1d_bias, None, cache, cache is not None, "silu"
    )
    if cache is not None and state is not None:
        cache.copy_(state)
    return y


class ShortConvolution(nn.Conv1d):
    """The short convolution of a token mixer, with a state for decoding. Parameters: `weight` [D, 1, W], `bias` [D].

    A call with a cache and one token per sequence updates the cache in place if no gradient is recorded. Every other
    call leaves the cache as it is and returns a new one. `backend`: None, "triton" or "torch"; "cuda" means None.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        use_fast_conv1d: bool | None = None,
    ) -> None:
        if activation not in fused.CONV_ACTIVATIONS:
            raise ValueError(f"activation must be one of {fused.CONV_ACTIVATIONS}, got {activation!r}")
        if backend not in fused.CONV_BACKENDS:
            raise ValueError(f"backend must be one of {fused.CONV_BACKENDS}, got {backend!r}")
        fused.check_flag("bias", bias)
        if use_fast_conv1d is not None:
            warnings.warn(
                "use_fast_conv1d has no effect any more: use backend= instead", DeprecationWarning, stacklevel=2
            )
        super().__init__(
            hidden_size,
            hidden_size,
            kernel_size,
            padding=kernel_size - 1,
            groups=hidden_size,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.hidden_size, self.activation, self.backend = hidden_size, activation, backend

    @property
    def state_size(self) -> int:
        """Number of elements in one sequence's state."""
        return self.hidden_size * self.kernel_size[0]

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        *,
        cu_seqlens_cpu: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The convolution of `x` [B, T, D]; returns `(y, cache)`, with cache None unless `output_final_state`.

        `residual` [B, T, D] is added to the result. `mask` [B, T] (1 = token) multiplies `x` first and cannot be given
        with `cu_seqlens`. With `cache` [N, D, W] the call continues where the last one ended, with any number of
        tokens. `cu_seqlens_cpu` and `seq_idx` [B, T] are those of `causal_conv1d`. Raises ValueError or TypeError for
        arguments that do not fit.
        """
        fused.check_float("x", x)
        if x.dim() != 3 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x must have shape [B, T, {self.hidden_size}], got {list(x.shape)}")
        if mask is not None:
            x = self._masked(x, mask, cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
        if cu_seqlens_cpu is not None or (seq_idx is not None and x.shape[0] == 1):
            cu_seqlens, seq_idx = _packing(x, cu_seqlens, cu_seqlens_cpu, seq_idx), None
        if cache is not None:
            self._check_cache(cache, x, cu_seqlens)
        if cache is not None and self._is_step(x, cache, cu_seqlens):
            return self.step(x, residual, cache, output_final_state, cu_seqlens)
        return causal_conv1d(
            x,
            self.weight.squeeze(1),
            self.bias,
            residual,
            cache,
            output_final_state,
            self.activation,
            self.backend,
            cu_seqlens,
            chunk_indices=chunk_indices,
            seq_idx=seq_idx,
        )

    def step(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: Tensor,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One token of every sequence, `x` [N, 1, D] or packed [1, N, D]. It updates `cache` [N, D, W] in place."""
        weight = self.weight.squeeze(1)
        if cu_seqlens is None:
            y, _ = causal_conv1d_update(x, cache, residual, weight, self.bias, self.activation, backend=self.backend)
        else:
            # N tokens in N sequences may be unevenly spread, as in lengths (0, 2, 1); reading them would wait
            y, state = causal_conv1d(
                x, weight, self.bias, residual, cache, True, self.activation, self.backend, cu_seqlens
            )
            assert state is not None
            cache.copy_(state)
        return y, cache if output_final_state else None

    def _is_step(self, x: Tensor, cache: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether `step` can compute the call: as many tokens as sequences, and a cache that may be written to."""
        recorded = torch.is_grad_enabled() and (x.requires_grad or cache.requires_grad or self.weight.requires_grad)
        if not torch.compiler.is_compiling() and cache.is_inference() and not torch.is_inference_mode_enabled():
            return False  # a tensor made in inference mode cannot be written to outside of it
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return not recorded and x.dim() == 3 and x.shape[0] * x.shape[1] == sequences

    def _check_cache(self, cache: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> None:
        fused.check_float("cache", cache)
        fused.check_tensor("cu_seqlens", cu_seqlens)
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        expected = [sequences, self.hidden_size, self.kernel_size[0]]
        if list(cache.shape) != expected:
            raise ValueError(f"cache must have shape {expected} (sequences, channels, width), got {list(cache.shape)}")

    @staticmethod
    def _masked(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        fused.check_tensor("mask", mask)
        if cu_seqlens is not None:
            raise ValueError("mask and cu_seqlens cannot both be given: packed sequences have no padding")
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask must have shape {list(x.shape[:2])} like the first axes of x, got {list(mask.shape)}"
            )
        return x * mask.to(x.dtype).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
