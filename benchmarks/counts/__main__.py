"""`python -m benchmarks.counts`: the table of `benchmarks.counts.kernels`."""

import sys

from benchmarks.counts.kernels import main

if __name__ == "__main__":
    sys.exit(main())
