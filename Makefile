# Two commands: `make reproduce` and `make test`. Each builds the environment first if it is not there.

PYTHON ?=
TORCH_BACKEND ?=
PROFILE ?= demo
SET ?=
IMAGES ?=
CAPTIONS ?=
CLASSES ?=
MODEL ?=
FORCE ?=
DRY ?=
OF ?=
FAST ?=
ONLY ?=

RUN := .venv/bin/python -m
# Python keeps what it has compiled, whatever the user's environment says: else each of the many kernels compiles anew.
export PYTHONDONTWRITEBYTECODE :=
# The runner sets the same for its kernels (clipshift_core/reproduce.py says why).
test lab model: export OPENBLAS_NUM_THREADS := 1
test lab model: export MALLOC_TRIM_THRESHOLD_ := 1073741824
test lab model: export MALLOC_MMAP_THRESHOLD_ := 1073741824
test lab model: export NO_ALBUMENTATIONS_UPDATE := 1
# Several processes share the cores: torch's threads are to sleep while they wait, not to spin.
test: export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup reproduce refresh test lab model bench figures clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: ## build .venv from requirements.lock [PYTHON=python3.12] [TORCH_BACKEND=cpu]
	@PYTHON="$(PYTHON)" TORCH_BACKEND="$(TORCH_BACKEND)" sh setup.sh

reproduce: setup ## run the notebooks [PROFILE=demo|paper|file.yaml] [SET="key=value ..."] [IMAGES=folder] [CAPTIONS=file.csv] [CLASSES=file.txt] [MODEL=name or folder] [FORCE=1] [DRY=1]
	@$(RUN) clipshift_core.reproduce --profile "$(PROFILE)" --images "$(IMAGES)" --captions "$(CAPTIONS)" \
	    --classes "$(CLASSES)" --model "$(MODEL)" \
	    $(if $(FORCE),--force) $(if $(DRY),--dry) --set $(SET)

refresh: setup ## run the demo and renew the committed notebooks and figures/ (needs a browser)
	@$(RUN) clipshift_core.publish

figures: setup ## run the demo and renew figures/ alone (needs a browser)
	@$(RUN) clipshift_core.publish --figures-only

test: setup ## lint, unit tests, and every committed notebook run again and compared [FAST=1 leaves out what takes minutes] [ONLY="files or options of pytest"]
	@$(RUN) ruff check .
	@$(RUN) pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(if $(FAST),-m "not slow") $(ONLY)

lab: setup ## open the notebooks in JupyterLab [OF=name of a run in runs/]
	@$(RUN) jupyter lab "$(if $(OF),runs/$(OF)/notebooks,notebooks)" --LabApp.default_url=/lab/tree/00_start_here.ipynb

model: setup ## train the models of the demo and their dictionaries from scratch (goes on after a kill)
	@$(RUN) clipshift_core.pretrain
	@$(RUN) clipshift_core.pretrain_sae

bench: setup ## measure speed against the yardstick (minutes; leave the machine alone meanwhile)
	@.venv/bin/python tests/bench/run.py
	@.venv/bin/python tests/bench/run_sae.py
	@.venv/bin/python tests/bench/run_attribution.py

clean: ## remove the environment, all runs and all caches
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
