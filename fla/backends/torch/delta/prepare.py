"""From raw inputs to those of the recurrence, and back to their gradients: l2 norm, gates made in the op, beta.

With `x` a row of q or k, and `x^ = x r` of the length 1:

    r  = 1 / sqrt(sum x^2 + 1e-6)
    dx = r (dx^ - x^ sum(x^ dx^))

With `z = g + dt_bias` and `e = exp(A_log)`, for a gate without and with a lower bound `l`:

    w = -e softplus(z)     dg = -e sigmoid(z) dw                 dA_log = sum w dw
    w = l sigmoid(e z)     dg = e l sigmoid'(e z) dw             dA_log = sum z dg

and `ddt_bias` is the sum of `dg` over all tokens. Gates and their gradients are float64.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fla.backends._gates import DEAD_LOG_DECAY, MIN_LOG_DECAY
from fla.backends.delta import L2_EPS, Problem


@dataclass
class Inputs:
    """What the recurrence runs on; also the form of their gradients.

    q, k `[B, T, H, K]`, v `[B, T, HV, V]`. The log decays of key channels `[B, T, HV, 1 or K]` and of value channels
    `[B, T, HV, V]` are float64 and may be None, as may beta `[B, T, HV]` or `[B, T, HV, V]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor | None
    values: Tensor | None
    beta: Tensor | None


def prepare(problem: Problem, dtype: torch.dtype) -> Inputs:
    q, k, v = (x.to(dtype) for x in (problem.q, problem.k, problem.v))
    if problem.qk_l2norm:
        q, k = (x * _inverse_length(x) for x in (q, k))
    return Inputs(q, k, v, _keys(problem), _clamped(problem.gv), _beta(problem, dtype))


def _inverse_length(x: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()


def _clamped(gate: Tensor | None) -> Tensor | None:
    return None if gate is None else gate.double().clamp(min=MIN_LOG_DECAY)


def log_decays(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """`g` and `gk`, the one that is made in the op as what it becomes, clamped."""
    g, gk = _clamped(problem.g), _clamped(problem.gk)
    if problem.gate_in_op and g is not None:
        g = _clamped(_gate_made(problem))
    elif problem.gate_in_op:
        gk = _clamped(_gate_made(problem))
    return g, gk


def _keys(problem: Problem) -> Tensor | None:
    g, gk = log_decays(problem)
    if g is None:
        return gk
    return g[..., None] if gk is None else g[..., None] + gk


def _raw_gate(problem: Problem) -> tuple[Tensor, Tensor]:
    """`z = g + dt_bias` and `exp(A_log)`, which multiplies it, in float64."""
    raw = problem.gk if problem.g is None else problem.g
    assert raw is not None
    z = raw.double() if problem.dt_bias is None else raw.double() + problem.dt_bias.double()
    if problem.A_log is None:
        return z, z.new_ones(())
    factor = problem.A_log.double().exp()
    return z, factor if problem.g is not None else factor[:, None]


def _gate_made(problem: Problem) -> Tensor:
    z, factor = _raw_gate(problem)
    if problem.lower_bound is None:
        return -factor * F.softplus(z)
    return problem.lower_bound * (factor * z).sigmoid()


def _beta(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    if problem.beta is None or not problem.beta_sigmoid:
        return None if problem.beta is None else problem.beta.to(dtype)
    return problem.beta.to(dtype).sigmoid() * (2.0 if problem.neg_eigval else 1.0)


def raw_gradients(problem: Problem, inputs: Inputs, found: Inputs, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The gradients of the problem's fields from `found`, those of `inputs` (their `beta` and decays may be None)."""
    dq, dk, dbeta = found.q, found.k, found.beta
    if problem.qk_l2norm:
        dq, dk = (
            _inverse_length(raw.to(dtype)) * (d - x * (x * d).sum(-1, keepdim=True))
            for raw, x, d in ((problem.q, inputs.q, dq), (problem.k, inputs.k, dk))
        )
    if dbeta is not None and problem.beta_sigmoid and inputs.beta is not None:
        dbeta = dbeta * inputs.beta * (1.0 - inputs.beta / (2.0 if problem.neg_eigval else 1.0))
    result = {"q": dq, "k": dk, "v": found.v, "beta": dbeta}
    if found.values is not None:
        result["gv"] = _alive(problem, problem.gv, found.values)
    if found.keys is not None:
        result |= _gate_gradients(problem, found.keys)
    return result


def _alive(problem: Problem, gate: Tensor | None, gradient: Tensor) -> Tensor:
    """The gradient of a log decay, 0 where it is so strong that only rounding noise is left."""
    if gate is None or problem.q.dtype == torch.float64:
        return gradient
    return gradient.masked_fill(gate < DEAD_LOG_DECAY, 0.0)


def _gate_gradients(problem: Problem, keys: Tensor) -> dict[str, Tensor | None]:
    """Of `g`, `gk`, `A_log` and `dt_bias`, from that of the decays of key channels."""
    g, gk = log_decays(problem)
    result: dict[str, Tensor | None] = {}
    if g is not None:
        result["g"] = _alive(problem, g, keys.sum(-1))
    if gk is not None:
        result["gk"] = _alive(problem, gk, keys)
    if not problem.gate_in_op:
        return result
    name, made = ("g", g) if g is not None else ("gk", gk)
    d_made = result[name]
    assert made is not None and d_made is not None
    z, factor = _raw_gate(problem)
    if problem.lower_bound is None:
        raw = d_made * -factor * torch.where(z > 20.0, 1.0, z.sigmoid())  # softplus is linear above 20
        of_factor = made * d_made
    else:
        share = (factor * z).sigmoid()
        inner = d_made * problem.lower_bound * share * (1.0 - share)
        raw, of_factor = inner * factor, torch.where(inner == 0.0, 0.0, inner * factor * z)
    result[name] = raw
    if problem.A_log is not None:
        result["A_log"] = of_factor.sum([axis for axis in range(of_factor.dim()) if axis != 2])
    if problem.dt_bias is not None:
        result["dt_bias"] = raw.sum((0, 1))
    return result
