# Everything a person types. Set-up happens on its own: every target makes the environment it needs.
SHELL         := bash
.SHELLFLAGS   := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup reproduce notebooks report publish test lab lint lock clean clean-data FORCE

CORPUS  ?= synthetic
KEYWORD ?= sheila
SPLIT   ?= speaker
PROFILE ?= standard
SEEDS   ?= 0
ARGS    ?=
KWS_HOME ?= .
export KWS_HOME

PYTHON  ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

help:       ## show this list
	@echo "make TARGET [CORPUS=synthetic|FOLDER] [KEYWORD=sheila] [SPLIT=speaker|random] [PROFILE=smoke|standard|full] [SEEDS=3]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# CPU=1 leaves out the CUDA packages; pip must then be told where PyTorch's CPU wheels are (README).
setup: $(READY)  ## create .venv from requirements.lock (other targets do it when needed)
$(READY): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Python 3.11 is needed: install it, or name it with make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Creating $(VENV): several GB of wheels, some minutes."
	@"$(PYTHON)" -m venv $(VENV)
	@grep -v $(if $(CPU),-E '^(nvidia|cuda|triton)',-E '^$$') requirements.lock > $(VENV)/wanted.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/wanted.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

reproduce: $(READY)  ## run every experiment that is not done yet, then the report
	@study=$$($(BIN)/kws study --corpus "$(CORPUS)" --keyword "$(KEYWORD)" --split "$(SPLIT)" --profile "$(PROFILE)" --seeds "$(SEEDS)"); \
	$(MAKE) --no-print-directory notebooks STUDY="$$study"; \
	$(BIN)/kws table "$$study"

# ---- one study: executed notebooks, in order -------------------------------------------------
OUT   := $(KWS_HOME)/reports/$(STUDY)/notebooks
STEPS := 01_split_and_baseline 02_streaming 03_kd 04_attention_kd 05_quant_fp16
RUN    = KWS_HEADLESS=1 $(BIN)/papermill --no-progress-bar --log-output --log-level WARNING -k python3 -r corpus "$(CORPUS)" -r keyword "$(KEYWORD)" \
         -r split "$(SPLIT)" -r profile "$(PROFILE)" -p seeds "$(SEEDS)"

notebooks: $(STEPS:%=$(OUT)/%.ipynb)
	@$(MAKE) --no-print-directory report STUDY="$(STUDY)"

# Parameters and the code of kwslib, by content: a fresh checkout or a touched file re-runs nothing.
$(OUT)/.inputs: FORCE
	@mkdir -p $(@D)
	@{ echo "$(CORPUS)|$(KEYWORD)|$(SPLIT)|$(PROFILE)|$(SEEDS)"; cat kwslib/*.py notebooks/*.ipynb | cksum; } > $@.tmp
	@if cmp -s $@.tmp $@; then rm $@.tmp; else mv $@.tmp $@; fi

# papermill saves a notebook even when a cell fails, so the target gets its name only after success;
# the failed copy stays, with the traceback in it, as unfinished_*.ipynb.
$(OUT)/%.ipynb: $(OUT)/.inputs
	@echo "$* ..."
	@$(RUN) notebooks/$*.ipynb $(@D)/unfinished_$*.ipynb
	@mv $(@D)/unfinished_$*.ipynb $@
	@$(BIN)/kws html $@ > /dev/null

# who reads whose checkpoints
$(OUT)/02_streaming.ipynb: $(OUT)/01_split_and_baseline.ipynb
$(OUT)/03_kd.ipynb: $(OUT)/02_streaming.ipynb
$(OUT)/04_attention_kd.ipynb: $(OUT)/03_kd.ipynb
$(OUT)/05_quant_fp16.ipynb: $(OUT)/04_attention_kd.ipynb

report: $(READY)  ## redraw figures and HTML from saved records: no data, no training
	@study="$(STUDY)"; [ -n "$$study" ] || study=$$($(BIN)/kws name --corpus "$(CORPUS)" --keyword "$(KEYWORD)" --split "$(SPLIT)"); \
	out="$(KWS_HOME)/reports/$$study/notebooks"; mkdir -p "$$out"; \
	echo "06_plots ..."; \
	$(RUN) notebooks/06_plots.ipynb "$$out/unfinished_06_plots.ipynb"; \
	mv "$$out/unfinished_06_plots.ipynb" "$$out/06_plots.ipynb"; \
	$(BIN)/kws html "$$out/06_plots.ipynb" > /dev/null

publish: $(READY)  ## copy a study to reports/reference and checkpoints/reference, and its table to the README
	@$(BIN)/kws publish "$$($(BIN)/kws name --corpus "$(CORPUS)" --keyword "$(KEYWORD)" --split "$(SPLIT)")"

test: $(READY)  ## all tests, with a smoke run of the whole chain (quick ones only: make test ARGS="-m 'not slow'")
	@$(BIN)/python -m pytest -m "" $(ARGS)

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

lint: $(READY)  ## check style
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

# Versions only, no addresses; markers for other Pythons are left out.
lock: $(READY)  ## make requirements.lock anew from pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@{ echo "# Every package of the environment, exactly. Made by 'make lock' from pyproject.toml; do not edit."; \
	  $(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate -q \
	  | grep -v -E "python_full_version (==|>=) '3.12" | sed "s/ ; python_full_version < '3.12'//"; } > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock

clean:      ## remove executed notebooks and HTML; keeps records, figures, checkpoints and data
	@find "$(KWS_HOME)/reports" -mindepth 1 -maxdepth 1 -type d ! -name reference -exec rm -rf {}/notebooks {}/index.html {}/wandb \;
clean-data: ## remove prepared corpora, which are made again when needed
	@rm -rf "$(KWS_HOME)/data"
