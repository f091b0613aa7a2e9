# Targets for people who work on the code; users need only the README.
PYTHON ?= python
OUT ?= outputs/gpu-suite

PTX_ARCH ?= sm_89

.PHONY: test ptx check types wheel bench gpu-suite gpu-suite-dry first-contact

test:  ## everything that runs without a GPU
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2

ptx:  ## every compiled kernel of five GPUs run on the CPU, then the kernel tests on compiled code
	$(PYTHON) -m benchmarks.aot.run
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --ptx --ptx-arch $(PTX_ARCH) tests/kernels tests/ops

check: types  ## style, types, and the kernels compiled for five GPUs
	ruff check . && ruff format --check .
	$(PYTHON) -m benchmarks.aot --check

types:
	$(PYTHON) -m mypy

wheel:  ## the package built, installed beside the checkout, and its commands run
	.ci/wheel

bench:  ## kernel microbenchmarks of this machine
	$(PYTHON) -m benchmarks.run --out $(OUT)

gpu-suite:  ## everything that needs a GPU, within nine minutes: make gpu-suite OUT=DIR
	$(PYTHON) -m benchmarks.gpu_suite --out $(OUT)

gpu-suite-dry:  ## the same script on a CPU at tiny sizes; nothing is timed on an interpreter
	$(PYTHON) -m benchmarks.gpu_suite --out $(OUT) --dry

first-contact:  ## every command on CUDA's rules without a GPU: make first-contact ROWS="pretrain infer"
	bash tests/fake_cuda/first_contact.sh $(if $(ROWS),--rows $(ROWS))
