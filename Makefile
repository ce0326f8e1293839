# make demo    the whole path on the model that ships with attnopt; installs into .venv first
# make test    the tests
# make oldest  the tests that meet transformers, with the oldest version of it that is supported
# make check   linter, types, house rules, sizes
# make docs    the documentation as a site, in docs/_build/html; a warning is an error
# make bench   the table of the README on this machine; ARGS=list shows every benchmark, ARGS="run NAME" runs one
# make clean   removes .venv and what the tools left behind
#
# PYTHON=python3.12 names another interpreter, ARGS="..." passes arguments on (make test ARGS="-k sdpa").

ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3.12 python3; do $$p -c "" 2>/dev/null && { echo $$p; break; }; done || echo python3)
endif
ARGS ?=
OLDEST_TRANSFORMERS := 5.17.0

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -c $(VENV)/constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help demo test oldest check docs bench clean requirements

help:
	@sed -n 's/^# \{0,1\}//; 1,/^$$/p' Makefile

demo: $(VENV)/.demo
	$(VENV)/bin/attnopt demo $(ARGS)

# Processes that tests start would compile the package anew, each of them.
test: $(VENV)/.dev
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# That version and what it needs lie before those of the environment; torch is not among them.
oldest: $(VENV)/oldest/.$(OLDEST_TRANSFORMERS)
	PYTHONPATH=$(VENV)/oldest $(VENV)/bin/python -m pytest tests/hf tests/generation $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest tests/test_house_rules.py
	$(VENV)/bin/python tools/sizes.py

docs: $(VENV)/.dev
	$(VENV)/bin/python -m sphinx -nW --keep-going -q docs docs/_build/html $(ARGS)
	@echo docs/_build/html/index.html

bench: $(VENV)/.demo
	$(VENV)/bin/python -m benchmarks $(or $(ARGS),run end_to_end)

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

requirements:
	@sh tools/check_requirements.sh $(PYTHON)

# The environment and its constraints, then one stamp for each set of packages in it. Without a GPU, torch's CPU build is
# preferred: from where pip looks anyway, else from PyTorch's own index. Where neither has it, the next step takes the
# build that PyPI has, which asks for a triton of its own. torch's dependencies come with the next step, pinned.
$(VENV)/constraints.txt: constraints.txt | requirements
	$(PYTHON) -m venv --clear $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then echo "A GPU is here: installing torch $(TORCH) as PyPI has it."; \
	  grep -v "^triton==" constraints.txt > $@.partial; \
	elif $(PIP) install --no-deps "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) install --no-deps --index-url $(CPU_INDEX) --retries 1 --timeout 15 "torch==$(TORCH)+cpu" 2>/dev/null; then \
	  cp constraints.txt $@.partial; \
	else echo "No CPU build of torch $(TORCH) found: installing the one that PyPI has."; \
	  grep -v "^triton==" constraints.txt > $@.partial; \
	fi
	$(PIP) install -c $@.partial setuptools
	@mv $@.partial $@

$(VENV)/.demo: pyproject.toml $(VENV)/constraints.txt | requirements
	$(INSTALL) --no-build-isolation -e ".[demo]"
	@touch $@

$(VENV)/oldest/.$(OLDEST_TRANSFORMERS): | $(VENV)/.dev
	rm -rf $(@D)
	$(PIP) install --target $(@D) "transformers==$(OLDEST_TRANSFORMERS)" "numpy==$$(sed -n 's/^numpy==//p' constraints.txt)"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/constraints.txt | requirements
	$(INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@ $(VENV)/.demo
