"""`python -m benchmarks.benchmark_generation` runs `benchmarks.generation`."""

import sys

from benchmarks.generation import main

if __name__ == "__main__":
    sys.exit(main())
