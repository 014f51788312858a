# make round   set up, then run one task from publication to payment
# make stack   set up, then start the real parts on this machine, each a process of its own; make stack-down ends them
# make test    set up, then lint, type-check and run all tests
# make test-faults   strike a real stack and edge rounds in every way: kill -9, servers, power, network, disk, clocks; an hour or more
# make bench   set up, then measure learning under encryption; bench-model: a network of 409 034 parameters;
#              bench-crypto: the cryptography beside its peers; bench-gas: what a task costs on chain;
#              bench-stream: 25 million coordinates through the disk; bench-stack: the real parts, with 5 and 100 miners;
#              bench-edge: a round over 10, 100 and 1000 simulated edge devices
# make fuzz    set up, then compare ten million random coordinates with an independent implementation
# make contracts-deep   10 000 random histories of the contracts, and their fuzz tests 20 000 times each
# Each sets up what it needs in the project's own virtual environment, .venv; a second call finds it ready.

PYTHON ?= python3.11
VENV := .venv
READY := $(VENV)/ready
SHELL := /bin/bash
FORGE := cd contracts && node_modules/@foundry-rs/forge-linux-amd64/bin/forge
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: round stack stack-down test test-faults bench bench-model bench-crypto bench-gas bench-stream bench-stack bench-edge fuzz contracts contracts-deep clean
.DEFAULT_GOAL := round

round: $(READY)
	$(VENV)/bin/healchain run breast-cancer --out build/round --again

# Ports and more miners: make stack STACK="--miners 7 --prefect-port 4300"; they are kept.
stack: $(READY) contracts/node_modules/ready
	$(VENV)/bin/healchain stack up $(STACK)

stack-down: $(READY)
	$(VENV)/bin/healchain stack down

test: $(READY) contracts/node_modules/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest
	$(FORGE) test

test-faults: $(READY) contracts/node_modules/ready
	@command -v faketime >/dev/null || echo "faketime is missing, the case of wrong clocks is left out. On Debian: apt-get install -y faketime"
	$(VENV)/bin/pytest -p no:xdist -o addopts="-v --strict-markers" --timeout=1500 tests/faults tests/edge tests/infra/test_bench_edge.py -m "faults or main"

bench: $(READY)
	$(VENV)/bin/healchain bench --out build/bench.json

bench-model: $(READY)
	$(VENV)/bin/healchain bench-model --out build/bench-model.json

bench-crypto: $(READY)
	$(VENV)/bin/healchain bench-crypto --out build/bench-crypto.json

bench-gas: $(READY)
	$(VENV)/bin/healchain bench-gas --out build/bench-gas.json

bench-stream: $(READY)
	$(VENV)/bin/healchain bench-stream --out build/bench-stream.json

bench-stack: $(READY) contracts/node_modules/ready
	$(VENV)/bin/healchain bench-stack --out build/bench-stack.json

bench-edge: $(READY)
	$(VENV)/bin/healchain bench-edge --out build/bench-edge.json

fuzz: $(READY)
	$(VENV)/bin/healchain fuzz --out build/fuzz.json

# Recompile the contracts after a change of their sources; ABI and bytecode are committed.
contracts: contracts/node_modules/ready
	node contracts/compile.mjs

contracts-deep: contracts/node_modules/ready
	export FOUNDRY_PROFILE=deep; $(FORGE) test --match-test 'invariant_|testFuzz_'

clean:
	rm -rf $(VENV) build contracts/node_modules

$(READY): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is missing. On Debian 12: apt-get install -y python3.11 python3.11-venv; or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "$(PYTHON) is not Python 3.11; name one that is: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "The venv module is missing. On Debian 12: apt-get install -y python3.11-venv"; exit 1; }
	@echo "setting up $(VENV): about 2 GB are downloaded once, which takes some minutes"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/pip install -qq --requirement requirements.lock
	@$(VENV)/bin/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

contracts/node_modules/ready: contracts/package-lock.json
	@command -v npm >/dev/null || { echo "node and npm are missing. On Debian: apt-get install -y nodejs npm"; exit 1; }
	cd contracts && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@
