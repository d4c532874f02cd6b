"""The family `dplr` in the benchmarks: how the peer computes its ops."""

from benchmarks._peers import Peer, same_names

PEERS = same_names("rwkv7") | {op: Peer("fla.ops.generalized_delta_rule") for op in ("dplr", "iplr")}
