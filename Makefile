# Everything is installed into .venv, again only when constraints.txt or pyproject.toml changed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup setup-qwen3 serve test check format bench clean

help: ## list the commands
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.serve ## install what the server needs
setup-qwen3: $(VENV)/.qwen3 ## add torch and what the engine needs
serve: $(VENV)/$(if $(filter qwen3,$(TTS_BACKEND)),.qwen3,.serve) ## serve on TTS_HOST:TTS_PORT (make serve TTS_PORT=18000)
	@exec $(BIN)/qwen3-tts serve

test: $(VENV)/.test ## run every test
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev ## lint, formatting, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test ## measure the running server against itself and a bare file server
	$(BIN)/python -m tests.bench.server

clean: ## remove what was installed and cached
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

$(VENV)/.serve: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[pico,piper]"
	@touch $@

$(VENV)/.qwen3: $(VENV)/.serve
	$(PIP) -e ".[pico,piper,qwen3]"
	@touch $@

$(VENV)/.test: $(VENV)/.qwen3
	$(PIP) -e ".[pico,piper,qwen3,test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e ".[pico,piper,qwen3,test,dev]"
	@touch $@
