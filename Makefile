# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test suite test-oldest test-newest lint format kernels-report compatibility wheel clean
.PHONY: bench bench-prediction bench-prediction-host bench-disagreement bench-lora bench-step bench-host bench-compare
.PHONY: benchmarks-page

demo: $(VENV)/.installed  ## train MiniLM on TREC with mixed and uniform ranks; a report
	$(BIN)/adarank demo

.PHONY: help
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

test: $(VENV)/.installed  ## the tests, everything set up on the way
	$(MAKE) suite

suite: RUN ?= $(BIN)/python
suite:
	$(RUN) -m pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(RUN) -m pytest -n 2 tests/interpreter

# The suite, which branches of both packages it takes, and what share of them: about 1.5 times the
# suite's time. Triton kernels count as what the interpreter ran of them.
.PHONY: coverage
coverage: $(VENV)/.installed  ## the tests, and the share of branches they take
	rm -rf build/coverage && mkdir -p build/coverage
	$(MAKE) suite RUN="$(BIN)/python -m coverage run"
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage json --quiet -o build/coverage/coverage.json
	$(BIN)/python -m tests.reliability.coverage build/coverage/coverage.json

# Mutation tests of allocation, Philox and the ops; an hour. Some of them:
# make mutants ARGS="--only allocation --minutes 5"; with --more it goes on where the last run ended
.PHONY: mutants
mutants: $(VENV)/.installed  ## change the code a little; which changes does no test notice?
	$(BIN)/python -m tests.reliability.mutants $(ARGS)

# The C++ operators' tests with AddressSanitizer and UndefinedBehaviorSanitizer, built with g++ into a
# cache of their own. Minutes; not part of the suite.
.PHONY: sanitize
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: export CXX = $(CURDIR)/tests/kernels/sanitized-c++
sanitize: export PYTHONPATH = $(CURDIR)/kernels
sanitize: $(VENV)/.installed  ## tests of the C++ operators with sanitizers
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && export ADARANK_CACHE=$$cache && \
	preload="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" && \
	LD_PRELOAD="$$preload" $(BIN)/python -c \
		"from adarank_kernels.runtime import native; assert native.operators() is not None" && \
	LD_PRELOAD="$$preload" $(BIN)/python -m pytest --capture=sys -x \
		tests/kernels/test_products.py tests/kernels/test_grouped_lora.py

# The suite with the lower bounds of pyproject.toml, and with the newest releases the index serves.
# Bounds are read from every quoted "name>=version" there: the build's, the dependencies' and the
# extras'. The extra "dev" is not installed: no test needs its tools.
test-oldest:  ## the tests with the oldest versions that are supported
	$(PYTHON) -m venv $(VENV)-oldest
	grep -o '"[[:alnum:]][[:alnum:]._-]*>=[0-9.]*' pyproject.toml \
		| sed 's/"//; s/>=/==/' > $(VENV)-oldest/bounds.txt
	$(VENV)-oldest/bin/pip install --quiet --constraint $(VENV)-oldest/bounds.txt --editable '.[test]'
	$(MAKE) suite BIN=$(VENV)-oldest/bin

test-newest:  ## the tests with the newest versions on the index
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	$(MAKE) suite BIN=$(VENV)-newest/bin

# What the suite tries for seconds, for hours: kills, full disks, exceptions, changed files, growth,
# threads, processes. A fault ends it with 1, after all of them. make soak MINUTES=20 shares the time;
# make soak MINUTES=5 ARGS="--only kills growth" runs some. Renews docs/reliability.md.
.PHONY: soak reliability-page
soak: $(VENV)/.installed  ## kills, full disks, exceptions, for as long as wanted
	PYTHONPATH=.:kernels $(BIN)/python -m tests.reliability.soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

# docs/reliability.md, of the figures in bench/results; nothing is tried.
reliability-page: $(VENV)/.installed
	$(BIN)/python -m bench.reliability_page

lint: $(VENV)/.installed  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/.installed  ## ruff, mending what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every benchmark renews docs/benchmarks.md, which a test compares with bench/results.
bench: $(VENV)/.installed bench-lora bench-step bench-host bench-compare  ## every benchmark, and docs/benchmarks.md
	$(BIN)/python -m pytest bench
	$(MAKE) benchmarks-page

bench-prediction: $(VENV)/.installed
	$(BIN)/python -m pytest bench/bench_prediction.py -s
	$(MAKE) benchmarks-page

# Host time of a prediction's probe beside an earlier commit's; no card.
bench-prediction-host: $(VENV)/.installed
	PYTHONPATH=.:kernels $(BIN)/python -m bench.prediction_host $(ARGS)
	$(MAKE) benchmarks-page

bench-disagreement: $(VENV)/.installed
	$(BIN)/python -m pytest bench/bench_disagreement.py -s
	$(MAKE) benchmarks-page

bench-lora: $(VENV)/.installed
	$(BIN)/python -m bench.bench_lora
	$(MAKE) benchmarks-page

bench-step: $(VENV)/.installed
	$(BIN)/python -m bench.bench_step
	$(MAKE) benchmarks-page

# Host time of the GPU path with launches stubbed; no card.
bench-host: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -m bench.bench_host $(ARGS)
	$(MAKE) benchmarks-page

bench-compare: $(VENV)/.installed
	$(BIN)/python -m bench.bench_compare $(ARGS)
	$(MAKE) benchmarks-page

# docs/benchmarks.md, of the figures in bench/results; nothing is timed.
benchmarks-page: $(VENV)/.installed
	$(BIN)/python -m bench.benchmarks_page

