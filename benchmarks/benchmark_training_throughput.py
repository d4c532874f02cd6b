"""`python -m benchmarks.benchmark_training_throughput` runs `benchmarks.training`."""

import sys

from benchmarks.training import main

if __name__ == "__main__":
    sys.exit(main())
