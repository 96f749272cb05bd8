# kecho: `make serve` runs the server, `make check` tests it, `make help` lists the rest.
#
# PYTHON=python3.12 picks the interpreter (remembered in .venv), ARGS="..." is passed on.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Naming another PYTHON makes .venv anew; naming none keeps the .venv there is.
ifeq ($(origin PYTHON),undefined)
PYTHON := python3
VENV := .venv/.made
else
VENV := .venv/.made-by-$(subst /,_,$(PYTHON))
endif
ifeq ($(origin CC),default)
CC := gcc
endif
ARGS ?=
MINUTES ?= 10
# Tests that run beside each other: they wait more than they compute.
JOBS ?= $(shell echo $$((3 * $$(nproc))))
PARALLEL = -n $(JOBS) --dist worksteal
# In a worker, too: it is started in a network namespace of its own.
ONE_BY_ONE = -n 1
# $(call each_of,OPTIONS,OPTIONS,OPTIONS) runs pytest with each, though one before has failed. ARGS
# may name tests of which none has the mark: pytest's status 5.
pytest_with = $(if $(strip $(1)),$(PY) -m pytest $(1) $(ARGS) || (($$? == 5)) || failed=1;)
each_of = failed=0; $(call pytest_with,$(1)) $(call pytest_with,$(2)) $(call pytest_with,$(3)) exit $$failed
# The tests start a thousand processes: modules are compiled once, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE
SEED ?=
PEER_CFLAGS ?= -O2 -g -std=gnu11 -Wall -Wextra -pthread

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
RELEASE := build/release/.built
NATIVE := setup.py $(wildcard $(foreach d,ext ext/* ext/*/*,$(d)/*.pyx $(d)/*.pxd $(d)/*.pxi $(d)/*.c $(d)/*.h))
PEERS := $(patsubst benchmarks/%.c,build/%,$(wildcard benchmarks/peers/*.c))
C_STYLE := $(filter %.c %.h,$(NATIVE)) $(wildcard benchmarks/*.[ch] benchmarks/*/*.[ch] benchmarks/*/*/*.[ch] tests/*/*/*.[ch])
CYTHON_STYLE := $(filter %.pyx %.pxd %.pxi,$(NATIVE)) $(wildcard tests/sanitizers/*.pyx)
PYTHON_STYLE := setup.py $(wildcard kecho tests benchmarks)

# $(call requirements,KEY...) reads lists of requirements from pyproject.toml, so
# that they are written once; pip has no option for it that is old enough.
requirements = $(PY) -c 'import sys, tomllib; t = tomllib.load(open("pyproject.toml", "rb")); \
	[t := t[k] for k in sys.argv[1:]]; print(*t, sep="\n")' $(1)
# $(call setup,KIND,COMMAND) keeps all that a kind of build makes under build/KIND.
setup = $(PY) setup.py --quiet $(2) --build-temp build/$(1)/temp --build-lib build/$(1)/lib

# One line says all that is missing, before pip or gcc fail at length.
define CHECK_SYSTEM
python=$$1 package=python3 missing=
case $${python##*/} in python3.*) package=$${python##*/} ;; esac
command -v gcc >/dev/null || missing+=" gcc"
if ! version=$$("$$python" -c 'import platform; print(platform.python_version())' 2>/dev/null); then
    missing+=" $$package $$package-dev $$package-venv"
elif ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "kecho needs Python 3.11 or newer, $$python is $$version:" \
        "apt-get install -y$$missing python3.11-dev python3.11-venv && make PYTHON=python3.11" >&2
    exit 1
else
    "$$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        missing+=" $$package-dev"
    "$$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=" $$package-venv"
fi
[ -z "$$missing" ] || { echo "kecho needs more packages: apt-get install -y$$missing" >&2; exit 1; }
endef
export CHECK_SYSTEM
check_system = @bash -c "$$CHECK_SYSTEM" bash

.PHONY: all help serve bench compare plot check check-all mutants test soak lint format debug asan tsan annotate dist clean distclean

all: $(RELEASE) $(PEERS) ## build the environment, the extensions in place, the C peers (default)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' Makefile

serve: $(RELEASE) ## run the server on 127.0.0.1:12345; ARGS="..." are its options
	@$(PY) -m kecho $(ARGS)

bench: $(RELEASE) .venv/.bench ## measure a server of its own: bench.json, bench.txt; ARGS="..." are its options
	@$(PY) -m kecho.bench --spawn --json bench.json --txt bench.txt $(ARGS)

compare: all .venv/.plot ## measure echo servers side by side into benchmarks/results; ARGS="..."
	@$(PY) -m benchmarks.compare $(ARGS)

plot: .venv/.plot ## draw bench.png from bench.json
	@[ -e bench.json ] || { echo 'there is no bench.json yet: make bench' >&2; exit 1; }
	@$(PY) -m kecho.bench plot bench.json -o bench.png
	@echo bench.png

check: all .venv/.dev ## prove every behaviour once; ARGS="..." for pytest
	@$(call each_of, \
		$(PARALLEL) -m 'not alone and not outside', \
		$(ONE_BY_ONE) -m 'alone and not outside')

check-all: all .venv/.dev ## every variant of every test, storms, crowds, fuzzers and packages: before a release
	@$(call each_of, \
		--everything $(PARALLEL) -m 'not alone and not outside', \
		--everything $(ONE_BY_ONE) -m 'alone and not outside', \
		--everything --host-network -m outside)

mutants: all .venv/.dev ## plant faults one at a time, which the tests must notice: hours; ARGS="..."
	@PYTHONPATH=tests $(PY) -m mutants $(ARGS)

test: all .venv/.dev ## run pytest with ARGS="..."
	@$(PY) -m pytest $(ARGS)

soak: all ## storms, stops and restarts for MINUTES=10; SEED=N goes through the same again; ARGS="..."
	@$(PY) tests/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

lint: .venv/.dev ## check style and types; compile with warnings as errors
	$(PY) -m ruff check $(PYTHON_STYLE)
	$(PY) -m ruff format --check $(PYTHON_STYLE)
	$(PY) -m mypy
	PATH="$$PWD/.venv/bin:$$PATH" cython-lint $(CYTHON_STYLE)
ifneq ($(C_STYLE),)
	.venv/bin/clang-format --dry-run -Werror $(C_STYLE)
endif
	$(check_system) $(PY)
	KECHO_WERROR=1 $(call setup,werror,build)

format: .venv/.dev ## rewrite Python and C in the style that lint checks, and what is generated
	PYTHONPATH=tests $(PY) -m support.keywords
	$(PY) -m ruff check --fix $(PYTHON_STYLE)
	$(PY) -m ruff format $(PYTHON_STYLE)
ifneq ($(C_STYLE),)
	.venv/bin/clang-format -i $(C_STYLE)
endif

debug: .venv/.build ## build without optimisation into build/debug and say how to use it
	$(check_system) $(PY)
	@mkdir -p build/debug/lib && find build/debug/lib -name '*.py' -delete
	KECHO_DEBUG=1 $(call setup,debug,build)
	@echo 'PYTHONSAFEPATH=1 PYTHONPATH=build/debug/lib gdb --args $(PY) -m kecho'

asan: .venv/.dev ## run the tests under ASan and UBSan, then look for leaks; ARGS="..." for pytest
	$(check_system) $(PY)
	@tests/sanitizers/run asan $(ARGS)

tsan: .venv/.dev ## run the tests under TSan; ARGS="..." for pytest
	$(check_system) $(PY)
	@tests/sanitizers/run tsan $(ARGS)

annotate: .venv/.build ## write Cython's HTML annotation, which shows where Python is called
	@KECHO_ANNOTATE=1 $(PY) setup.py --quiet --name >/dev/null
	@find build/annotate -name '*.html'

dist: .venv/.dev ## make dist/: an sdist and the wheel built from it
	$(check_system) $(PY)
	$(PY) -m build

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kecho tests benchmarks -name __pycache__ -exec rm -rf {} +
	rm -f kecho/*/*.so bench.json bench.txt bench.png

distclean: clean ## remove .venv as well
	rm -rf .venv

$(VENV):
	$(check_system) '$(PYTHON)'
	@'$(PYTHON)' -m venv --clear .venv
	@touch .venv/.made $@

.venv/.build: $(VENV) pyproject.toml
	@$(call requirements,build-system requires) | $(PIP) install -r /dev/stdin
	@touch $@

.venv/.dev: .venv/.build
	@$(call requirements,project optional-dependencies dev) | $(PIP) install -r /dev/stdin
	@touch $@

.venv/.bench: .venv/.build
	@$(call requirements,project optional-dependencies bench) | $(PIP) install -r /dev/stdin
	@touch $@

.venv/.plot: .venv/.build
	@$(call requirements,project optional-dependencies plot) | $(PIP) install -r /dev/stdin
	@touch $@

# The .pth file lets `python -m kecho` and pytest find kecho from any directory.
$(RELEASE): .venv/.build $(NATIVE)
	$(check_system) $(PY)
	@echo '$(CURDIR)' >"$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kecho.pth"
	@$(call setup,release,build_ext --inplace)
	@touch $@

# What is not there to build these with, `make compare` does without.
build/peers/go_echo/go_echo: $(wildcard benchmarks/peers/go_echo/*)
	@command -v go >/dev/null || { echo 'go is not installed' >&2; exit 1; }
	@mkdir -p $(@D)
	cd benchmarks/peers/go_echo && GOFLAGS=-mod=mod GOPROXY=off go build -o '$(CURDIR)/$@' .

build/peers/uring_echo/uring_echo: benchmarks/peers/uring_echo/uring_echo.c
	@echo '#include <liburing.h>' | $(CC) -E -o /dev/null - 2>/dev/null || \
	    { echo 'liburing is not installed (Debian: liburing-dev)' >&2; exit 1; }
	@mkdir -p $(@D)
	$(CC) $(PEER_CFLAGS) $(CPPFLAGS) $(LDFLAGS) -o $@ $< -luring $(LDLIBS)

# The crate comes from where Debian's librust-tokio-dev puts it, or from cargo's own cache.
DEBIAN_CRATES := /usr/share/cargo/registry
build/peers/tokio_echo/tokio_echo: $(wildcard benchmarks/peers/tokio_echo/Cargo.toml benchmarks/peers/tokio_echo/src/*)
	@command -v cargo >/dev/null || { echo 'cargo is not installed' >&2; exit 1; }
	@mkdir -p $(@D) && cp -r benchmarks/peers/tokio_echo/. $(@D)
	cd $(@D) && rm -f Cargo.lock && cargo --quiet build --release --offline --target-dir target \
	    $(if $(wildcard $(DEBIAN_CRATES)/tokio-[0-9]*),--config 'source.crates-io.replace-with="debian"' \
	    --config 'source.debian.directory="$(DEBIAN_CRATES)"')
	@cp $(@D)/target/release/tokio_echo $@

build/peers/venv/.made: $(VENV) pyproject.toml
	@$(PY) -m venv $(@D)
	@$(call requirements,project optional-dependencies compare) | \
	    $(@D)/bin/python -m pip --disable-pip-version-check --quiet install -r /dev/stdin
	@touch $@

build/peers/%: benchmarks/peers/%.c $(wildcard benchmarks/peers/*.h)
	@mkdir -p $(@D)
	$(CC) $(PEER_CFLAGS) $(CPPFLAGS) $(LDFLAGS) -o $@ $< $(LDLIBS)
