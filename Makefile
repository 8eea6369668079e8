# Every job as one target; `make` alone prints them.

DATA ?=
MODEL ?=
RECIPE ?=
TIME ?=
RUN ?=
IMAGE ?=
ARGS ?=
K ?= 5
VENV ?= .venv
PYTHON ?= python3
comma := ,
ifeq ($(origin CUDA_VISIBLE_DEVICES),undefined)
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
else
GPUS := $(words $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)))
endif
PROCESSES ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),1)

# What else is set on the command line is a mistake: Data=digits would train on CIFAR-10.  A make above this one hands its own variables down.
VARIABLES := DATA MODEL RECIPE TIME RUN IMAGE ARGS K PROCESSES VENV PYTHON
OTHERS := CUDA_VISIBLE_DEVICES OMP_NUM_THREADS PET_SIGNALS_TO_HANDLE SHELL .SHELLFLAGS MAKE MAKEFLAGS MAKEFILES MAKELEVEL GNUMAKEFLAGS VPATH
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(if $(filter 0,$(MAKELEVEL)),$(firstword $(filter-out $(VARIABLES) $(OTHERS),$(GIVEN))))
# $(call quote,NAME): a variable's value as one word of the shell, whatever is in it; $(call option,--name,NAME): with its option, where it is set.
quote = '$(subst ','\'',$(value $(1)))'
option = $(if $(value $(2)),$(1) $(call quote,$(2)))
ifneq ($(UNKNOWN),)
HINT = import glob, sys; from lenslet.errors import nearest; \
  name, value, *known = sys.argv[1:]; option = "--" + name.lower().replace("_", "-"); \
  files = glob.glob("scripts/*.py") + glob.glob("lenslet/**/*.py", recursive=True); \
  code = "".join(open(file, encoding="utf-8").read() for file in files); \
  is_option = name.upper() not in known and f"\"{option}\"" in code; \
  print(f"; say ARGS=\x27{option} {value}\x27" if is_option else nearest(name.upper(), known))
$(error $(UNKNOWN): no such variable$(or $(shell $(PYTHON) -c '$(HINT)' '$(UNKNOWN)' $(call quote,$(UNKNOWN)) $(VARIABLES) 2>/dev/null),; there are $(VARIABLES)))
endif

BIN := $(VENV)/bin
# One process needs no launcher.  `exec` lets a signal to make reach it, past the shell.  torchrun would set one thread with a warning, so it is set here;
# lenslet/distributed/start.py then gives each process its share of the cores.
export PET_SIGNALS_TO_HANDLE ?= SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
LAUNCH := exec $(if $(filter 1,$(PROCESSES)),$(BIN)/python,env OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(PROCESSES))
FROM := $(call option,--data,DATA)
OPTIONS := $(FROM) $(call option,--model,MODEL) $(call option,--config,RECIPE) $(call option,--time,TIME)
# TensorBoard follows links, and would show runs/latest as a second run.  The loader that can be told not to is the one in Python.
TENSORBOARD = import os, sys; from tensorboard import main; from tensorboard.backend.event_processing import io_wrapper; \
  io_wrapper.ListRecursivelyViaWalking = lambda top: ( \
    (folder, [os.path.join(folder, file) for file in files]) for folder, _, files in os.walk(top)); \
  sys.exit(main.run_main())

.PHONY: help setup data train test predict tensorboard reproduce folds bench results check check-all mutants clean clean-cache

help:
	@echo 'make setup                     make $(VENV) and install what the commands need'
	@echo 'make train                     fetch CIFAR-10, train, measure   [DATA= MODEL= RECIPE= TIME= PROCESSES= ARGS=]'
	@echo 'make train TIME=60s            the best network that a minute of training gives on this machine (5m, 2h)'
	@echo 'make train DATA=digits         the same on bundled handwritten digits, in under a minute'
	@echo 'make train DATA=my/pictures    the same on a folder: train/<class>/*.jpg, or <class>/*.jpg'
	@echo 'make data DATA=mnist           only fetch: cifar10 cifar100 mnist fashion-mnist digits   [ARGS=]'
	@echo 'make test                      measure the newest model on the test images   [RUN= DATA= ARGS=]'
	@echo 'make predict IMAGE=img.png     name what is in an image, a folder or '\''*.png'\''   [RUN= ARGS=]'
	@echo 'make tensorboard               look at the curves of all runs'
	@echo 'make reproduce RUN=runs/name   train the newest (or that) run again, and compare the bits   [ARGS=]'
	@echo 'make folds K=5 DATA=digits     train once for each of 5 folds: mean and deviation   [DATA= MODEL= RECIPE= ARGS=]'
	@echo 'make bench                     compare speeds with what people use otherwise: half an hour   [DATA= ARGS=]'
	@echo 'make results                   draw the plot of the README, and compare its tables with results/   [ARGS=]'
	@echo 'make check                     unit tests of this code (ruff + pytest); check-all: the slow ones too'
	@echo 'make mutants                   do the tests notice 320 small changes of the code?   [ARGS=]'
	@echo 'make clean-cache               remove the photographs that were decoded once and kept, see data/cache'
	@echo 'make clean                     remove the environment and caches, but no data and no run'

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("error: Python 3.11 or later is needed: give PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: requirements/dev.txt $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	@touch $@

data: setup
	$(BIN)/python scripts/download.py $(if $(value DATA),$(call quote,DATA),cifar10) $(ARGS)

train: setup
	$(LAUNCH) scripts/train.py $(OPTIONS) $(ARGS)
	$(LAUNCH) scripts/test.py

test: setup
	$(LAUNCH) scripts/test.py $(call option,--weights,RUN) $(FROM) $(ARGS)

predict: setup
	@$(BIN)/python scripts/predict.py $(call option,--weights,RUN) $(ARGS) $(if $(value IMAGE),$(call quote,IMAGE),$(error IMAGE is missing: make predict IMAGE=img.png))

tensorboard: setup
	@$(BIN)/python -c '$(TENSORBOARD)' --load_fast=false --logdir $(if $(value RUN),$(call quote,RUN),runs) $(ARGS)

reproduce: setup
	$(BIN)/python scripts/reproduce.py $(if $(value RUN),$(call quote,RUN)/model.safetensors) $(ARGS)

folds: setup
	$(BIN)/python scripts/folds.py --folds $(call quote,K) --processes $(PROCESSES) $(OPTIONS) $(ARGS)

bench: setup
	$(BIN)/python scripts/bench.py $(FROM) $(ARGS)

results: $(VENV)/.ready-dev
	$(BIN)/python scripts/results.py $(ARGS)

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

check-all: check
	$(BIN)/python -m pytest -m slow

mutants: $(VENV)/.ready-dev
	$(BIN)/python tests/mutants.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache __pycache__ */__pycache__ */*/__pycache__

clean-cache:
	rm -rf data/cache
