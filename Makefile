# `make demo` and `make test` each do all the set-up a fresh machine needs; see `make help`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := pipelines adapters apps configs

# Two test workers with one thread each; torch's own threads would only compete with them. Each begins with its half of
# the files, so that fixtures and models of a file are made once. Nothing may reach the Hub.
PYTEST := OMP_NUM_THREADS=1 DIFFUSERS_ATTN_CHECKS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format types stress fuzz gpu versions weights docs pages clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# make demo PROMPT="a red cube left of a blue sphere, cartoon style"
demo: $(STAMP) ## generate images of PROMPT, or of six examples, and print their paths
	$(BIN)/imgdit generate $(if $(PROMPT),"$(PROMPT)")

test: lint types ## lint, format check, types and tests
	$(PYTEST)

check: test ## the same as `make test`

lint: $(STAMP) ## ruff's rules and format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy knows neither setuptools' package-dir nor __path__, so it gets the installed layout as a tree of links.
types: $(STAMP) ## mypy over the package in its installed layout
	@tree=$$(mktemp -d) && trap 'rm -rf "$$tree"' EXIT && mkdir "$$tree/imgdit" && \
	ln -s "$(CURDIR)"/imgdit/* "$$tree/imgdit/" && \
	for room in $(ROOMS); do ln -s "$(CURDIR)/$$room" "$$tree/imgdit/$$room"; done && \
	cd "$$tree" && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p imgdit

stress: $(STAMP) ## the tests marked slow: faults, load, wrong files, two processes; within an hour
	$(PYTEST) -m slow --load-seconds 180

# make fuzz SHARE=10 SEED=7
fuzz: $(STAMP) ## read mutated files with every loader; other ones with another SEED
	folder=$$(mktemp -d) && PYTHONPATH=.:tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz/hammer.py \
		"$$folder" all $(or $(SHARE),1) $(or $(SEED),0)

# make gpu GPU="--device cpu --tiny" shows on any machine that every piece runs.
gpu: $(STAMP) ## measure on a CUDA GPU, at most ten minutes; call it again for pieces that are missing
	$(BIN)/imgdit bench gpu --tests tests/test_cuda.py $(GPU)

# make versions ONLY=3.11-lowest; every cell downloads gigabytes.
versions: $(STAMP) ## run the tests on Python 3.11 to 3.13, with the lowest and the newest versions of the ranges
	$(BIN)/python tests/versions.py $(if $(ONLY),--only $(ONLY))

# Every run goes on where it stopped; configs/scenes/ says what each costs.
weights: $(STAMP) ## train the embedded model from nothing, or go on with it
	for recipe in text_encoder autoencoder transformer probe; do \
		$(BIN)/imgdit train scenes/$$recipe --resume || exit 1; \
	done
	$(BIN)/imgdit assemble
	for condition in depth canny inpainting subject; do \
		$(BIN)/imgdit train scenes/control_$$condition --resume || exit 1; \
	done
	$(BIN)/imgdit train scenes/few_steps --resume
	$(BIN)/imgdit train scenes/text_frames --resume
	$(BIN)/imgdit train scenes/text_questions --resume
	for recipe in sae sae_text; do \
		$(BIN)/imgdit sae train scenes/$$recipe --resume || exit 1; \
	done
	$(BIN)/imgdit assemble

docs: $(STAMP) ## build build/site/index.html from README.md and docs/, with a link check; it opens without a server
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "$(CURDIR)/build/site/index.html"

# MUP=1 makes the two plots of μP as well, ten minutes of processor time.
pages: $(STAMP) ## generate the images, numbers and API page of docs/ anew
	$(BIN)/imgdit docs api
	$(BIN)/imgdit docs architecture
	$(BIN)/imgdit docs images $(if $(MUP),--mup)

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The project installs without build isolation: setuptools comes from the lock, so nothing outside it is fetched.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
