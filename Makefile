.PHONY: check types fast fix test gpu bench kernels
SHELL := /bin/bash
ENVIRONMENT := . launch/environment.sh && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

check:  ## style, types, import order and the fast tests
	$(ENVIRONMENT) && ruff check . && ruff format --check . && (cd / && lint-imports --no-cache --config $(CURDIR)/pyproject.toml)
	@$(MAKE) --no-print-directory -j 2 types fast

types:  ## Pyright, which uses one core, beside the tests
	$(ENVIRONMENT) && pyright

fast:  ## all tests but those marked slow; asserts are rewritten once and kept, though an environment may keep no bytecode
	$(ENVIRONMENT) && PYTHONDONTWRITEBYTECODE= $$PYTHON -m pytest -n 2 --dist worksteal -m "not slow"

fix:  ## what ruff can repair by itself
	$(ENVIRONMENT) && ruff check --fix . && ruff format .

test:  ## all tests
	bash launch/test.sh

gpu:  ## tests and measures the GPU within nine minutes; the report goes to benchmarks/results/ (docs/gpu.md)
	$(ENVIRONMENT) && install_missing && $$PYTHON -m longreach.launch.gpu_check $(ARGUMENTS)

bench:  ## every op beside its peers; the table goes to benchmarks/results/
	$(ENVIRONMENT) && $$PYTHON benchmarks/ops/kernels.py --write

kernels:  ## compiles every Triton kernel for sm_80, sm_90 and sm_100, without a GPU
	$(ENVIRONMENT) && cd / && $$PYTHON -m longreach.kernels.compilation
