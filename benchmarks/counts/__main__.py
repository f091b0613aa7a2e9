"""`python -m benchmarks.counts`: the table of `benchmarks.counts.kernels`."""

import sys

from benchmarks.counts import kernels

main = kernels.TABLE.main(kernels.__doc__.split("\n\n")[0])

if __name__ == "__main__":
    sys.exit(main())
