# Every target makes the environment it needs under .venv/ and reuses it afterwards.
#
# Variables: PYTHON, PYTHON_OLDEST, PYTHON_NEWEST (interpreters; found when not set),
# DOCS_ENV (the environment that builds the documentation: this or .venv/newest),
# WORKERS (parallel test processes), ARGS (more arguments for pytest, the demo or the
# benchmark, as in `make test ARGS="-k vsam"`), DATA (Fashion-MNIST for `make bench`),
# CACHE (compiled programs, kept between runs; may be deleted at any time).

WORKERS ?= 2
ARGS ?=
DATA ?=
JAX_PLATFORMS ?= cpu
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/optax_sam
PYTHON ?=
PYTHON_OLDEST ?=
PYTHON_NEWEST ?=
DOCS_ENV ?= .venv/main

SETUP := pyproject.toml $(wildcard requirements/*)
FIND_PYTHON := sh requirements/find_python.sh
MAKE_ENV := sh requirements/make_env.sh
UPGRADE := --upgrade --upgrade-strategy eager
# Compiling dominates, on one core each, so processes pay; `worksteal` keeps
# neighbouring tests, which share compiled functions, in one process.
# What was compiled once is read from the cache, of which half of the time is saved. It
# lies outside the checkout, so that a new clone finds it.
CACHED := JAX_COMPILATION_CACHE_DIR=$(CACHE)/programs \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
PYTEST = JAX_PLATFORMS=$(JAX_PLATFORMS) $(CACHED) $(1)/bin/python -m pytest -q \
	-n $(WORKERS) --dist worksteal

.PHONY: help demo test test-all sweep faults test-oldest test-newest test-pods test-dist dist lint \
	format docs tables conformance accuracy bench bench-gpu bench-pods clean
.DEFAULT_GOAL := help
# Two environments at a time would only fight for the same cores and network.
.NOTPARALLEL:

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: .venv/main/.stamp  ## See SAM resist label noise on a small real data set
	@.venv/main/bin/python examples/digits_label_noise.py $(ARGS)

test: .venv/main/.stamp  ## Run the quick tests and doctests
	$(call PYTEST,.venv/main) -m "not slow" $(ARGS)

# Hours on two cores. It says so in tests/full_tier.md, to be committed, when all passed.
test-all: test-oldest test-newest test-pods sweep  ## Run all tests there are, on all versions
	@sh requirements/full_tier.sh > tests/full_tier.md && cat tests/full_tier.md

test-oldest: .venv/oldest/.stamp  ## Run all tests on the oldest supported versions
	@.venv/oldest/bin/python requirements/show.py oldest
	$(call PYTEST,.venv/oldest) -m "not sweep" $(ARGS)

test-newest:  ## Run all tests on the newest versions and Python
	@if python=$${PYTHON_NEWEST:-$$($(FIND_PYTHON) 3.13 3.12)}; then \
		$(MAKE) --no-print-directory test-newest-on PYTHON_NEWEST="$$python"; \
	else \
		echo "SKIPPED: no working Python 3.13 or 3.12 was found, so the newest"; \
		echo "SKIPPED: versions were NOT tested. Set PYTHON_NEWEST=/path/to/python."; \
	fi

.PHONY: test-newest-on
test-newest-on: .venv/newest/.stamp
	@.venv/newest/bin/python requirements/show.py newest
	$(call PYTEST,.venv/newest) -m "not sweep" $(ARGS)

# The TPU_ variables keep libtpu from asking the cloud which TPU it runs on; with no TPU
# that it could fight for, several processes may load it. Level O0 compiles five times
# faster; operations and what is sent between chips are the same. What was compiled for
# an abstract TPU cannot be read from a cache.
ON_PODS := TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost \
	ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_OPTIMIZATION_LEVEL=O0 \
	JAX_ENABLE_COMPILATION_CACHE=false

sweep: .venv/main/.stamp  ## Run 2,000 random programs, plain and dispatched
	$(call PYTEST,.venv/main) tests/engine/test_sweep.py $(ARGS)

faults: .venv/main/.stamp  ## Plant wrong lines in the package: do the quick tests see them?
	$(CACHED) .venv/main/bin/python tests/faults.py $(ARGS)

test-pods: .venv/tpu/.stamp  ## Compile training steps for TPU pods (no TPU needed)
	@.venv/tpu/bin/python requirements/show.py tpu
	$(ON_PODS) $(call PYTEST,.venv/tpu) tests/devices/test_pods.py $(ARGS)

# The sdist, and the wheel from it.
dist: .venv/build/.stamp  ## Build the wheel and the sdist in dist/
	@rm -rf dist
	@log=$$(.venv/build/bin/python -m build --no-isolation 2>&1) || \
		{ echo "$$log"; exit 1; }
	@.venv/build/bin/python -m twine check --strict dist/* > /dev/null
	@ls -1 dist/*

test-dist: dist  ## Install the wheel alone in a new environment and use it there
	@.venv/build/bin/python requirements/check_dist.py dist

lint: .venv/lint/.stamp  ## Check style, formatting and types
	.venv/lint/bin/ruff check
	.venv/lint/bin/ruff format --check
	.venv/lint/bin/mypy

format: .venv/lint/.stamp  ## Apply the formatting that lint checks
	.venv/lint/bin/ruff check --fix
	.venv/lint/bin/ruff format

# -E: all pages are read again, since some show rows of others.
docs: $(DOCS_ENV)/.stamp  ## Build the documentation in docs/_build
	JAX_PLATFORMS=$(JAX_PLATFORMS) $(DOCS_ENV)/bin/python -m sphinx -E -W --keep-going \
		-q -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

tables: .venv/main/.stamp  ## Write the tables of the pages from the committed results
	@JAX_PLATFORMS=$(JAX_PLATFORMS) .venv/main/bin/python benchmarks/pages.py

# Each comparison adds a line to the file; the largest deviations are kept.
conformance: .venv/main/.stamp  ## Record how far methods are from papers' and authors' code
	@mkdir -p out && rm -f out/conformance.jsonl
	CONFORMANCE=out/conformance.jsonl $(call PYTEST,.venv/main) tests/methods \
		-k "recorded or reference or authors" $(ARGS)
	@.venv/main/bin/python tests/lib/conformance.py out/conformance.jsonl
	@$(MAKE) --no-print-directory tables

# glibc then keeps the memory of XLA's programs: see benchmarks/README.md.
STEADY := MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000

# The settings are those that the committed searches chose.
accuracy: .venv/main/.stamp  ## Train the runs of the figure of results again (DATA: Fashion-MNIST)
	@JAX_PLATFORMS=$(JAX_PLATFORMS) .venv/main/bin/python benchmarks/quality/protocol.py \
		--repeat --task digits $(if $(DATA),fashion_mlp fashion_cnn --data $(DATA)) \
		--rows SGD "SGD 2x" SAM SAM-5 vSAM "vSAM .33 to .4" MSAM "quarter-batch SAM" \
		--out out/accuracy.jsonl --figure out/accuracy.png $(ARGS)

bench: .venv/main/.stamp  ## Make all results of a CPU again, in out/bench (an hour)
	@$(STEADY) JAX_PLATFORMS=$(JAX_PLATFORMS) .venv/main/bin/python benchmarks/bench.py \
		$(if $(DATA),--data $(DATA)) $(ARGS)

# In the environment that has JAX for the GPU. After each round the file is written.
bench-gpu:  ## Time steps on a GPU for ten minutes (PYTHON has JAX with CUDA)
	@$(or $(PYTHON),.venv/main/bin/python) benchmarks/steps/step_cost.py --workers 16 \
		--models ResNet-18 MLP CNN transformer --compute bfloat16 float32 --minutes 8 \
		--methods "optax.contrib.sam, opaque" sam sam_5 vsam msam "m-sam, 4 shards" \
		random_sam $(ARGS)

bench-pods: .venv/tpu/.stamp  ## Count what large models cost on 8 to 256 chips
	@JAX_PLATFORMS=cpu $(ON_PODS) .venv/tpu/bin/python benchmarks/pods/pods.py $(ARGS)

clean:  ## Remove the environments and all that was built
	rm -rf .venv build dist docs/_build .pytest_cache .mypy_cache .ruff_cache

.venv/main/.stamp: $(SETUP)
	@python=$${PYTHON:-$$($(FIND_PYTHON) default)} && \
	$(MAKE_ENV) .venv/main "$$python" $(UPGRADE) --group test --group docs \
		--editable .

.venv/oldest/.stamp: $(SETUP)
	@python=$${PYTHON_OLDEST:-$$($(FIND_PYTHON) oldest)} && \
	$(MAKE_ENV) .venv/oldest "$$python" --constraint requirements/oldest.txt \
		--group test --editable .

.venv/newest/.stamp: $(SETUP)
	@$(MAKE_ENV) .venv/newest "$(PYTHON_NEWEST)" $(UPGRADE) --group test --group docs \
		--editable .

# The compiler for TPUs, 680 MB. JAX starts it wherever it finds it, so it has an
# environment of its own.
.venv/tpu/.stamp: $(SETUP)
	@python=$${PYTHON_NEWEST:-$$($(FIND_PYTHON) 3.13 3.12 || $(FIND_PYTHON) default)} && \
	$(MAKE_ENV) .venv/tpu "$$python" $(UPGRADE) --group test "jax[tpu]" --editable .

.venv/build/.stamp: $(SETUP)
	@python=$${PYTHON:-$$($(FIND_PYTHON) default)} && \
	$(MAKE_ENV) .venv/build "$$python" --group build

# mypy sees the types of the oldest JAX and Optax: real ones, and ones that stay put.
.venv/lint/.stamp: $(SETUP)
	@python=$${PYTHON:-$$($(FIND_PYTHON) default)} && \
	$(MAKE_ENV) .venv/lint "$$python" --constraint requirements/oldest.txt \
		--group lint jax optax
