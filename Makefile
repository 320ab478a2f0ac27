# A fresh machine needs Python 3.10 or newer, git and make. Each target sets up what it needs in .venv, once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUT ?= runs/quickstart
PIP = $(BIN)/python -m pip --disable-pip-version-check
export PYTHONUTF8 = 1

.PHONY: quickstart finetune test check docs fmt slow gpu bench clean

quickstart: $(VENV)/.demo  ## the whole chain on the demo pictures: OUT/report.html
	$(BIN)/mixmodal quickstart --out $(OUT)

finetune: $(VENV)/.demo  ## the quickstart's model tuned on edits, questions and captions: OUT/finetune.html
	$(BIN)/mixmodal quickstart --out $(OUT) --stage finetune

test: $(VENV)/.dev  ## the tests without slow and gpu ones
	$(BIN)/python -m pytest

slow: $(VENV)/.dev  ## the tests that take longer
	$(BIN)/python -m pytest -m "slow and not gpu"

gpu: $(VENV)/.dev  ## the tests and figures that need an accelerator
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "torch sees no GPU here: make bench measures what a CPU can" >&2; exit 1; }
	$(BIN)/python -m pytest -m gpu
	set -e; for shape in 350m 1b; do \
	  $(BIN)/python benchmarks/train_throughput.py compare --shape $$shape --precision bfloat16 --compile; done
	set -e; for shape in 1b 7b; do $(BIN)/python benchmarks/decode.py --shape $$shape --precision bfloat16 \
	  --peer_precision bfloat16 --batch_sizes 1 8 32 128 --cuda_graphs; \
	  $(BIN)/python benchmarks/decode.py --shape $$shape --precision bfloat16 --alone --batch_sizes 1 8; \
	  $(BIN)/python benchmarks/decode.py --shape $$shape --precision bfloat16 --alone --batch_sizes 1 8 \
	  --cuda_graphs --compile; done
	$(MAKE) bench

check: $(VENV)/.dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs  ## the documentation site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 PATH="$(BIN):$$PATH" $(BIN)/mkdocs build --strict

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## measures, takes the figures of OUT where a quickstart has been run, appends to benchmarks/results/, renders docs/results.md
	set -e; for script in benchmarks/measure_*.py; do $(BIN)/python $$script; done
	set -e; for mode in compare length; do $(BIN)/python benchmarks/train_throughput.py $$mode; done
	set -e; for shape in demo 100m; do $(BIN)/python benchmarks/decode.py --shape $$shape; done
	$(BIN)/python benchmarks/interruptions.py
	$(BIN)/python benchmarks/diffusion_classifier.py
	@if [ -f $(OUT)/summary.json ]; then $(BIN)/python benchmarks/record_quickstart.py $(OUT); \
	  else echo "$(OUT)/summary.json is missing: no figures of a quickstart are recorded; make quickstart makes it"; fi
	@if [ -f $(OUT)/finetune.json ]; then $(BIN)/python benchmarks/tuning.py --run $(OUT) --parts tasks; \
	  else echo "$(OUT)/finetune.json is missing: no figures of its tuning are recorded; make finetune makes it"; fi
	$(BIN)/python benchmarks/render.py

clean:
	rm -rf $(VENV) build dist *.egg-info

# The stamps make a second run skip the installation until the requirements change.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mixmodal[$*] into $(VENV): a few minutes the first time"
	$(PIP) install -c constraints.txt -e ".[$*]"
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is missing; install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) --version) is too old; install Python 3.10 or newer and run: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "$(PYTHON) can not make environments; on Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
