# One word for each job; .ci/run uses the same words.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
RECORDS := docs/records/chat-tiny
STAMP := $(VENV)/installed.stamp
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip install --quiet --constraint constraints-peers.txt
PEERS_STAMP := $(PEERS)/installed.stamp

.PHONY: help setup demo peers test check docs records

help:  ## what each word does
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/'

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

demo: setup  ## a real multi-turn benchmark on the shipped model, three methods, a report
	$(BIN)/kvfold demo

test: setup  ## every test, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: setup  ## regenerate what is generated: docs/cli.md, and the tables and the picture of README from the records
	$(BIN)/python -m kvfold.cli.reference docs/cli.md
	if test -f $(RECORDS)/records.jsonl; then \
	  $(BIN)/kvfold report $(RECORDS) --into README.md && \
	  $(BIN)/kvfold report $(RECORDS) --picture docs/pictures/score.svg; fi

records: setup  ## the records that README's table and picture are made from: the chat suite on the shipped model
	$(BIN)/kvfold demo --out $(RECORDS)
	rm -f $(RECORDS)/report.html
