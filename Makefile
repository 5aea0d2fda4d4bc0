# One .venv for everything; every target is safe to run twice.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0
export RAY_AUTH_MODE := disabled
# glibc keeps large blocks, idle threads sleep soon: much faster on a CPU (benchmarks/cpu.py)
export MALLOC_ARENA_MAX := 1
export MALLOC_MMAP_MAX_ := 0
export MALLOC_TRIM_THRESHOLD_ := 100000000000
export MALLOC_TOP_PAD_ := 67108864
export GOMP_SPINCOUNT := 10000

.PHONY: setup demo demo-long test test-long test-fast live torture lint generated clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[all,dev]"
	@if command -v npm >/dev/null; then npm install --fetch-timeout=20000 --fetch-retries=1 --no-audit --no-fund --no-package-lock --silent --prefix examples/apps || echo "npm install failed: the JavaScript example will not be tested"; fi
	touch $(STAMP)

demo: setup      ## the whole way on a rendered data set; writes demo/report.html
	$(BIN)/python examples/demo/run.py

demo-long: setup ## the demo, then every recipe and the papers' own tasks on scenes (most of an hour on 2 slow cores)
	$(BIN)/python examples/demo/run.py --long

test: lint       ## everything but what takes minutes each
	$(BIN)/python -m pytest -m "not long" --durations=10 -n 4 --dist loadfile --no-loadscope-reorder

test-long: setup ## what takes minutes each: jobs that are killed, plans that are measured, more bases
	$(BIN)/python -m pytest -m long --durations=10

test-fast: setup ## what needs neither Ray nor an export
	$(BIN)/python -m pytest -m "not slow and not real and not long"

live: setup      ## what needs a Qdrant server: make live QDRANT_URL=http://localhost:6333 [QDRANT_API_KEY=...]
	@test -n "$(QDRANT_URL)" || { echo "make live QDRANT_URL=http://localhost:6333"; exit 2; }
	QDRANT_URL=$(QDRANT_URL) $(BIN)/python -m pytest -m live -v -rs tests/serving
	$(BIN)/python benchmarks/under_fire.py --url $(QDRANT_URL)
	$(BIN)/python tests/torture/kills.py --kills 40 --url $(QDRANT_URL)

torture: setup   ## 100 kills at random moments and 10,000 odd inputs: a quarter of an hour on 2 cores
	timeout 3600 $(BIN)/python tests/torture/kills.py --kills 100
	timeout 3600 $(BIN)/python tests/torture/fuzz.py --inputs 10000

lint: setup      ## format, 110 columns, ruff, pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

generated: setup ## schemas/*.json and docs/cli.md, from the code
	$(BIN)/python -m dclip_qdrant.cli.generated .

clean:
	rm -rf demo
