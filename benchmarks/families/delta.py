"""The family `delta` in the benchmarks: how the peer computes its ops. Goals follow with their kernels."""

from benchmarks._peers import same_names

PEERS = same_names("delta_rule", "gated_delta_rule", "kda")
