"""The decayed scores that families of chunks share (`fla.backends.torch._scores`), held to their formula."""

import pytest
import torch

from fla.backends.torch._scores import pair_decay


def formula(x, y, rows, columns, diagonal):
    """`P_ij = sum_c x_ic y_jc exp(R_ic - G_jc)` under the mask, from one exponential for every pair and channel."""
    mask = torch.ones(x.shape[-2], x.shape[-2]).tril(diagonal).bool()
    exponents = (rows[..., :, None, :] - columns[..., None, :, :]).masked_fill(~mask[..., None], 0.0)
    return (x[..., :, None, :] * y[..., None, :, :] * exponents.exp()).sum(-1) * mask


@pytest.mark.parametrize("strength", [0.1, 30.0], ids=["weak", "far"])
@pytest.mark.parametrize("channels", [0, 1, 5])
@pytest.mark.parametrize("kind", ["inclusive", "strict", "before"])
def test_scores_and_their_gradients_follow_the_formula(kind, channels, strength):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 1, 9, 5, dtype=torch.float64, requires_grad=True)  # shared by three value heads
    y = torch.randn(2, 2, 3, 9, 5, dtype=torch.float64, requires_grad=True)
    gates = -strength * torch.rand(2, 2, 3, 9, max(channels, 1), dtype=torch.float64)
    gates[0] = gates[0] / 100  # some chunks are not far
    G = gates.cumsum(-2) if channels else torch.zeros_like(gates)
    rows = G - gates if kind == "before" else G
    diagonal = 0 if kind == "inclusive" else -1

    decay = pair_decay(G if channels else None, x.dtype, rows if kind == "before" and channels else None)
    scores = decay.between(x.detach(), y.detach(), strict=diagonal < 0)
    expected = formula(x, y, rows if channels else G, G, diagonal)
    values = scores.values()
    torch.testing.assert_close(values.expand_as(expected), expected.detach(), rtol=1e-12, atol=1e-12)

    d_scores = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, (x, y), d_scores)
    gradients = scores.gradients(d_scores)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)
