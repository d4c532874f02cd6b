# Two commands tell the story: `make demo` and `make test`. Each sets up what it needs, once.

PYTHON ?= python3
# Another Triton than the pinned one, in an environment of its own: make test TRITON=3.9.0
TRITON ?=
VENV := .venv$(if $(TRITON),-triton-$(TRITON))
RUN := $(VENV)/bin/python
# Further arguments: make demo ARGS="--model retnet", make test-gpu ARGS="-k gla", make bench ARGS="--op gla"
ARGS ?=

INSTALL = $(PYTHON) tools/install.py --venv $(VENV) $(if $(TRITON),--triton $(TRITON))
REQUIREMENTS := pyproject.toml constraints.txt tools/install.py
PYTHON_FILES := fla tests benchmarks examples tools
# Two processes of one thread each: what two cores can do
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# What Triton does anyway; 3.9 warns where it is not said
export TRITON_DEFAULT_FP_FUSION := 1

# A folder into which the peer was installed: make records PEER=.peer/site
PEER ?=
PEER_CACHE := benchmarks/peer/h200-flash-linear-attention-0.6.0.tgz

.PHONY: help demo test check test-gpu sanitize bench records clean

help:
	@echo 'make demo      install, train a small language model on real text, save it, reload it, let it write'
	@echo 'make test      the whole CPU suite'
	@echo 'make check     format, lint, types, spelling'
	@echo 'make test-gpu  the GPU suite, in the current Python'
	@echo 'make sanitize  races and stray accesses of the kernels, with compute-sanitizer'
	@echo 'make bench     time the ops'
	@echo 'make records   time the ops for docs/benchmarks.md, on a quiet machine with a GPU, in the current Python'

$(VENV)/.installed-demo: $(REQUIREMENTS)
	@$(INSTALL) demo
	@touch $@

$(VENV)/.installed: $(REQUIREMENTS)
	@$(INSTALL) test,check,bench
	@touch $(VENV)/.installed-demo $@

demo: $(VENV)/.installed-demo
	$(RUN) examples/train_and_generate.py $(ARGS)

# Triton decides at import whether it compiles or interprets, so each has a process of its own.
test: $(VENV)/.installed
	env -u TRITON_INTERPRET $(PYTEST) -m 'not gpu' --ignore=tests/triton_interpreter tests
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_interpreter

check: $(VENV)/.installed
	$(RUN) -m ruff format --check $(PYTHON_FILES)
	$(RUN) -m ruff check $(PYTHON_FILES)
	$(RUN) -m mypy
	$(RUN) -m codespell_lib $(PYTHON_FILES) docs .ci Makefile $(wildcard *.md)

test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests $(ARGS)

# The first run compiles: the checkers would slow that down
sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING = 1
sanitize: export PYTHONPATH = .
sanitize:
	$(PYTHON) -m tests.gpu.sanitize
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m tests.gpu.sanitize
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m tests.gpu.sanitize

bench: $(VENV)/.installed
	$(RUN) -m benchmarks.ops $(ARGS)

# Nothing else may run there: rows of small shapes are the host's time
records: export PYTHONPATH = .
records:
	$(PYTHON) -m benchmarks.host
	$(PYTHON) -m benchmarks.decode
	$(PYTHON) -m benchmarks.ops --shapes targets $(if $(PEER),--peer $(PEER) --peer-cache $(PEER_CACHE)) $(ARGS)
	$(PYTHON) -m benchmarks.ops --shapes seed --op retention --baselines --no-first-call
	$(PYTHON) -m benchmarks.packed
	$(PYTHON) -m benchmarks.ops --report

clean:
	rm -rf .venv .venv-triton-* runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
