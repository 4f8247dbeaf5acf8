# Every target works in a fresh clone: it makes its own virtual environment from an exact lock.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
FROZEN := runs/one_negative
FURNITURE := sweethome3d-furniture
BIN := $(VENV)/bin
LIBTPU := .work/libtpu
BUCKETS := .work/buckets
CLIP_BENCHMARK := .work/clip_benchmark
BROWSER := .work/browser
HAS_BROWSER := { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
INSTALL_BROWSER := apt-get install -qq --no-install-recommends chromium >/dev/null 2>&1

.DEFAULT_GOAL := help
.PHONY: help docs docs-build quickstart warm-start compare costs scaling encoders train-step input-pipeline retrieval search-speed one-negative mutual-information soak test test-long format lock clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 28

quickstart: $(VENV)/installed  ## train on the built-in pairs and write the report
	$(BIN)/python -m clip_lite_jax.main --config configs/quickstart.py --workdir $(WORKDIR)

warm-start: $(VENV)/installed-towers  ## the same pairs between frozen pretrained encoders
	$(BIN)/python -m clip_lite_jax.main --config configs/warm_start.py --workdir runs/warm_start

compare: $(VENV)/installed  ## JSD against InfoNCE at equal budget, three seeds each (an hour)
	$(BIN)/python -m benchmarks.compare

costs: $(VENV)/installed  ## what negatives cost in time, memory and traffic (an hour)
	$(BIN)/python -m benchmarks.objectives

scaling: $(VENV)/installed $(LIBTPU)/installed  ## what devices send and hold, for up to 256 TPU chips that need not be there (half an hour)
	TPU_LIBRARY_PATH=$(LIBTPU)/libtpu/libtpu.so $(BIN)/python -m benchmarks.scaling

encoders: .venv-peers/installed $(VENV)/installed  ## a step of the encoders beside PyTorch's (half an hour)
	$(BIN)/python -m benchmarks.encoders

train-step: .venv-peers/installed $(VENV)/installed  ## the loop over its step, and steps beside open_clip's (half an hour)
	$(BIN)/python -m benchmarks.train_step

input-pipeline: .venv-peers/installed $(VENV)/installed-test  ## pictures read in a second beside PyTorch's readers (half an hour)
	$(BIN)/python -m benchmarks.input_pipeline

retrieval: .venv-peers/installed $(CLIP_BENCHMARK)/installed  ## recall of large galleries beside clip_benchmark's (ten minutes)
	$(BIN)/python -m benchmarks.retrieval

search-speed: $(VENV)/installed-test  ## searches among 100,000 embeddings, exact and by FAISS (needs make warm-start)
	$(BIN)/python -m benchmarks.search --model runs/warm_start --drawings 1000 --rows 20000,50000,100000

one-negative: $(FROZEN)/features.npz $(VENV)/installed  ## one negative against the batch on frozen features (hours)
	$(BIN)/python -m benchmarks.one_negative

mutual-information: $(VENV)/installed  ## estimators where the truth is known (half an hour)
	$(BIN)/python -m benchmarks.mutual_information

soak: $(VENV)/installed  ## whether the memory of a long run grows (two hours)
	$(BIN)/python -m benchmarks.soak

# Three workers for two cores: some tests wait for processes, clocks and browsers.
test: $(VENV)/installed-test $(VENV)/installed-towers $(LIBTPU)/installed $(BROWSER)/installed  ## format, lint, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 3

test-long: $(VENV)/installed-test $(VENV)/installed-towers $(LIBTPU)/installed $(BUCKETS)/installed $(CLIP_BENCHMARK)/installed .venv-beam/installed .venv-peers/installed  ## what takes too long for every change (hours)
	FUZZ_EXAMPLES=3000 $(BIN)/python -m pytest -n 2 tests/long tests/test_fuzz_readers.py
	PYTHONPATH=$(BUCKETS) $(BIN)/python -m pytest tests/long/test_s3.py tests/long/test_gcs.py tests/long/test_http.py
	$(MAKE) train-step soak

# The variable silences what the theme says of a successor of mkdocs.
docs: $(VENV)/installed-test  ## show the documentation at http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-build: $(VENV)/installed-test  ## write it to .work/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/installed-test  ## format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Raises every pin to the newest release that setup.cfg allows, for Python 3.11 to 3.13.  Images and TPU
# VMs have 3.11 and keep to what requirements.lock says, where extras allow it.
lock:  ## renew the exact locks, *.lock (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --upgrade setup.cfg -o requirements.lock
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --upgrade --extra test \
		-c requirements.lock setup.cfg -o requirements-test.lock
	uv pip compile --quiet --universal --python-version 3.11 --no-annotate --upgrade --extra beam setup.cfg \
		-o requirements-beam.lock
	for devices in cpu cuda tpu; do cp requirements.lock launch/$$devices.lock && uv pip compile --quiet \
		--python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-annotate --extra gcs --extra s3 \
		$$(test $$devices = cpu || echo --extra $$devices) setup.cfg -o launch/$$devices.lock || exit 1; done

clean:  ## remove the environment and caches, not the runs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

$(VENV)/installed: requirements.lock setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
		sys.exit(0 if (3, 11) <= v < (3, 14) else \
		"Python 3.11 to 3.13 is needed, %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(VENV)/installed-test: requirements-test.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.lock
	@touch $@

# Without what they ask for, which is PyTorch: their files are read without it.
$(VENV)/installed-towers: requirements-towers.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-towers.txt
	@touch $@

# Not in the environment: Apache Beam asks for older releases of much else.
.venv-beam/installed: requirements-beam.lock setup.cfg
	$(PYTHON) -m venv .venv-beam
	.venv-beam/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-beam.lock
	.venv-beam/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# Not in the environment: with libtpu in it every `import jax` would look for a TPU.
$(LIBTPU)/installed: requirements-plan.txt $(VENV)/installed
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# Not in the environment: servers and clients of object storage ask for much else.
$(BUCKETS)/installed: requirements-buckets.txt $(VENV)/installed
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# Tests of pages need Chromium or Chrome: the system's, or Debian's where this may install it.
$(BROWSER)/installed:
	@mkdir -p $(@D)
	@$(HAS_BROWSER) || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || { \
		export DEBIAN_FRONTEND=noninteractive; $(INSTALL_BROWSER) || { apt-get update -qq && $(INSTALL_BROWSER); }; } || true
	@if $(HAS_BROWSER); then touch $@; else \
		echo 'no Chromium or Chrome: tests of pages are skipped; install one and run again'; fi

# Not in the environment: it asks for PyTorch, which its functions find in that of the peers.
$(CLIP_BENCHMARK)/installed: benchmarks/requirements-clip-benchmark.txt $(VENV)/installed
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

# Pretrained towers run in an environment of their own: they need torch.
$(FROZEN)/features.npz: .venv-peers/installed $(FROZEN)/furniture/Scopia.sh3f
	.venv-peers/bin/python -m benchmarks.frozen_towers

$(FROZEN)/furniture/Scopia.sh3f:
	mkdir -p $(@D)
	cd $(@D) && apt-get download $(FURNITURE)=1.8-1
	dpkg-deb --fsys-tarfile $(@D)/$(FURNITURE)_1.8-1_all.deb \
		| tar -x -m -C $(@D) --strip-components=5 ./usr/share/sweethome3d/furniture

.venv-peers/installed: benchmarks/requirements-frozen.txt benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r benchmarks/requirements-peers.txt
	@touch $@
