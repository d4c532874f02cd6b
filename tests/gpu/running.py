"""Cases run forward and backward on a GPU."""

import torch
from torch import Tensor

from fla.testing.cases import GPU, plain_cases
from fla.testing.contract import Case, whole
from tests.ops.suite import every_op


def chunk_cases(**changes) -> list[Case]:
    """The chunk form of every op, called by default."""
    cases = every_op(lambda spec: plain_cases(spec, GPU, **changes), GPU)
    first = {(case.spec.name, case.form): case for case in reversed(cases) if "chunk" in case.form}
    return list(reversed(first.values()))


def evaluate(case: Case, leaves: dict[str, Tensor], incoming: list[Tensor] | None = None) -> list[Tensor]:
    """Output, final states and the gradients of all inputs; `incoming` by default noise."""
    output, state = whole(case)(leaves)
    results = [output, *state]
    incoming = [torch.randn_like(x) for x in results] if incoming is None else incoming
    return [*results, *torch.autograd.grad(results, list(leaves.values()), incoming)]


def leaves_of(case: Case) -> dict[str, Tensor]:
    return {name: x.requires_grad_() for name, x in case.inputs().items()}


def noise_for(case: Case, leaves: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output, state = whole(case)(leaves)
    return [torch.randn_like(x) for x in (output, *state)]
