"""The stages of one chunk of the family `delta`, forward and backward, in float64: what kernels compute step by step.

Inside the chunk, `G` is the running sum of the log decay `w`, `G_C` its last row. `S` is the state before the chunk,
`S'` the state after it, `b` is beta as a diagonal matrix, `M = I + b L`:

    P_ij = sum_c q_ic k_jc exp(G_ic - G_jc)    for j <= i, else 0
    L_ij = sum_c k_ic k_jc exp(G_ic - G_jc)    for j < i, else 0
    R    = b (V - e^G K S)
    X    = M^-1 R
    O    = scale (e^G Q S + P X)
    S'   = e^{G_C} S + (e^{G_C - G} K)^T X

Tensors are `[..., C, K]` (q, k), `[..., C, V]` (v, R, X, O), `[..., C]` (beta), `[..., C, 1 or K]` (w, G),
`[..., C, C]` (P, L) and `[..., K, V]` (S), with any axes in front.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MIN_LOG_DECAY = -1000.0  # its exponential is 0, and running sums stay finite


class Forward(NamedTuple):
    """The stages of a forward, in their order."""

    P: Tensor
    L: Tensor
    R: Tensor
    X: Tensor
    O: Tensor
    S: Tensor  # after the chunk


class Backward(NamedTuple):
    """The gradient of every stage and input; `dS` is that of the state before the chunk."""

    dX: Tensor
    dR: Tensor
    dP: Tensor
    dL: Tensor
    dv: Tensor
    dbeta: Tensor
    dq: Tensor
    dk: Tensor
    dw: Tensor
    dS: Tensor


@dataclass(frozen=True)
class DeltaChunk:
    """The inputs of one chunk; they are computed with in float64. `w`: log decays, zeros for none."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    w: Tensor
    S: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("q", "k", "v", "beta", "w", "S"):
            object.__setattr__(self, name, getattr(self, name).double())

    @property
    def G(self) -> Tensor:
        return self.w.clamp(min=MIN_LOG_DECAY).cumsum(-2)

    @property
    def between(self) -> Tensor:
        """`exp(G_i - G_j)` for `j <= i`, else 0: `[..., C, C, K]`."""
        exponents = self.G[..., :, None, :] - self.G[..., None, :, :]
        above = torch.ones(exponents.shape[-3:-1], dtype=torch.bool, device=exponents.device).triu(1)[..., None]
        return exponents.masked_fill(above, -torch.inf).exp().expand(*exponents.shape[:-1], self.k.shape[-1])

    def forward(self) -> Forward:
        q, k, G, between, b = self.q, self.k, self.G, self.between, self.beta[..., None]
        P = torch.einsum("...ic,...jc,...ijc->...ij", q, k, between)
        L = torch.einsum("...ic,...jc,...ijc->...ij", k, k, between).tril(-1)
        R = b * (self.v - G.exp() * k @ self.S)
        X = torch.linalg.solve_triangular(_unit_like(L) + b * L, R, upper=False)
        O = self.scale * (G.exp() * q @ self.S + P @ X)
        S = G[..., -1:, :].exp().mT * self.S + ((G[..., -1:, :] - G).exp() * k).mT @ X
        return Forward(P, L, R, X, O, S)

    def backward(self, dO: Tensor, dS_after: Tensor) -> Backward:
        """The gradients for those of `O` and of the state after the chunk.

        M is differentiated through X, so that no derivative of its inverse is needed. The gradient of a log decay adds
        up what passes from before its token to it or later: pairs of tokens, of a token and a state, of both states.
        """
        q, k, G, between, b, S = self.q, self.k, self.G, self.between, self.beta[..., None], self.S
        P, L, _, X, _, _ = self.forward()
        from_start, to_end = G.exp(), (G[..., -1:, :] - G).exp()
        dO, dS_after = self.scale * dO.double(), dS_after.double()

        dX = P.mT @ dO + to_end * k @ dS_after
        dR = torch.linalg.solve_triangular((_unit_like(L) + b * L).mT, dX, upper=True)
        dP, dL = (dO @ X.mT).tril(), -b * (dR @ X.mT).tril(-1)
        dbeta = (dR * (self.v - from_start * k @ S)).sum(-1) - ((dR @ X.mT).tril(-1) * L).sum(-1)
        dS = G[..., -1:, :].exp().mT * dS_after + (from_start * q).mT @ dO - (from_start * k).mT @ (b * dR)

        dq_start, dk_start = from_start * (dO @ S.mT), -from_start * (b * dR @ S.mT)
        dk_end = to_end * (X @ dS_after.mT)
        dq_pairs = torch.einsum("...ij,...jc,...ijc->...ic", dP, k, between)
        dk_rows = torch.einsum("...ij,...jc,...ijc->...ic", dL, k, between)
        dk_columns = torch.einsum("...ij,...ic,...ijc->...jc", dP, q, between)
        dk_columns = dk_columns + torch.einsum("...ij,...ic,...ijc->...jc", dL, k, between)
        dq, dk = dq_start + dq_pairs, dk_start + dk_end + dk_rows + dk_columns

        later = (q * dq + k * (dk_start + dk_rows - dk_columns)).flip(-2).cumsum(-2).flip(-2)
        earlier = (k * dk_end).cumsum(-2) - k * dk_end
        dw = later + earlier + (G[..., -1:, :].exp() * (S * dS_after).sum(-1)[..., None, :])
        dw = dw if self.w.shape[-1] > 1 else dw.sum(-1, keepdim=True)
        return Backward(dX, dR, dP, dL, b * dR, dbeta, dq, dk, dw, dS)


def _unit_like(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
