# The commands of the house. `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
RECIPES := demo subject-dreambooth-whole subject-textual-inversion subject-pivotal-tuning style-lora

.PHONY: install demo test kernels check format bench clean

install: .venv/installed

.venv/installed: pyproject.toml .ci/constraints.txt
	@echo "installing into .venv, which takes a few minutes the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/finetune train demo --overwrite

# A worker for each core, each with a file at a time: its tests share what they have trained.
test: install
	$(BIN)/python -m pytest -n logical --dist loadfile

# A GPU's kernels without a GPU, in Triton's interpreter; in a folder of its own, for torch brings the one that it wants.
TRITON := triton==3.9.0
kernels: install
	@test -d .venv/$(TRITON) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/$(TRITON) $(TRITON)
	TRITON_INTERPRET=1 PYTHONPATH=.venv/$(TRITON) $(BIN)/python -m pytest -n logical tests/test_gpu.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

bench: install
	$(BIN)/finetune bench $(RECIPES)

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv outputs
