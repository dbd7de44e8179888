# Every target sets up what it needs; Python 3.11, make and libnuma1 (which vLLM loads) are all that must be there.
PYTHON ?= python3.11
GPU_PYTHON ?= python3.12
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS = 600
export DO_NOT_TRACK = 1
export GX_ANALYTICS_ENABLED = false
# Memory in huge pages: on a virtual machine whose page faults are dear, `import prefect` took a seventh of the time (2026-11-28).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export PYTHONMALLOC ?= malloc
# Modules are compiled once, not in each process, also where the shell says otherwise: `import mlflow` took 2.3 instead of 7.0 s (2026-11-30).
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help setup setup-serve setup-gpu demo test test-infra lint up down compose-up compose-down sbom bench clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## create .venv and .venv-policy from the locks; seconds when they fit
	@$(PYTHON) requirements/install.py pipeline policy

setup-serve:  ## create .venv-serve: SGLang on the CPU, 3 GB
	@$(PYTHON) requirements/install.py serve

setup-gpu:  ## on a machine with NVIDIA GPUs: check driver and CUDA, create .venv-gpu-policy, .venv-gpu-serve, .venv-gpu-index (docs/gpu.md)
	@$(GPU_PYTHON) requirements/gpu.py

demo: setup  ## run the whole chain on the laptop profile
	@.venv/bin/python -m flows.train

test: setup  ## every test, lint, types, layers; MINUTES=60 stops what has not ended by then and names it
	@.venv/bin/python tests/run.py $(if $(MINUTES),--minutes $(MINUTES))

test-infra: setup  ## build the images and run infra/compose.yaml on a Docker engine of its own (root, Debian 12, 25 GB of disk)
	@.venv/bin/python tests/run.py infra

lint: setup  ## format check, lint, types, layers
	@.venv/bin/python tests/run.py lint

up: setup  ## start Prefect server, MLflow server and a worker on loopback, deploy everything
	@.venv/bin/python -m tasks.local.stack up

down:  ## stop what `make up` started
	@if [ -x .venv/bin/python ]; then .venv/bin/python -m tasks.local.stack down; fi

compose-up: setup  ## draw missing secrets, build the images, start infra/compose.yaml and wait until it is healthy
	@.venv/bin/python -m tasks.local.compose up

compose-down:  ## stop the containers; their volumes stay
	@.venv/bin/python -m tasks.local.compose down

sbom: setup  ## write the parts of each environment to dist/sbom, in CycloneDX 1.6
	@.venv/bin/python -m tasks.local.sbom

bench: setup  ## run the benchmarks
	@.venv/bin/python -m benchmarks

clean: down  ## remove environments, artifacts and caches; data/ and mlflow.db stay
	rm -rf .venv .venv-policy .prefect .services .cache artifacts/.work
