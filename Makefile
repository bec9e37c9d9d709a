# make demo      the whole system on embedded data, on the CPU
# make test      all tests
# make check     formatting, lint, types
# make torture   N=200 SEED=0: training killed N times on each engine; every bit must come out the same
# make mutation  known defects, and mistakes of the science, put in one by one: the tests must notice each (minutes)
PYTHON ?= python3
N ?= 200
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
TESTS := $(VENV)/share/transformers-source

.PHONY: demo test check torture mutation format clean

demo: $(READY)
	$(BIN)/polyglu demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

torture: $(READY)
	mkdir -p runs && folder=$$(mktemp -d runs/torture.XXXX) && mkdir $$folder/plain $$folder/zero && \
	export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 && \
	$(BIN)/python tests/integration/torture.py $$folder/plain --kills $(N) --seed $(SEED) && \
	$(BIN)/python tests/integration/torture.py $$folder/zero --kills $(N) --seed $(SEED) --ranks 2 && \
	rm -rf $$folder

mutation: $(READY)
	$(BIN)/python tests/mutation/mutate.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs/demo

# transformers' own tests are in its source distribution alone. Without it (no network), tests/conformance is skipped.
# Torch is named first and exactly, so that the pinned version is installed and no other.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all,dev]'
	rm -rf $(TESTS) && mkdir -p $(TESTS)
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest $(TESTS) "$$(grep '^transformers==' constraints.txt)" && \
		tar -xzf $(TESTS)/*.tar.gz -C $(TESTS) --strip-components=1 && rm $(TESTS)/*.tar.gz || \
		echo "transformers' own tests could not be fetched: tests/conformance will be skipped" >&2
	touch $(READY)
