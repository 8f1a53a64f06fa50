# What each target needs it sets up itself (tools/setup.sh): packages as root, a virtual environment in .venv.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Prerequisites are made in the order they are written, also under make -j: tools first, then what needs them.
.NOTPARALLEL:
.PHONY: help install uninstall setup criu demo test check lint fuzz bench clean ready-demo ready-check ready-test ready-peers links

PYTHON := .venv/bin/python
PREFIX ?= /usr/local
LINKS := $(PREFIX)/bin/dynacut $(PREFIX)/share/bash-completion/completions/dynacut
PACKAGES := $(wildcard cli jobs live offline shared handlers)
# Everything typed besides the packages; folders without Python files are passed over.
TYPED := $(patsubst %/,%,$(sort $(dir $(wildcard tests/unit/*.py tests/integration/*.py examples/*.py bench/*.py)))) \
	$(wildcard tests/*.py)
# Tests of one file share servers and recordings, so they stay together.
PARALLEL := -n $(shell nproc) --dist loadfile
HANDLER_SOURCES := handlers/build.py $(wildcard handlers/*.c handlers/*.h handlers/*.ld)

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ready-demo handlers/trap.bin ## put the command into PREFIX/bin (/usr/local); it runs from this folder
	@mkdir -p $(dir $(LINKS))
	@ln -sfn "$(CURDIR)/.venv/bin/dynacut" $(word 1,$(LINKS))
	@ln -sfn "$(CURDIR)/tools/completion.bash" $(word 2,$(LINKS))
	@$(word 1,$(LINKS)) --version

uninstall: ## remove the links that install has made; what is patched stays so (dynacut live --undo)
	@for link in $(LINKS); do \
	case $$(readlink "$$link") in "$(CURDIR)"/*) rm -f "$$link" ;; esac; done

setup: ready-test handlers/trap.bin ## install what everything below needs, servers to test with too (packages as root, .venv)

criu: ## get a CRIU that works on this kernel: as root
	@tools/setup.sh criu

demo: ready-demo handlers/trap.bin build/notes ## switch a command of a small server off and on again
	@$(PYTHON) examples/demo.py

check: lint ## format, lint, types and the quick unit tests: half a minute
	@$(PYTHON) -m pytest $(PARALLEL) -m 'not slow' tests/unit

ifeq ($(shell id -u),0)
test: ready-test lint ## everything, with real processes and servers: as root
	@$(PYTHON) -m pytest $(PARALLEL) -m 'not alone' tests/unit tests/integration || { \
	echo '*** WHAT FAILED BESIDE OTHER TESTS IS RUN ONCE MORE, ALONE ***' >&2; \
	$(PYTHON) -m pytest --last-failed --last-failed-no-failures none -m 'not alone' tests/unit tests/integration; }
	@$(PYTHON) -m pytest -m alone tests/integration
else
test: lint
	@$(PYTHON) -m pytest $(PARALLEL) tests/unit || status=$$?; \
	echo '*** THE INTEGRATION TESTS WERE NOT RUN: they patch processes, which needs root (sudo make test) ***' >&2; \
	exit $${status:-1}
endif

fuzz: ready-check handlers/trap.bin ## try 100,000 mutated images: a quarter of an hour
	@$(PYTHON) tests/fuzz_images.py --count 100000

bench: ready-test ready-peers handlers/trap.bin ## measure dynacut beside its peers: tables, JSON, a page: as root
	@$(PYTHON) bench/run.py

clean: ## remove everything that make has made, .venv too
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis handlers/trap.bin ./*.egg-info
	find $(PACKAGES) tests examples bench -name __pycache__ -type d -exec rm -rf {} +

lint: ready-check handlers/trap.bin links
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy --strict --no-error-summary
	@if [ -n '$(TYPED)' ]; then MYPYPATH=tests/unit .venv/bin/mypy --strict --no-error-summary $(TYPED); fi

# mypy does not know setuptools' package-dir, so the packages are laid out for it.
links:
	@mkdir -p build/typing/dynacut
	@find build/typing/dynacut -xtype l -delete
	@$(foreach package,$(PACKAGES),ln -sfn ../../../$(package) build/typing/dynacut/$(package);)

ready-demo:
	@tools/setup.sh demo

ready-check:
	@tools/setup.sh check

ready-test:
	@tools/setup.sh test

ready-peers: ready-test
	@tools/peers.sh

handlers/trap.bin: $(HANDLER_SOURCES)
	@python=$(PYTHON); [ -x $$python ] || python=python3; $$python handlers/build.py

build/notes: examples/notes.c
	@mkdir -p build
	@$(CC) -std=gnu11 -O2 -g -Wall -Wextra -o $@ $<
