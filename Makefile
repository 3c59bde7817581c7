# make demo      the whole method on a small problem, from scratch, on CPUs
# make test      linters, type checks and all tests that are not slow
# make test-fast linters, type checks and the tests that start no ranks and no daemons: a minute or two
# make soak      60 injected faults and the slow tests; an hour or so
# make bench     speed and memory against lm-eval, Trainer and TRL, and two ranks against one; needs make smollm2
# make docs      docs/ as a website in site/, with links and anchors checked
# make release   the wheel and the sdist of the last commit in dist/, checked; nothing is uploaded or pushed
# make smollm2   a real pretrained model of 135M parameters into models/
# make reference docs/recipe.md and the recipe's JSON schema, from the code
# Each creates .venv first, which takes a few minutes the first time.

SHELL := /bin/bash
python := $(shell command -v python3.11 || command -v python3)

.PHONY: demo test test-fast soak bench docs release smollm2 reference

demo: .venv/.installed
	.venv/bin/atlantis-ds run recipes/demo.yaml --ranks 2

# All checks run, even if some fail. .venv/bin is on the PATH because the tests call ninja, mpirun and others by name.
# Two workers; a file of tests is run by one of them (tests/conftest.py).
two := -n 2 --dist loadgroup
lint := 'ruff check' 'ruff format --check' 'mypy atlantis_ds'
test: checks := tools/install_test_services.sh $(lint) 'pytest $(two) -m "not slow"'
test-fast: checks := $(lint) 'pytest $(two) -m "not slow and not ranks"'
test test-fast: .venv/.installed
	@export PATH="$(CURDIR)/.venv/bin:$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1; failed=; \
	for check in $(checks); do \
		echo "== $$check"; eval "$$check" || failed+="; $$check"; \
	done; \
	if [ -n "$$failed" ]; then echo "make $@: FAILED: $${failed#; }"; exit 1; fi; \
	echo "make $@: all passed"

soak: .venv/.installed
	export PATH="$(CURDIR)/.venv/bin:$$PATH" HF_HUB_OFFLINE=1; tools/install_test_services.sh && \
		python tools/soak.py --faults 60 && pytest -m slow

bench: .venv/.installed .venv-bench/.installed
	.venv-bench/bin/python tools/bench/cpu.py
	.venv/bin/python tools/bench/scaling.py speedup --mode lora --zero zero1 --pairs 2 --ranks 1 2 \
		--plot scaling.png

docs: .venv-docs/.installed
	.venv-docs/bin/mkdocs build --strict

release: .venv/.installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" tools/release.sh

smollm2: .venv/.installed
	.venv/bin/python tools/get_smollm2.py

reference: .venv/.installed
	.venv/bin/atlantis-ds schema > atlantis_ds/config/recipe.schema.json
	.venv/bin/atlantis-ds schema --markdown > docs/recipe.md

# torch first, with its exact version: otherwise pip installs a build with gigabytes of CUDA libraries.
.venv/.installed: constraints.txt pyproject.toml setup.py
	$(python) -m venv .venv
	.venv/bin/pip install -q -c constraints.txt torch==2.13.0
	.venv/bin/pip install -q -c constraints.txt -e '.[test,qlora,gguf]'
	touch $@

.venv-bench/.installed: constraints.txt tools/bench/requirements.txt
	$(python) -m venv .venv-bench
	.venv-bench/bin/pip install -q -c constraints.txt torch==2.13.0
	.venv-bench/bin/pip install -q -c constraints.txt -r tools/bench/requirements.txt
	touch $@

.venv-docs/.installed: docs/requirements.txt
	$(python) -m venv .venv-docs
	.venv-docs/bin/pip install -q -r docs/requirements.txt
	touch $@
