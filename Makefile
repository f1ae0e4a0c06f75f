# Slackwater. `make` lists the targets; `make demo` is the way to see it work.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-info test test-all sim-test sim-mutants chaos conformance lint clean clean-demo

VENV := .venv/bin
# The demo's database, logs and key; a database named in the shell is not touched.
DEMO_VAR = $(or $(SLACKWATER_VAR),var)/demo
# What lint checks strictly: decisions and the worker's pure files.
STRICT := controlplane gpuworkers/scheduler.py gpuworkers/sequence.py gpuworkers/blocks.py
# A name on the PATH may be a shim that runs nothing, so each candidate has to prove itself.
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
# Not in `make test`: what `make test-all` adds.
REST := slow or services or kill

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup:  ## create or finish .venv with the locked requirements (about 3 minutes the first time)
	@for python in "$(PYTHON)" python3.11 python3.12 python3.13 python3; do \
	  if "$$python" -c '$(USABLE)' </dev/null >/dev/null 2>&1; then \
	    exec "$$python" -u deploy/setup.py; \
	  fi; \
	done; \
	echo "No usable Python: install Python 3.11, 3.12 or 3.13 with its venv module" \
	  "(Debian: apt-get install python3 python3-venv), or name one: make PYTHON=/path/to/python"; \
	exit 1

demo: setup  ## two CPU workers serve a small real model under load; Ctrl-C ends it
	@exec env -u DATABASE_URL -u REDIS_URL SLACKWATER_VAR="$(DEMO_VAR)" \
	  $(VENV)/python -u manage.py serve --demo $(if $(PORT),--port $(PORT)) $(if $(FLEET),--fleet $(FLEET))

demo-info:  ## addresses, login and key of the demo
	@exec env -u DATABASE_URL -u REDIS_URL SLACKWATER_VAR="$(DEMO_VAR)" \
	  $(VENV)/python -u manage.py demo_info

test: setup  ## the suite, at most 10 minutes on 2 cores
	$(VENV)/python -u -m gpuworkers.convert
	$(VENV)/python -m pytest -n 2 --dist loadfile -m "not (serial or gpu or $(REST))"
	$(VENV)/python -m pytest -m "serial and not (gpu or $(REST))"

test-all: test  ## the same, then services, kills and long tests, at most 45 minutes
	$(VENV)/python -m pytest -m "($(REST)) and not gpu"

sim-test: setup  ## 2,000 simulated clusters under faults, at most 12 minutes on 2 cores
	PYTHONHASHSEED=0 $(VENV)/python -m controlplane.sim swarm --seeds 2000 --processes 2

sim-mutants: setup  ## planted bugs against the simulation, at most 40 minutes on 2 cores
	PYTHONHASHSEED=0 $(VENV)/python -m tests.simulation.mutants

chaos: setup  ## workers are killed and frozen under load, clients must not notice; at most 10 minutes
	$(VENV)/python -u -m tests.chaos --json var/chaos.json

conformance: setup  ## the API by OpenAI's own client against a real server
	$(VENV)/python -m pytest tests/conformance

lint: setup  ## ruff and mypy
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy $(STRICT)

clean:  ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis var/static
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

clean-demo:  ## remove the demo's database, logs and key
	rm -rf "$(DEMO_VAR)"
