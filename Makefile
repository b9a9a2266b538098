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

# The README's picture of the playground, with two encoders of the micro model: that of `make quickstart`, and one of steps before it, from
# craftor train recipes/micro_textcraftor.toml --out runs/middle --set name=middle --set task.window='{start = 4, stop = 12, gradient_path = "direct"}' \
#   --set task.rewards.clip.weight=60 --set task.rewards.aesthetic.weight=2 --set optimizer.lr=1e-4 --set run.num_steps=20
ENCODERS ?= late=runs/quickstart/bundle middle=runs/middle/bundle
.PHONY: playground-picture
playground-picture: .venv/.dev
	$(BIN)/python -W ignore tests/playground_picture.py recipes/playground.png $(ENCODERS)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Two files at a time keep two cores busy, in the order of tests/conftest.py. Three took longer in all: they are in each other's way.
test: .venv/.dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

# A node, a host and a store that are lost and come back: three tests.
test-slow: .venv/.dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m slow

.PHONY: claims
# Trains every method three times, and goes on where it was interrupted; then writes the README's table.
claims: .venv/.dev
	$(BIN)/craftor claims --json recipes/claims.json
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown claims

# Benchmarks write runs/bench/<name>.json and the README's table of it. TRL's last release with AlignPropTrainer is no dependency of ours: a folder.
bench-train: .venv/.dev
	test -d runs/bench/trl || $(PIP) install --quiet --no-deps --target runs/bench/trl trl==0.23.1
	PYTHONPATH=tests:runs/bench/trl $(BIN)/python -W ignore -m benchmarks.train
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown train

# On a GPU, where one is to be had: shapes of Stable Diffusion 1.5 and of the public reward models, random weights.
.PHONY: bench-gpu
bench-gpu: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.gpu

bench-rewards: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.rewards
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown rewards

bench-search: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.search
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown search

bench-scale: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.scale
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown scale

bench-serve: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.serve
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown serve

# Of a run of recipes/micro_object_encoder.toml, and of one like it whose references are their own targets:
# craftor_micro.build object-pairs --self-pairs --seed 2 --out runs/micro/self_pairs, then
# craftor train recipes/micro_object_encoder.toml --out runs/micro-object-self --set data.path=runs/micro/self_pairs
# Others may be compared too, by OBJECT_RUNS="--adapter-only RUN --plain-cnn RUN --no-captions RUN": of runs with --set task.unet='"frozen"', with
# craftor_micro.build plain-cnn and --set task.image_encoder=runs/micro/plain_cnn, and on pairs of craftor_micro.build object-pairs --no-described.
OBJECT_RUNS ?=
.PHONY: bench-object
bench-object: .venv/.dev
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks.object runs/micro-object-encoder --self-pairs runs/micro-object-self $(OBJECT_RUNS)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.markdown object

clean:
	rm -rf .venv runs dist
