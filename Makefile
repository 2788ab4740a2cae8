# make setup | reproduce | test [SLOW=1] | trust | lint
# PYTHON chooses the interpreter, JOBS how many tests run at a time.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
JOBS ?= 2

.PHONY: setup reproduce test trust trust-crash trust-concurrency trust-fuzz trust-mutation trust-coverage trust-soak \
	trust-reconcile trust-slurm trust-claims lint clean

setup: $(VENV)/.installed

# A new .venv where pyproject.toml or constraints.txt has changed its wants; nothing at all where they have not.
$(VENV)/.installed: pyproject.toml constraints.txt
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14; do \
		if "$$python" -c "$$usable" 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -x $(BIN)/python ] && $(BIN)/python -c "$$usable" 2>/dev/null; then :; \
	elif [ -z "$$found" ]; then \
		echo "error: no Python 3.11 or newer with venv was found (on Debian and Ubuntu: apt-get install python3-venv; or: make setup PYTHON=/path/to/python)" >&2; exit 2; \
	else echo "making $(VENV) with $$($$found --version)"; rm -rf $(VENV); "$$found" -m venv $(VENV); fi
	@echo "installing the versions of constraints.txt into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	@touch $@

reproduce: setup
	@$(BIN)/sdae-cli reproduce

# The slow tests (minutes, and a LaTeX engine) come with SLOW=1, as in .ci/run.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(if $(SLOW),,-m "not slow")

# The long campaigns, outside CI, hours in all; each is a target of its own. Crash, concurrency, fuzz, mutation and
# reconcile go on where they were cut off, the others begin anew. What a release tells of is copied to results/trust,
# and docs/make_reliability.py makes the page of it.
TRUST ?= trust
PLAY := @mkdir -p $(TRUST) && OMP_NUM_THREADS=1 $(BIN)/python

trust: trust-crash trust-concurrency trust-fuzz trust-mutation trust-coverage trust-soak trust-reconcile trust-slurm trust-claims

trust-crash: setup
	$(PLAY) tests/crash_campaign.py --out $(TRUST)/crash.json --every kill power --kills 500
trust-concurrency: setup
	$(PLAY) tests/concurrency_campaign.py --rounds 1000 --out $(TRUST)/concurrency.json
trust-fuzz: setup
	$(PLAY) tests/fuzz_campaign.py --minutes 10 --out $(TRUST)/fuzz.json
trust-mutation: setup
	$(PLAY) tests/mutation_campaign.py --count 300 --out $(TRUST)/mutation.json
trust-coverage: setup
	$(PLAY) tests/coverage_campaign.py --jobs $(JOBS) --out $(TRUST)/coverage.json
trust-soak: setup
	$(PLAY) tests/soak.py --minutes 120 --out $(TRUST)/soak.json
trust-reconcile: setup
	$(PLAY) tests/test_reconcile.py --schedules 10000
trust-slurm: setup
	$(PLAY) tests/test_slurm_real.py --faults 200
trust-claims: setup
	$(PLAY) docs/make_claims.py --universes 2000 --seed $$RANDOM --check

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r sdae ablations slurm analysis cli
	-$(BIN)/python tests/audit_packages.py  # an advisory of today is told; it must not turn a tested commit red

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
