# Everything runs in .venv in the checkout, which the first target that needs it creates.
.DEFAULT_GOAL := help
SHELL := /bin/bash

# The first Python from 3.11 to 3.13 that really runs: a version manager's shim may exist and fail.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	>/dev/null 2>&1 && echo $$python && break; done)
TORCH := $(shell grep '^torch==' constraints.txt)

BIN := .venv/bin
STAMP := .venv/.installed
TINY := evals/models/tiny-coder-moe
KILLS ?= 20
PYTEST_ARGS ?=

.PHONY: help install demo quality test slow lint docs package package-all kernels kernels-nightly gpu-check interop kill-resume kill-sweep foreign-files target-sizes scale compensation-speed several-targets gate-sensitivity families engines sanitize many-threads digests fuzz clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch alone and first: resolved together with the rest it may come with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11, 3.12 or 3.13 with venv found; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(STAMP)  ## make .venv and install qconv there, with what its evals and tests need

demo: $(STAMP)  ## quantize the bundled model, verify a build, measure five builds against bf16, make the report
	rm -rf build/demo
	$(BIN)/qconv quantize $(TINY) --fmt awq -o build/demo/awq
	$(BIN)/qconv verify build/demo/awq --against $(TINY)
	$(BIN)/qconv nightly evals/demo.yaml

quality: $(STAMP)  ## KL divergence of every method and format beside rounding on the same grid
	$(BIN)/python evals/quality.py

test: lint  ## lint, then every test that needs nothing but .venv
	$(BIN)/python -m pytest -n 2 -m 'not interop and not slow and not kernels and not package' $(PYTEST_ARGS)

slow: $(STAMP)  ## the tests that take minutes: every build type's logits, streaming's memory, the sensitivity of gates
	$(BIN)/python -m pytest -n 2 -m 'slow and not interop and not kernels' $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)  ## build the documentation into build/docs, warnings being errors, and type the tutorial
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env --builder html docs build/docs
	$(BIN)/python -m pytest tests/docs $(PYTEST_ARGS)

package: $(STAMP)  ## build wheel and sdist, install them elsewhere, quantize and measure from outside the checkout
	$(BIN)/python -m pytest -m package tests/packaging $(PYTEST_ARGS)

package-all: $(STAMP)  ## the same with every Python from 3.11 to 3.13 that this machine has
	QCONV_PACKAGE_PYTHONS=all $(BIN)/python -m pytest -m package tests/packaging $(PYTEST_ARGS)

kernels: $(STAMP)  ## prove the CUDA kernels on the CPU (needs g++ and nvcc)
	$(BIN)/python -m pytest -n 2 -m 'kernels and not slow' $(PYTEST_ARGS) tests/kernels tests/gpu

kernels-nightly: $(STAMP)  ## the same with the larger sweeps
	$(BIN)/python -m pytest -n 2 -m kernels $(PYTEST_ARGS) tests/kernels tests/gpu

gpu-check: $(STAMP)  ## the CUDA kernels on this machine's GPU: correctness, timings, a result file
	$(BIN)/python -m pytest -m gpu -p no:randomly -s $(PYTEST_ARGS) tests/gpu

interop: $(STAMP)  ## other people's readers and loaders on our builds, each in its own environment
	$(BIN)/python tests/interop/environments.py
	$(BIN)/python -m pytest -n 2 --dist loadfile -m interop $(PYTEST_ARGS)

kill-resume: $(STAMP)  ## kill a run at KILLS random moments (default 20); resumed, it must end byte-identical
	$(BIN)/python evals/kill_resume.py --kills $(KILLS)
	$(BIN)/python evals/kill_resume.py --kills $(KILLS) --fmt gguf:Q4_K_M --max-shard-size 0.002

kill-sweep: $(STAMP)  ## kill every writing command 300 times in all, at random times and before the n-th change to the disk
	$(BIN)/python -m evals.kill_sweep --kills 300

foreign-files: $(STAMP)  ## put somebody's files of every kind where qconv writes and removes; none may be changed
	$(BIN)/python evals/foreign_files.py

scale: $(STAMP)  ## speed and peak memory on layers of the 480B model's true shapes
	$(BIN)/python evals/scale.py

compensation-speed: $(STAMP)  ## what one true expert costs by GPTQ on Q4_K and other grids beside int4
	$(BIN)/python evals/compensation_speed.py --way Q4_K --way "Q4_K + sweep" --way "Q4_K + refit" --way IQ3_S --way NVFP4

several-targets: $(STAMP)  ## what two formats of one calibration cost beside one
	$(BIN)/python -m evals.several_targets

target-sizes: $(STAMP)  ## the best GGUF file of a size by four ways to choose types, on three models, and what was predicted
	test -d build/tiny-coder-dense || $(BIN)/python -m evals.dense_model build/tiny-coder-dense
	$(BIN)/python -m evals.target_sizes
	$(BIN)/python -m evals.target_sizes --model build/tiny-coder-dense
	$(BIN)/python -m evals.target_sizes --outliers
	$(BIN)/python -m evals.predicted_divergence

gate-sensitivity: $(STAMP)  ## damage a build three ways: gates must see and blame must name each, and nothing in 20 runs of sound builds
	$(BIN)/python evals/gate_sensitivity.py

families: $(STAMP)  ## model types of transformers through the whole of qconv: builds, logits, folds
	$(BIN)/python -m evals.families

engines: $(STAMP)  ## a real vLLM on the CPU: perplexity of every format's build beside our own runtime's
	$(BIN)/python -m evals.engines

sanitize: $(STAMP)  ## the C++ and its callers under the sanitizers of addresses, undefined behaviour and threads
	$(BIN)/python evals/sanitize.py

fuzz: $(STAMP)  ## 150 mutants of the input of every parser: no traceback, no hang, no crash, bounded memory
	$(BIN)/python -m evals.fuzz

many-threads: $(STAMP)  ## 50 runs of every format with 8 threads: no crash, one set of bytes
	$(BIN)/python evals/many_threads.py

digests: $(STAMP)  ## hash every kind of build into build/digests.json; COMPARE=FILE of before names every file with other bytes
	mkdir -p build
	$(BIN)/python -m evals.build_digests -o build/digests.json $(if $(COMPARE),--compare $(COMPARE))

clean:  ## remove build/, dist/ and caches; environments stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find qconv tests evals -name __pycache__ -type d -prune -exec rm -rf {} +
