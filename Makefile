# Rayograph: what a newcomer types.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DATA   ?=
NAME   ?= demo
STORAGE ?= runs

.PHONY: help setup demo test test-slow lint docs bench bench-gpu roofline traffic rehearse clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/ready ## Make .venv and install

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]' --constraint constraints.txt
	touch $@

demo: setup ## The whole path on the phantom, or on a folder of X-rays: make demo DATA=PATH
ifeq ($(DATA),)
	$(BIN)/rayograph run profile=demo storage=$(STORAGE) name=$(NAME)
else
	$(BIN)/rayograph run profile=demo storage=$(STORAGE) data=folder "data.root='$(DATA)'" \
	  name=$(NAME)-$$(basename "$(DATA)" | tr -cs 'A-Za-z0-9._\n-' _)
endif

test: setup ## All tests but the slow ones
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## Both demos with their goals, two workers under every ZeRO stage, nodes that leave and come: an hour
	$(BIN)/python -m pytest -m slow

lint: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup ## docs/settings.md, from the settings' own sentences
	$(BIN)/python -m pipelines.graph.help > docs/settings.md

bench: setup ## Speed against named baselines: one JSON line a figure
	$(BIN)/python -m tests.bench

bench-gpu: setup ## Training throughput of large denoisers on one GPU, as a table
	$(BIN)/python tests/bench/gpu.py

roofline: setup ## Predicted MFU of large denoisers on an H100, from counted calls, FLOPs and bytes
	$(BIN)/python tests/bench/roofline.py

traffic: setup ## What a training asks of its storage at 8 to 512 GPUs, simulated
	$(BIN)/python tests/bench/traffic.py

rehearse: setup ## The list of 868,000 images; every stage at 20,000 and 100,000 films: seconds, memory (two hours, 30 GB)
	$(BIN)/python tests/bench/whole_set.py
	$(BIN)/python tests/bench/rehearse.py

clean: ## Remove .venv and caches; results in runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
