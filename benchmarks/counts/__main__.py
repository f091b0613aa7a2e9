"""`python -m benchmarks.counts`: the table of `benchmarks.counts.kernels`."""

import sys

from benchmarks.counts import kernels

if __name__ == "__main__":
    sys.exit(kernels.TABLE.main(kernels.__doc__.split("\n\n")[0]))
