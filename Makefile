# One word for each job; .ci/run uses the same words.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
RECORDS := docs/records
RUNS = $(sort $(wildcard $(RECORDS)/*-tiny))
STAMP := $(VENV)/installed.stamp
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip install --quiet --constraint constraints-peers.txt
PEERS_STAMP := $(PEERS)/installed.stamp

.PHONY: help setup demo peers test check docs records

help:  ## what each word does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -u 's/:.*## */\t/'

setup: $(STAMP)  ## bring .venv up to date (nothing to do: no time spent)

# torch goes in first and alone, so that no other package chooses its build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

peers: $(PEERS_STAMP)  ## a second environment with kvpress, for `kvfold bench SUITE --peers ...`

# kvpress wants an older transformers than ours, so it cannot live in .venv.
$(PEERS_STAMP): constraints-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) torch
	$(PEERS_PIP) transformers kvpress
	touch $@

demo: setup  ## a real multi-turn benchmark on the shipped model, four methods, a report
	$(BIN)/kvfold demo

test: setup  ## every test, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: setup  ## regenerate what is generated: docs/cli.md, and the tables and the picture of README from the records
	$(BIN)/python -m kvfold.cli.reference docs/cli.md
	if test -n "$(RUNS)"; then \
	  $(BIN)/kvfold report $(RUNS) --overview --into README.md && \
	  $(BIN)/kvfold report $(RUNS) --into docs/results.md; fi
	if test -f $(RECORDS)/chat-tiny/records.jsonl; then \
	  $(BIN)/kvfold report $(RECORDS)/chat-tiny --picture docs/pictures/score.svg; fi

# What `make records` runs. Two suites at a time, each on one thread; what the folders hold already is not run again.
# int8 and int4 are judged on bfloat16, as byte bars are: of float32 they would look twice as good.
PLANS ?= int8; int4; streaming_llm; h2o; snapkv; kvzip; sonic; snapkv + int8; pca(rate=0.47); pca(rate=0.2); \
  dynakv(rate=0.47); dynakv(rate=0.2); snapkv(keep=0.125) + dynakv(rate=0.47); sentkv(budget=0.2); sentkv(budget=0.06)
KEEPS ?= 0.5,0.2,0.06
RIVALS ?= kvpress:SnapKV; kvpress:KVzip; kvpress:ExpectedAttention; kvpress:StreamingLLM; kvpress:ObservedAttention; \
  kvpress:ThinK; transformers:DynamicCache; transformers:QuantizedCache(backend='fp8')
DATA ?=
JOBS ?= 2
chat_ASKS := --n 32
needle_ASKS := --n 24 --set tokens=1024
longqa_ASKS = --n 24 --set score=likelihood --data "$(DATA)"
fidelity_ASKS := --n 8
SUITES := chat needle $(if $(DATA),longqa) fidelity

records: setup peers  ## the records that README's tables are made from; longqa needs DATA=folder of real text
	$(if $(DATA),,@echo "longqa is left out: give DATA=FOLDER that holds fairytaleqa.val.jsonl.xz")
	$(MAKE) -j $(JOBS) $(SUITES:%=$(RECORDS)/%-tiny)

# Lines of both say whose they are; a failure is not lost in the pipe.
.PHONY: $(SUITES:%=$(RECORDS)/%-tiny)
$(SUITES:%=$(RECORDS)/%-tiny): SHELL := /bin/bash
$(SUITES:%=$(RECORDS)/%-tiny): .SHELLFLAGS := -o pipefail -c
$(SUITES:%=$(RECORDS)/%-tiny): $(RECORDS)/%-tiny:
	@OMP_NUM_THREADS=1 $(BIN)/kvfold bench $* --dtype bfloat16 --threads 1 --plans "$(PLANS)" --keep $(KEEPS) \
	  --peers "$(RIVALS)" $($*_ASKS) --out $@ 2>&1 > /dev/null | sed -u 's/^/$*: /'
