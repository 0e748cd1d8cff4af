# Everything a fresh Debian 12+ machine needs is installed by the targets themselves.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.complete

.PHONY: test setup clean

test: $(STAMP)
	$(PYTHON) -m pytest

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile tests/packages.txt tests/setup
	tests/setup $(VENV)
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
