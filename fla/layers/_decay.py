"""`LearnedDecay`: a learned rate and a learned step size, of which token mixers compute their decay.

    g_t = -exp(A_log) softplus(a_t + dt_bias)          a_t: a projection of the token

At first the rates `exp(A_log)` are uniform in a range and the step sizes `softplus(dt_bias)` log-uniform in
[0.001, 0.1]. Paper: https://arxiv.org/abs/2405.21060
"""

import math

import torch
from torch import Tensor, nn

from fla.layers._initial import is_loaded

# The logarithm of a rate that is exactly 0 would be -inf.
LOWEST_RATE = 1e-4
LOWEST_STEP, STEPS = 1e-4, (0.001, 0.1)


class LearnedDecay(nn.Module):
    """Base, beside `TokenMixer`, of mixers whose decay has the parameters `A_log` and `dt_bias`.

    Both are float32 in a model of any dtype, since rounding a rate changes how far a state reaches. Their attribute
    `_no_weight_decay` tells trainers that weight decay should leave them alone.
    """

    A_log: nn.Parameter
    dt_bias: nn.Parameter

    def add_decay(self, num_rates: int, num_steps: int, rates: tuple[float, float]) -> None:
        """Add `A_log` [num_rates] and `dt_bias` [num_steps]; `rates` is the range of the first rates."""
        self._rates = rates
        self.A_log = nn.Parameter(torch.empty(num_rates, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_steps, dtype=torch.float32))
        self.reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, also one that a loader puts in another's place; mark those of the decay."""
        if name in ("A_log", "dt_bias") and param is not None:
            param._no_weight_decay = True  # type: ignore[attr-defined]
        super().register_parameter(name, param)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both parameters. What transformers loaded from a checkpoint, and has marked so, stays as it is."""
        for parameter, draw in ((self.A_log, self._log_rates), (self.dt_bias, _step_biases)):
            if not is_loaded(parameter):
                # in float32 whatever the dtype of the parameter: rounded, a small rate may be 0 and its logarithm -inf
                uniform = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device).uniform_()
                parameter.copy_(draw(uniform))

    def _log_rates(self, uniform: Tensor) -> Tensor:
        low, high = self._rates
        return (low + (high - low) * uniform).clamp(min=LOWEST_RATE).log()


def _step_biases(uniform: Tensor) -> Tensor:
    """The inverse of softplus at step sizes that are log-uniform in `STEPS`."""
    low, high = (math.log(step) for step in STEPS)
    steps = (low + (high - low) * uniform).exp().clamp(min=LOWEST_STEP)
    return steps + (-torch.expm1(-steps)).log()
