# The two commands: `make demo` and `make test`. Each does all of its own set-up.
# .venv comes from the hash-checked lock; LOCK=cuda12 takes the pair built for CUDA 12.

LOCK ?= default
IMAGE ?= rtshpc.sif
BASE ?= oci
DETECTRON2 ?=
FLAGS ?=
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed-$(LOCK)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full check image lock apt apt-full clean help

help:
	@echo "make demo       the main job on this machine: generated scenes to a report (under 8 minutes on 2 cores)"
	@echo "make test       style, types, layers, size limits, then the tests (under 20 minutes)"
	@echo "make test-full  the tests, with more kills and more random layouts"
	@echo "make check      style, types, layers and size limits alone"
	@echo "make image      the container image (needs apptainer; BASE=debootstrap without a registry; docs/containers.md)"
	@echo "make lock       resolve requirements/*.txt anew (needs uv)"

$(STAMP): requirements/$(LOCK).txt pyproject.toml
	@if [ -z "$(PYTHON)" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq python3 python3-venv >/dev/null; fi
	@python=$(PYTHON); python=$${python:-python3}; \
		$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rtshpc needs Python 3.11 or newer with venv (Debian: apt-get install python3 python3-venv)"; exit 2; }; \
		$$python -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/$(LOCK).txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# $(call debian,PROGRAM,PACKAGES,TESTS): what tests need, only as root on Debian; elsewhere they are skipped and say so.
debian = if ! command -v $(1) >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(2) >/dev/null \
	|| echo "$(1) could not be installed: $(3) will be skipped and say so"; fi

# A browser to look at the report with; Slurm's daemons for a cluster of the tests' own; Pango, which writes PDFs.
apt:
	@$(call debian,chromium,chromium,the browser tests)
	@$(call debian,slurmctld,--no-install-recommends slurmctld slurmd slurm-client,the cluster tests)
	@$(call debian,shellcheck,--no-install-recommends shellcheck,the check of the batch templates)
	@if ! ldconfig -p 2>/dev/null | grep -q libpangoft2-1.0.so.0 && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends libpangoft2-1.0-0 libharfbuzz-subset0 >/dev/null \
		|| echo "Pango could not be installed: tests of the PDF will be skipped and say so"; fi

# A database for the cluster's accounting.
apt-full: apt
	@$(call debian,slurmdbd,--no-install-recommends slurmdbd mariadb-server,the accounting test)

demo: $(STAMP)
	$(BIN)/python -m rtshpc.launch sweep demo

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/house

test: check apt
	$(BIN)/python -m pytest -m "not slow and not full" -rs --ignore tests/house
	$(BIN)/python -m pytest -m "slow and not full" -rs

test-full: check apt-full
	$(BIN)/python -m pytest -m "not slow and not full" -rs --ignore tests/house
	$(BIN)/python -m pytest -m "slow or full" -rs

image:
	containers/build.sh --lock $(LOCK) --base "$(BASE)" --detectron2 "$(DETECTRON2)" --output "$(IMAGE)" $(FLAGS)

lock:
	for l in default cuda12; do uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --no-annotate --extra tasks --extra dev --extra pdf --extra benchmarks pyproject.toml requirements/$$l.in \
		-o requirements/$$l.txt || exit 1; done

clean:
	rm -rf .venv runs .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
