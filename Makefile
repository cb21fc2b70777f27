.PHONY: check fix test gpu bench
SHELL := /bin/bash
ENVIRONMENT := . launch/environment.sh && export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

check:  ## style, types, import order and the fast tests
	$(ENVIRONMENT) && ruff check . && ruff format --check . && pyright && (cd / && lint-imports --no-cache --config $(CURDIR)/pyproject.toml) && $$PYTHON -m pytest -m "not slow"

fix:  ## what ruff can repair by itself
	$(ENVIRONMENT) && ruff check --fix . && ruff format .

test:  ## all tests
	bash launch/test.sh

gpu:  ## the tests that need a CUDA device
	bash launch/test.sh -m gpu

bench:  ## the benchmarks
	$(ENVIRONMENT) && for file in benchmarks/*.py; do echo "== $$file" && $$PYTHON $$file || exit 1; done
