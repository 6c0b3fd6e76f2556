# The two commands are `make serve` and `make test`. Each recipe is one plain line that can be typed by hand.
# Variables: make serve PORT=9000 ARGS="--model facebook/opt-125m"    make test PYTEST="tests/core -x"    make PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
ARGS ?=
PYTEST ?=

.DEFAULT_GOAL := help
.PHONY: help serve test clients lint bench lab notebooks docs clean

help:  ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

serve: $(VENV)/.installed  ## install once, download the default model once, serve it on PORT (8000)
	$(VENV)/bin/minivllm serve --port $(PORT) $(ARGS)

test: $(VENV)/.installed-test  ## install the test extra once, run the whole suite (or PYTEST="...") in one process per core
	$(VENV)/bin/pytest -n auto --dist loadfile $(PYTEST)

clients: $(VENV)-clients/.installed  ## install third-party clients once in a separate environment, test them against the server
	$(VENV)-clients/bin/pytest tests/clients $(PYTEST)

lint: $(VENV)/.installed-lint  ## ruff, and mypy (strict on the control plane)
	$(VENV)/bin/ruff check . && $(VENV)/bin/mypy

bench: $(VENV)/.installed  ## the same work under minivllm and Hugging Face generate: a table and a JSON line
	$(VENV)/bin/python -m bench.run $(ARGS)

lab: $(VENV)/.installed-notebooks  ## open the notebooks in a browser
	$(VENV)/bin/jupyter lab notebooks

notebooks: $(VENV)/.installed-test  ## run the notebooks and save them with their outputs (all, or ARGS="notebooks/01_....ipynb")
	$(VENV)/bin/python notebooks/execute.py $(ARGS)

docs: $(VENV)/.installed-docs  ## build the documentation as a site with search: build/docs/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --config-file docs/site/mkdocs.yml

clean:  ## remove the environment and the tools' caches (the model cache in ~/.cache/minivllm stays)
	rm -rf $(VENV) $(VENV)-clients build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Through a symbolic link, an editable install would change the environment of another clone.
NO_LINK = @test ! -L $(1) || { echo "$(1) is a symbolic link, so this would change another environment: remove it, or set VENV" >&2; exit 1; }

# One environment. A stamp file is newer than pyproject.toml and constraints.txt if their packages are installed.
$(VENV)/bin/python:
	$(call NO_LINK,$(VENV))
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'minivllm needs Python 3.11 or newer, and $(PYTHON) is ' + sys.version.split()[0] + ': try make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(call NO_LINK,$(VENV))
	$(VENV)/bin/python -m pip install --editable . --constraint constraints.txt && touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(call NO_LINK,$(VENV))
	$(VENV)/bin/python -m pip install --editable ".[$*]" --constraint constraints.txt && touch $@

# The clients need other versions of openai and of its dependencies than constraints.txt has.
$(VENV)-clients/.installed: pyproject.toml
	$(call NO_LINK,$(VENV)-clients)
	$(PYTHON) -m venv $(VENV)-clients && $(VENV)-clients/bin/python -m pip install --editable ".[clients]" && touch $@