# The experiments behind docs/results.md: hours, in runs that may be stopped and go on. Options:
# make study ARGS="--only minilm-trec-r2 --minutes 30"; make study ARGS=--list
.PHONY: study results-page
study: $(VENV)/.installed  ## the experiments behind docs/results.md: hours
	$(BIN)/python -m bench.study $(ARGS)
	$(MAKE) results-page

results-page: $(VENV)/.installed
	$(BIN)/python -m bench.results_page

# On a machine with a CUDA or ROCm card: checks and times everything, writes one file to send back.
# Elsewhere it says that there is no GPU. Options: make bench-gpu ARGS="--quick --only blocks"
.PHONY: bench-gpu gpu-page roofline
bench-gpu: $(VENV)/.installed  ## check and time everything on a CUDA or ROCm card
	PYTHONPATH=.:kernels $(BIN)/python -m bench.gpu $(ARGS)

# docs/gpu.md, of the files of all cards in bench/results/gpu; nothing is timed.
gpu-page: $(VENV)/.installed
	PYTHONPATH=.:kernels $(BIN)/python -m bench.gpu.page

# Projected times on GPUs that need not be here, counted from bytes and FLOPs; nothing is timed.
roofline: $(VENV)/.installed  ## projected times on cards that nobody measured here
	$(BIN)/python -m bench.roofline

# Compiles the Triton kernels for GPUs that need not be here; nothing is timed.
kernels-report: $(VENV)/.installed  ## compile the Triton kernels for cards that are not here
	$(BIN)/python -m bench.kernels_report

# Takes every architecture through every step; exits with 1 if a cell of the table fails.
compatibility: $(VENV)/.installed  ## every architecture through every step
	OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -m tests.conformance.compatibility

# PEFT's own tests, plain, accelerated, graphed and graphed by recorded operators; its source is
# fetched, or PEFT_TESTS names a folder. The tests' other packages go into an environment of their
# own, on top of $(VENV). Options: make peft-suite ARGS="--only mixed --how graphed -n 2"
.PHONY: peft-suite
peft-suite: $(VENV)-peft-suite/.installed  ## PEFT's own tests, plain, accelerated and graphed
	$(VENV)-peft-suite/bin/python -m tests.peft_suite.run $(if $(PEFT_TESTS),--tests $(PEFT_TESTS)) $(ARGS)

$(VENV)-peft-suite/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --without-pip $(VENV)-peft-suite
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
		> $$($(VENV)-peft-suite/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	$(VENV)-peft-suite/bin/python -m pip install --quiet attrs diffusers parameterized protobuf \
		scikit-learn sentencepiece
	touch $@

# The random cases of tests/adapters/test_differential.py in every way: CASES of each; some minutes
# on two cores.
.PHONY: differential
differential: CASES ?= 500
differential: $(VENV)/.installed  ## random models and orders of steps beside PEFT, in every way
	ADARANK_DIFFERENTIAL=$(CASES) $(BIN)/python -m pytest -n 2 --dist worksteal \
		tests/adapters/test_differential.py

# DeepSpeed's ZeRO-2 and ZeRO-3 with two CPU processes, beside plain PEFT, in an environment of its
# own: on demand.
.PHONY: deepspeed
deepspeed: $(VENV)-deepspeed/.installed  ## ZeRO-2 and ZeRO-3 with two CPU processes, beside PEFT
	$(VENV)-deepspeed/bin/python -m tests.deepspeed.check

$(VENV)-deepspeed/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --without-pip $(VENV)-deepspeed
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
		> $$($(VENV)-deepspeed/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/python -m pip install --quiet --no-build-isolation deepspeed
	touch $@

wheel: $(VENV)/.installed  ## build dist/adarank_fast-*.whl
	$(BIN)/python -m build --wheel

# The examples, run, and the site in build/site, notebooks run on the way; a warning is an error.
.PHONY: docs
docs: export OMP_NUM_THREADS = 1
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.installed  ## run the examples, build the site in build/site
	@for script in $(filter-out examples/toy.py,$(wildcard examples/*.py)); do echo $$script; \
		$(BIN)/python $$script > build-example.log 2>&1 || { cat build-example.log; exit 1; }; \
	done; rm -f build-example.log
	$(BIN)/mkdocs build --quiet
	@echo "the site is build/site/index.html; with search: $(PYTHON) -m http.server -d build/site"

# The dependencies: do they go together, under which licences, and (with a network) are faults known.
.PHONY: audit
audit: $(VENV)/.installed  ## do the pins go together; licences; known faults
	$(BIN)/python -m pip check
	$(BIN)/python -m tests.release.licences
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# A wheel and an sdist, built twice to the same bytes, judged, and used in empty environments. Other
# Pythons, everything installed: make release-check ARGS="--python python3.12"
.PHONY: release-check
release-check: $(VENV)/.installed  ## build wheel and sdist, try them in empty environments
	rm -rf build/release
	mkdir -p build/release
	$(BIN)/python -m tests.release.build build/release
	$(BIN)/python -m twine check --strict build/release/*
	$(BIN)/check-wheel-contents build/release/*.whl
	$(BIN)/python -m tests.release.check build/release $(ARGS)

# The environment is made once, and again when what it is made from changes.
# constraints.txt pins every package; pyproject.toml keeps the lower bounds.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adarank-fast needs Python \
	3.11 or newer, $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:  ## remove environments and what was built
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks \
		.import_linter_cache .hypothesis
