# kvmesh: `make help` lists what there is. Everything is installed into .venv from the lock files.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
GENERATED ?= generated
PROTO_FILES = $(sort $(wildcard protos/kvmesh/v1/*.proto protos/kvmesh/etcd/v1/*.proto))

.PHONY: help install install-dev install-oracle install-nixl run test check lint types protos proto-lint bench bench-grpc bench-replay
.PHONY: bench-route bench-index bench-quality soak bench-peers-install lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  %-19s %s\n", $$1, $$2}'

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -m compileall -q src generated
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements-dev.lock
	@touch $@

.venv-protos/.installed: $(VENV)/.installed requirements-protos.lock
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-protos
	$(UV) pip install --quiet --python .venv-protos/bin/python -r requirements-protos.lock
	@touch $@

.venv-oracle/.installed: $(VENV)/.installed requirements-oracle.lock
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-oracle
	$(UV) pip install --quiet --python .venv-oracle/bin/python -r requirements-oracle.lock
	@touch $@

node_modules/.installed: package.json package-lock.json
	npm ci --silent --no-audit --no-fund
	@touch $@

install: $(VENV)/.installed ## Install the program into .venv

install-dev: $(VENV)/.installed-dev .venv-protos/.installed ## Install what tests and checks need as well

install-oracle: .venv-oracle/.installed ## Install what tests/oracle compares the router with into .venv-oracle (Linux x86-64, 71 MB)

install-nixl: install ## Add NIXL, where a wheel exists (Linux), without the CUDA packages it asks for
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --only-binary :all: nixl-cu12==1.5.1

run: install ## Run a mesh: 2 decode workers, 1 prefill worker, queue, router, frontend
	$(BIN)/kvmesh up

test: install-dev ## Run the tests
	$(BIN)/pytest

check: install-dev lint types proto-lint ## Lint, type-check, check the contract, the drift and the house rules
	$(BIN)/pytest tests/house

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

proto-lint: ## Lint the contract and compare it with the baseline, where Node is there
	@if command -v npm >/dev/null; then \
	  $(MAKE) --no-print-directory node_modules/.installed build/googleapis && npx --no-install buf lint && \
	  npx --no-install buf format --diff --exit-code protos && npx --no-install buf build -o build/contract.binpb && \
	  npx --no-install buf breaking build/contract.binpb --exclude-imports --against protos/baseline.binpb; \
	else echo "proto-lint: skipped, npm is not installed"; fi

# The google.api annotations, from the wheel of googleapis-common-protos, where protoc and buf find them.
build/googleapis: $(VENV)/.installed
	@mkdir -p build/googleapis/google/api build/googleapis/google/rpc
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  cp $$site/google/api/annotations.proto $$site/google/api/http.proto build/googleapis/google/api/; \
	  cp $$site/google/rpc/status.proto build/googleapis/google/rpc/

protos: .venv-protos/.installed build/googleapis ## Generate the Python code of the contract
	@mkdir -p $(GENERATED)
	PATH="$(CURDIR)/.venv-protos/bin:$$PATH" .venv-protos/bin/python -m grpc_tools.protoc \
	  --proto_path=protos --proto_path=build/googleapis \
	  --python_out=$(GENERATED) --grpc_python_out=$(GENERATED) --mypy_out=quiet:$(GENERATED) --mypy_grpc_out=quiet:$(GENERATED) \
	  $(PROTO_FILES)

bench: install-dev ## Measure what serving costs, beside a peer: a table on stderr, one JSON object on stdout
	@$(BIN)/python bench/serving.py

bench-grpc: install-dev ## Measure what serving costs through the gRPC door
	@$(BIN)/python bench/grpc_door.py

bench-replay: install-dev ## Replay TRACE (Mooncake's format) through a mesh of processes, for two policies
	@test -n "$(TRACE)" || { echo "name a trace: make bench-replay TRACE=conversation_trace.jsonl" >&2; exit 2; }
	@$(BIN)/python bench/replay.py "$(TRACE)"

# The benches below take further arguments: `make bench-route ARGS=--help`.
bench-route: install-dev ## Measure a routing decision, beside the peer's: hash and match, select, reserve to release
	@$(BIN)/python bench/route.py $(ARGS)

bench-index: install-dev ## Measure the prefix index, beside the peer's: matches, events, bytes per (worker, block) pair
	@$(BIN)/python bench/prefix_index.py $(ARGS)

bench-quality: install-dev ## Replay TRACE in virtual time by every policy: reuse, balance, latencies
	@test -n "$(TRACE)" || { echo "name a trace: make bench-quality TRACE=conversation_trace.jsonl" >&2; exit 2; }
	@$(BIN)/python bench/quality.py "$(TRACE)" $(ARGS)

soak: install-dev ## Churn KV events, disconnect and restart workers for 10 minutes, then compare the index with their blocks
	@$(BIN)/python bench/soak.py $(ARGS)

bench-peers-install: install-dev ## Install what the benches compare with into .venv-peers (Linux)
	@test -x .venv-peers/bin/python || $(UV) venv --quiet --python $(BIN)/python .venv-peers
	$(UV) pip install --quiet --python .venv-peers/bin/python --override bench/peers/overrides.txt -r bench/peers/requirements.txt

bench-queue: install-dev ## Measure what the prefill queue adds to a prefill
	@$(BIN)/python bench/prefill_queue.py $(ARGS)

bench-transfer: install-dev ## Measure moving KV by transport, beside memcpy
	@$(BIN)/python bench/transfer.py $(ARGS)

lock: $(VENV)/.installed ## Resolve the lock files anew
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --extra etcd pyproject.toml -o requirements.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --extra etcd pyproject.toml --group dev -o requirements-dev.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --group protos -o requirements-protos.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --group oracle -o requirements-oracle.lock

clean: ## Remove what was installed and built
	rm -rf $(VENV) .venv-protos .venv-oracle node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
