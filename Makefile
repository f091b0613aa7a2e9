# Targets for people who work on the code; users need only the README.
PYTHON ?= python
OUT ?= outputs/gpu-suite

.PHONY: test check types

test:  ## everything that runs without a GPU
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2

check: types  ## style, types, and the kernels compiled for five GPUs
	ruff check . && ruff format --check .
	$(PYTHON) -m benchmarks.aot --check

types:
	@mkdir -p build/types && ln -sfn ../../kernels build/types/sgg_kernels
	MYPYPATH=build/types $(PYTHON) -m mypy
