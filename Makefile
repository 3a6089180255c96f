# Everything a person types. Set-up happens on its own: every target makes the environment it needs.
SHELL         := bash
.SHELLFLAGS   := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup reproduce report appendix sweep publish test lab lint lock clean clean-data

CORPUS  ?= synthetic
KEYWORD ?= sheila
SPLIT   ?= speaker
PROFILE ?= standard
SEEDS   ?= 0
OTHER   ?=
APPENDIX ?= augmentation_and_transfer distillation_grid
TRIALS  ?= 40
MAX_MACS ?= 93000
TEACHER ?=
STORAGE ?=
ARGS    ?=
KWS_HOME ?= .
export KWS_HOME

PYTHON  ?= $(firstword $(shell command -v python3.11 python3 2>/dev/null))
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

help:       ## show this list
	@echo "make TARGET [CORPUS=synthetic|speech_commands_v0.01|FOLDER] [KEYWORD=sheila] [SPLIT=speaker|random] [PROFILE=smoke|standard|full] [SEEDS=3]"
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

STEPS   := 01_split_and_baseline 02_streaming 03_kd 04_attention_kd 05_quant_fp16
STUDY   := --corpus "$(CORPUS)" --keyword "$(KEYWORD)" --split "$(SPLIT)"
RUN     := KWS_HEADLESS=1 $(BIN)/papermill --no-progress-bar --log-output --log-level WARNING -k python3 -r corpus "$(CORPUS)" \
           -r keyword "$(KEYWORD)" -r split "$(SPLIT)" -r profile "$(PROFILE)" -p seeds "$(SEEDS)"
QUIET   := 2> >(grep --line-buffered -v -e IPKernelApp -e '^$$' >&2)  # the kernel warns about its local port

# The stamp holds a checksum of everything the notebooks read and left behind, so a touched file re-runs nothing
# and a deleted or edited one is noticed. When it does not fit, all of them run; finished experiments are loaded.
# papermill saves a notebook even when a cell fails, so it gets its name only after success; the failed copy
# stays, with the traceback in it, as unfinished_*.ipynb.
reproduce: $(READY)  ## run every experiment that is not done yet, then the report
	@set -euo pipefail; \
	found=$$($(BIN)/kws study $(STUDY) --profile "$(PROFILE)" --seeds "$(SEEDS)"); study=$${found%% *}; \
	reports="$(KWS_HOME)/reports/$$study"; out="$$reports/notebooks"; mkdir -p "$$out"; \
	state() { { echo "$$found|$(CORPUS)|$(PROFILE)|$(SEEDS)"; ls "$$out" | grep ^0 || true; cat kwslib/*.py notebooks/0[1-5]*.ipynb \
	  "$(KWS_HOME)/checkpoints/$$study"/* "$$reports"/records/* 2>/dev/null || true; } | cksum; }; \
	if [ "$$(state)" != "$$(cat "$$reports/.state" 2>/dev/null)" ]; then \
	  for step in $(STEPS); do \
	    echo "$$step ..."; \
	    $(RUN) notebooks/$$step.ipynb "$$out/unfinished_$$step.ipynb" $(QUIET); \
	    mv "$$out/unfinished_$$step.ipynb" "$$out/$$step.ipynb"; \
	    $(BIN)/kws html "$$out/$$step.ipynb" > /dev/null; \
	  done; \
	  touch "$$out/06_plots.ipynb" "$$out/06_plots.html"; \
	  state > "$$reports/.state"; \
	fi
	@$(MAKE) --no-print-directory report
	@$(BIN)/kws table "$$($(BIN)/kws name $(STUDY))"

report: $(READY)  ## redraw figures and HTML from saved records: no data, no training
	@set -euo pipefail; \
	study=$$($(BIN)/kws name $(STUDY)); $(BIN)/kws table "$$study" > /dev/null; \
	out="$(KWS_HOME)/reports/$$study/notebooks"; mkdir -p "$$out"; \
	echo "06_plots ..."; \
	$(RUN) notebooks/06_plots.ipynb "$$out/unfinished_06_plots.ipynb" $(QUIET); \
	mv "$$out/unfinished_06_plots.ipynb" "$$out/06_plots.ipynb"; \
	$(BIN)/kws html "$$out/06_plots.ipynb" > /dev/null

appendix: $(READY)  ## side questions: each augmentation, synthetic speech against people [OTHER=FOLDER of other words], KD's settings
	@set -euo pipefail; \
	$(BIN)/kws study $(STUDY) --profile "$(PROFILE)" --seeds "$(SEEDS)" > /dev/null; \
	out="$(KWS_HOME)/reports/$$($(BIN)/kws name $(STUDY))/notebooks"; mkdir -p "$$out"; \
	for name in $(APPENDIX); do \
	  other=(); if [ $$name = augmentation_and_transfer ]; then other=(-r other "$(OTHER)"); fi; \
	  $(RUN) $${other[@]+"$${other[@]}"} notebooks/appendix/$$name.ipynb "$$out/unfinished_$$name.ipynb" $(QUIET); \
	  mv "$$out/unfinished_$$name.ipynb" "$$out/$$name.ipynb"; \
	  $(BIN)/kws html "$$out/$$name.ipynb"; \
	done; \
	if [ -e "$$out/../index.html" ]; then $(BIN)/kws report "$$($(BIN)/kws name $(STUDY))" > /dev/null; fi

sweep: $(READY)  ## search for small models [TRIALS=40] [MAX_MACS=93000] [TEACHER=baseline] [STORAGE=database URL]
	@$(BIN)/kws sweep $(STUDY) --profile "$(PROFILE)" --trials "$(TRIALS)" --max-macs "$(MAX_MACS)" \
	  --teacher "$(TEACHER)" --storage "$(STORAGE)"

publish: $(READY)  ## copy a study to reports/reference and checkpoints/reference, and its table to the README
	@$(BIN)/kws publish "$$($(BIN)/kws name $(STUDY))"

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
clean-data: ## remove prepared corpora, which are made again when needed; keeps downloads
	@rm -rf "$(KWS_HOME)/data/prepared"
