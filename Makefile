# Two commands tell the story: `make demo` and `make test`. Each sets up what it needs, once.

PYTHON ?= python3
# Another Triton than the pinned one, in an environment of its own: make test TRITON=3.9.0
TRITON ?=
# The same of transformers: make test TRANSFORMERS=5.24.0
TRANSFORMERS ?=
VENV := .venv$(if $(TRITON),-triton-$(TRITON))$(if $(TRANSFORMERS),-transformers-$(TRANSFORMERS))
RUN := $(VENV)/bin/python
# Further arguments: make demo ARGS="--model retnet", make test ARGS="-k packed", make bench ARGS="--op gla"
ARGS ?=
# Only what touches these ops, their layers and their models: make test OPS=gla,retention
OPS ?=
# Processes of the test suite; by default one a core, at most 8
JOBS ?=

ASKED := $(filter-out file,$(origin PYTHON))
INSTALL = $(PYTHON) tools/install.py --venv $(VENV) $(if $(TRITON),--triton $(TRITON)) $(if $(TRANSFORMERS),--transformers $(TRANSFORMERS)) $(if $(ASKED),--this-python)
REQUIREMENTS := pyproject.toml constraints.txt tools/install.py
PYTHON_FILES := fla tests benchmarks examples tools
SUITE = tools/suite.py $(if $(OPS),--ops "$(OPS)") $(if $(JOBS),--jobs $(JOBS))

# A PYTHON that is given makes the environment anew if another one made it; one that is not given keeps what is there
ifneq ($(and $(ASKED),$(wildcard $(VENV)/bin/python)),)
ifeq ($(shell $(PYTHON) tools/install.py --venv $(VENV) --made-by),another)
REQUIREMENTS += another-python
endif
endif

# What Triton does anyway; 3.9 warns where it is not said
export TRITON_DEFAULT_FP_FUSION := 1

# A folder into which the peer was installed: make records PEER=.peer/site
PEER ?=
PEER_CACHE := benchmarks/peer/h200-flash-linear-attention-0.6.0.tgz

.PHONY: help demo test test-all check test-gpu sanitize bench records clean another-python

help:
	@echo 'make demo      install, train a small language model on real text, save it, reload it, let it write'
	@echo 'make test      the CPU suite; with OPS=gla what touches that op'
	@echo 'make test-all  the same with every exhaustive test: before a kernel lands'
	@echo 'make check     format, lint, types, spelling'
	@echo 'make test-gpu  the GPU suite, in the current Python'
	@echo 'make sanitize  races and stray accesses of the kernels, with compute-sanitizer'
	@echo 'make bench     time the ops'
	@echo 'make records   time the ops for docs/benchmarks.md, on a quiet machine with a GPU, in the current Python'

another-python:

$(VENV)/.installed-demo: $(REQUIREMENTS)
	@$(INSTALL) demo
	@touch $@

$(VENV)/.installed: $(REQUIREMENTS)
	@$(INSTALL) test,check,bench
	@touch $(VENV)/.installed-demo $@

demo: $(VENV)/.installed-demo
	$(RUN) examples/train_and_generate.py $(ARGS)

test: $(VENV)/.installed
	@$(RUN) $(SUITE) $(ARGS)

test-all: $(VENV)/.installed
	@$(RUN) $(SUITE) --all $(ARGS)

check: $(VENV)/.installed
	$(RUN) -m ruff format --check $(PYTHON_FILES)
	$(RUN) -m ruff check $(PYTHON_FILES)
	$(RUN) -m mypy
	$(RUN) -m codespell_lib $(PYTHON_FILES) docs .ci Makefile $(wildcard *.md)

test-gpu:
	@$(PYTHON) $(SUITE) --gpu $(ARGS)

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
	rm -rf .venv .venv-triton-* .venv-transformers-* runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache
