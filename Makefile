VENV := .venv
PY := $(VENV)/bin/python
SITE = $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

.PHONY: protos
# Generated code is kept in the repository; a test regenerates it and compares.
protos:
	$(PY) -m grpc_tools.protoc -I protos -I $(SITE) \
	  --plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc \
	  --python_out=clients/python --grpc_python_out=clients/python \
	  --mypy_out=quiet:clients/python --mypy_grpc_out=quiet:clients/python \
	  $$(cd protos && find millrace -name '*.proto' | sort)
	for d in clients/python/millrace/*/v1; do touch $$d/__init__.py $$d/../__init__.py; done
