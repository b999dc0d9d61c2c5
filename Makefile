# Everything is installed into .venv, again only when constraints.txt or pyproject.toml changed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The extras that every server has: the embedded voice, and what the cache can do.
BASE := pico,piper,encryption,lz4

# Qwen3-TTS is installed where it is asked for (here, in the environment or in .env), or where it will be chosen: with a GPU.
ASKED := $(or $(TTS_BACKEND),$(shell sed -n 's/^TTS_BACKEND=//p' .env 2>/dev/null | tail -n 1),auto)
GPU   := $(if $(filter auto,$(ASKED)),$(shell nvidia-smi -L 2>/dev/null | head -n 1))
SERVE := $(if $(or $(findstring qwen3,$(ASKED)),$(GPU)),.qwen3,.serve)

# So is PostgreSQL's driver, where the ledger is to be in one.
LEDGER := $(or $(TTS_LEDGER_URL),$(shell sed -n 's/^TTS_LEDGER_URL=//p' .env 2>/dev/null | tail -n 1))
SERVE  += $(if $(filter postgresql%,$(LEDGER)),.postgres)

# And Redis's client, where there is one to be used.
REDIS := $(or $(TTS_REDIS_URL),$(shell sed -n 's/^TTS_REDIS_URL=//p' .env 2>/dev/null | tail -n 1))
SERVE += $(if $(REDIS),.redis)

# And OpenTelemetry, where traces are asked for.
TRACES := $(or $(TTS_TRACES),$(shell sed -n 's/^TTS_TRACES=//p' .env 2>/dev/null | tail -n 1))
SERVE  += $(if $(filter true True TRUE 1 yes on,$(TRACES)),.traces)

.DEFAULT_GOAL := help
.PHONY: help setup setup-qwen3 serve test test-all check format bench bench-server bench-engine bench-cpu bench-limits bench-ledger bench-simulate faults judge clean

help: ## list the commands
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.serve ## install what the server needs
setup-qwen3: $(VENV)/.qwen3 ## add torch and what the engine needs
serve: $(addprefix $(VENV)/,$(SERVE)) ## serve on TTS_HOST:TTS_PORT (make serve TTS_PORT=18000)
	@exec $(BIN)/qwen3-tts serve

test: $(VENV)/.test ## run the tests that do not take long; the PostgreSQL and Redis that they start are installed too
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/.test ## run every test, as CI does
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

bench-server: $(VENV)/.test ## measure speech over HTTP under load (make bench-server ARGS="--model FOLDER")
	$(BIN)/python -m tests.bench.tts_load $(ARGS)

bench-engine: $(VENV)/.test ## measure the engine alone, on the GPU if there is one (ARGS="--size 1.7b --costs FILE")
	$(BIN)/python -m tests.bench.engine $(ARGS)

bench-cpu: $(VENV)/.test .venv-official/.installed ## measure the engine on the CPU beside the official package
	$(BIN)/python -m tests.bench.cpu --official .venv-official/bin/python $(ARGS)

bench-limits: $(VENV)/.test ## measure what limits cost a cache hit, in memory and in Redis
	$(BIN)/python -m tests.bench.limits $(ARGS)

bench-ledger: $(VENV)/.test ## measure what the ledger costs a cache hit, by where it is kept
	$(BIN)/python -m tests.bench.ledger_load $(ARGS)

bench-simulate: $(VENV)/.test ## simulate the scheduler under load, with estimated or measured (--costs FILE) step costs
	$(BIN)/python -m tests.bench.simulate $(ARGS)

faults: $(VENV)/.test ## kill servers, Redis and PostgreSQL with -9 under load, then read the books (ARGS="--kills 500")
	$(BIN)/python -m tests.faults.run $(ARGS)

judge: $(VENV)/.test ## let a recogniser and DNSMOS judge forms of the weights (ARGS="--model FOLDER --weights fp32,int8")
	$(BIN)/python -m tests.bench.judge $(ARGS)

clean: ## remove what was installed and cached
	rm -rf $(VENV) .venv-official .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info

$(VENV)/.serve: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[$(BASE)]"
	@touch $@

$(VENV)/.qwen3: $(VENV)/.serve
	$(PIP) -e ".[$(BASE),qwen3]"
	@touch $@

$(VENV)/.postgres: $(VENV)/.serve
	$(PIP) -e ".[$(BASE),postgres]"
	@touch $@

$(VENV)/.redis: $(VENV)/.serve
	$(PIP) -e ".[$(BASE),redis]"
	@touch $@

$(VENV)/.traces: $(VENV)/.serve
	$(PIP) -e ".[$(BASE),traces]"
	@touch $@

$(VENV)/.test: $(VENV)/.qwen3
	$(PIP) -e ".[$(BASE),qwen3,postgres,redis,traces,test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e ".[$(BASE),qwen3,postgres,redis,traces,test,dev]"
	@touch $@

# qwen-tts pins its dependencies, so it has an environment of its own; torch comes first, as the engine has it
.venv-official/.installed:
	$(PYTHON) -m venv .venv-official
	.venv-official/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-official/bin/python -m pip install --quiet --disable-pip-version-check qwen-tts==0.1.1
	@touch $@
