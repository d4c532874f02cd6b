"""The family `decay` in the benchmarks: the goals of its ops, and how the peer computes them."""

from benchmarks._goals import Goal, speed
from benchmarks._peers import same_names

SCALAR = ("chunk_linear_attn", "chunk_retention", "chunk_simple_gla")
ALL = (*SCALAR, "chunk_gla")
RECURRENT = tuple(op.replace("chunk", "fused_recurrent") for op in ALL)

PEERS = same_names("linear_attn", "retention", "simple_gla", "gla", "rwkv6")
GOALS: tuple[Goal, ...] = (
    *speed(SCALAR, "B4 T4096 H64 D128", (2.2, 2.6), (2.2, 3), (1.7, 2.5)),
    *speed(SCALAR, "B8 T16384 H32 D128", (2.2, 2.6), (2.2, 3), (1.7, 2.5)),
    *speed(SCALAR, "B2 T16384 H16 D128", (2.0, 2.6), (2.0, 3)),
    *speed(SCALAR, "B4 T2048 H16 D128", (6, 8), (4, 6)),
    *speed(SCALAR, "B8 T1024 H8 D64", (6, None), (4, None)),
    *speed(["chunk_gla"], "B4 T4096 H64 D128", (3.6, 5), (3.2, 4.5), (2.6, 4)),
    *speed(["chunk_gla"], "B2 T16384 H16 D128", (3, 5), (3, 4.5)),
    *speed(["chunk_gla"], "B4 T2048 H16 D128", (5, 8), (4.5, 8)),
    *speed(ALL, "B8 T2048 H32 D256", (1.8, None), (1.8, None)),
    *speed(ALL, "B1 T65536 H16 D128", (1.8, None), (1.8, None)),
    *(
        Goal("softmax", "chunk_retention", f"B8 T{t} H32 D128", "fwdbwd", "softmax_x", 15 if t == 16384 else 1)
        for t in (1024, 2048, 4096, 8192, 16384)
    ),
    *(Goal("memory", op, "B4 T4096 H64 D128", "fwdbwd", "work_x", 0.4) for op in ALL),
    *(Goal("first call", op, "B4 T4096 H64 D128", "fwdbwd", "first_call_s", 8) for op in ALL),
    *(
        Goal("packing", op, "B1 T65536 H16 D128", mode, "packed_x", 1.3)
        for op in ALL
        for mode in ("packed_fwd", "packed_fwdbwd")
    ),
    *(Goal("host", op, "B1 T64 H1 D64", "host_fwd", "us", 30) for op in ALL),
    *(Goal("decode", op, "B64 T1 H32 D128", "decode", "bandwidth", 0.8) for op in RECURRENT),
    *(Goal("decode", op, "B1 T1 H16 D128", "decode_graph", "us", 12) for op in RECURRENT),
)
