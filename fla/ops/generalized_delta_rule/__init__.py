"""The generalised delta rule: linear attention whose state has a transition of low rank beside an identity (`iplr`) or
a diagonal of decays (`dplr`)."""

from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule, fused_recurrent_dplr_delta_rule
from fla.ops.generalized_delta_rule.iplr import chunk_iplr_delta_rule, fused_recurrent_iplr_delta_rule

__all__ = [
    "chunk_dplr_delta_rule",
    "chunk_iplr_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_iplr_delta_rule",
]
