# Everything a person types. Set-up happens on its own: every target makes the environment it needs.
SHELL         := bash
.SHELLFLAGS   := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup reproduce detector report people verify prove appendix sweep publish test lab lint lock clean clean-data

CORPUS  ?= synthetic
KEYWORD ?= sheila
SPLIT   ?= speaker
PROFILE ?= standard
SEEDS   ?= 0
OTHER   ?=
PEOPLE  ?=
RECORDINGS ?=
NEGATIVES ?=
APPENDIX ?= augmentation_and_transfer distillation_grid
TRIALS  ?= 40
MAX_MACS ?= 93000
TEACHER ?=
STORAGE ?=
ARGS    ?=
QUIET   ?=
KWS_HOME ?= .
export KWS_HOME

PYTHON  ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

help:       ## show this list
	@echo "make TARGET [CORPUS=synthetic|speech_commands_part|speech_commands_v0.01|FOLDER] [KEYWORD=sheila] [SPLIT=speaker|random] [PROFILE=smoke|standard|full] [SEEDS=3]"
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

STUDY   := --corpus "$(CORPUS)" --keyword "$(KEYWORD)" --split "$(SPLIT)"
RUN     := $(BIN)/kws reproduce $(STUDY) --profile "$(PROFILE)" --seeds "$(SEEDS)" $(if $(QUIET),--quiet)

# Each notebook is executed headless with papermill (kwslib/lab/reproduce.py). Finished experiments are loaded; when nothing
# changed since the last run, only the report is drawn again.
reproduce: $(READY)  ## run every experiment that is not done yet, then the report [QUIET=1] [PEOPLE=FOLDER]
	@$(RUN) --people "$(PEOPLE)"

detector: $(READY)  ## a detector for KEYWORD in detectors/ [RECORDINGS=FOLDER to learn from, too] [NEGATIVES=FOLDER to be quiet on] [PEOPLE=FOLDER to judge]
	@$(BIN)/kws make "$(KEYWORD)" --recordings "$(RECORDINGS)" --negatives "$(NEGATIVES)" --people "$(PEOPLE)" --profile "$(PROFILE)"

report: $(READY)  ## redraw figures and HTML from saved records: no data, no training
	@$(RUN) --only 06_plots

people: $(READY)  ## score every model on people it was not trained on [PEOPLE=FOLDER of recordings], then the report
	@$(BIN)/kws people $(STUDY) --people "$(PEOPLE)" && $(RUN) --only 06_plots

verify: $(READY)  ## own records against the published ones; published checkpoints scored again [ARGS=--all]
	@$(BIN)/kws verify $(STUDY) $(ARGS)

prove: $(READY)  ## measure the figures of REPRODUCING.md: fifty times kill -9, a full disk, another processor (an hour or two)
	@$(BIN)/python tests/prove.py $(ARGS)

appendix: $(READY)  ## side questions: each augmentation, synthetic speech against people [OTHER=FOLDER of other words], KD's settings
	@$(RUN) --only $(APPENDIX:%=appendix/%) --other "$(OTHER)"
	@study=$$($(BIN)/kws name $(STUDY)); if [ -e "$(KWS_HOME)/reports/$$study/index.html" ]; then $(BIN)/kws report $$study; fi

sweep: $(READY)  ## search for small models [TRIALS=40] [MAX_MACS=93000] [TEACHER=baseline] [STORAGE=database URL]
	@$(BIN)/kws sweep $(STUDY) --profile "$(PROFILE)" --trials "$(TRIALS)" --max-macs "$(MAX_MACS)" \
	  --teacher "$(TEACHER)" --storage "$(STORAGE)"

publish: $(READY)  ## copy a study to reports/reference and checkpoints/reference, and its tables to README.md and docs/results.md
	@$(BIN)/kws publish "$$($(BIN)/kws name $(STUDY))"

test: $(READY)  ## the tests, with a smoke run of the whole chain (quick ones only: make test ARGS="-m 'not slow'")
	@$(BIN)/python -m pytest -m "not proof" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# KWS_PUBLISHED=1: a notebook takes a published model of the same recipe and data instead of training it.
lab: $(READY)  ## open the notebooks in JupyterLab [KWS_PUBLISHED=0: train what was published, too]
	@KWS_PUBLISHED="$${KWS_PUBLISHED-1}" $(BIN)/jupyter lab notebooks

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
clean-data: ## remove prepared corpora, which are made again when needed; keeps downloads
	@rm -rf "$(KWS_HOME)/data/prepared"
