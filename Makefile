# The commands of the house. `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check format bench clean

install: .venv/installed

# Compiled at install, so that the first start is not the slow one.
.venv/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib finetune || true
	touch $@

demo: install
	$(BIN)/finetune train demo --overwrite

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv outputs
