# One environment in .venv serves every target; it is made on first use and again when what it is made from changes.

PYTHON ?= python3
EXTRAS ?= test
PY := .venv/bin/python
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
MINUTES ?= 30
DEMO := build/demo
DIGITS := build/digits
DEMO_NETWORK := --alpha 0.35 --resize 32 --preprocessing torchvision --data_url $(DIGITS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all sanitize aot bench-static lint bench report tune gpu clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' Makefile | while IFS='	' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: .venv/.ready ## make .venv with pinned dependencies and the project installed editable

.venv/.ready: pyproject.toml setup.py .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python >= 3.11 is needed, $(PYTHON) is not: name another with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "make: $(PYTHON) lacks venv (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c .ci/constraints.txt setuptools
	$(PY) -m pip install -q -c .ci/constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# One thread a process: the network is small, and threads that wait for each other on a busy machine take ten times longer.
demo: export OMP_NUM_THREADS = 1
demo: setup ## train on the embedded digits and evaluate with one process and with two
	$(PY) -m mnv2.digits $(DIGITS)
	@rm -rf $(DEMO)
	$(PY) train.py $(DEMO_NETWORK) --epoch_size 30 --max_lr 0.05 --warmup_epochs 5 --crop_scale 0.75 0.75 --crop_ratio 1 1 --hflip 0 --ckpt_save_dir $(DEMO)
	$(PY) validate.py $(DEMO_NETWORK) --pretrained $(DEMO)/last.pt > $(DEMO)/one.txt
	$(PY) -m torch.distributed.run --standalone --nproc_per_node 2 \
		validate.py $(DEMO_NETWORK) --pretrained $(DEMO)/last.pt > $(DEMO)/two.txt
	@echo; echo "One process:"; tail -n 4 $(DEMO)/one.txt; echo "Two processes:"; tail -n 4 $(DEMO)/two.txt
	@$(PY) .ci/check_demo.py $(DEMO)/one.txt $(DEMO)/two.txt

test: setup ## pass the tests
	$(PY) -m pytest tests $(PARALLEL)

test-all: setup ## pass the tests in every case: shapes, strides, paddings, types
	$(PY) -m pytest tests --all $(PARALLEL)

# ttsem declares other versions of torch and Triton than those that it is known to work with here.
.venv/.sanitizer: .venv/.ready
	$(PY) -m pip install -q --no-deps --ignore-requires-python ttsem==0.1.0
	@touch $@

sanitize: .venv/.sanitizer ## run the kernels in a sanitizer: races, accesses out of bounds, unwritten memory, bf16
	$(PY) -m pytest tests --sanitize $(PARALLEL)

aot: setup ## compile the kernels for five generations of GPUs: registers, spills, shared memory, bounds
	env -u TRITON_INTERPRET $(PY) -m bench.aot

bench-static: setup ## compare bytes, saved bytes, registers and instructions with those on record
	env -u TRITON_INTERPRET $(PY) -m bench.static

lint: setup ## style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

.venv/.bench: .venv/.ready
	$(PY) -m pip install -q -c .ci/constraints.txt --no-build-isolation -e '.[$(EXTRAS),bench]'
	@touch $@

bench: .venv/.bench ## the benchmarks, beside timm and transformers
	$(PY) -m pytest bench

report: setup ## the README's tables, and the plots, of bench/results
	$(PY) -m bench.report

tune: setup ## measure on this GPU which tiles and which paths are fastest
	$(PY) -m bench.tune

gpu: .venv/.bench ## everything that needs a GPU, in MINUTES=30; goes on where it stopped
	$(PY) -m bench.gpu --minutes $(MINUTES)

clean: ## remove what the other targets made
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
