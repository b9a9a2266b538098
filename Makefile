PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One arithmetic thread per process: workers set their own, and results are reproducible bit for bit.
export OMP_NUM_THREADS ?= 1

.PHONY: install dev quickstart check format test test-slow clean
.PHONY: bench-train bench-rewards bench-search bench-scale bench-serve

install: .venv/.installed
dev: .venv/.dev

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) install --quiet --constraint constraints.txt --group dev
	touch $@

quickstart: .venv/.installed
	$(BIN)/craftor quickstart

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: .venv/.dev
	$(BIN)/pytest -m 'not slow'

# Whole searches, deployments and clusters on this machine, and what befalls them: processes, nodes and networks lost.
test-slow: .venv/.dev
	$(BIN)/pytest -m slow

# Benchmarks write runs/bench/<name>.json and the README's table of it. TRL's last release with AlignPropTrainer is no dependency of ours: a folder.
bench-train: .venv/.dev
	test -d runs/bench/trl || $(PIP) install --quiet --no-deps --target runs/bench/trl trl==0.23.1
	PYTHONPATH=tests:runs/bench/trl $(BIN)/python -W ignore -m benchmarks.train
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown train

bench-rewards: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.rewards
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown rewards

bench-search: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.search

bench-scale: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.scale

bench-serve: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.serve

# Of a run of recipes/micro_object_encoder.toml.
.PHONY: bench-object
bench-object: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.object runs/micro-object-encoder

clean:
	rm -rf .venv runs dist
