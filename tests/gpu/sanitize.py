"""Every kernel forward and backward on small shapes, for compute-sanitizer: `make sanitize`.

Values are the suite's business; here only accesses count. The caching allocator must be off
(`PYTORCH_NO_CUDA_MEMORY_CACHING=1`), or an access behind a tensor may lie inside another one.
"""

import sys
import time

import torch

from fla.testing import GPU, plain_cases
from fla.testing.contract import rounded_cotangent, run, whole
from tests.ops.suite import specs

CASES = (
    # two chunks and a rest, ordinary decays and ones that leave the near range; columns beside and inside the tiles
    {"tokens": 130, "sizes": {"H": 2, "K": 64, "V": 64}, "dtype": torch.bfloat16},
    {"tokens": 130, "sizes": {"H": 2, "K": 64, "V": 64}, "dtype": torch.bfloat16, "gates": "mixed"},
    {"tokens": (65, 0, 1, 62), "sizes": {"H": 1, "K": 100, "V": 33}, "dtype": torch.float16},
    # several sequences a chunk
    {"tokens": (40, 1, 0, 89), "sizes": {"H": 2, "K": 64, "V": 64}, "dtype": torch.bfloat16, "state": "none"},
    # segments, and slices of K and V
    {"tokens": 2100, "sizes": {"H": 1, "K": 64, "V": 64}, "dtype": torch.bfloat16, "batch": 1},
    {"tokens": 70, "sizes": {"H": 1, "K": 272, "V": 144}, "dtype": torch.bfloat16, "batch": 1},
    {"tokens": 3, "sizes": {"H": 2, "K": 64, "V": 64}, "dtype": torch.float32},
)


def main() -> int:
    start = time.perf_counter()
    for changes in CASES:
        for spec in specs(GPU):
            gates = changes.get("gates", "ordinary") if spec.gates else "ordinary"
            cases = plain_cases(spec, GPU, **changes | {"gates": gates})
            for case in cases:
                run(whole(case), case.inputs(), cotangents=rounded_cotangent(case))
            torch.cuda.synchronize()
            words = " ".join(str(x) for x in changes.values())
            print(f"{time.perf_counter() - start:5.0f} s  {spec.name}: {len(cases)} cases of {words}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
