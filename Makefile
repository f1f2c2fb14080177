# The newcomer's commands. `make quickstart` and `make test` set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
VLLM_VENV ?= .venv-vllm
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: quickstart test test-slow test-gpu check format picture vllm-venv clean

quickstart: $(READY)
	$(BIN)/pldr run configs/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow or multinode"

# On a machine with a GPU, which the other tests do not see.
test-gpu: $(READY)
	DS_ACCELERATOR=cuda CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest -m gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# README's picture, of a run's certificate; needs Chromium.
picture: $(READY)
	$(BIN)/python docs/picture.py $(RUN) docs/certificate.png

# A virtual environment with the locked versions; made again when pyproject.toml or constraints.txt change.
$(READY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; set PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@rm -f $(VENV)/.ready-* && touch $@

# vLLM for CPUs, in a virtual environment of its own: 2.5 GB. With it, `make test-slow` runs the tests of exports in vLLM.
vllm-venv:
	PYTHON=$(PYTHON) tests/pipeline/inference/vllm/make_venv.sh $(VLLM_VENV)

# What was built; runs/ holds checkpoints and bundles and is left alone.
clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
