# The two commands that matter: `make up` and `make test`. Both set up what they need on a fresh Debian 12 as root.

STACK_DIR ?= .stack
HOST ?= $(shell hostname)
PYTHON = .venv/bin/python
BENCH ?=

.PHONY: help up down status test unit lint faults check bench asyncapi matrix setup pins clean

help:
	@echo "make up      broker, hypervisor and agent; boot a guest and follow it"
	@echo "make down    end all that and leave nothing but the cached guest image"
	@echo "make status  what runs"
	@echo "make test    every test, on real servers"
	@echo "make check   lint, types, layers"
	@echo "make bench   figures for docs/performance.md"

setup:
	@bash devstack/bootstrap.sh all

up: setup
	@$(PYTHON) -m devstack.stack up --dir $(STACK_DIR) --host $(HOST) --first-boot

down:
	@python3 -m devstack.stack down --dir $(STACK_DIR)

status:
	@python3 -m devstack.stack status --dir $(STACK_DIR)

test: setup
	$(PYTHON) -m pytest tests -n 2 --dist worksteal

unit: setup
	$(PYTHON) -m pytest tests/unit

# Every boundary of every verb, on both hypervisors; `test` plays one of each step.
faults: setup
	COMPUTE_AGENT_FAULTS=full $(PYTHON) -m pytest tests/faults -n 2 --dist worksteal

check: setup
	.venv/bin/ruff check agent devstack tests bench
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: setup
	$(PYTHON) -m bench $(BENCH)

asyncapi: setup
	.venv/bin/compute-agent asyncapi > docs/asyncapi.json

matrix: setup
	.venv/bin/compute-agent support-matrix > docs/support-matrix.md

# Pins name packages and hashes only, never where they came from. Needs `uv` on PATH.
pins:
	uv pip compile --generate-hashes --no-emit-index-url --no-header --all-extras --python-version 3.11 \
		--custom-compile-command "make pins" pyproject.toml -o constraints.txt

clean: down
	rm -rf .venv $(STACK_DIR) compute_agent.egg-info
