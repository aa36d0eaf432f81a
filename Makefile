# Every target takes PYTHON= (use that environment, create nothing). Training targets also take
# LAUNCH=cpu-2 NPROC=2 DATA=folder-or-Hub-id ARGS='key=value ...' FRESH=1 (start over).
PYTHON ?= .venv/bin/python
SETUP := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
# Logs and results that another target has just written make no other commit of the sources.
COMMIT = $(shell git rev-parse HEAD)$(shell git diff --quiet HEAD -- . ':!tests/*.log' ':!tests/*.json' ':!tests/*.png' ':!docs' || echo -dirty)
# $(call LOGGED,COMMAND,FILE): show and keep what a command prints, behind the commit that it looked at.
LOGGED = bash -o pipefail -c '(echo $(COMMIT); $(1)) | sed -u "s|$(CURDIR)/||g" | tee $(2)'
REPRODUCE = $(PYTHON) -m lars reproduce $(if $(LAUNCH),--launch $(LAUNCH)) $(if $(NPROC),--nproc $(NPROC)) \
            $(if $(DATA),--data $(DATA)) $(if $(FRESH),--fresh)

.PHONY: help setup reproduce-demo prove lint test test-long test-environments test-gpu parity launchers scale study tables chaos \
        slurm fuzz reverts bench
help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 24

setup: $(SETUP)  ## make .venv with the exact versions of requirements.txt

.venv/ready: requirements.txt pyproject.toml lars/exact/kernels.c
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

reproduce-demo: $(SETUP)  ## train both demo recipes on this machine, judge them, prove one run at any number of processes
	$(REPRODUCE) recipes/demo/alexnet.yaml recipes/demo/resnet50.yaml $(ARGS)
	$(PYTHON) -m lars prove recipes/demo/alexnet.yaml

reproduce-%: $(SETUP)  ## train recipes/<model>/<what>.yaml, as in reproduce-resnet50-lars-b32k-90ep
	$(REPRODUCE) recipes/$(firstword $(subst -, ,$*))/$(patsubst $(firstword $(subst -, ,$*))-%,%,$*).yaml $(ARGS)

prove: $(SETUP)  ## 30 steps of the demo at 1, 2 and 4 processes, and killed and resumed: one hash
	$(PYTHON) -m lars prove recipes/demo/alexnet.yaml

lint: $(SETUP)  ## rules of style and lines of at most 120 characters (ruff), and types (mypy)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: lint  ## what CI runs: `make lint` and the tests
	$(PYTHON) -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(SETUP)  ## tests that do not fit into `make test`; the log is committed, another one for ATEN_CPU_CAPABILITY=avx2
	$(call LOGGED,$(PYTHON) -m pytest -m long -n 2 --dist loadfile --no-loadscope-reorder -vv --no-header,\
	    tests/long$(addprefix -,$(ATEN_CPU_CAPABILITY)).log)

test-environments: $(SETUP)  ## `make test` under five settings of instruction set and threads; the log is committed
	$(call LOGGED,bash tests/environments.sh $(PYTHON),tests/environments.log)

test-gpu: $(SETUP)  ## does this machine's GPU keep every promise? PART=1 to PART=4; DEVICE=cpu tries the script without one
	$(PYTHON) tests/gpu/check.py $(if $(DEVICE),--device $(DEVICE)) $(if $(PART),--part $(PART))

parity: $(SETUP)  ## one step on every engine at 1, 2 and 3 processes against a control; writes docs/engines.md's table
	$(PYTHON) tests/distributed/parity.py

launchers: $(SETUP)  ## one hash under every launcher and on emulated CPUs (qemu-x86_64, half an hour); writes portable.json
	$(PYTHON) -m tests.distributed.portable

scale: $(SETUP)  ## what processes tell each other, counted at 2 to 32 and simulated up to 2,048; writes docs/clusters.md's table
	$(PYTHON) -m tests.distributed.scale

study: $(SETUP)  ## CIFAR-10 at batch 256 to 16,384 with four optimizers, hours; trains what the ledger lacks, FRESH=1 all
	$(PYTHON) recipes/study/study.py $(if $(DATA),--data $(DATA)) $(if $(FRESH),--fresh) $(ARGS)

tables: $(SETUP)  ## write the READMEs' tables and the study's figures from recipes, the plan and committed results
	$(PYTHON) -m lars tables
	$(PYTHON) recipes/study/summary.py

chaos: $(SETUP)  ## one run interrupted 84 times in every way, against an undisturbed one; the log is committed
	$(call LOGGED,$(PYTHON) tests/chaos.py,tests/chaos.log)

slurm: $(SETUP)  ## a job stopped by its time limit, requeued and resumed by real daemons (root, slurm-wlm, munge); the log is committed
	$(call LOGGED,$(PYTHON) -m pytest tests/distributed/test_slurm.py -vv -rs -s --no-header,tests/slurm.log)

fuzz: $(SETUP)  ## broken recipes, run folders, data and images at random for MINUTES=30; the log is committed
	$(call LOGGED,$(PYTHON) -m tests.hostile.fuzz --minutes $(or $(MINUTES),30),tests/fuzz.log)

reverts: $(SETUP)  ## takes each mend back alone and sees its test fail, an hour, goes on where it stopped; the log is committed
	$(PYTHON) -m tests.hostile.reverts

bench: $(SETUP)  ## benchmarks, ratios to the usual way in the same run; results are committed
	$(PYTHON) -m pip install --quiet -e .[bench]
	set -e; for name in reduction optimizer_step memory order loader resize portable content plan step end_to_end; do \
	    $(PYTHON) -m tests.benchmarks.$$name --json > tests/benchmarks/$$name.json; done
	[ "$$(id -u)" != 0 ] || $(PYTHON) -m tests.benchmarks.wire --json > tests/benchmarks/wire.json
	$(PYTHON) -m tests.benchmarks.page
